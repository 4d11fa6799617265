"""Blocks, some at a time: so many that what is computed of them stays in the cache."""

import jax.numpy as jnp
from jax import lax


def in_pieces(total: int, size: int, body, carry):
    """`carry = body(start, length, carry)` over pieces of equal length; the last overlaps the one before instead of
    being padded."""
    pieces = -(-total // size)
    if pieces == 1:
        return body(0, total, carry)
    length = min(-(-total // (16 * pieces)) * 16, total)  # whole vectors
    return lax.fori_loop(0, pieces, lambda k, c: body(jnp.minimum(k * length, total - length), length, c), carry)
