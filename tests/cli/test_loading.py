"""What starts in a moment: help, version and completion do not wait for JAX."""

import json
import os
import subprocess
import sys

import pytest

from nm_jax.cli._app import COMMANDS

SCRIPT = """
import json, sys
from nm_jax.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as done:
    code = done.code
loaded = [name for name in ("jax", "jaxlib", "numpy", "optax", "scipy") if name in sys.modules]
print(json.dumps([code, loaded]), file=sys.stderr)
"""


def run(*arguments, **environment):
    """(stdout, exit code, heavy modules that were loaded) in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, code, loaded


def test_version():
    out, code, loaded = run("--version")
    assert (code, loaded) == (0, [])
    assert out.startswith("nm-jax ")


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["alone", "help"])
def test_help_lists_the_commands(arguments):
    out, code, loaded = run(*arguments)
    assert (code, loaded) == (0, [])
    assert out.startswith("Usage: nm-jax")
    assert out.count("\n") > len(COMMANDS)
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name):
    out, code, loaded = run(name, "--help")
    assert (code, loaded) == (0, [])
    assert out.startswith(f"Usage: nm-jax {name} ")


@pytest.mark.parametrize(("words", "expected"), [("nm-jax pr", "prune"), ("nm-jax prune --pa", "--pattern")])
def test_completion(words, expected):
    count = len(words.split()) - 1
    out, _, loaded = run(_NM_JAX_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(count))
    assert loaded == []
    assert expected in out
