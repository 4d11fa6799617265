"""The recipe of `nm_jax/matmul/menu.py`, followed to the letter with a toy."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINE = '    Implementation("toy", toy.supports, toy.product, is_kernel=False),\n'
TOY = '''"""A product of one row of A at a time."""

import jax.numpy as jnp

from nm_jax.matmul._compress import to_dense


def supports(product, device):
    del device
    return None if product.dtype == jnp.bfloat16 else "it was made for bfloat16"


def product(a, x):
    rows = [jnp.sum(x.astype(jnp.float32) * row[None], axis=-1) for row in to_dense(a).astype(jnp.float32)]
    return jnp.stack(rows, axis=-1).astype(x.dtype){fault}
'''


def with_a_toy(folder, fault):
    """The outcome of the contract suite, of the toy alone, in a copy of the project that has it."""
    for part in ("nm_jax", "tests", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "nm_jax/matmul/toy.py").write_text(TOY.format(fault=fault))
    menu = folder / "nm_jax/matmul/menu.py"
    before, opening, after = menu.read_text().partition("IMPLEMENTATIONS: tuple[Implementation, ...] = (\n")
    imported = before.replace("import ampere, hopper, reference", "import ampere, hopper, reference, toy")
    assert opening and imported != before
    menu.write_text(imported + opening + LINE + after)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "toy", "tests/matmul/test_contract.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(("fault", "works"), [("", True), (" + 1", False)], ids=["right", "wrong"])
def test_a_toy_is_covered_by_the_contract_suite(tmp_path, fault, works):
    done = with_a_toy(tmp_path, fault)
    assert (done.returncode == 0) == works, done.stdout
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    assert sum(counts.values()) >= 5  # product and gradients, pairs of patterns, poison, infinity, packed and vmapped
    assert ("failed" not in counts) if works else counts["failed"] >= 3
