"""The optimal transposable mask as a minimum-cost flow, solved on the host (Section 4, Fig. 4 of the paper)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import lazy_loader
import numpy as np

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers.base import Solver, well_scaled

scipy = lazy_loader.load("scipy")  # loaded when a block is solved


@dataclasses.dataclass(frozen=True)
class MinCostFlow(Solver):
    """The optimum, block by block on the host with `scipy.optimize.linear_sum_assignment`.

    The flow of the paper's Fig. 4 is written as an assignment. Every entry (i, j) of a block is an agent. It takes
    one of the n *keep* slots of column j, for its score, or one of the m - n *discard* slots of row i, for nothing.
    When all agents have a slot, n entries of every column and of every row are kept. For *at most n*, every row has n
    more discard slots, and idle agents, worth nothing, may take these or the keep slots.

    Cost: an assignment over m^2 agents (m^2 + n*m for at most n) per block, one after another: for masks that are found
    once, and the oracle of the tests. Under `jax.jit` it is a host callback.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> scores = jnp.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]])
      >>> nm.solve(scores, "1:3-T", nm.solvers.MinCostFlow()).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM)

    def solve(self, scores, pattern):
        return on_host(functools.partial(_optimum, pattern), scores, pattern), None


def on_host(solve_block, scores, pattern: TransposableNM):
    """A mask for each tile from a host function of one numpy block, as a `jax.pure_callback`.

    Args:
      solve_block: float64 (rows, cols) array -> boolean (rows, cols) array.
      scores: (rows, cols, *tiles).
      pattern: what is solved.
    """

    def solve_all(scores):
        scores = np.asarray(scores, np.float64)
        blocks = scores.reshape(*scores.shape[:2], math.prod(scores.shape[2:]))
        mask = np.empty(blocks.shape, bool)
        for k in range(blocks.shape[2]):
            mask[:, :, k] = solve_block(blocks[:, :, k])
        return mask.reshape(scores.shape)

    result = jax.ShapeDtypeStruct(scores.shape, jnp.bool_)
    return jax.pure_callback(solve_all, result, well_scaled(scores, pattern.at_most)[0], vmap_method="sequential")


def _optimum(pattern: TransposableNM, block: np.ndarray) -> np.ndarray:
    slots = _slots(pattern)
    padded = np.append(block.ravel(), [0.0, -np.inf])  # what a discarded entry and a forbidden pair are worth
    agents, chosen = scipy.optimize.linear_sum_assignment(padded[slots], maximize=True)
    keep_slots = pattern.n * pattern.m
    kept = chosen[agents < block.size] < keep_slots
    return kept.reshape(block.shape)


@functools.cache
def _slots(pattern: TransposableNM) -> np.ndarray:
    """Where the value of each (agent, slot) pair is found: an entry of the block, then 'nothing', then 'forbidden'."""
    n, m = pattern.n, pattern.m
    entry = np.arange(m * m).reshape(m, m)
    nothing, forbidden = m * m, m * m + 1
    columns, rows = np.repeat(np.arange(m), n), np.repeat(np.arange(m), m - n)
    keep = np.where(np.arange(m)[None, :, None] == columns, entry[:, :, None], forbidden)
    discard = np.where(np.arange(m)[:, None, None] == rows, nothing, forbidden)
    table = np.concatenate([keep, np.broadcast_to(discard, (m, m, len(rows)))], axis=2).reshape(m * m, -1)
    if pattern.at_most:
        more = np.where(np.repeat(np.arange(m), m)[:, None] == np.repeat(np.arange(m), n), nothing, forbidden)
        idle = np.concatenate([np.full(n * m, nothing), np.full(len(rows), forbidden), np.full(n * m, nothing)])
        table = np.concatenate([table, more], axis=1)
        table = np.concatenate([table, np.broadcast_to(idle, (n * m, idle.size))])
    return table
