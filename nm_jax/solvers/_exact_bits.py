"""Masks as integers, a row in each, and reductions over short leading axes: what `Exact` is made of."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer


def bit(bits: Int[Array, "..."], j: Int[Array, "..."] | int) -> Bool[Array, "..."]:
    """Whether bit j is set; both are broadcast."""
    return (lax.shift_right_logical(*jnp.broadcast_arrays(bits, jnp.int32(j))) & 1) != 0


def positive(x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """1 where x > 0, else 0, for |x| < 2^31: the sign of -x."""
    return lax.shift_right_logical(-x, jnp.full_like(x, 31))


def unpack(bits: Integer[Array, "m blocks"]) -> Bool[Array, "m m blocks"]:
    """Row bitmasks as a mask."""
    shape = (bits.shape[0], *bits.shape)
    column = lax.broadcasted_iota(bits.dtype, shape, 1)
    return (lax.shift_right_logical(jnp.broadcast_to(bits[:, None], shape), column) & 1) != 0


def column_counts(bits: Int[Array, "m blocks"]) -> Int[Array, "m blocks"]:
    column = lax.broadcasted_iota(jnp.int32, bits.shape, 0)
    return total([lax.shift_right_logical(jnp.broadcast_to(row[None], bits.shape), column) & 1 for row in bits])


def pick(table: Int[Array, "size blocks"], index: Int[Array, " blocks"]) -> Int[Array, " blocks"]:
    """table[index], block by block; any entry where the index points nowhere."""
    return jnp.take_along_axis(table, index[None], axis=0, mode="clip")[0]


def total(terms):
    """The sum as a tree of additions, which pipelines better than a chain."""
    terms = list(terms)
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def largest(values: Int[Array, "size blocks"]) -> Int[Array, " blocks"]:
    return functools.reduce(jnp.maximum, [values[k] for k in range(values.shape[0])])


def smallest(values: Int[Array, "size blocks"]) -> Int[Array, " blocks"]:
    return functools.reduce(jnp.minimum, [values[k] for k in range(values.shape[0])])
