"""Patterns whose optimum is a sort: n:m groups, sequential windows, and the unstructured threshold."""

import dataclasses
import functools

import jax.numpy as jnp

from nm_jax._core.patterns import NM, SequentialNM, Unstructured
from nm_jax._core.select import Count, largest
from nm_jax.solvers.base import Solver, order_key, rank, well_scaled


@dataclasses.dataclass(frozen=True)
class TopK(Solver):
    """Keeps the n largest scores of every group, or the largest scores of a whole leaf: the optimum.

    Ties go to the lower index. O(m) elementwise passes for n:m; 32 counting passes (64 for float64) for
    unstructured masks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[3.0], [1.0]]), "1:2", nm.solvers.TopK())[:, 0].tolist()
      [True, False]
    """

    def supports(self, pattern):
        return isinstance(pattern, NM | Unstructured)

    def solve(self, scores, pattern):
        keys = order_key(scores)
        if isinstance(pattern, NM):
            return rank(keys) < pattern.n, None
        flat = keys.reshape(keys.shape[0] * keys.shape[1], *keys.shape[2:])
        mask = largest(flat, Count.of(pattern.kept(flat.shape[0])))
        return mask.reshape(keys.shape), None

    def solve_edges(self, scores, valid, pattern):
        mask, _ = self.solve(jnp.where(valid, scores, jnp.nan), pattern)  # NaN goes last
        return mask & valid & (order_key(scores) >= 0), None


@dataclasses.dataclass(frozen=True)
class Window(Solver):
    """Prunes the window of m - n consecutive entries with the smallest sum of scores: the optimum for n:m-S.

    Ties keep the lower indices. O(n) elementwise passes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[3.0], [4.0], [5.0]]), "1:3-S", nm.solvers.Window())[:, 0].tolist()
      [False, False, True]
    """

    def supports(self, pattern):
        return isinstance(pattern, SequentialNM)

    def solve(self, scores, pattern):
        return _outside_lightest_window(well_scaled(scores)[0], pattern), None

    def solve_edges(self, scores, valid, pattern):
        wanted = valid & (order_key(scores) >= 0)
        worth = jnp.where(wanted, well_scaled(jnp.where(wanted, scores, 0))[0], 0)
        return _outside_lightest_window(worth, pattern) & wanted, None


def _outside_lightest_window(scores, pattern: SequentialNM):
    zeros = pattern.m - pattern.n
    sums = [functools.reduce(jnp.add, scores[start : start + zeros]) for start in range(pattern.n + 1)]
    first = pattern.n - jnp.argmin(jnp.stack(sums[::-1]), axis=0)[None]
    index = jnp.arange(pattern.m).reshape(-1, *[1] * (scores.ndim - 1))
    return (index < first) | (index >= first + zeros)
