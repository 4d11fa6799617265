"""Solving many matrices slab by slab gives what solving each at once gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax import TransposableNM, parse_pattern
from nm_jax._core.axes import Tiling
from nm_jax.solvers import Exact, Greedy, default_solver, solve_matrices
from nm_jax.solvers import _slabs as slabs

PATTERN = TransposableNM(2, 4)
LEAVES = {
    "tall": ((96, 16), "io"),
    "not a multiple of a slab": ((76, 20), "io"),
    "transposed": ((40, 64), "oi"),
    "experts": ((3, 32, 24), "bio"),
    "convolution": ((3, 3, 8, 32), "bbio"),
    "small": ((8, 8), "io"),
    "as small": ((4, 12), "io"),
    "ragged": ((10, 15), "io"),
    "ragged and large": ((50, 63), "io"),
}


def make(names, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(names))
    scores = [jax.random.normal(key, LEAVES[name][0]) for key, name in zip(keys, names, strict=True)]
    tilings = [Tiling(*LEAVES[name], 4, 4) for name in names]
    return scores, tilings


@pytest.mark.parametrize("entries", [pytest.param(64, marks=pytest.mark.slow), 500, 1 << 21])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(tuple(LEAVES), marks=pytest.mark.slow),
        ("tall",),
        ("small",),
        pytest.param(("ragged",), marks=pytest.mark.slow),
        ("tall", "small"),
        pytest.param(("experts", "transposed"), marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_slabs_give_the_masks_of_each_matrix_alone(monkeypatch, entries, names):
    monkeypatch.setattr(slabs, "_SLAB_ENTRIES", entries)
    scores, tilings = make(names)
    found = jax.jit(lambda s: solve_matrices(s, tilings, PATTERN, Greedy(), jnp.abs))(scores)
    for score, tiling, result in zip(scores, tilings, found, strict=True):
        alone = Greedy()(tiling.split(jnp.abs(score)), PATTERN, tiling.valid())
        np.testing.assert_array_equal(result.mask, tiling.join(alone.mask))
        assert result.mask.shape == score.shape
        assert float(result.proof.scale) == pytest.approx(float(jnp.abs(score)[result.mask].sum()), rel=1e-5)
        assert float(result.nan) == 0
        assert not result.proof.proved  # Greedy proves nothing


def test_totals_count_every_tile_once(monkeypatch):
    monkeypatch.setattr(slabs, "_SLAB_ENTRIES", 500)
    names = ("not a multiple of a slab", "small")
    scores, tilings = make(names)
    scores[0] = scores[0].at[75, 0].set(jnp.nan).at[70, 3].set(jnp.nan)
    large, small = jax.jit(lambda s: solve_matrices(s, tilings, PATTERN, Exact()))(scores)
    assert (float(large.nan), float(small.nan)) == (2, 0)
    assert all(result.proof.proved and result.proof.gap == 0 for result in (large, small))


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_temporary_memory_is_below_the_weights(layout):
    shapes = [(4096, 4096), (2048, 8192), (512, 512)]
    tilings = [Tiling(shape, layout, 8, 8) for shape in shapes]

    def solve(weights):
        return [s.mask for s in solve_matrices(weights, tilings, TransposableNM(4, 8), Exact(), jnp.abs)]

    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(solve).lower(arguments).compile()
    weights = sum(4 * rows * cols for rows, cols in shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < (1.5 if layout == "io" else 2.5) * weights


def test_one_solver_is_compiled_for_all_leaves():
    """The compiled program grows by the reading and writing of a leaf, not by another solver."""
    shapes = [(256 + 8 * k, 256) for k in range(12)]

    def size(count):
        tilings = [Tiling(shape, "io", 4, 4) for shape in shapes[:count]]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:count]]
        lowered = jax.jit(lambda w: [s.mask for s in solve_matrices(w, tilings, PATTERN, Exact())]).lower(arguments)
        return len(lowered.as_text())

    assert size(12) < 1.5 * size(1)


@pytest.mark.parametrize("name", ["2:4", "3:4-S"])
@pytest.mark.parametrize("leaf", [name for name in LEAVES if "ragged" not in name])
def test_tiles_of_one_column_in_place(monkeypatch, name, leaf):
    pattern = parse_pattern(name)
    scores, tiling = jax.random.normal(jax.random.key(1), LEAVES[leaf][0]), Tiling(*LEAVES[leaf], 4, 1)
    scores = scores.reshape(-1).at[7].set(jnp.nan).reshape(scores.shape)
    (expected,) = solve_matrices([scores], [tiling], pattern, default_solver(pattern), jnp.abs)
    monkeypatch.setattr(slabs, "_SLAB_ENTRIES", 40)
    (found,) = jax.jit(lambda s: solve_matrices([s], [tiling], pattern, default_solver(pattern), jnp.abs))(scores)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert float(found.nan) == float(expected.nan) == 1
    np.testing.assert_allclose(found.proof, expected.proof, rtol=1e-6)


@pytest.mark.parametrize(("name", "share"), [("2:4", 0.5), ("4:8-S", 0.5), ("2:4-T", 0.5), ("US-0.5", 2.1)])
def test_temporary_memory(name, share):
    """As the docstring says, relative to the weights."""
    pattern = parse_pattern(name)
    tiling = Tiling.of((4096, 4096), "io", pattern)
    solver = default_solver(pattern)
    run = jax.jit(lambda w: solve_matrices([w], [tiling], pattern, solver, jnp.abs)[0].mask)
    compiled = run.lower(jax.ShapeDtypeStruct((4096, 4096), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < share * 4 * 4096**2
