"""The paper's 2-approximation (Algorithm 1), vectorised over blocks, and its completion to exactly n."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers.base import Solver, order_key, rank, well_scaled


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
    left, then makes room by the best exchange (one entry out, two in).

    Args:
      complete: fill up to exactly n (to at most n, without entries that lower the objective, when the pattern says
        so). `False` is the paper's algorithm to the letter: its masks are at most n for any pattern.

    Cost: 2*m comparisons per entry, and one pass over the tiles for each entry that completion inserts.

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
            mask = _complete(mask, well_scaled(scores, pattern.at_most)[0], pattern)
        return mask, None


def _complete(mask: Bool[Array, "m m *tiles"], scores: Float[Array, "m m *tiles"], pattern: TransposableNM):
    if pattern.at_most:
        wanted = scores > 0
        mask = mask & wanted
    else:
        wanted = jnp.ones(mask.shape, bool)

    def short(mask):
        return jnp.sum(mask, axis=1) < pattern.n, jnp.sum(mask, axis=0) < pattern.n

    def insertable(mask):
        rows, cols = short(mask)
        return ~mask & rows[:, None] & cols[None] & wanted

    def insert(mask):
        return mask | _best(scores, insertable(mask))

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
        stuck = jnp.any(rows, axis=0) & ~jnp.any(insertable(mask), axis=(0, 1))
        out = _best(gain, mask & ~row_mask[None] & ~col_mask[:, None] & stuck[None, None])
        p, q = jnp.any(out, axis=1), jnp.any(out, axis=0)
        return (mask & ~out) | (row[:, None] & q[None]) | (p[:, None] & col[None])

    if pattern.at_most:
        return jax.lax.while_loop(lambda mask: jnp.any(insertable(mask)), insert, mask)
    return jax.lax.while_loop(lambda mask: jnp.any(short(mask)[0]), lambda mask: insert(exchange(mask)), mask)


def _best(values: Float[Array, "m m *tiles"], among: Bool[Array, "m m *tiles"]) -> Bool[Array, "m m *tiles"]:
    """The one entry of each tile with the largest value among those allowed; none where none is."""
    flat = jnp.where(among, values, jnp.finfo(values.dtype).min).reshape(-1, *values.shape[2:])
    index = jnp.arange(flat.shape[0]).reshape(-1, *[1] * (flat.ndim - 1))
    return (index == jnp.argmax(flat, axis=0)[None]).reshape(values.shape) & among


def _first(flags: Bool[Array, " m *tiles"]) -> Bool[Array, " m *tiles"]:
    """One-hot: the first True along the first axis; none where there is none."""
    index = jnp.arange(flags.shape[0]).reshape(-1, *[1] * (flags.ndim - 1))
    return (index == jnp.argmax(flags, axis=0)[None]) & flags


def _pick(tiles, row: Bool[Array, " m *tiles"]):
    """The row of every tile that a one-hot vector points at; zeros where it points nowhere."""
    return jnp.sum(jnp.where(row[:, None], tiles, jnp.zeros_like(tiles)), axis=0).astype(tiles.dtype)
