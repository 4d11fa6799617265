"""The optimal transposable mask of small blocks: elementwise, without a loop.

**The problem.** A block has m rows and m columns, and a mask keeps n entries (or at most n) in each. Row by row there
are few choices, C(m, n) for "exactly n": 6 at 2:4. Rows know of each other only by how often each column is kept, so
what a few rows do can be summed up in their *column counts*: of all ways to the same counts only the best can be part
of an optimum. This is dynamic programming over rows, with the counts as state.

**Meeting in the middle.** The upper and the lower half of the rows are summed up apart. At 2:4 two rows have 36 ways
and 19 column counts (both keep the same pair: 6; one column twice, one never, two once: 12, two ways each; each column
once: 1, six ways). A mask is an upper and a lower half whose counts add up to n in every column, so the optimum is the
best of 19 sums. For "at most n" the counts may add up to less: the best of the lower half with *at most* given counts
takes the place of the best with just these.

Everything is a tree of additions, comparisons and selections, a few hundred at 2:4, each elementwise over blocks: one
fused kernel that reads 16 scores and writes one integer. Scores are integers on the grid of `Exact`, so sums are exact,
and ties, sorted or rank-one blocks take as long as any other.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._grid import proof_on_grid, quantise, quantise_double
from nm_jax.solvers._proof import Proof
from nm_jax.solvers.base import Solver, choose, order_key, well_scaled

_MOST_ROWS = 4  # with more the ways are too many: at 4:8 four rows have 38,165 column counts

Ways = dict[tuple[int, ...], tuple[Array, Array]]  # by column counts: the most that is kept, and the mask as an integer


@dataclasses.dataclass(frozen=True)
class MeetInTheMiddle(Solver):
    """The optimum of transposable patterns with m up to 4, elementwise, on any device.

    max sum(mask * scores)  such that  every row and column of a block keeps n (or at most n)

    All masks of a block are compared, rows in two halves, halves by their column counts (see the module). Scores are
    rounded to a fixed-point grid of 26 bits below the largest score of their block; the mask is optimal on that grid,
    which is what the proof says: a gap of 0 for every block.

    Cost: one pass over the scores, about 400 operations a block at 2:4, 1,600 for "at most"; the same for all scores.
    Temporary memory: at most 320 bytes a block, of the slabs that `nm_jax.solve` and `nm_jax.compute_masks` pass on, of
    all blocks in a call of your own.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> solver = nm.solvers.MeetInTheMiddle()
      >>> nm.solve(jnp.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]]), "1:3-T", solver).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM) and pattern.m <= _MOST_ROWS

    def solve(self, scores, pattern):
        if scores.dtype == jnp.float64:
            return _solution(*_best(*_careful(scores, pattern), pattern), pattern, scores.dtype)
        raw = [lax.bitcast_convert_type(entry, jnp.int32) for row in scores for entry in row]
        sizes = [jnp.maximum(x, 0) if pattern.at_most else x & 0x7FFFFFFF for x in raw]
        largest = functools.reduce(jnp.maximum, sizes)  # of integers: NaN are above all, subnormals above 0
        quick = (largest >> 23 >= 27) & (largest >> 23 <= 227) | (largest == 0)

        def careful():
            grids = choose(quick, _quick(scores, largest, pattern), _careful(scores, pattern))
            return _best(*grids, pattern)

        # The branches also end a fusion: else all would be computed again for each entry of the mask.
        bits, exponent = lax.cond(jnp.all(quick), lambda: _best(*_quick(scores, largest, pattern), pattern), careful)
        return _solution(bits, exponent, pattern, scores.dtype)

    def solve_edges(self, scores, valid, pattern):
        grid = _careful(jnp.where(valid, scores, -jnp.inf), pattern.relaxed)
        mask, proof = _solution(*_best(*grid, pattern.relaxed), pattern.relaxed, scores.dtype)
        return mask & valid, proof


