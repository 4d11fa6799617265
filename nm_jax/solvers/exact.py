"""The optimal transposable mask on the device: batched, inside `jit`, with a proof for every block.

**The problem and its dual.** Call the scores of one m x m block w. A mask S that keeps n entries of every row and
column maximises sum(S * w). Relaxed to 0 <= S <= 1 this is a transportation problem; its vertices are integer, so the
linear programme loses nothing, and its dual puts a price u_i on every row and v_j on every column:

    min over u, v of   n * sum(u) + n * sum(v) + sum_ij max(r_ij, 0),      r_ij = w_ij - u_i - v_j.

The dual of any prices bounds the score of every mask from above, and for a mask with n kept in every row and column

    bound - objective = sum over pruned of max(r, 0) + sum over kept of max(-r, 0)       (the gap).

It is 0, and the mask is optimal, when every kept entry has r >= 0 and every pruned entry r <= 0 (*complementary
slackness*). "At most n" is the same with u, v >= 0, and adds price times what is missing to n for every row and column
to the gap: who has a price must hold n. Everything here is int32 on a fixed-point grid, so a gap of 0 is exact.

**Phase 1, all blocks: coordinate descent on the dual.** For fixed v the dual is separable in the rows, and row i is at
its minimum for any u_i between the n-th and the (n+1)-th largest of w_ij - v_j: at the minimum r is positive in just n
entries. A few over-relaxed sweeps move rows and columns in turn to the midpoints of these intervals. Then the mask is
S = (r > 0), whose gap is 0 by construction: *if* it keeps n in every row and column, the block is solved and proved.
That is the case for about 97 % of Gaussian blocks, at the cost of a few selection networks.

**Phase 2, the other blocks: shortest augmenting paths.** Each row keeps the n largest of w_ij - v_j: complementary
slackness holds in the rows, only some columns hold too many (*sources*) or too few (*sinks*). Units move along
alternating paths, source column -> row that gives it up -> column that it takes instead -> ... -> sink. What a step
costs is |r| >= 0, so that Bellman-Ford gives all distances d_j; with v_j + max(D - d_j, 0) as new prices, r keeps its
signs and is 0 along every shortest path no longer than D, and moving units along these keeps complementary slackness.
So the mask stays optimal for its own column counts, and is optimal when these are n. Each round brings at least one
unit home, at most n * m are astray: the loop ends with the optimum, whatever the ties.

For "at most n" there is one more node, the *pool*, of price 0. A row with fewer than n keeps the rest in the pool, and
a column that is short though its price is 0 is filled up from the pool; the pool is source or sink of what is left.

**Layout.** Blocks are last: arrays are `(m, m, blocks)` and `(m, blocks)`, every operation is elementwise over blocks
and loops over m are unrolled or are short `fori_loop`s. Blocks are taken a chunk at a time, which stays in the cache.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._proof import Proof
from nm_jax.solvers.base import Solver, blank, well_scaled

_MAX_M = 32  # a row of a mask is one int32
_FAR = 1 << 30  # longer than any path, and twice that still fits
_SATURATED = (1 << 30) - 1


@dataclasses.dataclass(frozen=True)
class Exact(Solver):
    """The optimum, on the device and inside `jit`, with a proof of optimality for every block.

    max sum(mask * scores)  such that  every row and column of a block keeps n (or at most n)

    Scores are rounded to a fixed-point grid of 24 to 26 bits below the largest score of their block (one bit goes to
    the sign when there are negative ones and exactly n are kept); the mask is optimal on that grid for all scores, ties
    included. Dual coordinate descent solves most blocks, shortest augmenting paths the rest (see the module).

    Proof: the gap is 0 for every block.

    Cost: on two CPU cores millions of blocks of 2:4 and 4:8 per second, half a million of 8:16 and 100,000 of 16:32.
    Blocks of few different values take longer, 11,000 a second at 16:32 on binary scores: prices cannot tell tied
    entries apart, phase 1 proves hardly any block, and phase 2 has a unit astray in one of four columns, most paths of
    which cross, so that it takes about eight rounds. Any m up to 32; `MinCostFlow` takes larger ones.

    Args:
      chunk: blocks that are taken at a time; `None` chooses what fits the cache.
    """

    chunk: int | None = None

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM) and pattern.m <= _MAX_M

    def solve(self, scores, pattern):
        tiles = scores.shape[2:]
        blocks = scores.reshape(pattern.m, pattern.m, math.prod(tiles))
        bits, gap, exponent = _solve_blocks(blocks, pattern, self.chunk or _CHUNK)
        mask = _unpack(bits).reshape(scores.shape)
        return mask, _proof(gap.reshape(tiles), exponent.reshape(tiles), pattern, scores.dtype)


def _proof(gap: Int[Array, "*tiles"], exponent: Int[Array, "*tiles"], pattern: TransposableNM, dtype) -> Proof:
    """From a gap in units of the grid. What is not 0 stays above 0 however small the unit is."""
    lowest = jnp.finfo(dtype).minexp
    unit = jnp.ldexp(jnp.ones((), dtype), jnp.maximum(exponent, lowest))
    nothing = jnp.zeros_like(unit)
    # Half a unit for each entry that this mask keeps, and for each that the true optimum keeps; none on the grid of
    # the smallest subnormal, where all floats are.
    finest = lowest - jnp.finfo(dtype).nmant
    rounding = jnp.where(exponent <= finest, 0, pattern.n * pattern.m * unit)
    return Proof(nothing, gap.astype(dtype) * unit, rounding, nothing)


def _solve_blocks(scores: Float[Array, "m m blocks"], pattern: TransposableNM, chunk: int):
    """Row bitmasks (m, blocks), gaps and exponents of the grid (blocks,): one slab of blocks after another."""
    m, blocks = pattern.m, scores.shape[2]
    word = jnp.uint8 if m <= 8 else jnp.uint16 if m <= 16 else jnp.uint32
    bits = blank((m, blocks), word, scores)
    gap, exponent = (blank((blocks,), jnp.int32, scores) for _ in range(2))
    if not blocks:
        return bits, gap, exponent

    def solve_slab(start, size, carry):
        slab = lax.dynamic_slice_in_dim(scores, start, size, axis=2)
        found = _solve_slab(slab, pattern, chunk)
        found = (found[0].astype(word), *found[1:])
        return tuple(
            lax.dynamic_update_slice_in_dim(x, y, start, x.ndim - 1) for x, y in zip(carry, found, strict=True)
        )

    return _in_pieces(blocks, max(_SLAB_ENTRIES // m**2, chunk), solve_slab, (bits, gap, exponent))


def _solve_slab(scores: Float[Array, "m m blocks"], pattern: TransposableNM, chunk: int):
    """Phase 1 for every block, phase 2 for those that are left."""
    m, blocks = pattern.m, scores.shape[2]

    def descend(start, size, carry):
        finite, scale = well_scaled(lax.dynamic_slice_in_dim(scores, start, size, axis=2))
        grid, exponent = (_quantise if finite.dtype == jnp.float32 else _quantise_double)(finite, pattern)
        u, v = _descend(grid, pattern)
        bits, solved = _threshold(grid, u, v, pattern)
        found = (grid, bits, v, exponent + scale, solved)
        return tuple(
            lax.dynamic_update_slice_in_dim(x, y, start, x.ndim - 1) for x, y in zip(carry, found, strict=True)
        )

    empty = (
        blank(scores.shape, jnp.int32, scores),
        blank((m, blocks), jnp.int32, scores),
        blank((m, blocks), jnp.int32, scores),
        blank((blocks,), jnp.int32, scores),
        blank((blocks,), bool, scores),
    )
    grid, bits, v, exponent, solved = _in_pieces(blocks, chunk, descend, empty)

    width = min(_REPAIR_ROWS // m, blocks)
    count = jnp.sum(~solved, dtype=jnp.int32)
    # Past the end of the list are indices out of range: such blocks read as zeros, and their results are dropped.
    index = jnp.nonzero(~solved, size=blocks + width, fill_value=blocks)[0].astype(jnp.int32)

    def repair(carry):
        k, bits, gap = carry
        which = lax.dynamic_slice_in_dim(index, k * width, width)
        block = jnp.take(grid, which, axis=2, mode="fill", fill_value=0)
        kept, u, prices = _augment(block, jnp.take(v, which, axis=1, mode="fill", fill_value=0), pattern)
        found = duality_gap(block, _unpack(kept), u, prices, pattern)
        return k + 1, bits.at[:, which].set(kept, mode="drop"), gap.at[which].set(found, mode="drop")

    start = (jnp.int32(0), bits, blank((blocks,), jnp.int32, scores))
    _, bits, gap = lax.while_loop(lambda carry: carry[0] * width < count, repair, start)
    return bits, gap, exponent


_SLAB_ENTRIES = 1 << 21  # of a slab: phase 2 needs enough blocks at a time to fill its chunks
_CHUNK = 256  # blocks of phase 1 at a time: what fits the second-level cache
_REPAIR_ROWS = 1 << 11  # rows of phase 2 at a time: the more, the longer blocks wait for the slowest of them


def _in_pieces(total: int, size: int, body, carry):
    """`carry = body(start, length, carry)` over pieces of equal length; the last overlaps the one before instead of
    being padded."""
    pieces = -(-total // size)
    if pieces == 1:
        return body(0, total, carry)
    length = min(-(-total // (16 * pieces)) * 16, total)  # whole vectors
    return lax.fori_loop(0, pieces, lambda k, c: body(jnp.minimum(k * length, total - length), length, c), carry)


# ---------------------------------------------------------------------------------------------------------------------
# The grid


def _fraction_bits(m: int) -> int:
    """Bits of the grid below the largest score of a block.

    A path changes up to m - 1 rows by less than 2^bits each; m * 2^bits <= 2^29 keeps distances and prices in int32.
    """
    return min(26, 29 - (m - 1).bit_length())


def _quantise(
    scores: Float[Array, "m m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m m blocks"], Int[Array, " blocks"]]:
    """Scores in units of the grid of their block, rounded to nearest, and the exponent of the unit, a power of two.

    Integer arithmetic on the bits of the floats: floating-point operations may flush subnormal numbers to zero. What
    is kept at most n times never has a negative score: there negative scores become -1, whatever their size.

    The loops are there to be fusion boundaries: the CPU compiler fuses everything else, and would find the largest
    score of a block again for every entry.
    """
    m = pattern.m

    def parts(row):
        raw = lax.bitcast_convert_type(row, jnp.int32)
        magnitude = jnp.minimum(raw & 0x7FFFFFFF, 0x7F7FFFFF)
        return magnitude, (raw < 0) & (magnitude > 0)

    def widest(i, carry):
        largest, signed = carry
        magnitude, negative = parts(lax.dynamic_index_in_dim(scores, i, 0, keepdims=False))
        if pattern.at_most:
            magnitude = jnp.where(negative, 0, magnitude)
        return jnp.maximum(largest, magnitude), signed | negative

    def over_columns(j, carry):
        largest, signed = carry
        return jnp.maximum(largest, columns[0][j]), signed | columns[1][j]

    shape, blocks = scores.shape[1:], scores.shape[2:]
    columns = lax.fori_loop(0, m, widest, (blank(shape, jnp.int32, scores), blank(shape, bool, scores)))
    nothing = blank(blocks, jnp.int32, scores), blank(blocks, bool, scores)
    largest, signed = lax.fori_loop(0, m, over_columns, nothing)

    # A float is mantissa * 2^(exponent - 150). The grid of a block is 2^(largest exponent - 150 - finer).
    exponent = jnp.maximum(largest >> 23, 1)
    finer = jnp.full_like(exponent, _fraction_bits(m) - 24) - (0 if pattern.at_most else signed.astype(jnp.int32))
    finer = jnp.minimum(finer, exponent - 1)  # nothing is finer than the smallest subnormal

    def to_grid(i, grid):
        magnitude, negative = parts(lax.dynamic_index_in_dim(scores, i, 0, keepdims=False))
        mantissa = (magnitude & 0x7FFFFF) | jnp.where(magnitude >= 0x800000, 0x800000, 0)
        shift = jnp.minimum((exponent - finer + 2)[None] - jnp.maximum(magnitude >> 23, 1), 30)
        row = ((mantissa << 2) + ((1 << shift) >> 1)) >> shift
        row = jnp.where(negative, -1 if pattern.at_most else -row, row)
        return lax.dynamic_update_index_in_dim(grid, row, i, 0)

    grid = lax.fori_loop(0, m, to_grid, blank(scores.shape, jnp.int32, scores))
    return grid, exponent - 150 - finer


def _quantise_double(
    scores: Float[Array, "m m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m m blocks"], Int[Array, " blocks"]]:
    """The same for float64, whose subnormal numbers are scaled away before."""
    counted = jnp.maximum(scores, 0) if pattern.at_most else jnp.abs(scores)
    _, exponent = jnp.frexp(jnp.max(counted, axis=(0, 1)))
    signed = jnp.any(scores < 0, axis=(0, 1)) & (not pattern.at_most)
    exponent = exponent - _fraction_bits(pattern.m) + signed.astype(exponent.dtype)
    grid = jnp.round(jnp.ldexp(scores, -exponent[None, None]))
    return jnp.maximum(grid, -1 if pattern.at_most else grid).astype(jnp.int32), exponent.astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1: coordinate descent on the dual


def _descend(
    grid: Int[Array, "m m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m blocks"], Int[Array, "m blocks"]]:
    """Prices u, v close to the minimum of the dual; u is at its minimum for v."""
    sweeps, over, shift = _sweeps(pattern.m)

    def toward(old, new, first):
        """Over-relaxation: past the minimum by `over / 2^shift`, once there is something to start from."""
        moved = jnp.where(first, new, old + ((over * (new - old)) >> shift))
        return jnp.maximum(moved, 0) if pattern.at_most else moved

    def sweep(t, prices):
        u, v = prices
        best = _best_prices([grid[:, j] - v[j][None] for j in range(pattern.m)], pattern)
        if pattern.at_most:  # rows leave half of the price to the columns, so that both have room above 0
            best = jnp.where(t == 0, best >> 1, best)
        u = toward(u, best, t == 0)
        v = toward(v, _best_prices([grid[i] - u[i][None] for i in range(pattern.m)], pattern), t == 0)
        return u, v

    zeros = blank(grid.shape[1:], jnp.int32, grid)
    _, v = lax.fori_loop(0, sweeps, sweep, (zeros, zeros))
    return _best_prices([grid[:, j] - v[j][None] for j in range(pattern.m)], pattern), v


def _sweeps(m: int) -> tuple[int, int, int]:
    """Sweeps, and over-relaxation as numerator and power-of-two denominator; tuned on Gaussian blocks."""
    if m == 2:
        return 3, 1, 0
    if m <= 8:
        return 5, 5, 2
    if m <= 16:
        return 8, 11, 3
    return 14, 12, 3


def _best_prices(values: list[Int[Array, "*shape"]], pattern: TransposableNM) -> Int[Array, "*shape"]:
    """The middle of the prices that leave n of the values above it."""
    ordered = _descending(values)
    middle = (ordered[pattern.n - 1] + ordered[pattern.n]) >> 1
    return jnp.maximum(middle, 0) if pattern.at_most else middle


def _descending(values: list[Int[Array, "*shape"]]) -> list[Int[Array, "*shape"]]:
    """Sorted elementwise by a network of comparators; the compiler drops those that nothing depends on."""
    values = list(values)
    for a, b in _comparators(len(values)):
        values[a], values[b] = jnp.maximum(values[a], values[b]), jnp.minimum(values[a], values[b])
    return values


@functools.cache
def _comparators(size: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort. Sizes between powers of two go without the comparators that would reach padding:
    it stays at the end."""
    network = []

    def merge(low, length, stride):
        if 2 * stride < length:
            merge(low, length, 2 * stride)
            merge(low + stride, length, 2 * stride)
            network.extend((k, k + stride) for k in range(low + stride, low + length - stride, 2 * stride))
        else:
            network.append((low, low + stride))

    def sort(low, length):
        if length > 1:
            sort(low, length // 2)
            sort(low + length // 2, length // 2)
            merge(low, length, 1)

    sort(0, 1 << (size - 1).bit_length())
    return tuple((a, b) for a, b in network if b < size)


def _threshold(
    grid: Int[Array, "m m blocks"], u: Int[Array, "m blocks"], v: Int[Array, "m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m blocks"], Bool[Array, " blocks"]]:
    """Row bitmasks of r > 0, and whether they are a mask of the pattern, and so the optimum."""
    m, n = pattern.m, pattern.n
    bits = _total([_positive(grid[:, j] - v[j][None] - u) << j for j in range(m)])
    rows, cols = lax.population_count(bits), _column_counts(bits)
    if pattern.at_most:
        wrong = (rows > n) | (cols > n) | ((rows < n) & (u > 0)) | ((cols < n) & (v > 0))
    else:
        wrong = (rows != n) | (cols != n)
    return bits, ~functools.reduce(jnp.logical_or, [wrong[i] for i in range(m)])


def duality_gap(
    grid: Int[Array, "m m blocks"],
    mask: Bool[Array, "m m blocks"],
    u: Int[Array, "m blocks"],
    v: Int[Array, "m blocks"],
    pattern: TransposableNM,
) -> Int[Array, " blocks"]:
    """Dual bound minus objective of masks of the pattern, for any prices (non-negative ones for "at most n").

    It is summed from slacks, all of them non-negative, so that nothing cancels; it saturates at 2^30 - 1.
    """

    def add(a, b):
        return jnp.minimum(a + b, _SATURATED)

    def row(i, gap):
        r = grid[i] - v - u[i][None]
        slack = jnp.minimum(jnp.maximum(jnp.where(mask[i], -r, r), 0), _SATURATED)
        return functools.reduce(add, [slack[j] for j in range(pattern.m)], gap)

    gap = lax.fori_loop(0, pattern.m, row, blank(grid.shape[2:], jnp.int32, grid))
    if pattern.at_most:
        for prices, axis in ((u, 1), (v, 0)):
            missing = pattern.n - jnp.sum(mask, axis=axis, dtype=jnp.int32)
            unpaid = jnp.where((missing > 0) & (prices > _SATURATED // pattern.m), _SATURATED, prices * missing)
            gap = functools.reduce(add, [unpaid[i] for i in range(pattern.m)], gap)
    return gap


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2: shortest augmenting paths


class _Paths(NamedTuple):
    """Shortest paths from the sources to all columns (and the pool, which comes last) and rows.

    The parent of a row is the column that would lose the unit that the row gives up. The parent of a column is the row
    that would take it, `_ROOT` for a source, or m + k for column (or pool) k that hands over without a row.
    """

    to_column: Int[Array, "nodes blocks"]
    column_parent: Int[Array, "nodes blocks"]
    to_row: Int[Array, "m blocks"]
    row_parent: Int[Array, "m blocks"]


_ROOT = -1


def _augment(
    grid: Int[Array, "m m blocks"], v: Int[Array, "m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m blocks"], Int[Array, "m blocks"], Int[Array, "m blocks"]]:
    """The optimum from any column prices: row bitmasks, and prices u, v that prove it.

    At most n: `filled` counts the units that columns got from the pool, and a row with fewer than n kept entries keeps
    the others in the pool. Both give the pool's own balance.
    """
    m, n = pattern.m, pattern.n
    v = _align(grid, v, pattern)
    if not pattern.at_most:
        v = v - functools.reduce(jnp.minimum, [v[j] for j in range(m)])[None]
    bits = _keep_rows(grid, v, pattern)
    counts = _column_counts(bits)
    filled = jnp.where(v > 0, 0, jnp.maximum(n - counts, 0)) if pattern.at_most else jnp.zeros_like(v)
    excess = counts + filled - n
    if pattern.at_most:
        excess = jnp.concatenate([excess, -jnp.sum(excess, axis=0, keepdims=True, dtype=jnp.int32)])
    # Prices beyond this could, in theory, add up over the rounds to more than int32 holds.
    ceiling = _largest(v) + (1 << 28)

    def unfinished(carry):
        return jnp.any(carry[3] > 0)

    def round_(carry):
        bits, v, filled, excess = carry
        slack = _encoded_slack(grid, bits, v, pattern)
        paths, reach = _shortest_paths(slack, bits, v, filled, excess, ceiling, pattern)
        closer = jnp.maximum(reach[None] - paths.to_column, 0)
        bits, filled, excess = _move_units(paths, reach, bits, filled, excess, pattern)
        v = v + (closer[:m] - closer[m:] if pattern.at_most else closer)  # the pool's price stays 0
        return bits, v, filled, excess

    bits, v, _, _ = lax.while_loop(unfinished, round_, (bits, v, filled, excess))
    return bits, _row_prices(grid, bits, v, pattern), v


def _keep_rows(grid, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """Row bitmasks of the n largest of w_ij - v_j (of the positive ones, at most n).

    Row after row, ties go to the columns that still need most, which leaves few units astray.
    """
    m, n = pattern.m, pattern.n
    level = _descending([grid[:, j] - v[j][None] for j in range(m)])[n - 1]
    if pattern.at_most:
        level = jnp.maximum(level, 0)
    sure = _total([_positive(grid[:, j] - v[j][None] - level) << j for j in range(m)])
    need = n - _column_counts(sure)
    column = lax.broadcasted_iota(jnp.int32, v.shape, 0)
    never, always = 0, 1 << 20

    def keep(i, carry):
        bits, need = carry
        value = lax.dynamic_index_in_dim(grid, i, 0, keepdims=False) - v
        row_level = lax.dynamic_index_in_dim(level, i, 0, keepdims=True)
        tied = value == row_level
        if pattern.at_most:  # at level 0 the pool is as good; only a column that has a price must be filled
            tied = tied & ((row_level > 0) | ((v > 0) & (need > 0)))
        # Distinct among the tied, so that exactly n entries reach the n-th largest.
        key = jnp.where(value > row_level, always, jnp.where(tied, (need + m) * m + (column + i) % m + 1, never))
        nth = _descending([key[j] for j in range(m)])[n - 1]
        kept = ((key >= nth[None]) & (key > never)).astype(jnp.int32)
        row = _total([kept[j] << j for j in range(m)])
        need = need - jnp.where(tied, kept, 0)
        return lax.dynamic_update_index_in_dim(bits, row, i, 0), need

    return lax.fori_loop(0, m, keep, (jnp.zeros_like(v), need))[0]


def _align(grid, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """Column prices that are near v and are scores minus other prices.

    Midpoints are as good a proof, but hide ties: where scores take few values, prices on their lattice leave many
    entries at r = 0, free to go to whichever column needs them.
    """

    def ends(values):
        nth = _descending(values)[pattern.n - 1]
        return jnp.maximum(nth, 0) if pattern.at_most else nth

    def sweep(_, v):
        u = ends([grid[:, j] - v[j][None] for j in range(pattern.m)])
        return ends([grid[i] - u[i][None] for i in range(pattern.m)])

    return lax.fori_loop(0, 2, sweep, v)


def _row_prices(grid, bits, v, pattern: TransposableNM) -> Int[Array, "m blocks"]:
    """The least value that a row keeps (what it keeps in the pool is worth 0)."""
    m = pattern.m
    idle = lax.population_count(bits) < pattern.n
    least = jnp.where(idle, 0, _FAR) if pattern.at_most else jnp.full_like(v, _FAR)
    for j in range(m):
        least = jnp.where(_bit(bits, j), jnp.minimum(least, grid[:, j] - v[j][None]), least)
    return least


def _encoded_slack(grid, bits, v, pattern: TransposableNM) -> tuple[Int[Array, "m m blocks"], Int[Array, "m blocks"]]:
    """What each entry costs a path, with the mask in the sign: r for a kept entry, ~(-r) for a pruned one; and u."""
    u = _row_prices(grid, bits, v, pattern)
    column = lax.broadcasted_iota(jnp.int32, grid.shape, 1)
    kept = lax.shift_right_logical(jnp.broadcast_to(bits[:, None], grid.shape), column) & 1
    return grid - v[None] - u[:, None] - (1 - kept), u


def _shortest_paths(slack, bits, v, filled, excess, ceiling, pattern: TransposableNM):
    """Bellman-Ford from all sources at once, and how far units shall be moved.

    Units may go to any sink within `reach`, from the nearest to the farthest one: the farther, the more are brought
    home in one round. Prices rise by up to `reach`; when they come near their ceiling only the nearest sink is served,
    which never raises a price beyond that of a sink plus the longest path.

    A source reaches every sink: it has more than n rows, whose entries in a sink cannot all be kept.
    """
    m = pattern.m
    slack, u = slack
    sink = excess < 0
    idle = lax.population_count(bits) < pattern.n

    def farthest(to_column):
        return _largest(jnp.where(sink, to_column, -1))

    def through_column(j, carry):
        to_row, row_parent, to_column = carry
        cost = lax.dynamic_index_in_dim(slack, j, 1, keepdims=False)
        through = jnp.where(cost >= 0, lax.dynamic_index_in_dim(to_column, j, 0) + cost, _FAR)
        return jnp.minimum(through, to_row), jnp.where(through < to_row, j, row_parent), to_column

    def through_row(i, carry):
        to_column, column_parent, to_row = carry
        cost = lax.dynamic_index_in_dim(slack, i, 0, keepdims=False)
        through = jnp.where(cost < 0, lax.dynamic_index_in_dim(to_row, i, 0) + ~cost, _FAR)
        return jnp.minimum(through, to_column), jnp.where(through < to_column, i, column_parent), to_row

    def relax(carry):
        before, column_parent, to_row, row_parent = carry[0]
        columns, pool = before[:m], before[m:]
        to_row, row_parent, _ = lax.fori_loop(0, m, through_column, (to_row, row_parent, columns))
        if pattern.at_most:
            through = jnp.where(idle, pool, _FAR)
            to_row, row_parent = jnp.minimum(through, to_row), jnp.where(through < to_row, m, row_parent)
        # What is farther than every sink is of no use.
        limit = jnp.minimum(before, farthest(before)[None])
        columns, parents, _ = lax.fori_loop(0, m, through_row, (limit[:m], column_parent[:m], to_row))
        if pattern.at_most:
            pool, pool_parent = limit[m:], column_parent[m:]
            for parent, through in [(i, to_row[i] + u[i]) for i in range(m)] + [
                (m + j, jnp.where(filled[j] > 0, before[j], _FAR)) for j in range(m)
            ]:
                pool_parent = jnp.where(through[None] < pool, parent, pool_parent)
                pool = jnp.minimum(through[None], pool)
            through = pool + v
            columns, parents = jnp.minimum(through, columns), jnp.where(through < columns, 2 * m, parents)
            columns, parents = jnp.concatenate([columns, pool]), jnp.concatenate([parents, pool_parent])
        improved = columns < limit
        columns, parents = jnp.where(improved, columns, before), jnp.where(improved, parents, column_parent)
        return _Paths(columns, parents, to_row, row_parent), jnp.any(improved)

    start = _Paths(
        jnp.where(excess > 0, 0, _FAR),
        jnp.full_like(excess, _ROOT),
        jnp.full_like(bits, _FAR),
        jnp.full_like(bits, _ROOT),
    )
    paths, _ = lax.while_loop(lambda carry: carry[1], relax, (start, ~blank((), bool, bits)))
    nearest = _smallest(jnp.where(sink, paths.to_column, _FAR))
    reach = jnp.maximum(nearest, jnp.minimum(farthest(paths.to_column), ceiling - _largest(v)))
    return paths, jnp.where(nearest < _FAR, reach, 0)  # 0: a block without sources


def _move_units(paths: _Paths, reach, bits, filled, excess, pattern: TransposableNM):
    """Moves a unit to every sink within reach whose path crosses no other.

    First every block walks its paths back from the sinks, one step at a time, and notes the rows and columns on those
    that it will use; a path that meets a row or column in use, or a source with nothing left, is given up. Then all
    the noted entries change at once.
    """
    m = pattern.m
    nodes = excess.shape[0]
    node = lax.broadcasted_iota(jnp.int32, excess.shape, 0)
    open_ = (excess < 0) & (paths.to_column <= reach[None])
    nothing = blank(excess.shape[1:], jnp.int32, excess)

    def step(carry):
        excess, open_, at, sink, path, taken = carry
        # Blocks that are between two paths begin the next.
        begin = (at < 0) & functools.reduce(jnp.logical_or, [open_[j] for j in range(nodes)])
        first = _smallest(jnp.where(open_, node, nodes))
        at, sink = jnp.where(begin, first, at), jnp.where(begin, first, sink)
        open_ = open_ & ~((node == first[None]) & begin[None])
        path = tuple(jnp.where(begin, t, p) for t, p in zip(taken, path, strict=True))
        rows, cols, pool = path
        taken_rows, taken_cols, _ = taken

        walking = at >= 0
        parent = _pick(paths.column_parent, at)
        root = walking & (parent == _ROOT)
        arrived = root & (_pick(excess, at) > 0)
        by_row = walking & (parent >= 0) & (parent < m)
        row_bit = jnp.where(by_row, 1 << jnp.clip(parent, 0, m - 1), 0)
        col_bit = jnp.where(walking & ~root & (at < m), 1 << jnp.clip(at, 0, m - 1), 0)
        crossed = ((taken_rows & row_bit) | (taken_cols & col_bit)) != 0
        path = (rows | row_bit, cols | col_bit, jnp.where(walking & ~root & (at == m), 1, pool))

        change = jnp.where(node == at[None], -1, 0) + jnp.where(node == sink[None], 1, 0)
        excess = excess + jnp.where(arrived[None], change, 0)
        taken = tuple(jnp.where(arrived, p, t) for p, t in zip(path, taken, strict=True))
        following = jnp.where(by_row, _pick(paths.row_parent, parent), parent - m)
        at = jnp.where(walking & ~root & ~crossed, following, -1)
        return excess, open_, at, sink, path, taken

    def walking(carry):
        return jnp.any(carry[1]) | jnp.any(carry[2] >= 0)

    none = (nothing, nothing, nothing)
    start = (excess, open_, nothing - 1, nothing - 1, none, none)
    excess, _, _, _, _, (rows, cols, pool) = lax.while_loop(walking, step, start)

    row = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
    lost = jnp.where(_bit(rows[None], row) & (paths.row_parent < m), 1 << jnp.clip(paths.row_parent, 0, m - 1), 0)
    bits = bits ^ lost
    for j in range(m):
        gains = _bit(cols, j)[None] & (row == paths.column_parent[j][None])
        bits = bits ^ jnp.where(gains, _one(j), 0)
    if pattern.at_most:
        from_pool = _bit(cols[None], row) & (paths.column_parent[:m] == 2 * m)
        to_pool = (pool != 0)[None] & (paths.column_parent[m][None] == m + row)
        filled = filled + from_pool.astype(jnp.int32) - to_pool.astype(jnp.int32)
    return bits, filled, excess


# ---------------------------------------------------------------------------------------------------------------------
# Small pieces


def _one(j: int) -> Int[Array, ""]:
    return jnp.int32(1) << j


def _bit(bits: Int[Array, "*shape"], j) -> Bool[Array, "*shape"]:
    return (lax.shift_right_logical(*jnp.broadcast_arrays(bits, jnp.int32(j))) & 1) != 0


def _positive(x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """1 where x > 0, else 0, for |x| < 2^31: the sign of -x."""
    return lax.shift_right_logical(-x, jnp.full_like(x, 31))


def _unpack(bits: Int[Array, "m blocks"]) -> Bool[Array, "m m blocks"]:
    """Row bitmasks as a mask."""
    shape = (bits.shape[0], *bits.shape)
    column = lax.broadcasted_iota(bits.dtype, shape, 1)
    return (lax.shift_right_logical(jnp.broadcast_to(bits[:, None], shape), column) & 1) != 0


def _column_counts(bits: Int[Array, "m blocks"]) -> Int[Array, "m blocks"]:
    column = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
    return _total([lax.shift_right_logical(jnp.broadcast_to(row[None], bits.shape), column) & 1 for row in bits])


def _pick(table: Int[Array, "size blocks"], index: Int[Array, " blocks"]) -> Int[Array, " blocks"]:
    """table[index], block by block; any entry where the index points nowhere."""
    return jnp.take_along_axis(table, index[None], axis=0, mode="clip")[0]


def _total(terms):
    """The sum as a tree of additions, which pipelines better than a chain."""
    terms = list(terms)
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def _largest(values: Int[Array, "size blocks"]) -> Int[Array, " blocks"]:
    return functools.reduce(jnp.maximum, [values[k] for k in range(values.shape[0])])


def _smallest(values: Int[Array, "size blocks"]) -> Int[Array, " blocks"]:
    return functools.reduce(jnp.minimum, [values[k] for k in range(values.shape[0])])
