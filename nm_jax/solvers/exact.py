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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._exact_bits import unpack
from nm_jax.solvers._exact_descent import descend, duality_gap, threshold
from nm_jax.solvers._exact_paths import augment
from nm_jax.solvers._grid import proof_on_grid, quantise, quantise_double
from nm_jax.solvers._pieces import in_pieces
from nm_jax.solvers.base import Solver, blank, well_scaled

_MAX_M = 32  # a row of a mask is one int32


@dataclasses.dataclass(frozen=True)
class Exact(Solver):
    """The optimum, on the device and inside `jit`, with a proof of optimality for every block.

    max sum(mask * scores)  such that  every row and column of a block keeps n (or at most n)

    Scores are rounded to a fixed-point grid of 24 to 26 bits below the largest score of their block (one bit goes to
    the sign when there are negative ones and exactly n are kept); the mask is optimal on that grid for all scores, ties
    included. Dual coordinate descent solves most blocks, shortest augmenting paths the rest (see the module).

    Proof: the gap is 0 for every block. Temporary memory: about 5 bytes per entry, of the slabs that `nm_jax.solve` and
    `nm_jax.compute_masks` pass on, of all blocks in a call of your own.

    Cost: the results in the documentation have blocks per second. At most n takes longer, most of all on sorted and
    rank-one blocks. Blocks of few different values take longer too: prices cannot tell tied entries apart, so that
    phase 2 has more of them. Any m up to 32; `MinCostFlow` takes larger ones.

    Args:
      chunk: blocks that are taken at a time; `None` chooses what fits the cache.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]]), "1:3-T", nm.solvers.Exact()).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    chunk: int | None = None

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM) and pattern.m <= _MAX_M

    def solve(self, scores, pattern):
        tiles = scores.shape[2:]
        blocks = scores.reshape(pattern.m, pattern.m, math.prod(tiles))
        bits, gap, exponent = _solve_blocks(blocks, pattern, self.chunk or _CHUNK)
        word = jnp.uint8 if pattern.m <= 8 else jnp.uint16 if pattern.m <= 16 else jnp.uint32
        mask = unpack(bits.astype(word)).reshape(scores.shape)
        return mask, proof_on_grid(gap.reshape(tiles), exponent.reshape(tiles), pattern, scores.dtype)


class _Descended(NamedTuple):
    """Blocks after phase 1."""

    grid: Int[Array, "m m blocks"]
    exponent: Int[Array, " blocks"]
    bits: Int[Array, "m blocks"]
    v: Int[Array, "m blocks"]
    solved: Bool[Array, " blocks"]


def _solve_blocks(
    scores: Float[Array, "m m blocks"], pattern: TransposableNM, chunk: int
) -> tuple[Int[Array, "m blocks"], Int[Array, " blocks"], Int[Array, " blocks"]]:
    """Row bitmasks, gaps and exponents of the grid: phase 1 for every block, phase 2 for those that are left."""
    first = _phase_1(scores, pattern, chunk)
    bits, gap = _phase_2(first, pattern)
    return bits, gap, first.exponent


def _phase_1(scores: Float[Array, "m m blocks"], pattern: TransposableNM, chunk: int) -> _Descended:
    m, blocks = pattern.m, scores.shape[2]

    def descend_piece(start, size, carry):
        finite, scale = well_scaled(lax.dynamic_slice_in_dim(scores, start, size, axis=2), pattern.at_most)
        grid, exponent = (quantise if finite.dtype == jnp.float32 else quantise_double)(finite, pattern)
        u, v = descend(grid, pattern)
        bits, solved = threshold(grid, u, v, pattern)
        found = _Descended(grid, exponent + scale, bits, v, solved)
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, x.ndim - 1), carry, found)

    of_rows, of_blocks = blank((m, blocks), jnp.int32, scores), blank((blocks,), jnp.int32, scores)
    empty = _Descended(blank(scores.shape, jnp.int32, scores), of_blocks, of_rows, of_rows, of_blocks == 1)
    return in_pieces(blocks, chunk, descend_piece, empty) if blocks else empty


def _phase_2(blocks: _Descended, pattern: TransposableNM) -> tuple[Int[Array, "m blocks"], Int[Array, " blocks"]]:
    """Row bitmasks and gaps of all blocks. Those that are not solved are gathered, some at a time."""
    m, total = blocks.v.shape
    if not total:
        return blocks.bits, blocks.exponent
    width = min(_REPAIR_ROWS // m, total)
    count = jnp.sum(~blocks.solved, dtype=jnp.int32)
    # Past the end of the list are indices out of range: such blocks read as zeros, and their results are dropped.
    index = jnp.nonzero(~blocks.solved, size=total + width, fill_value=total)[0].astype(jnp.int32)

    def repair(carry):
        k, bits, gap = carry
        which = lax.dynamic_slice_in_dim(index, k * width, width)
        grid = jnp.take(blocks.grid, which, axis=2, mode="fill", fill_value=0)
        kept, u, v = augment(grid, jnp.take(blocks.v, which, axis=1, mode="fill", fill_value=0), pattern)
        found = duality_gap(grid, unpack(kept), u, v, pattern)
        return k + 1, bits.at[:, which].set(kept, mode="drop"), gap.at[which].set(found, mode="drop")

    start = (jnp.int32(0), blocks.bits, blank((total,), jnp.int32, blocks.v))
    return lax.while_loop(lambda carry: carry[0] * width < count, repair, start)[1:]


_CHUNK = 256  # blocks of phase 1 at a time: what fits the second-level cache
_REPAIR_ROWS = 1 << 11  # rows of phase 2 at a time: the more, the longer blocks wait for the slowest of them
