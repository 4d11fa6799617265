"""The command line `nm-jax`. It needs the packages of the extra `nm_jax[cli]`.

To add a command `NAME`

1. write `nm_jax/cli/NAME.py` with a `click.command` that is called `command`; it returns its exit code (`_exits`);
2. add `"NAME"` to `COMMANDS` in `nm_jax/cli/_app.py`.

Options that several commands have are in `_options`, everything that prints in `_output`. A command's own file is
loaded for help and for completion, which must not wait for JAX: it takes the library through `_late`.
"""

import sys

try:
    from nm_jax.cli._app import main as main
except ModuleNotFoundError as error:
    if error.name not in ("click", "rich"):
        raise
    _missing = error.name

    def main() -> int:
        """Says what to install."""
        print(f"nm-jax: {_missing} is not installed; pip install 'nm_jax[cli]'", file=sys.stderr)
        return 2
