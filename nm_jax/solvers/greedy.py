"""The paper's 2-approximation (Algorithm 1), vectorised over blocks, and its completion to exactly n."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._pieces import in_pieces
from nm_jax.solvers.base import Solver, blank, order_key, rank, well_scaled


@dataclasses.dataclass(frozen=True)
class Greedy(Solver):
    """Algorithm 1 of the paper: prunes light to heavy whatever a row or a column still has to prune.

    Going through the entries from light to heavy, an entry is pruned while its row *or* its column has fewer than
    N = m - n pruned ones. (The paper prints `<=`; its proof and its Fig. A.1 use `<`.) No sequential pass is needed.
    When an entry comes up, fewer than N lighter ones in its row means that its row has room, and conversely a row has
    room until N of its own entries have come up, all of which were pruned. So

        pruned = (the N lightest of each row) or (the N lightest of each column),

    from which the guarantee follows at once: the *pruned* weight is at most twice the optimum, each half of the union
    being a lower bound. The bound is tight (Appendix A.2); on Gaussian blocks the ratio is about 1.2.

    Algorithm 1 prunes more than it must: rows and columns can keep fewer than n, which loses 4 to 10 % of the kept
    weight. Completion gives that back: it inserts the heaviest entry for which row and column have room until none is
    left, makes room by the best exchange (one entry out, two in), and at last swaps two kept entries for the two where
    their rows and columns meet while that gains, a few rounds. Of Gaussian 2:4 to 16:32, 0.1 to 0.2 % is lost then.

    Args:
      complete: fill up to exactly n (to at most n, without entries that lower the objective, when the pattern says
        so). `False` is the paper's algorithm to the letter: its masks are at most n for any pattern.

    Cost: 2*m comparisons per entry, and as many passes over the tiles as the slowest of some hundred tiles needs: for
    completion a handful, for each round of swaps m.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]]), "1:3-T", nm.solvers.Greedy()).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    complete: bool = True

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM)

    def solve(self, scores, pattern):
        keys = ~order_key(scores)  # complement: ascending order, and ties still go to the lower index
        zeros = pattern.m - pattern.n
        row_place = jnp.swapaxes(rank(jnp.swapaxes(keys, 0, 1)), 0, 1)
        mask = (row_place >= zeros) & (rank(keys) >= zeros)
        if self.complete:
            blocks = (pattern.m, pattern.m, math.prod(scores.shape[2:]))
            finite, _ = well_scaled(scores, pattern.at_most)
            mask = _complete_pieces(mask.reshape(blocks), finite.reshape(blocks), pattern).reshape(scores.shape)
        return mask, None


_PIECE_ENTRIES = 1 << 15  # of a piece: a few arrays of them fit the second-level cache
_ROUNDS_OF_SWAPS = 6


