"""The public names, and what loading them costs."""

import importlib.util
import json
import pkgutil
import subprocess
import sys

import pytest

import nm_jax as nm

# Removing a name breaks somebody's program: the changelog must say so.
NAMES = [
    "ChannelGroup",
    "Checkpoint",
    "CheckpointReport",
    "Conversion",
    "Decay",
    "FormatError",
    "GradientDecay",
    "Gram",
    "LeafReport",
    "LeafTrace",
    "NM",
    "PackedWeight",
    "Pattern",
    "Permutation",
    "PermuteReport",
    "PermutedLayer",
    "Plan",
    "PlannedLeaf",
    "PruneReport",
    "PrunedLayer",
    "Reconstruction",
    "RefreshStats",
    "Report",
    "SequentialNM",
    "SparseTrainingState",
    "StepDecay",
    "Trace",
    "TransposableNM",
    "Unstructured",
    "Use",
    "Violations",
    "absorb_mean",
    "adaprune",
    "apply_masks",
    "attach",
    "choose_decay",
    "choose_patterns",
    "compute_masks",
    "conv_general_dilated",
    "convert",
    "dense_params",
    "dot_general",
    "einsum",
    "find_permutation",
    "fit_blocks",
    "fit_masks",
    "gram",
    "load_checkpoint",
    "mask_diversity",
    "masks",
    "matmul",
    "nm_matmul",
    "obc",
    "output_error",
    "pack",
    "pack_params",
    "parse_pattern",
    "pattern_violations",
    "permute",
    "plan",
    "prune_checkpoint",
    "recipes",
    "reconstruct",
    "reconstruct_layers",
    "refine_mask",
    "refine_masks",
    "refresh_stats",
    "repack",
    "s_ste",
    "s_ste_scale",
    "save_checkpoint",
    "save_scores",
    "score_tree",
    "solve",
    "solvers",
    "sparse_params",
    "sparse_training",
    "sr_ste",
    "sr_ste_term",
    "ste",
    "trace",
    "tune_batch_norm",
    "unpack",
    "verify",
    "verify_checkpoint",
    "violation_probability",
    "wanda",
    "with_params",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name):
    assert getattr(nm, name) is not None
    assert name in dir(nm)


def test_no_name_shadows_a_module():
    for name in dir(nm):
        found = importlib.util.find_spec(f"nm_jax.{name}")
        assert (found is not None) == (name in ("matmul", "recipes", "solvers")), name


def test_modules_that_are_not_public_have_private_names():
    folders = {module.name for module in pkgutil.iter_modules(nm.__path__) if not module.name.startswith("_")}
    assert folders == {"checkpoint", "cli", "matmul", "recipes", "solvers"}


def modules_after(program):
    """The modules that a program has loaded in a process of its own."""
    listed = program + "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_library_loads_nothing_heavy():
    assert not {"jax", "numpy", "optax", "scipy"} & modules_after("import nm_jax")


def test_solvers_on_the_host_load_scipy_when_they_solve():
    program = "import jax.numpy as jnp, nm_jax as nm; nm.solve(jnp.ones((4, 4)), '2:4-T', {})"
    assert "scipy.optimize._lsap" not in modules_after(program.format(None))
    assert "scipy.optimize._lsap" in modules_after(program.format("nm.solvers.MinCostFlow()"))


HEAVY = (
    "scipy.optimize",
    "scipy.sparse",
    "jax.experimental.pallas",
    "jax.experimental.mosaic",
    "click",
    "rich",
)


@pytest.mark.parametrize(
    "use",
    [
        'nm.sparse_training(optax.adamw(3e-4), "2:4-T")',
        'nm.compute_masks({"kernel": jax.numpy.ones((8, 8))}, "2:4")',
        'nm.solve(jax.numpy.ones((8, 8)), "4:8-T")',
        "nm.plan, nm.gram, nm.convert, nm.nm_matmul, nm.dot_general, nm.solvers.MinCostFlow",
    ],
)
def test_kernels_and_scipy_are_loaded_when_they_are_used(use):
    before = modules_after("import jax, optax, jax.numpy")
    added = modules_after(f"import jax, optax\nimport nm_jax as nm\n{use}") - before
    heavy = {name for name in added for prefix in HEAVY if name == prefix or name.startswith(prefix + ".")}
    assert not heavy
