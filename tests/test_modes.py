"""The public API under the configurations of JAX that people debug and compute with."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import nm_jax as nm
from tests.modes_smoke import MODES

ROOT = pathlib.Path(__file__).parents[1]
# One device, and programs that compile fast.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_section_runs(mode):
    python = [sys.executable, *["-OO"] * (mode == "optimised"), "-W", "error"]
    command = [*python, "-m", "tests.modes_smoke", mode]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Classes whose instances functions of the smoke test return, and what has its own tests of modes.
RETURNED = {
    "BlockReport", "ChannelGroup", "Checkpoint", "CheckpointReport", "Conversion", "ConversionStep", "FittedBlock",
    "LeafReport", "LeafTrace", "PackedWeight", "Permutation", "PermuteReport", "PermutedLayer", "PlannedLeaf",
    "PruneReport", "PrunedLayer", "Reconstruction", "RefineReport", "RefinedLayer", "RefinedMask", "RefreshStats",
    "Report", "SparseTrainingState", "Trace", "Use", "Violations",
}  # fmt: skip
CONSTANT = {"__version__", "Decay", "FormatError", "Pattern", "matmul"}  # nothing that a mode could change


def test_every_public_name_is_in_the_smoke_test():
    tree = ast.parse((ROOT / "tests" / "modes_smoke.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nm"
    }
    assert set(nm.__all__) - RETURNED - CONSTANT == used & set(nm.__all__) - RETURNED - CONSTANT
    assert not (RETURNED | CONSTANT) - set(nm.__all__) - {"__version__"}
