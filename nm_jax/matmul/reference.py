"""The sparse product in plain XLA: runs anywhere, in any float dtype, and is what the kernels are held against."""

import jax
from jaxtyping import Array, Float

from nm_jax.matmul._compress import SparseMatrix, to_dense
from nm_jax.matmul.base import Product, sum_dtype


def supports(product: Product, device: jax.Device) -> str | None:
    """Nothing is refused."""
    del product, device
    return None


def product(a: SparseMatrix, x: Float[Array, "tokens k"]) -> Float[Array, "tokens rows"]:
    """Decodes A, and runs one dense product."""
    exact = jax.lax.Precision.HIGHEST
    y = jax.lax.dot_general(x, to_dense(a), (((1,), (1,)), ((), ())), exact, sum_dtype(x.dtype))
    return y.astype(x.dtype)
