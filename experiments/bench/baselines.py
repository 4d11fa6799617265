"""Solvers of transposable masks that this library is compared with, written for the benchmark alone.

All take scores (m, m, blocks) and a pattern with exactly n, and return a boolean mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float
from ortools.graph.python import min_cost_flow
from scipy.optimize import linprog

from nm_jax import TransposableNM


def ortools(scores: np.ndarray, pattern: TransposableNM) -> np.ndarray:
    """`SimpleMinCostFlow` on scores rounded to 24 bits below the largest of their block."""
    scores = np.asarray(scores, np.float64)
    scale = 2**24 / np.maximum(np.abs(scores).max((0, 1)), 1e-300)
    return ortools_integer(np.rint(scores * scale).astype(np.int64), pattern)


def ortools_integer(grid: np.ndarray, pattern: TransposableNM, together: int = 64) -> np.ndarray:
    """`SimpleMinCostFlow` on integer scores, many blocks in one network; also takes "at most n"."""
    m, n, blocks = pattern.m, pattern.n, grid.shape[2]
    mask = np.zeros(grid.shape, bool)
    for start in range(0, blocks, together):
        part = grid[:, :, start : start + together]
        count = part.shape[2]
        row, col, block = np.meshgrid(np.arange(m), np.arange(m), np.arange(count), indexing="ij")
        flow = min_cost_flow.SimpleMinCostFlow()
        tails, heads = (2 * block * m + row).ravel(), (2 * block * m + m + col).ravel()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(tails, heads, np.ones_like(tails), -part.ravel())
        nodes = np.arange(2 * count * m)
        rows, cols = nodes[nodes // m % 2 == 0], nodes[nodes // m % 2 == 1]
        if pattern.at_most:  # rows may leave units with a drain, and columns may take them from it
            drain = np.full_like(rows, 2 * count * m)
            room, free = np.full_like(rows, n), np.zeros_like(rows)
            flow.add_arcs_with_capacity_and_unit_cost(rows, drain, room, free)
            flow.add_arcs_with_capacity_and_unit_cost(drain, cols, room, free)
        flow.set_nodes_supplies(nodes, np.where(nodes // m % 2 == 0, n, -n))
        if flow.solve() != flow.OPTIMAL:
            raise RuntimeError("OR-tools found no optimum")
        mask[:, :, start : start + together] = flow.flows(arcs).reshape(part.shape) > 0
    return mask


def highs(scores: np.ndarray, pattern: TransposableNM, together: int = 64) -> np.ndarray:
    """The linear programme of many blocks at once; its vertices are integer."""
    m, blocks = pattern.m, scores.shape[2]
    scores = np.moveaxis(np.asarray(scores, np.float64), 2, 0)
    mask = np.zeros(scores.shape, bool)
    eye, ones = scipy.sparse.eye(m), np.ones((1, m))
    sums = scipy.sparse.vstack([scipy.sparse.kron(eye, ones), scipy.sparse.kron(ones, eye)])
    for start in range(0, blocks, together):
        part = scores[start : start + together]
        matrix = scipy.sparse.kron(scipy.sparse.eye(len(part)), sums, format="csr")
        found = linprog(-part.ravel(), A_eq=matrix, b_eq=np.full(matrix.shape[0], pattern.n), bounds=(0, 1))
        mask[start : start + together] = found.x.reshape(part.shape) > 0.5
    return np.moveaxis(mask, 0, 2)


def entropic(
    scores: Float[Array, "m m blocks"], pattern: TransposableNM, iterations: int = 300, sharpness: float = 100.0
) -> Bool[Array, "m m blocks"]:
    """In the style of TSENOR (2025): entropic optimal transport with capacities by Dykstra's algorithm, rounded
    greedily from the largest entry of the plan to the smallest, and completed by the best insertions and exchanges.

    `sharpness` is the inverse temperature for scores that are at most 1; beyond about 150 a row underflows in float32.
    """
    z = scores * (sharpness / jnp.maximum(jnp.max(scores, axis=(0, 1), keepdims=True), 1e-30))
    # Scaled by the largest of each row, then of each column, so that no line underflows as a whole.
    z = z - jnp.max(z, axis=1, keepdims=True)
    z = z - jnp.max(z, axis=0, keepdims=True)

    def project(_, state):
        plan, dual = state
        plan = plan * (pattern.n / jnp.sum(plan, axis=1, keepdims=True))
        plan = plan * (pattern.n / jnp.sum(plan, axis=0, keepdims=True))
        unclipped = plan * dual
        return jnp.minimum(unclipped, 1), jnp.maximum(unclipped, 1)

    plan, dual = jax.lax.fori_loop(0, iterations, project, (jnp.exp(z), jnp.ones_like(z)))
    return _complete(_round(plan * dual, pattern), scores, pattern)


def _round(plan, pattern: TransposableNM):
    """Keeps entries from the largest to the smallest while their row and column have room."""
    m, n = pattern.m, pattern.n
    order = jnp.argsort(-plan.reshape(m * m, -1), axis=0).astype(jnp.int32)
    line = jnp.arange(m, dtype=jnp.int32)[:, None]

    def keep(k, mask):
        row, col = (line == index[None] for index in (order[k] // m, order[k] % m))
        full = (jnp.sum(mask, axis=1) == n) & row | (jnp.sum(mask, axis=0) == n) & col
        return mask | (row[:, None] & col[None] & ~jnp.any(full, axis=0)[None, None])

    return jax.lax.fori_loop(0, m * m, keep, jnp.zeros(plan.shape, bool))


def _complete(mask, scores, pattern: TransposableNM):
    """Until every row and column has n: row i and column j that are short get entry (i, j), or (i, q) and (p, j) in
    exchange for (p, q), whichever p and q gain most."""
    m, n = pattern.m, pattern.n
    line = jnp.arange(m, dtype=jnp.int32)[:, None]

    def first(condition):
        """One-hot of the first true entry; all false if there is none."""
        return condition & (jnp.cumsum(condition, axis=0) == 1)

    def short(mask):
        return first(jnp.sum(mask, axis=1) < n), first(jnp.sum(mask, axis=0) < n)

    def add(mask):
        row, col = short(mask)
        mask_row, score_row = (jnp.max(jnp.where(row[:, None], x, -jnp.inf), axis=0) for x in (mask, scores))
        mask_col, score_col = (jnp.max(jnp.where(col[None], x, -jnp.inf), axis=1) for x in (mask, scores))
        gain = score_row[None] + score_col[:, None] - scores
        gain = jnp.where(mask & (mask_row[None] == 0) & (mask_col[:, None] == 0), gain, -jnp.inf)
        best = jnp.argmax(gain.reshape(m * m, -1), axis=0).astype(jnp.int32)
        p, q = line == (best // m)[None], line == (best % m)[None]
        direct = (jnp.max(jnp.where(col, mask_row, -jnp.inf), axis=0) == 0)[None]
        flipped = jnp.where(direct, col, q)
        exchanged = (q ^ col) & ~direct & jnp.any(row, axis=0)[None]
        return mask ^ (row[:, None] & flipped[None]) ^ (p[:, None] & exchanged[None])

    return jax.lax.while_loop(lambda mask: jnp.any(jnp.sum(mask, axis=1) < n), add, mask)
