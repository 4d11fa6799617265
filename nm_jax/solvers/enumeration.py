"""The optimum of any pattern with small tiles: every mask of a tile is tried."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nm_jax.solvers.base import Solver, blank, order_key, well_scaled


@dataclasses.dataclass(frozen=True)
class Enumeration(Solver):
    """Tries all the masks that `pattern.full` accepts: the optimum for any pattern whose tiles have up to 16 entries.

    It asks nothing else of a pattern, so that a new one has a solver at once. Of masks that keep the same, the first in
    binary order is found. Sums of scores are rounded as their dtype rounds.

    Cost: an addition per entry and mask: 90 masks for 2:4-T, 12,870 for any 8 of 16.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[3.0], [1.0], [2.0], [4.0]]), "2:4", nm.solvers.Enumeration())[:, 0].tolist()
      [True, False, False, True]
    """

    def supports(self, pattern):
        return pattern.masks() is not None

    def solve(self, scores, pattern):
        return _best(scores, pattern.full, len(pattern.masks()), pattern.relaxed == pattern), None

    def solve_edges(self, scores, valid, pattern):
        wanted = valid & (order_key(scores) >= 0)
        return _best(jnp.where(wanted, scores, 0), pattern.allows, len(pattern.masks(allowed=True))) & wanted, None


def _best(scores, fits, count: int, at_most: bool = False):
    """Of the `count` masks that fit, the one that keeps most."""
    rows, cols = scores.shape[:2]
    scores, _ = well_scaled(scores, at_most)
    entries = [(k, scores[divmod(k, cols)]) for k in range(rows * cols)]
    # The masks as integers; computed here, as an operation of the partitioner may not hold constant arrays.
    every = jnp.arange(1 << len(entries), dtype=jnp.int32)
    codes = jnp.nonzero(fits(_kept(every, rows, cols)), size=count)[0].astype(jnp.int32)

    def attempt(k, best):
        most, chosen = best
        total = functools.reduce(
            jnp.add, [jnp.where((codes[k] >> entry) & 1 == 1, score, 0) for entry, score in entries]
        )
        better = (total > most) | (k == 0)
        return jnp.where(better, total, most), jnp.where(better, codes[k], chosen)

    start = (blank(scores.shape[2:], scores.dtype, scores), blank(scores.shape[2:], jnp.int32, scores))
    return _kept(jax.lax.fori_loop(0, count, attempt, start)[1], rows, cols)


def _kept(codes, rows: int, cols: int):
    """Masks from integers, whose bits are their entries row by row: (rows, cols, *shape)."""
    entries = [(codes >> entry) & 1 == 1 for entry in range(rows * cols)]
    return jnp.stack(entries).reshape(rows, cols, *codes.shape)
