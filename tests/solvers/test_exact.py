"""The solvers that prove the optimum: independent optima on their grids, the proof, the symmetries of the problem."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from nm_jax import TransposableNM, parse_pattern, solve
from nm_jax.solvers import MinCostFlow
from nm_jax.solvers._exact_descent import duality_gap
from nm_jax.solvers._grid import quantise
from nm_jax.solvers.exact import Exact
from nm_jax.solvers.meet_in_the_middle import MeetInTheMiddle
from tests.helpers import SCORES, best_by_enumeration, reference_blocks

WHOLE = ["2:4-T", "4:8-T", "8:16-T", pytest.param("16:32-T", marks=pytest.mark.slow)]
# Each pattern compiles for seconds; these say little that the others do not.
SLOW = [
    pytest.param(p, marks=pytest.mark.slow)
    for p in (
        "8:16-T",
        "16:32-T",
        "1:2-T",
        "2:5-T",
        "5:12-T",
        "1:3-T",
        "2:3-T",
        "3:6-T",
        "11:24-T",
        "1:4-T",
        "3:4-T",
        "1:8-T",
        "7:8-T",
        "1:32-T",
        "31:32-T",
    )
]
MODES = pytest.mark.parametrize("suffix", ["", "-at-most"], ids=["exactly", "at_most"])

SOLVERS = (Exact(), MeetInTheMiddle())

_solve = jax.jit(lambda scores, pattern, solver: solver(scores, pattern), static_argnums=(1, 2))


def solve_blocks(scores, pattern, solver=SOLVERS[0]):
    return _solve(jnp.asarray(scores), parse_pattern(pattern), solver)


def solvers_of(pattern):
    """The solvers that prove the optimum of a pattern."""
    return [solver for solver in SOLVERS if solver.supports(parse_pattern(pattern))]


def grid_by_fractions(scores, unit):
    """Scores in units of the grid, rounded half away from zero; float64 has room for both without rounding."""
    ratio = np.asarray(scores, np.float32).astype(np.float64) / np.asarray(unit, np.float64)
    return (np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)).astype(np.int64)


def unit_of(scores, pattern):
    """The spacing of the grid of each block."""
    _, exponent = quantise(jnp.asarray(scores, jnp.float32), pattern)
    return 2.0 ** np.asarray(exponent, np.float64)


def grid_of(scores, pattern, solver):
    """Integers in the place of scores, of which the solver finds the optimum."""
    grid = grid_by_fractions(scores, unit_of(scores, pattern))
    if isinstance(solver, MeetInTheMiddle):
        # 26 bits for signed scores too, rounded half to even, unless the block is scaled first.
        scores = np.asarray(scores, np.float64)
        largest = np.abs(scores).max((0, 1))
        tame = (largest >= 2.0**-100) & (largest < 2.0**101)
        exponent = np.floor(np.log2(np.where(tame, largest, 1)))
        finer = np.rint(np.where(tame, scores, 0) / 2.0 ** (exponent - 25)).astype(np.int64)
        grid = np.where(tame, finer, grid)
    return grid


def proved(solution):
    """Whether every block has a proof that its mask is optimal on its grid."""
    return bool(solution.proof.proved.all()) and not solution.proof.gap.any()


def optimum(block, pattern):
    """Largest sum of kept integers, by a linear assignment in float64, where they are exact.

    For at most n, the block is padded with zeros to twice its size and exactly n are kept in every row and column:
    whatever is missing to n finds a place in the padding.
    """
    block = np.asarray(block, np.int64)
    if pattern.at_most:
        block = np.pad(np.maximum(block, 0), (0, pattern.m))
    m, n = len(block), pattern.n
    agents = np.arange(m * m)
    keep = np.where(agents[:, None] % m == np.repeat(np.arange(m), n), block.reshape(-1, 1), -(2**40))
    discard = np.where(agents[:, None] // m == np.repeat(np.arange(m), m - n), 0, -(2**40))
    table = np.concatenate([keep, discard], axis=1).astype(np.float64)
    return int(table[linear_sum_assignment(table, maximize=True)].sum())


def check_optimal(scores, pattern, against=10, solver=SOLVERS[0]):
    """Feasible, proved, and equal to the optimum of the grid on the first blocks."""
    pattern = parse_pattern(pattern)
    solution = solve_blocks(scores, pattern, solver)
    assert bool(pattern.full(solution.mask).all())
    assert proved(solution)
    if pattern.at_most:
        assert not (np.asarray(solution.mask) & (scores < 0)).any()
        scores = np.maximum(scores, 0)
    grid = grid_of(scores, pattern, solver)
    objective = (grid * np.asarray(solution.mask)).sum((0, 1))
    for k in range(min(against, scores.shape[2])):
        assert objective[k] == optimum(grid[:, :, k], pattern), k
    return solution


# ----------------------------------------------------------------------------------------------------------- optimality


@MODES
@pytest.mark.parametrize("pattern", [pytest.param("2:4-T", marks=pytest.mark.slow), "4:8-T", *SLOW])
def test_optimum_of_every_kind_of_scores(pattern, suffix):
    rng = np.random.default_rng(10)
    m = parse_pattern(pattern).m
    against = 6 if m <= 8 else 2 if m <= 16 and not suffix else 0 if suffix else 1
    for make in SCORES.values():
        with np.errstate(over="ignore"):
            scores = make(rng, (m, m, 40)).astype(np.float32)
        # What is infinite is replaced before the solver sees it; tests/solvers/test_contract.py has that.
        if np.isfinite(scores).all():
            for solver in solvers_of(pattern):
                check_optimal(scores, pattern + suffix, against, solver)


@pytest.mark.slow
@MODES
def test_all_binary_3x3_blocks(suffix):
    """Every block there is, ties and all, against enumeration."""
    every = (np.arange(512)[:, None] >> np.arange(9)) & 1
    scores = every.T.reshape(3, 3, 512).astype(np.float32)
    for n in (1, 2):
        pattern = parse_pattern(f"{n}:3-T{suffix}")
        best = [best_by_enumeration(scores[:, :, k], pattern) for k in range(512)]
        for solver in SOLVERS:
            np.testing.assert_array_equal(check_optimal(scores, pattern, 0, solver).objective, best)


@MODES
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_4x4_blocks_against_enumeration(n, suffix):
    rng = np.random.default_rng(11)
    pattern = parse_pattern(f"{n}:4-T{suffix}")
    for name in ("gaussian", "signed", "ties", "heavy_tailed"):
        scores = SCORES[name](rng, (4, 4, 50)).astype(np.float32)
        best = [best_by_enumeration(scores[:, :, k], pattern) for k in range(50)]
        for solver in SOLVERS:
            mask = np.asarray(check_optimal(scores, pattern, 0, solver).mask)
            found = (scores.astype(np.float64) * mask).sum((0, 1))
            # Half a unit of the grid for each kept entry.
            np.testing.assert_allclose(found, best, rtol=0, atol=8 * 2.0**-25 * np.abs(scores).max())


@MODES
@pytest.mark.parametrize("key", ["2of4", "4of8"])
def test_reference_optima_on_real_blocks(key, suffix):
    data = reference_blocks()
    scores = np.abs(np.moveaxis(data[f"{key}/blocks"], 0, -1))
    pattern = key.replace("of", ":") + "-T" + suffix
    for solver in solvers_of(pattern):
        mask = np.asarray(check_optimal(scores, pattern, 20, solver).mask)
        best = data[f"{key}/{'le_' if suffix else ''}opt_value"]
        np.testing.assert_allclose((scores.astype(np.float64) * mask).sum((0, 1)), best, rtol=1e-6)


@MODES
def test_agrees_with_the_flow_solver(suffix):
    pattern = parse_pattern("4:8-T" + suffix)
    scores = jax.random.normal(jax.random.key(12), (pattern.m, pattern.m, 40))
    np.testing.assert_allclose(
        solve_blocks(scores, pattern).objective, MinCostFlow()(scores, pattern).objective, rtol=1e-6
    )


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("pattern", WHOLE)
def test_many_blocks_against_ortools(pattern, suffix):
    """At least 100,000 blocks in all: integer optima by min-cost flow, many blocks in one network."""
    graph = pytest.importorskip("ortools.graph.python.min_cost_flow", reason="the oracle of this test is OR-tools")
    pattern = parse_pattern(pattern + suffix)
    rng = np.random.default_rng(13)
    count = {4: 2000, 8: 1200, 16: 150, 32: 40}[pattern.m]
    for name, make in MANY.items():
        scores = make(rng, (pattern.m, pattern.m, count)).astype(np.float32)
        for solver in solvers_of(pattern):
            solution = solve_blocks(scores, pattern, solver)
            assert bool(pattern.full(solution.mask).all()), name
            assert proved(solution), name
            grid = grid_of(np.maximum(scores, 0) if suffix else scores, pattern, solver)
            found = (grid * np.asarray(solution.mask)).sum(dtype=np.int64)
            assert found == ortools_optimum(graph, grid, pattern), name


def ortools_optimum(graph, grid, pattern):
    """The sum of the optima of all blocks: as no block can exceed its own, equal sums are equal optima."""
    m, n, blocks = pattern.m, pattern.n, grid.shape[2]
    row, col, block = np.meshgrid(np.arange(m), np.arange(m), np.arange(blocks), indexing="ij")
    rows, cols = (2 * block * m + row).ravel(), (2 * block * m + m + col).ravel()
    flow = graph.SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(rows, cols, np.ones_like(rows), -grid.ravel())
    nodes = np.arange(2 * blocks * m)
    supply = np.where(nodes // m % 2 == 0, n, -n)
    if pattern.at_most:
        # Rows may leave units with a drain and columns may take units from it.
        drain = 2 * blocks * m
        up = nodes[nodes // m % 2 == 0]
        flow.add_arcs_with_capacity_and_unit_cost(up, np.full_like(up, drain), np.full_like(up, n), np.zeros_like(up))
        down = nodes[nodes // m % 2 == 1]
        flow.add_arcs_with_capacity_and_unit_cost(
            np.full_like(down, drain), down, np.full_like(down, n), np.zeros_like(down)
        )
    flow.set_nodes_supplies(nodes, supply)
    assert flow.solve() == flow.OPTIMAL
    return -flow.optimal_cost()


def _bfloat16(rng, shape):
    return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32)


MANY = {
    **{name: make for name, make in SCORES.items() if "infin" not in name and name != "largest"},
    "four_levels": lambda rng, shape: rng.integers(1, 5, shape) / 4,
    "thirds": lambda rng, shape: rng.integers(0, 4, shape) / 3,
    "ternary": lambda rng, shape: rng.integers(-1, 2, shape).astype(float),
    "bfloat16": lambda rng, shape: np.abs(_bfloat16(rng, shape)),
    "signed_bfloat16": _bfloat16,
    "sparse": lambda rng, shape: rng.normal(size=shape) ** 2 * (rng.random(shape) < 0.3),
    "powers_of_two": lambda rng, shape: 2.0 ** rng.integers(-20, 20, shape),
    "rank_one": lambda rng, shape: rng.random((shape[0], 1, shape[2])) * rng.random((1, *shape[1:])),
    "row_constant": lambda rng, shape: np.broadcast_to(rng.random((shape[0], 1, shape[2])), shape),
    "permutation": lambda rng, shape: np.argsort(rng.random((shape[0] ** 2, shape[2])), axis=0).reshape(shape) + 0.0,
}


# ---------------------------------------------------------------------------------------------------------- proof


@MODES
def test_wrong_masks_have_a_gap(suffix):
    """The gap of any mask is what it loses or more; prices that prove the optimum give exactly what it loses."""
    pattern = parse_pattern("2:4-T" + suffix)
    rng = np.random.default_rng(14)
    grid = jnp.asarray(rng.integers(0, 1000, (4, 4, 200)), jnp.int32)
    best = np.asarray([optimum(np.asarray(grid[:, :, k]), pattern) for k in range(200)])
    mask = np.zeros((4, 4, 200), bool)
    for k in range(200):
        mask[:, :, k] = (np.add.outer(np.arange(4), rng.permutation(4)) % 4 < 2)[rng.permutation(4)]
    if suffix:
        mask &= rng.random(mask.shape) < 0.8
    u, v = (jnp.asarray(rng.integers(0, 500, (4, 200)), jnp.int32) for _ in "uv")
    assert bool(pattern.full(jnp.asarray(mask)).all())
    loss = best - (np.asarray(grid) * mask).sum((0, 1))
    gap = np.asarray(duality_gap(grid, jnp.asarray(mask), u, v, pattern))
    assert (loss > 0).any()
    assert (gap >= loss).all()
    # By definition: the dual at these prices, minus the objective.
    slack = np.maximum(np.asarray(grid) - np.asarray(u)[:, None] - np.asarray(v)[None], 0).sum((0, 1))
    dual = pattern.n * np.asarray(u + v).sum(0) + slack
    np.testing.assert_array_equal(gap, dual - (np.asarray(grid) * mask).sum((0, 1)))


@MODES
def test_gap_saturates(suffix):
    pattern = parse_pattern("2:4-T" + suffix)
    grid = jnp.full((4, 4, 1), 1 << 26, jnp.int32)
    prices = jnp.full((4, 1), 1 << 29, jnp.int32)
    mask = jnp.zeros((4, 4, 1), bool) if suffix else pattern_mask(pattern)
    assert int(duality_gap(grid, mask, prices, prices, pattern)[0]) == 2**30 - 1


def pattern_mask(pattern):
    index = np.arange(pattern.m)
    return jnp.asarray(((index[:, None] + index) % pattern.m < pattern.n)[..., None])


def test_what_rounding_costs_is_bounded():
    scores = jnp.abs(jax.random.normal(jax.random.key(15), (8, 8, 3, 5)))
    solution = Exact()(scores, TransposableNM(4, 8))
    assert solution.proof.gap.shape == (3, 5)
    assert proved(solution)
    largest, unit = np.asarray(scores).max((0, 1)), np.asarray(solution.proof.rounding) / (4 * 8)
    assert (unit * 2.0**25 <= largest).all()
    assert (unit * 2.0**26 > largest).all()


def test_units_of_the_smallest_and_largest_scores():
    """The grid never goes below the smallest subnormal: subnormal blocks are exact."""
    scores = np.array([1e-45, 1e-40, 1e-30, 1.0, 3.4e38], np.float32) * np.ones((4, 4, 5), np.float32)
    unit = unit_of(scores, parse_pattern("2:4-T"))
    np.testing.assert_array_equal(unit[:3], [2.0**-149, 2.0**-149, 2.0 ** (-100 - 25)])
    np.testing.assert_array_equal(unit[3:], [2.0**-25, 2.0**102])


# ----------------------------------------------------------------------------------------------------------- properties


def integer_blocks(m, low=-1000, high=1000):
    entries = st.lists(st.integers(low, high), min_size=m * m, max_size=m * m)
    return entries.map(lambda values: np.array(values, np.float32).reshape(m, m, 1))


def objective(scores, pattern):
    """The exact sum of what is kept; the integers below fit the grid, so that nothing is rounded."""
    found = []
    for solver in solvers_of(pattern):
        solution = solve_blocks(scores, pattern, solver)
        assert proved(solution)
        found.append((np.asarray(scores, np.float64) * np.asarray(solution.mask)).sum())
    assert len(set(found)) == 1
    return found[0]


property_test = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(("n", "m", "lowest", "highest"), [(2, 4, -1000, 1000), (4, 8, 0, 3)], ids=["2:4", "4:8 tied"])
@MODES
@property_test
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_permuting_and_transposing_change_nothing(suffix, n, m, lowest, highest, data, seed):
    rng = np.random.default_rng(seed)
    block, pattern = data.draw(integer_blocks(m, lowest, highest)), f"{n}:{m}-T{suffix}"
    best = objective(block, pattern)
    assert objective(block[rng.permutation(m)][:, rng.permutation(m)], pattern) == best
    assert objective(block.swapaxes(0, 1), pattern) == best


@MODES
@property_test
@hypothesis.given(block=integer_blocks(4), exponent=st.integers(-120, 110))
def test_scaling_by_a_power_of_two_scales_the_objective(suffix, block, exponent):
    """All the way to the ends of float32: nothing overflows or underflows."""
    pattern = "2:4-T" + suffix
    scaled = np.ldexp(block, exponent).astype(np.float32)
    np.testing.assert_array_equal(scaled.astype(np.float64), np.ldexp(block.astype(np.float64), exponent))
    assert objective(scaled, pattern) == np.ldexp(objective(block, pattern), exponent)


@property_test
@hypothesis.given(block=integer_blocks(4), row=st.integers(0, 3), constant=st.integers(-5000, 5000), flip=st.booleans())
def test_a_constant_on_a_row_or_column_adds_n_times_that(block, row, constant, flip):
    raised = block.copy()
    if flip:
        raised[:, row] += constant
    else:
        raised[row] += constant
    assert objective(raised, "2:4-T") == objective(block, "2:4-T") + 2 * constant


@property_test
@hypothesis.given(block=integer_blocks(4))
def test_at_most_keeps_no_negative_score_and_at_least_as_much(block):
    solution = solve_blocks(block, "2:4-T-at-most")
    assert (block[np.asarray(solution.mask)] >= 0).all()
    assert objective(block, "2:4-T-at-most") >= objective(block, "2:4-T")


@pytest.mark.parametrize("solver", SOLVERS)
def test_at_most_keeps_no_negative_subnormal_score(solver):
    block = np.zeros((4, 4, 1), np.float32)
    block[0, 0], block[1, 1], block[2, 2] = 1, -1e-45, 1e-45
    mask = np.asarray(solve_blocks(block, "2:4-T-at-most", solver).mask)
    assert mask[0, 0] and not mask[1, 1]


@pytest.mark.slow
@MODES
@property_test
@hypothesis.given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_any_finite_floats(suffix, values):
    for solver in SOLVERS:
        check_optimal(np.array(values, np.float32).reshape(4, 4, 1), "2:4-T" + suffix, solver=solver)


# ---------------------------------------------------------------------------------------- shapes, types, transformation


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257])
def test_any_number_of_blocks(blocks, solver):
    """Chunks overlap at the end; each block is solved as it is alone."""
    pattern = TransposableNM(2, 4)
    rng = np.random.default_rng(16)
    scores = rng.integers(0, 5, (4, 4, blocks)).astype(np.float32)
    solution = solve_blocks(scores, pattern, solver)
    assert solution.mask.shape == (4, 4, blocks)
    assert proved(solution)
    for k in (0, blocks // 2, blocks - 1) if blocks else ():
        alone = solve_blocks(scores[:, :, k : k + 1], pattern, solver)
        np.testing.assert_array_equal(solution.mask[:, :, k], alone.mask[:, :, 0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_tile_axes_do_not_matter(solver):
    pattern = TransposableNM(2, 4)
    scores = jax.random.normal(jax.random.key(17), (4, 4, 6, 10))
    flat = solve_blocks(scores.reshape(4, 4, 60), pattern, solver)
    shaped = solve_blocks(scores, pattern, solver)
    np.testing.assert_array_equal(shaped.mask.reshape(4, 4, 60), flat.mask)
    assert shaped.proof.rounding.shape == (6, 10)
    single = solve_blocks(scores[:, :, 0, 0], pattern, solver)
    assert single.proof.gap.shape == ()
    np.testing.assert_array_equal(single.mask, shaped.mask[:, :, 0, 0])


@pytest.mark.parametrize(
    ("pattern", "solver"),
    [
        ("2:4-T", MeetInTheMiddle()),
        ("2:4-T", Exact()),
        pytest.param("3:5-T-at-most", Exact(), marks=pytest.mark.slow),
    ],
)
def test_jit_vmap_and_plain_agree(pattern, solver):
    pattern = parse_pattern(pattern)
    scores = jax.random.randint(jax.random.key(18), (3, pattern.m, pattern.m, 50), -3, 4).astype(jnp.float32)
    plain = [solver(s, pattern) for s in scores]
    jitted = [solve_blocks(s, pattern, solver) for s in scores]
    batched = jax.jit(jax.vmap(lambda s: solver(s, pattern)))(scores)
    for k in range(3):
        np.testing.assert_array_equal(jitted[k].mask, plain[k].mask)
        np.testing.assert_array_equal(batched.mask[k], plain[k].mask)
        assert jax.tree.all(jax.tree.map(lambda a, b, k=k: jnp.array_equal(a[k], b), batched.proof, plain[k].proof))


def test_inside_cond():
    """A refresh that is due now and then, as in training."""
    scores = jax.random.normal(jax.random.key(19), (16, 16))
    refresh = jax.jit(lambda due, s, mask: jax.lax.cond(due, lambda: solve(s, "2:4-T", Exact()), lambda: mask))
    kept = jnp.zeros((16, 16), bool)
    np.testing.assert_array_equal(refresh(False, scores, kept), kept)
    np.testing.assert_array_equal(refresh(True, scores, kept), solve(scores, "2:4-T", Exact()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float16])
def test_short_floats_are_solved_as_they_are(dtype):
    scores = jax.random.normal(jax.random.key(20), (4, 4, 100)).astype(dtype)
    for solver in SOLVERS:
        expected = solve_blocks(scores.astype(jnp.float32), "2:4-T", solver)
        np.testing.assert_array_equal(solve_blocks(scores, "2:4-T", solver).mask, expected.mask)


def test_float64_scores():
    with jax.enable_x64(True):
        scores = jnp.asarray(np.random.default_rng(21).normal(size=(4, 4, 100)))
        assert scores.dtype == jnp.float64
        expected = MinCostFlow()(scores, TransposableNM(2, 4)).objective
        for solver in SOLVERS:
            solution = solver(scores, TransposableNM(2, 4))
            assert proved(solution)
            np.testing.assert_allclose(solution.objective, expected, rtol=1e-6)


def test_chunk_size_does_not_matter():
    scores = jax.random.randint(jax.random.key(22), (4, 4, 300), 0, 4).astype(jnp.float32)
    masks = [Exact(chunk=chunk)(scores, TransposableNM(2, 4)).mask for chunk in (7, 1000)]
    np.testing.assert_array_equal(masks[0], masks[1])


def test_too_large_blocks_are_refused():
    assert not Exact().supports(TransposableNM(20, 40))
    with pytest.raises(ValueError, match="does not solve 20:40-T"):
        Exact()(jnp.ones((40, 40, 1)), TransposableNM(20, 40))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["1:16-T", "31:32-T"])
def test_prices_stay_in_range_where_paths_are_longest(pattern):
    """Blocks that force long alternating paths: staircases whose optimum shifts every row by one."""
    index = np.arange(parse_pattern(pattern).m)
    stairs = np.where(np.isin(index[None] - index[:, None], (0, 1)), 1.0, 0.0)
    stairs[0, 0] = 0
    blocks = np.stack([stairs, stairs[::-1], stairs * 2.0 ** -index[:, None], 1 - stairs], axis=2)
    check_optimal(blocks.astype(np.float32), pattern, against=4)
