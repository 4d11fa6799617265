"""The sparse product in plain XLA: runs anywhere, in any float dtype, and is what the kernels are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nm_jax.matmul._packing import SparseMatrix, to_dense


def supports(dtype, tokens: int, rows: int, k: int, device) -> str | None:
    """`None`: nothing is refused."""
    del dtype, tokens, rows, k, device
    return None


def product(a: SparseMatrix, x: Float[Array, "tokens k"]) -> Float[Array, "tokens rows"]:
    """x A^T by decoding A and one dense product, accumulated in float32 at least, in the dtype of `x`."""
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    y = jax.lax.dot_general(x, to_dense(a), (((1,), (1,)), ((), ())), exact, accumulator)
    return y.astype(x.dtype)
