"""The recipes for whoever adds the next member, followed to the letter in a copy of the project.

A recipe stands where a newcomer looks. Each test here does what it says with a toy member, runs the suites that are
said to cover it in a process of its own, and sees that they did.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import save_file

import nm_jax

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(nm_jax.__file__).parent.parent


class Project:
    """A copy of the library and its tests, to be changed."""

    def __init__(self, folder, *parts):
        self.folder = folder
        for part in ("nm_jax", "tests", *parts):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def write(self, path, text):
        """A new file."""
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(textwrap.dedent(text))

    def insert(self, path, anchor, text):
        """A few lines before the only line that begins with `anchor`, indented as it is."""
        lines = (self.folder / path).read_text().splitlines(keepends=True)
        [place] = [k for k, line in enumerate(lines) if line.strip().startswith(anchor)]
        indent = re.match(" *", lines[place])[0]
        lines[place:place] = textwrap.indent(textwrap.dedent(text), indent)
        (self.folder / path).write_text("".join(lines))

    def test(self, keyword, *suites):
        """The names of the tests whose names hold the keyword; all of them pass."""
        command = [sys.executable, "-m", "pytest", "-n", "0", "-v", "-p", "no:cacheprovider", "-k", keyword, *suites]
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return re.findall(r"::(\S+) PASSED", run.stdout)


def test_a_solver(tmp_path):
    """The recipe in `nm_jax/solvers/base.py`."""
    project = Project(tmp_path)
    project.write(
        "nm_jax/solvers/toy.py",
        '''
        """The larger of every two, by one comparison."""

        import dataclasses

        import jax.numpy as jnp

        from nm_jax._core.patterns import NM
        from nm_jax.solvers.base import Solver, order_key


        @dataclasses.dataclass(frozen=True)
        class Toy(Solver):
            """Keeps the larger of two scores."""

            def supports(self, pattern):
                return pattern == NM(1, 2)

            def solve(self, scores, pattern):
                first, second = order_key(scores)
                return jnp.stack([first >= second, first < second]), None
        ''',
    )
    project.insert("nm_jax/solvers/menu.py", "from nm_jax.solvers.topk", "from nm_jax.solvers.toy import Toy\n")
    project.insert("nm_jax/solvers/menu.py", "Greedy(),", "Toy(),\n")
    passed = project.test("Toy", "tests/solvers/test_contract.py")
    for promise in ("feasible", "brute_force", "nan", "jit_and_vmap", "padding", "half_precision", "static"):
        assert any(promise in name for name in passed), promise


def test_a_pattern(tmp_path):
    """The recipe in the docstring of `Pattern`."""
    project = Project(tmp_path)
    project.insert(
        "nm_jax/_core/patterns.py",
        "_PATTERNS:",
        '''
        @dataclasses.dataclass(frozen=True)
        class Toy(Pattern):
            """One of the two diagonals of every 2 x 2 block is kept."""

            tile = (2, 2)
            density = 0.5

            def allows(self, kept):
                return ~((kept[0, 0] | kept[1, 1]) & (kept[0, 1] | kept[1, 0]))

            def full(self, kept):
                return self.allows(kept) & (jnp.sum(kept, axis=(0, 1)) == 2)

            def __str__(self):
                return "toy"


        ''',
    )
    project.insert("tests/helpers.py", "NM(1, 2),", "Toy(),\n")
    project.insert(
        "tests/helpers.py",
        "from nm_jax import NM, SequentialNM, TransposableNM, Unstructured",
        "from nm_jax._core.patterns import Toy\n",
    )
    passed = project.test("toy", "tests/solvers/test_contract.py", "tests/core")
    for promise in ("feasible", "brute_force", "nan", "jit_and_vmap", "padding", "listed_masks", "promises"):
        assert any(promise in name and "toy" in name for name in passed), promise


def test_a_matmul_implementation(tmp_path):
    """The recipe in `nm_jax/matmul/menu.py`."""
    project = Project(tmp_path, "experiments")
    path = "nm_jax/matmul/toy.py"
    project.write(
        path,
        '''
        """A product of one row of A at a time."""

        import jax.numpy as jnp

        from nm_jax.matmul._compress import to_dense


        def supports(product, device):
            del device
            return None if product.dtype == jnp.bfloat16 else "it was made for bfloat16"


        def product(a, x):
            rows = [jnp.sum(x.astype(jnp.float32) * row[None], axis=-1) for row in to_dense(a).astype(jnp.float32)]
            return jnp.stack(rows, axis=-1).astype(x.dtype)
        ''',
    )
    project.insert("nm_jax/matmul/menu.py", "from nm_jax.matmul import ampere", "from nm_jax.matmul import toy\n")
    toy = 'Implementation("toy", toy.supports, toy.product, is_kernel=False),\n'
    project.insert("nm_jax/matmul/menu.py", 'Implementation("reference"', toy)
    passed = project.test("toy", "tests/matmul/test_contract.py")
    for promise in ("weight_gradient", "36_pairs", "poison", "infinity", "vmapped"):
        assert any(promise in name for name in passed), promise
    project.insert(path, "return jnp.stack", "rows[0] += 1\n")
    with pytest.raises(AssertionError, match="test_forward_input_gradient"):
        project.test("toy", "tests/matmul/test_contract.py")


def test_a_score(tmp_path):
    """The recipe in `nm_jax/_reconstruct/scores.py`."""
    project = Project(tmp_path)
    project.insert(
        "nm_jax/_reconstruct/scores.py",
        "# Those that the contract suite covers.",
        '''
        def toy(w, gram):
            """The magnitude of a weight times the norm of its input."""
            layer = LayerMatrices.of(w, gram)

            def measure(w, gram):
                norms = jnp.sqrt(jnp.diagonal(InputMoments.of(gram).h, axis1=1, axis2=2))
                return layer.join(jnp.abs(layer.split(w.astype(jnp.float32))) * norms[:, :, None])

            return partitioned(measure, spec(w), w, gram)


        ''',
    )
    project.insert("nm_jax/_reconstruct/scores.py", "wanda,", "toy,\n")
    passed = project.test("toy", "tests/reconstruct/test_scores.py")
    for promise in ("finite", "every_layout", "jit_and_vmap", "sharded", "go_where_scores_go", "does_not_fit"):
        assert any(promise in name for name in passed), promise


def test_a_command(tmp_path):
    """The recipe in `nm_jax/cli/__init__.py`."""
    project = Project(tmp_path)
    project.write(
        "nm_jax/cli/count.py",
        '''
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
        ''',
    )
    project.insert("nm_jax/cli/_app.py", '"diversity",', '"count",\n')
    assert project.test("count", "tests/cli/test_loading.py") == ["test_help_of_every_command[count]"]
    save_file({"a": np.ones(2), "b": np.ones(3)}, tmp_path / "model")
    command = [sys.executable, "-m", "nm_jax.cli", "count", "model"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout == b"2\n"
