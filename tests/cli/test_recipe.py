"""To add a command, as `nm_jax.cli` says it: followed literally, in a copy of the package."""

import os
import pathlib
import shutil
import subprocess
import sys

import nm_jax
from nm_jax import cli

COMMAND = '''
"""`nm-jax count`."""

import click

from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import nm
from nm_jax.cli._output import echo


@click.command("count")
@click.argument("file", type=options.PATH)
def command(file) -> int:
    """Count the tensors of checkpoint FILE."""
    echo(str(len(nm.Checkpoint(file).tensors)))
    return exits.DONE
'''


def test_the_recipe_for_a_command(model, tmp_path):
    recipe = cli.__doc__
    assert "write `nm_jax/cli/NAME.py`" in recipe
    assert 'add `"NAME"` to `COMMANDS` in `nm_jax/cli/_app.py`' in recipe
    package = tmp_path / "nm_jax"
    shutil.copytree(pathlib.Path(nm_jax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "cli" / "count.py").write_text(COMMAND)
    app = package / "cli" / "_app.py"
    before = app.read_text()
    app.write_text(before.replace('COMMANDS = ("prune", ', 'COMMANDS = ("count", "prune", '))
    assert app.read_text() != before

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "nm_jax.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "\n  count       Count the tensors of checkpoint FILE.\n" in run("--help")
    assert run("count", model) == "5\n"