def _quick(
    scores: Float[Array, "m m *tiles"], largest: Int[Array, "*tiles"], pattern: TransposableNM
) -> tuple[Int[Array, "m m *tiles"], Int[Array, "*tiles"]]:
    """The grid of blocks that one float can scale, and the exponent of its unit: 26 bits below the largest score."""
    exponent = jnp.clip(largest >> 23, 27, 227)
    grid = jnp.round(scores * lax.bitcast_convert_type((279 - exponent) << 23, jnp.float32)[None, None])
    if pattern.at_most:
        negative = order_key(scores) < 0  # of integers: comparisons of floats may take subnormals for 0
        grid = jnp.where(negative, -1, grid)
    return grid.astype(jnp.int32), exponent - 152


def _careful(
    scores: Float[Array, "m m *tiles"], pattern: TransposableNM
) -> tuple[Int[Array, "m m *tiles"], Int[Array, "*tiles"]]:
    """The grid of any blocks, and the exponent of its unit."""
    finite, scale = well_scaled(scores, pattern.at_most)
    flat = finite.reshape(pattern.m, pattern.m, -1)
    grid, exponent = (quantise if finite.dtype == jnp.float32 else quantise_double)(flat, pattern)
    return grid.reshape(scores.shape), exponent.reshape(scores.shape[2:]) + scale


def _best(
    grid: Int[Array, "m m *tiles"], exponent: Int[Array, "*tiles"], pattern: TransposableNM
) -> tuple[Int[Array, "*tiles"], Int[Array, "*tiles"]]:
    """The best mask of every block, entry (i, j) at bit m * i + j, and the exponent as it came. Everything is written
    entry by entry: the compiler makes one kernel of that."""
    n, m = pattern.n, pattern.m
    rows = [_ways_of_a_row([grid[i, j] for j in range(m)], i, pattern) for i in range(m)]
    upper, lower = (functools.reduce(functools.partial(_both, n=n), half) for half in (rows[: m // 2], rows[m // 2 :]))
    if pattern.at_most:
        lower = _with_room(lower, pattern)
    rest = {counts: tuple(n - count for count in counts) for counts in upper}
    whole = [_together(way, lower[rest[counts]]) for counts, way in upper.items() if rest[counts] in lower]
    return functools.reduce(_better, whole)[1], exponent


def _solution(
    bits: Int[Array, "*tiles"], exponent: Int[Array, "*tiles"], pattern: TransposableNM, dtype
) -> tuple[Bool[Array, "m m *tiles"], Proof]:
    m = pattern.m
    mask = jnp.stack([jnp.stack([(bits >> (m * i + j)) & 1 == 1 for j in range(m)]) for i in range(m)])
    return mask, proof_on_grid(jnp.zeros_like(exponent), exponent, pattern, dtype)


def _ways_of_a_row(scores: list[Array], i: int, pattern: TransposableNM) -> Ways:
    ways: Ways = {}
    for size in range(pattern.n + 1) if pattern.at_most else (pattern.n,):
        for kept in itertools.combinations(range(pattern.m), size):
            most = functools.reduce(jnp.add, [scores[j] for j in kept]) if kept else jnp.zeros_like(scores[0])
            bits = jnp.int32(sum(1 << (pattern.m * i + j) for j in kept))
            ways[tuple(int(j in kept) for j in range(pattern.m))] = most, bits
    return ways


def _both(above: Ways, below: Ways, n: int) -> Ways:
    """The best of each column counts, up to n, that two parts make together."""
    ways: Ways = {}
    for (first, way), (second, other) in itertools.product(above.items(), below.items()):
        counts = tuple(a + b for a, b in zip(first, second, strict=True))
        if max(counts) <= n:
            found = _together(way, other)
            ways[counts] = _better(ways[counts], found) if counts in ways else found
    return ways


def _with_room(ways: Ways, pattern: TransposableNM) -> Ways:
    """The best with *at most* given column counts: column by column, the best with as many or with one fewer."""
    best = dict(ways)
    for j in range(pattern.m):
        for counts in itertools.product(range(pattern.n + 1), repeat=pattern.m):  # smaller counts come first
            fewer = (*counts[:j], counts[j] - 1, *counts[j + 1 :])
            if fewer in best:
                best[counts] = _better(best[counts], best[fewer]) if counts in best else best[fewer]
    return best


def _together(way: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    return way[0] + other[0], way[1] | other[1]


def _better(way: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    return jnp.maximum(way[0], other[0]), jnp.where(way[0] >= other[0], way[1], other[1])
