"""Numbers of every size and dtype: the optimum of the scores as they were given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import solvers
from nm_jax.solvers.base import well_scaled
from tests.helpers import PROVING, best_by_enumeration, check_mask

PATTERNS = {"2:4": (4, 1), "2:4-S": (4, 1), "2:4-T": (4, 4), "1:3-T-at-most": (3, 3)}
PAIRS = [
    (solver, name)
    for name in PATTERNS
    for solver in solvers.MENU
    if solver.supports(nm.parse_pattern(name)) and not isinstance(solver, solvers.Greedy)
]
FINE = [pair for pair in PAIRS if not isinstance(pair[0], solvers.IntegerProgram)]  # its tolerances are wider
pairs = pytest.mark.parametrize(("solver", "name"), PAIRS, ids=str)


def check_best(solver, name, scores, exact, rtol=1e-6):
    """`scores` go to the solver; `exact` are the same numbers, scaled to a size where float64 adds them up."""
    pattern = nm.parse_pattern(name)
    mask = np.asarray(solver(scores, pattern).mask)
    for k in range(exact.shape[2]):
        kept = exact[:, :, k][mask[:, :, k]].sum()
        assert kept == pytest.approx(best_by_enumeration(exact[:, :, k], pattern), rel=rtol), k


@pairs
@pytest.mark.parametrize("exponent", [-149, -130, 100])
def test_optimum_at_both_ends_of_float32(solver, name, exponent):
    integers = np.random.default_rng(0).integers(1, 1000, (*PATTERNS[name], 10)).astype(float)
    scores = np.ldexp(integers, exponent).astype(np.float32)
    np.testing.assert_array_equal(scores.astype(np.float64), np.ldexp(integers, exponent))
    check_best(solver, name, jnp.asarray(scores), integers)


AT_MOST = [
    (solver, name)
    for name in ("1:3-T-at-most", "2:4-T-at-most")
    for solver in solvers.MENU
    if solver.supports(nm.parse_pattern(name)) and not isinstance(solver, solvers.Greedy)
]


@pytest.mark.parametrize("worst", [-1.0, -1e30, -3e38, -np.inf])
@pytest.mark.parametrize(("solver", "name"), AT_MOST, ids=str)
def test_what_need_not_be_kept_hides_nothing(solver, name, worst):
    """At most n: a negative score is worth no place, and however large does not take the others' digits."""
    m = nm.parse_pattern(name).m
    exact = np.abs(np.random.default_rng(0).normal(size=(m, m, 8))) * 10.0 ** np.random.default_rng(1).uniform(-3, 3)
    at = np.random.default_rng(2).integers(m, size=(2, 8))
    exact[at[0], at[1], np.arange(8)] = -1
    scores = exact.astype(np.float32)
    scores[at[0], at[1], np.arange(8)] = worst
    check_best(solver, name, jnp.asarray(scores), exact.astype(np.float32).astype(float))


@pairs
def test_infinity_beats_the_largest_number(solver, name):
    pattern = nm.parse_pattern(name)
    scores = np.full((*pattern.tile, 1), 3.4e38, np.float32)
    scores[1, 0] = np.inf
    assert np.asarray(solver(jnp.asarray(scores), pattern).mask)[1, 0].all()
    scores[1, 0], scores[0, 0] = 3.4e38, -np.inf
    mask = np.asarray(solver(jnp.asarray(scores), pattern).mask)
    assert not mask[0, 0].any()
    assert bool(pattern.full(jnp.asarray(mask)).all())


@pytest.mark.parametrize(
    ("solver", "name"), [p for p in PAIRS if not isinstance(p[0], solvers.IntegerProgram)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e250])
def test_float64_is_solved_as_float64(solver, name, scale):
    """Differences far below the rounding of float32 (for those with a grid: within it), sizes far outside its range."""
    rng = np.random.default_rng(1)
    ranks = rng.permuted(np.tile(np.arange(1.0, 17)[: np.prod(PATTERNS[name])], (10, 1)), axis=1)
    exact = np.moveaxis(ranks.reshape(10, *PATTERNS[name]), 0, -1)
    if not isinstance(solver, PROVING):
        exact = 1 + exact * 1e-12
    with jax.enable_x64(True):
        scores = jnp.asarray(exact * scale)
        assert scores.dtype == jnp.float64
        check_best(solver, name, scores, exact, 1e-14)


def test_what_is_proved_of_float64_scores():
    """Scores that differ by less than the grid: the proof leaves room for what is lost."""
    rng = np.random.default_rng(2)
    scores = 1 + 1e-9 * rng.random((4, 4, 50))
    with jax.enable_x64(True):
        solution = solvers.Exact()(jnp.asarray(scores), nm.TransposableNM(2, 4))
        mask, proof = jax.device_get((solution.mask, solution.proof))
    assert proof.proved.all()
    for k in range(50):
        loss = best_by_enumeration(scores[:, :, k], nm.TransposableNM(2, 4)) - scores[:, :, k][mask[:, :, k]].sum()
        assert loss <= proof.gap[k] + proof.rounding[k]
    assert (proof.rounding < 1e-6).all()


@pytest.mark.parametrize("dtype", [jnp.float32, "float64"])
def test_scaling_is_exact(dtype):
    with jax.enable_x64(dtype == "float64"):
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        values = np.array([[3 * tiny, 0.0], [-7 * tiny, 5 * tiny]])[..., None]
        scaled, exponent = jax.jit(well_scaled)(jnp.asarray(values, dtype))
        np.testing.assert_array_equal(np.ldexp(np.asarray(scaled, np.float64), int(exponent[0])), values)
        assert np.asarray(scaled)[0, 0, 0] > 1e-20
        usual = jnp.asarray([[1.0, -2.0], [0.0, 1e-3]], dtype)[..., None]
        np.testing.assert_array_equal(well_scaled(usual)[0], usual)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "2:4-S", "US-0.5"])
def test_float8(pattern, dtype):
    scores = jnp.asarray(np.abs(np.random.default_rng(3).normal(size=(8, 8))), jnp.float32).astype(dtype)
    mask = nm.solve(scores, pattern)
    assert check_mask(mask, nm.parse_pattern(pattern))
    np.testing.assert_array_equal(mask, nm.solve(scores.astype(jnp.float32), pattern))
    masks, report = nm.compute_masks({"kernel": scores}, pattern, return_report=True)
    np.testing.assert_array_equal(masks["kernel"], mask)
    assert nm.verify(nm.apply_masks({"kernel": scores}, masks), pattern, dense={"kernel": scores}).ok
    assert report.ok


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "2:4-S", "US-0.5"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_arrays_without_entries(pattern, shape):
    mask = nm.solve(jnp.ones(shape), pattern)
    assert mask.shape == shape
    assert mask.dtype == bool
    params = {"a": jnp.ones(shape), "b": jnp.ones((8, 8))}
    masks = nm.compute_masks(params, [("", pattern, "io")])
    assert masks["a"] is None
    assert check_mask(masks["b"], nm.parse_pattern(pattern))


@pairs
def test_no_tiles(solver, name):
    solution = solver(jnp.ones((*PATTERNS[name], 0)), nm.parse_pattern(name))
    assert solution.mask.shape == (*PATTERNS[name], 0)
    assert solution.proof.gap.shape == (0,)
