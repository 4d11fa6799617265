"""Tiles that lie in a matrix only in part: the best mask that hardware can run, by brute force."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import solvers
from tests.helpers import PROVING, tiles


@functools.cache
def allowed(name):
    """Everything that a tile may keep at most, (count, rows, cols): counts and windows in NumPy."""
    pattern = nm.parse_pattern(name)
    rows, cols = pattern.tile
    every = np.array(list(itertools.product([False, True], repeat=rows * cols))).reshape(-1, rows, cols)
    if isinstance(pattern, nm.SequentialNM):
        free = [~every[:, k : k + rows - pattern.n].any((1, 2)) for k in range(pattern.n + 1)]
        return every[np.any(free, axis=0)]
    fits = (every.sum(1) <= pattern.n).all(1)
    return every[fits & (every.sum(2) <= pattern.n).all(1)] if cols > 1 else every[fits]


def best(scores, name):
    """The most that the edge tiles of a matrix can keep."""
    pattern = nm.parse_pattern(name)
    rows, cols = pattern.tile
    room = (0, -scores.shape[0] % rows), (0, -scores.shape[1] % cols)
    padded, there = np.pad(np.asarray(scores, np.float64), room), np.pad(np.ones(scores.shape, bool), room)
    total = 0.0
    for tile, shown in zip(tiles(padded, rows, cols), tiles(there, rows, cols), strict=True):
        if not shown.all():
            total += (allowed(name) * np.where(shown, tile, 0)).sum((1, 2)).max()
    return total


def kept_at_edges(mask, scores, name):
    rows, cols = nm.parse_pattern(name).tile
    whole = np.zeros(scores.shape, bool)
    whole[: scores.shape[0] // rows * rows, : scores.shape[1] // cols * cols] = True
    return np.asarray(scores, np.float64)[np.asarray(mask) & ~whole].sum()


CASES = [
    ("2:4-T", (3, 3)),
    ("2:4-T", (10, 9)),
    ("2:4-T-at-most", (7, 6)),
    ("1:3-T", (5, 4)),
    ("2:4", (7, 3)),
    ("2:4-S", (7, 5)),
    ("3:8-S", (13, 4)),
]
PAIRS = [
    (solver, name, shape)
    for name, shape in CASES
    for solver in solvers.MENU
    if solver.supports(nm.parse_pattern(name)) and not isinstance(solver, solvers.Greedy)
]


@pytest.mark.parametrize(("solver", "name", "shape"), PAIRS, ids=str)
def test_edges_keep_all_they_can(solver, name, shape):
    rng = np.random.default_rng(0)
    for make in (rng.normal, lambda size: np.abs(rng.normal(size=size)), lambda size: rng.integers(0, 3, size)):
        scores = make(size=shape).astype(np.float32)
        masks, report = nm.compute_masks(
            {"w": jnp.asarray(scores)},
            [("w", name, "io")],
            scores=lambda w: w,
            solver=solver,
            partial="pad",
            return_report=True,
        )
        assert report.ok
        assert kept_at_edges(masks["w"], scores, name) == pytest.approx(best(scores, name), rel=1e-6, abs=1e-6)
        assert bool(report["w"].proof.proved) == isinstance(solver, PROVING)


def test_zeros_may_be_padding():
    """The two zeros of 2:4-S are the last entry and the padding after it."""
    mask = nm.solve(jnp.array([[2.0], [2.0], [3.0]]), "2:4-S", partial="pad")
    np.testing.assert_array_equal(mask[:, 0], [True, True, False])


def test_a_solver_that_knows_no_edges_claims_no_proof():
    class Plain(solvers.Exact):
        def supports(self, pattern):
            return super().supports(pattern) and not pattern.at_most  # nothing relaxed

    scores = jnp.ones((4, 4, 2))
    valid = jnp.ones((4, 4, 2), bool).at[3, :, 1].set(False)
    solution = Plain()(scores, nm.TransposableNM(2, 4), valid)
    np.testing.assert_array_equal(solution.proof.proved, [True, False])
    assert not solution.mask[3, :, 1].any()


def test_edges_of_large_matrices_beside_small_ones():
    """In slabs, where a matrix that whole tiles fit shares the loop with one that they do not."""
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=(10, 9)), "b": rng.normal(size=(1024, 1024))}
    params = {name: jnp.asarray(np.abs(value), jnp.float32) for name, value in params.items()}
    masks = nm.compute_masks(params, [("", "2:4-T", "io")], partial="pad")
    np.testing.assert_array_equal(masks["b"], nm.solve(params["b"], "2:4-T"))
    edges = kept_at_edges(masks["a"], params["a"], "2:4-T")
    assert edges == pytest.approx(best(params["a"], "2:4-T"), rel=1e-6)
