"""The public API under the configurations of JAX that people debug and compute with."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.modes_smoke import MODES

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
# One device, and programs that compile fast.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.parametrize("mode", MODES)
def test_every_section_runs(mode):
    command = [sys.executable, "-W", "error", "-m", "tests.modes_smoke", mode]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
