"""The command line `nm-jax`. It needs the packages of the extra `nm_jax[cli]`."""

import sys

try:
    from nm_jax.cli.commands import main as main
except ModuleNotFoundError as error:
    if error.name not in ("click", "rich"):
        raise
    _missing = error.name

    def main() -> int:
        """Says what to install."""
        print(f"nm-jax: {_missing} is not installed; pip install 'nm_jax[cli]'", file=sys.stderr)
        return 2
