"""Scores in fixed point, on a grid of their own for each block, and what is proved of a mask on it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers._proof import Proof
from nm_jax.solvers.base import blank


def _fraction_bits(m: int) -> int:
    """Bits of the grid below the largest score of a block.

    A path changes up to m - 1 rows by less than 2^bits each; m * 2^bits <= 2^29 keeps distances and prices in int32.
    """
    return min(26, 29 - (m - 1).bit_length())


def quantise(
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


def quantise_double(
    scores: Float[Array, "m m blocks"], pattern: TransposableNM
) -> tuple[Int[Array, "m m blocks"], Int[Array, " blocks"]]:
    """The same for float64, whose subnormal numbers are scaled away before."""
    counted = jnp.maximum(scores, 0) if pattern.at_most else jnp.abs(scores)
    _, exponent = jnp.frexp(jnp.max(counted, axis=(0, 1)))
    signed = jnp.any(scores < 0, axis=(0, 1)) & (not pattern.at_most)
    exponent = exponent - _fraction_bits(pattern.m) + signed.astype(exponent.dtype)
    grid = jnp.round(jnp.ldexp(scores, -exponent[None, None]))
    return jnp.maximum(grid, -1 if pattern.at_most else grid).astype(jnp.int32), exponent.astype(jnp.int32)


def proof_on_grid(gap: Int[Array, "*tiles"], exponent: Int[Array, "*tiles"], pattern: TransposableNM, dtype) -> Proof:
    """From a gap in units of the grid. What is not 0 stays above 0 however small the unit is."""
    lowest = jnp.finfo(dtype).minexp
    unit = jnp.ldexp(jnp.ones((), dtype), jnp.maximum(exponent, lowest))
    nothing = jnp.zeros_like(unit)
    # Half a unit for each entry that this mask keeps, and for each that the true optimum keeps; none on the grid of
    # the smallest subnormal, where all floats are.
    finest = lowest - jnp.finfo(dtype).nmant
    rounding = jnp.where(exponent <= finest, 0, pattern.n * pattern.m * unit)
    return Proof(nothing, gap.astype(dtype) * unit, rounding, nothing)
