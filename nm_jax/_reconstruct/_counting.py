"""Shares of entries, of arrays of any size: counts may pass 2^31."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def share(flags: Bool[Array, "..."]) -> float:
    """The fraction of the entries that are true."""
    return count(flags) / max(flags.size, 1)


def count(flags: Bool[Array, "..."]) -> int:
    """How many entries are true."""
    return total(_by_row(flags))


def total(counts: Int[Array, "..."] | Int[np.ndarray, "..."]) -> int:
    """The sum of counts, which may be larger than any of them can be."""
    return int(np.sum(np.asarray(counts), dtype=np.int64))


@jax.jit
def _by_row(flags: Bool[Array, "..."]) -> Int[Array, "..."]:
    return jnp.sum(flags, axis=-1 if flags.ndim else None, dtype=jnp.int32)
