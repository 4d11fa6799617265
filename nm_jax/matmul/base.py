"""What a sparse product is, and what an implementation of it has to do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nm_jax.matmul._compress import SparseMatrix


@dataclasses.dataclass(frozen=True)
class Product:
    """A product x A^T that an implementation is wanted for.

    Args:
      dtype: dtype of the operands: anything that names one; it is kept as a numpy dtype.
      tokens: rows of x.
      rows: rows of A, the outputs of a layer going forward.
      k: columns of A, zeros included, the inputs of a layer going forward.
      packed: whether A is packed already, so that packing costs nothing.

    Examples:
      >>> import nm_jax as nm
      >>> product = nm.matmul.Product("bfloat16", tokens=512, rows=1024, k=256)
      >>> product.transposed.sizes
      (512, 256, 1024)
    """

    dtype: Any
    tokens: int
    rows: int
    k: int
    packed: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(tokens, rows, k)"""
        return self.tokens, self.rows, self.k

    @property
    def transposed(self) -> "Product":
        """The product of the input gradient, where this one is that of the layer."""
        return dataclasses.replace(self, rows=self.k, k=self.rows)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run a sparse product; how to add one is said in `nm_jax/matmul/menu.py`.

    Args:
      name: what `implementation=` calls it.
      supports: (product, device) -> `None` if it can, and should, run a `Product` on a `jax.Device`, or the reason why
        not, as a clause. It traces nothing, and is quick to refuse a device that is not its own.
      product: (A, x) -> x A^T, that is y[t, r] = sum_k A[r, k] x[t, k], accumulated in float32 at least and rounded
        once to the dtype of `x`, which is that of the values of A. Works under `jax.jit`; needs no derivative and no
        batching rule, `nm_matmul` gives it both. What A prunes is never multiplied, nor is padding: a NaN or an
        infinity in one token reaches that token alone. `ValueError` where shapes or dtypes of A and x do not
        match, `NotImplementedError` where it cannot run. The product of a kernel takes `interpret=True` too, to run
        anywhere with its grid, pipeline and indices unchanged.
      is_kernel: whether it runs on sparse tensor cores. A kernel may become the default where it was measured to be
        faster than the dense product, and is compared with `reference` on a small product, once per process, device
        and dtype, before its first use.
      version: to be raised when a change makes it faster or slower: what was measured of another version does not
        count.
      config: the class of its configurations, if it has any: a frozen dataclass of numbers. `supports` and `product`
        then take one as `config=`, and choose one themselves for `None`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> reference = nm.matmul.IMPLEMENTATIONS[-1]
      >>> print(reference.name, reference.is_kernel)
      reference False
      >>> mine = nm.matmul.Implementation("mine", lambda product, device: None, reference.product, is_kernel=False)
      >>> print(nm.nm_matmul(jnp.ones((1, 4)), jnp.diag(jnp.arange(4.0)), implementation=mine))
      [[0. 1. 2. 3.]]
    """

    name: str
    supports: Callable[[Product, jax.Device], str | None]
    product: Callable[[SparseMatrix, Float[Array, "tokens k"]], Float[Array, "tokens rows"]]
    is_kernel: bool = True
    version: int = 1
    config: Callable[..., Any] | None = None


def is_multiplied(dtype: jax.typing.DTypeLike) -> bool:
    """Whether products of a dtype are defined: floats of 16, 32 and 64 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits >= 16


def sum_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """What products of a dtype are accumulated in: float32 at least."""
    return np.dtype(dtype) if jnp.finfo(dtype).bits > 32 else np.dtype(np.float32)
