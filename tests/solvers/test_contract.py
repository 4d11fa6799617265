"""What every solver promises, for every pattern it supports and for every kind of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import solvers
from tests.helpers import PATTERNS, PROVING, SCORES, all_masks, best_by_enumeration, check_mask, tiles

SOLVERS = solvers.MENU
PAIRS = [(solver, pattern) for solver in SOLVERS for pattern in PATTERNS if solver.supports(pattern)]


def pairs(*conditions):
    """Parametrise over the (solver, pattern) pairs that fulfil all conditions."""
    chosen = [pair for pair in PAIRS if all(condition(*pair) for condition in conditions)]
    ids = [f"{type(solver).__name__}-{pattern}" for solver, pattern in chosen]
    return pytest.mark.parametrize(("solver", "pattern"), chosen, ids=ids)


def representative(solver, pattern):
    """One pattern of each kind for each solver: what follows compiles anew for every pattern."""
    kind = (type(pattern), getattr(pattern, "at_most", False))
    same = [p for s, p in PAIRS if s is solver and (type(p), getattr(p, "at_most", False)) == kind]
    return pattern is same[min(2, len(same) - 1)]


def optimal(solver, pattern):
    return not isinstance(solver, solvers.Greedy)


def tiled(solver, pattern):
    return pattern.tile is not None


def enumerable(solver, pattern):
    """Few enough masks to list; test_transposable.py has larger blocks."""
    return tiled(solver, pattern) and (pattern.tile[1] == 1 or pattern.tile[0] <= 4)


def roomy(solver, pattern):
    """Any entry can be kept and any other pruned at the same time."""
    groups = pattern.contraction_groups
    return groups and min(groups.n, groups.m - groups.n) > 1 and not isinstance(pattern, nm.SequentialNM)


def shape_for(pattern):
    rows, cols = pattern.tile or (6, 10)
    return rows * 2, cols * 3


def test_every_pattern_has_a_solver_and_a_default():
    assert {str(p) for _, p in PAIRS} == {str(p) for p in PATTERNS}
    for pattern in PATTERNS:
        assert solvers.default_solver(pattern).supports(pattern)


@pairs()
def test_masks_are_feasible_for_every_input(solver, pattern):
    rng = np.random.default_rng(0)
    for name, make in SCORES.items():
        scores = jnp.asarray(make(rng, shape_for(pattern)), jnp.float32)
        mask = nm.solve(scores, pattern, solver)
        assert mask.dtype == bool
        assert mask.shape == scores.shape
        assert check_mask(mask, pattern), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pairs(representative)
def test_half_precision(solver, pattern, dtype):
    """The same masks as for the same values in float32."""
    rng = np.random.default_rng(0)
    for name, make in SCORES.items():
        with np.errstate(over="ignore"):
            scores = jnp.asarray(make(rng, shape_for(pattern)), dtype)
        mask = nm.solve(scores, pattern, solver)
        assert check_mask(mask, pattern), name
        np.testing.assert_array_equal(mask, nm.solve(scores.astype(jnp.float32), pattern, solver), err_msg=name)


@pairs(representative)
def test_nan_raises_on_the_host_and_is_flagged_under_jit(solver, pattern):
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=shape_for(pattern)), jnp.float32).at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="1 scores are NaN"):
        nm.solve(scores, pattern, solver)
    assert check_mask(jax.jit(lambda s: nm.solve(s, pattern, solver))(scores), pattern)
    tile = scores[: (pattern.tile or scores.shape)[0], : (pattern.tile or scores.shape)[1]].at[0, 0].set(jnp.nan)
    if pattern.tile is None:
        tile = tile.reshape(-1, 1)
    solution = jax.jit(lambda s: solver(s, pattern))(tile)
    assert bool(solution.nan)
    assert bool(pattern.full(solution.mask))
    assert bool(jnp.isfinite(solution.objective))


@pairs(representative)
def test_jit_and_vmap_agree_with_plain(solver, pattern):
    scores = jax.random.normal(jax.random.key(2), (3, *shape_for(pattern)))
    plain = jnp.stack([nm.solve(s, pattern, solver) for s in scores])
    np.testing.assert_array_equal(jax.jit(lambda s: nm.solve(s, pattern, solver))(scores[0]), plain[0])
    np.testing.assert_array_equal(jax.vmap(lambda s: nm.solve(s, pattern, solver))(scores), plain)


@pairs(representative)
def test_objective_is_the_sum_of_kept_scores(solver, pattern):
    rows, cols = pattern.tile or (24, 1)
    scores = jax.random.normal(jax.random.key(3), (rows, cols, 2, 3))
    solution = solver(scores, pattern)
    kept = np.where(np.asarray(solution.mask), np.asarray(scores, np.float64), 0).sum((0, 1))
    np.testing.assert_allclose(solution.objective, kept, rtol=1e-5, atol=1e-5)
    assert not solution.nan.any()
    np.testing.assert_array_equal(solution.proof.scale, np.abs(solution.objective))
    assert (solution.proof.gap >= 0).all()
    assert solution.proof.proved.all() == isinstance(solver, PROVING)


@pairs(optimal, enumerable)
def test_optimal_by_brute_force(solver, pattern):
    rng = np.random.default_rng(4)
    assert len(all_masks(pattern)) > 1
    for name in ("gaussian", "signed", "negative", "ties", "binary", "mostly_zero", "constant", "heavy_tailed"):
        scores = np.asarray(SCORES[name](rng, shape_for(pattern)), np.float32)
        mask = np.asarray(nm.solve(jnp.asarray(scores), pattern, solver))
        for block, kept in zip(tiles(scores, *pattern.tile), tiles(mask, *pattern.tile), strict=True):
            best = best_by_enumeration(block, pattern)
            found = float(block.astype(np.float64)[kept].sum())
            assert found == pytest.approx(best, rel=1e-6, abs=1e-6), name


@pairs(tiled, representative)
def test_padding_is_never_kept_and_real_entries_are(solver, pattern):
    rng = np.random.default_rng(5)
    tall, wide = pattern.tile
    rows, cols = 2 * tall + 1, 2 * wide + wide // 2
    for name in ("gaussian", "signed", "negative", "infinity", "zeros"):
        scores = jnp.asarray(SCORES[name](rng, (rows, cols)), jnp.float32)
        mask = np.asarray(nm.solve(scores, pattern, solver, partial="pad"))
        assert mask.shape == (rows, cols)
        padded = np.zeros((3 * tall, 3 * wide), bool)
        padded[:rows, :cols] = mask
        for tile in tiles(padded, tall, wide):
            assert pattern.allows(jnp.asarray(tile)[..., None]).all()
        assert check_mask(mask[: 2 * tall, : 2 * wide], pattern)
        if name == "gaussian":
            assert mask[-1].any()  # the edge is pruned, not dropped
    with pytest.raises(ValueError, match="does not divide; pass partial='pad'"):
        nm.solve(jnp.ones((rows, cols)), pattern, solver)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_solvers_are_static_configuration(solver):
    assert hash(solver) == hash(type(solver)())
    assert solver == type(solver)()


@pytest.mark.unchecked
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_bad_input_is_one_clear_error(solver):
    pattern = next(p for p in PATTERNS if solver.supports(p))
    other = next(p for p in PATTERNS if not solver.supports(p))
    with pytest.raises(ValueError, match="does not solve"):
        nm.solve(jnp.ones((24, 24)), other, solver, partial="pad")
    with pytest.raises(ValueError, match="floating point, got int32"):
        nm.solve(jnp.ones((120, 120), jnp.int32), pattern, solver, partial="pad")
    if pattern.tile is not None:
        with pytest.raises(ValueError, match="has tiles of"):
            solver(jnp.ones((17, 17, 2)), pattern)


def test_scores_need_their_axes():
    with pytest.raises(ValueError, match="names 2 dimensions"):
        nm.solve(jnp.ones((4, 4, 4)), "2:4")
    with pytest.raises(ValueError, match="names 2 dimensions"):
        nm.solve(jnp.float32(1), "2:4")
    with pytest.raises(ValueError, match="partial"):
        nm.solve(jnp.ones((4, 4)), "2:4", partial="skip")


@pairs(optimal, roomy)
def test_infinities_go_first_and_leave_the_rest_as_it_was(solver, pattern):
    """Entries at infinity are kept, those at minus infinity pruned, and the others are still optimal."""
    scores = np.abs(np.random.default_rng(6).normal(size=(*pattern.tile, 20))).astype(np.float32)
    beyond = np.float32(1000)
    marked, moderate = scores.copy(), scores.copy()
    marked[0, 0], marked[1, 0] = np.inf, -np.inf
    moderate[0, 0], moderate[1, 0] = beyond, -beyond
    mask = np.asarray(solver(jnp.asarray(marked), pattern).mask)
    assert mask[0, 0].all()
    assert not mask[1, 0].any()
    np.testing.assert_array_equal(mask, solver(jnp.asarray(moderate), pattern).mask)
