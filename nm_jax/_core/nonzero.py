"""What "nonzero" means: told by the bits, because comparisons of floats may take subnormal numbers for zero."""

import functools
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def nonzero(values: Shaped[AnyArray, "*shape"]) -> Bool[AnyArray, "*shape"]:
    """Which entries are not zero: minus zero is, subnormal numbers and NaN are not. Of any dtype.

    Those of a numpy array are told on the host.
    """
    dtype = np.dtype(values.dtype)
    if dtype == np.bool_:
        return values
    if not jnp.issubdtype(dtype, jnp.floating):
        return values != 0
    bits = as_bits(values)
    if not isinstance(bits, np.ndarray):
        # Newer compilers turn comparisons of the bits back into a comparison of the floats, if they see them.
        bits = jax.lax.optimization_barrier(bits)
    full = np if isinstance(values, np.ndarray) else jnp
    return functools.reduce(operator.and_, [bits != zero for zero in _zeros(dtype)], full.ones(values.shape, bool))


def as_bits(values: Shaped[AnyArray, "*shape"]) -> UInt[AnyArray, "*shape"]:
    """The bits of floats as unsigned integers; those of a numpy array are the same memory."""
    if isinstance(values, np.ndarray):
        return values.view(f"u{values.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(values, f"uint{jnp.finfo(values.dtype).bits}")


@functools.cache
def _zeros(dtype: np.dtype) -> tuple[np.unsignedinteger, ...]:
    """The bits of zero and minus zero, of those that the dtype has."""
    values = np.array([0.0, -0.0]).astype(dtype)
    return tuple(np.unique(as_bits(values)[values == 0]))
