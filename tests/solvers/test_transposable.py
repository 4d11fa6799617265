"""Solvers of transposable masks against each other, against enumeration and against golden optima."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax import TransposableNM, solvers
from nm_jax.solvers import Greedy, IntegerProgram, MinCostFlow
from tests.helpers import SCORES, algorithm_1, reference_blocks

GOLDEN = pathlib.Path(__file__).parent / "golden_blocks.json"


def objectives(blocks, solver, pattern):
    """Sums of kept scores in float64, one per block; blocks are (count, m, m)."""
    blocks = np.asarray(blocks)
    mask = np.asarray(solver(jnp.asarray(np.moveaxis(blocks, 0, -1)), pattern).mask)
    return np.where(np.moveaxis(mask, -1, 0), blocks.astype(np.float64), 0).sum((1, 2))


@functools.cache
def golden_blocks(n, m, count=40):
    """Integer-valued blocks, so that optima are exact integers, of several kinds."""
    rng = np.random.default_rng(1000 * n + m)
    kinds = [
        rng.integers(0, 1000, (count, m, m)),
        rng.integers(-500, 500, (count, m, m)),
        rng.integers(0, 3, (count, m, m)),
    ]
    return np.concatenate(kinds).astype(np.float32)


CASES = [
    *[(1, 2), (1, 4), (2, 4), (3, 4), (4, 8)],
    *[pytest.param(n, m, marks=pytest.mark.slow) for n, m in ((2, 6), (2, 8), (6, 8))],
]


@pytest.mark.parametrize("at_most", [False, True], ids=["exactly", "at_most"])
@pytest.mark.parametrize(("n", "m"), CASES)
def test_golden_blocks(n, m, at_most):
    """The optima in the file were found by MinCostFlow and confirmed by IntegerProgram when they were written."""
    golden = json.loads(GOLDEN.read_text())[f"{n}:{m}{'-at-most' if at_most else ''}"]
    pattern = TransposableNM(n, m, at_most)
    found = objectives(golden_blocks(n, m), solvers.default_solver(pattern), pattern)
    if not isinstance(solvers.default_solver(pattern), Greedy):
        np.testing.assert_array_equal(found, golden)
    np.testing.assert_array_equal(objectives(golden_blocks(n, m), MinCostFlow(), pattern), golden)


@pytest.mark.parametrize("at_most", [False, True], ids=["exactly", "at_most"])
@pytest.mark.parametrize(("n", "m"), CASES)
def test_golden_blocks_by_integer_program(n, m, at_most):
    golden = json.loads(GOLDEN.read_text())[f"{n}:{m}{'-at-most' if at_most else ''}"]
    every = slice(None, None, 4)
    found = objectives(golden_blocks(n, m)[every], IntegerProgram(), TransposableNM(n, m, at_most))
    np.testing.assert_array_equal(found, golden[every])


@pytest.mark.parametrize("key", ["2of4", "4of8"])
@pytest.mark.parametrize("at_most", [False, True], ids=["exactly", "at_most"])
@pytest.mark.parametrize("solver", [MinCostFlow(), IntegerProgram()], ids=["flow", "integer"])
def test_reference_optima_on_real_blocks(key, at_most, solver):
    """All 480 blocks. Blocks are weights; the optima are of their magnitudes."""
    data = reference_blocks()
    blocks = np.abs(data[f"{key}/blocks"])
    assert len(blocks) == 240
    n, m = map(int, key.split("of"))
    found = objectives(blocks, solver, TransposableNM(n, m, at_most))
    np.testing.assert_allclose(found, data[f"{key}/{'le_opt' if at_most else 'opt'}_value"], rtol=1e-6)


def test_flow_and_integer_program_agree_on_every_kind_of_scores():
    rng = np.random.default_rng(0)
    for name in ("gaussian", "heavy_tailed", "signed", "negative", "ties", "mostly_zero", "constant", "one_huge"):
        for at_most in (False, True):
            pattern = TransposableNM(3, 8, at_most)
            blocks = np.asarray(SCORES[name](rng, (4, 8, 8)), np.float32)
            flow, integer = (objectives(blocks, s, pattern) for s in (MinCostFlow(), IntegerProgram()))
            np.testing.assert_allclose(flow, integer, rtol=1e-5, atol=1e-5, err_msg=name)


def test_at_most_is_never_worse_than_exactly_and_sometimes_better():
    rng = np.random.default_rng(1)
    blocks = np.abs(rng.normal(size=(300, 4, 4))).astype(np.float32)
    exactly, at_most = (objectives(blocks, MinCostFlow(), TransposableNM(2, 4, a)) for a in (False, True))
    assert (at_most >= exactly - 1e-6).all()
    assert 0 < (at_most > exactly + 1e-6).mean() < 0.2


# ------------------------------------------------------------------------------------------------ the approximation


def greedy(blocks, n, complete):
    m = blocks.shape[-1]
    mask = Greedy(complete=complete)(jnp.asarray(np.moveaxis(blocks, 0, -1)), TransposableNM(n, m)).mask
    return np.moveaxis(np.asarray(mask), -1, 0)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (6, 8), (8, 16)])
def test_greedy_is_algorithm_1_bit_for_bit(n, m):
    rng = np.random.default_rng(n * 100 + m)
    for name in SCORES:
        blocks = np.asarray(SCORES[name](rng, (12, m, m)), np.float32)
        finite = np.clip(blocks, np.finfo(np.float32).min, np.finfo(np.float32).max)
        literal = np.stack([algorithm_1(block, m - n) for block in finite])
        np.testing.assert_array_equal(greedy(blocks, n, complete=False), literal, err_msg=name)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_greedy_prunes_at_most_twice_the_optimum(n, m):
    rng = np.random.default_rng(2)
    for name in ("gaussian", "heavy_tailed", "ties", "mostly_zero", "binary"):
        blocks = np.asarray(SCORES[name](rng, (25, m, m)), np.float32)
        total = blocks.astype(np.float64).sum((1, 2))
        pruned = total - np.where(greedy(blocks, n, complete=False), blocks.astype(np.float64), 0).sum((1, 2))
        optimal = total - objectives(blocks, MinCostFlow(), TransposableNM(n, m))
        assert (pruned <= 2 * optimal + 1e-5 * total).all(), name
        if name == "gaussian":
            assert 1.1 < (pruned / optimal).mean() < 1.3  # "about 1.2" in the paper


@pytest.mark.parametrize("m", [4, 8, 16])
def test_greedy_attains_the_tight_example(m):
    """Fig. A.1: one pruned per row; the last row and column are as light as the diagonal, and come first."""
    block = np.full((m, m), 100.0, np.float32)
    np.fill_diagonal(block, 1.0)
    block[m - 1, :] = block[:, m - 1] = 1 - 1e-4
    block[m - 1, m - 1] = 1 - 2e-4
    kept = greedy(block[None], m - 1, complete=False)[0]
    optimal = block.sum() - objectives(block[None], MinCostFlow(), TransposableNM(m - 1, m))[0]
    assert optimal == pytest.approx(m, rel=1e-3)
    assert block[~kept].sum() / optimal == pytest.approx((2 * m - 1) / m, rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (2, 8), (8, 16)])
def test_completion_only_adds_weight(n, m):
    rng = np.random.default_rng(3)
    blocks = np.abs(rng.normal(size=(50, m, m))).astype(np.float32)
    before, after = (np.where(greedy(blocks, n, c), blocks, 0).sum((1, 2)) for c in (False, True))
    best = objectives(blocks, MinCostFlow(), TransposableNM(n, m))
    assert (after >= before - 1e-5).all()
    assert (after <= best + 1e-4).all()
    assert after.mean() > 0.994 * best.mean()


@pytest.mark.parametrize("at_most", [False, True], ids=["exactly", "at_most"])
def test_no_swap_improves_a_completed_mask(at_most):
    """Two kept entries out, for the two others where their rows and columns meet: against every choice of four."""
    m, pattern = 6, TransposableNM(3, 6, at_most)
    blocks = np.random.default_rng(5).normal(size=(700, m, m)).astype(np.float32)  # more than are taken at a time
    solve = jax.jit(lambda blocks: Greedy()(jnp.moveaxis(blocks, 0, -1), pattern).mask)
    mask = np.moveaxis(np.asarray(solve(blocks)), -1, 0)
    # Each block as it is when it is alone with few others.
    np.testing.assert_array_equal(np.moveaxis(np.asarray(solve(blocks[-3:])), -1, 0), mask[-3:])
    for p, r in itertools.combinations(range(m), 2):
        for q, s in itertools.permutations(range(m), 2):
            possible = mask[:, p, q] & mask[:, r, s] & ~mask[:, p, s] & ~mask[:, r, q]
            if at_most:
                assert (blocks[mask] > 0).all()
                possible &= (blocks[:, p, s] > 0) & (blocks[:, r, q] > 0)
            gain = blocks[:, p, s] + blocks[:, r, q] - blocks[:, p, q] - blocks[:, r, s]
            assert (gain[possible] <= 1e-5).all()


def test_completion_ends_from_the_emptiest_masks():
    """Exchange is needed where all short rows meet all short columns in kept entries."""
    rng = np.random.default_rng(4)
    permutation = np.stack([np.eye(8)[rng.permutation(8)] for _ in range(64)]).astype(np.float32)
    for scores in (permutation, -permutation, np.cumsum(permutation, 1), np.cumsum(permutation, 2)):
        assert (greedy(scores, 4, complete=True).sum(1) == 4).all()
        assert (greedy(scores, 4, complete=True).sum(2) == 4).all()


@pytest.mark.parametrize("solver", [MinCostFlow(), IntegerProgram()], ids=["flow", "integer"])
def test_host_solvers_run_inside_a_jitted_loop(solver):
    pattern = TransposableNM(2, 4)

    @jax.jit
    def loop(scores):
        def body(_, scores):
            return jnp.where(solver(scores, pattern).mask, scores, 0)

        return jax.lax.fori_loop(0, 3, body, scores)

    result = np.asarray(loop(jax.random.uniform(jax.random.key(0), (4, 4, 5))))
    assert ((result != 0).sum(0) == 2).all()
    assert ((result != 0).sum(1) == 2).all()
