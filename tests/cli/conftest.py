"""A checkpoint, and a way to run commands."""

import pytest

from nm_jax.cli import main
from tests.cli.cases import write_model


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors")


@pytest.fixture
def run(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
