"""`Exact`, phase 1: coordinate descent on the dual, and what prices prove of a mask."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._exact_bits import column_counts, positive, total
from nm_jax.solvers.base import blank

_SATURATED = (1 << 30) - 1


def descend(
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
    ordered = descending(values)
    middle = (ordered[pattern.n - 1] + ordered[pattern.n]) >> 1
    return jnp.maximum(middle, 0) if pattern.at_most else middle


def descending(values: list[Int[Array, "*shape"]]) -> list[Int[Array, "*shape"]]:
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


def threshold(
    grid: Int[Array, "m m blocks"], u: Int[Array, "m blocks"], v: Int[Array, "m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m blocks"], Bool[Array, " blocks"]]:
    """Row bitmasks of r > 0, and whether they are a mask of the pattern, and so the optimum."""
    m, n = pattern.m, pattern.n
    bits = total([positive(grid[:, j] - v[j][None] - u) << j for j in range(m)])
    rows, cols = lax.population_count(bits), column_counts(bits)
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