def _complete_pieces(mask: Bool[Array, "m m blocks"], scores: Float[Array, "m m blocks"], pattern: TransposableNM):
    m, blocks = pattern.m, mask.shape[2]

    def complete(start, size, carry):
        piece, values = (lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (mask, scores))
        return lax.dynamic_update_slice_in_dim(carry, _complete(piece, values, pattern), start, 2)

    return in_pieces(blocks, max(_PIECE_ENTRIES // (m * m), 1), complete, mask) if blocks else mask


def _complete(mask: Bool[Array, "m m blocks"], scores: Float[Array, "m m blocks"], pattern: TransposableNM):
    m = pattern.m
    if pattern.at_most:
        wanted = scores > 0
        mask = mask & wanted
    else:
        wanted = jnp.ones(mask.shape, bool)

    def short(mask):
        return _count(mask, 1) < pattern.n, _count(mask, 0) < pattern.n

    def insertable(mask):
        rows, cols = short(mask)
        return ~mask & rows[:, None] & cols[None] & wanted

    def insert(mask, open_):
        """All entries that are the heaviest insertable of their row and of their column: the others that could go
        first are in other rows and columns, so that one at a time, heavy to light, leads to the same mask."""
        (_, col), (_, row) = _heaviest(scores, open_, 1), _heaviest(scores, open_, 0)
        return mask | (_one_hot(col, 1, m) & _one_hot(row, 0, m))

    def exchange(mask):
        """Where nothing can be inserted, all short rows meet all short columns in kept entries. Take the first pair
        (i, j): some kept (p, q) can go out for (i, q) and (p, j). Otherwise the rows p that miss column j, more than
        m - n of them, would keep entries only where row i does, in fewer than n columns: they would be short and
        insertable at (p, j)."""
        rows, cols = short(mask)
        row, col = _first(rows), _first(cols)
        row_mask, row_scores = _pick(mask, row), _pick(scores, row)
        col_mask, col_scores = _pick(jnp.swapaxes(mask, 0, 1), col), _pick(jnp.swapaxes(scores, 0, 1), col)
        gain = row_scores[None] + col_scores[:, None] - scores
        allowed = mask & ~row_mask[None] & ~col_mask[:, None] & jnp.any(rows, axis=0)[None, None]
        best, q_of_row = _heaviest(gain, allowed, 1)
        _, best_row = _heaviest(best, q_of_row >= 0, 0)
        out = _one_hot(q_of_row, 1, m) & _one_hot(best_row, 0, m)[:, None]
        p, q = jnp.any(out, axis=1), jnp.any(out, axis=0)
        return (mask & ~out) | (row[:, None] & q[None]) | (p[:, None] & col[None])

    def fill(mask):
        return lax.while_loop(lambda mask: jnp.any(insertable(mask)), lambda mask: insert(mask, insertable(mask)), mask)

    def improve(mask):
        mask = lax.fori_loop(0, m, lambda t, mask: _meet(t, mask, scores, wanted, pattern, 0), mask)
        if pattern.at_most:
            mask = lax.fori_loop(0, m, lambda t, mask: _meet(t, mask, scores, wanted, pattern, 1), mask)
            mask = fill(mask)
        return mask

    def round_(carry):
        rounds, before, _ = carry
        after = improve(before)
        return rounds + 1, after, jnp.any(after != before)

    mask = fill(mask)
    if not pattern.at_most:
        mask = lax.while_loop(lambda mask: jnp.any(short(mask)[0]), lambda mask: fill(exchange(mask)), mask)
    # Bounded: rounded differences could go round in circles.
    start = (jnp.int32(0), mask, ~blank((), bool, scores))
    return lax.while_loop(lambda carry: carry[2] & (carry[0] < _ROUNDS_OF_SWAPS), round_, start)[1]


def _meet(
    t,
    mask: Bool[Array, "m m blocks"],
    scores: Float[Array, "m m blocks"],
    wanted: Bool[Array, "m m blocks"],
    pattern: TransposableNM,
    axis: int,
) -> Bool[Array, "m m blocks"]:
    """Swaps that gain: two kept entries out, for the two others where their rows and columns meet.

    Row i meets row t - i modulo m, so that after m turns every two rows have met (columns, where the axis is 1). Of the
    columns where only one row keeps its entry, a pair gives away the one that costs it least and takes the one that
    it gains most from. Each row finds this out for itself, and both to the same result. At most n: a row that is short
    need not give for what it takes.
    """
    m = pattern.m
    partner = (jnp.asarray(t, jnp.int32) - jnp.arange(m, dtype=jnp.int32)) % m

    def of_partner(x, axis=axis):
        return jnp.take(x, partner, axis=axis)

    difference = scores - of_partner(scores)
    gives = mask & ~of_partner(mask) & of_partner(wanted)
    takes = ~mask & of_partner(mask) & wanted
    (saved, out), (gain, into) = _heaviest(-difference, gives, 1 - axis), _heaviest(difference, takes, 1 - axis)
    if pattern.at_most:
        short = _count(mask, 1 - axis) < pattern.n
        (saved, out), (gain, into) = _or_nothing(saved, out, short), _or_nothing(gain, into, of_partner(short, 0))
    worth = gain > -saved  # false where there is nothing to give or to take
    changed = [_one_hot(jnp.where(worth, other, -1), 1 - axis, m) for other in (out, into)]
    return mask ^ (changed[0] | changed[1])


def _or_nothing(value: Float[Array, "m blocks"], index: Int[Array, "m blocks"], free: Bool[Array, "m blocks"]):
    """What is worth less than nothing is left where that is free."""
    nothing = free & (value < 0)
    return jnp.where(nothing, 0, value), jnp.where(nothing, -1, index)


def _count(mask: Bool[Array, "m m blocks"], axis: int) -> Int[Array, "m blocks"]:
    """Kept entries along an axis."""
    kept = mask.astype(jnp.int32)

    def add(k, count):
        return count + lax.dynamic_index_in_dim(kept, k, axis, keepdims=False)

    return lax.fori_loop(0, mask.shape[0], add, blank(mask.shape[1:], jnp.int32, kept))


def _heaviest(
    values: Float[Array, " size *rest"], among: Bool[Array, " size *rest"], axis: int
) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """The largest value along an axis among those allowed, and its index, the first of them; without any, the lowest
    float and -1."""

    def look(k, carry):
        best, index = carry
        value, allowed = (lax.dynamic_index_in_dim(x, k, axis, keepdims=False) for x in (values, among))
        better = allowed & (value > best)
        return jnp.where(better, value, best), jnp.where(better, jnp.asarray(k, jnp.int32), index)

    lowest = jnp.finfo(values.dtype).min
    nothing = blank(values.shape[:axis] + values.shape[axis + 1 :], jnp.int32, values)
    return lax.fori_loop(0, values.shape[axis], look, (nothing.astype(values.dtype) + lowest, nothing - 1))


def _one_hot(index: Int[Array, "..."], axis: int, size: int) -> Bool[Array, "..."]:
    """True at the index, along an axis that is inserted; nowhere for -1."""
    shape = (*index.shape[:axis], size, *index.shape[axis:])
    return lax.broadcasted_iota(jnp.int32, shape, axis) == jnp.expand_dims(index, axis)


def _first(flags: Bool[Array, " m *tiles"]) -> Bool[Array, " m *tiles"]:
    """One-hot: the first True along the first axis; none where there is none."""
    index = jnp.arange(flags.shape[0]).reshape(-1, *[1] * (flags.ndim - 1))
    return (index == jnp.argmax(flags, axis=0)[None]) & flags


def _pick(tiles, row: Bool[Array, " m *tiles"]):
    """The row of every tile that a one-hot vector points at; zeros where it points nowhere."""
    return jnp.sum(jnp.where(row[:, None], tiles, jnp.zeros_like(tiles)), axis=0).astype(tiles.dtype)
