"""Second moments of activations: sums over rows of x x^T, of x and of 1, for products and for convolutions."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num


class Moments(NamedTuple):
    """Sums over rows x of one activation; leading dimensions are one entry per iteration of the loops around it.

    Attributes:
      h: of x x^T.
      total: of x.
      rows: of 1.
    """

    h: Float[Array, "*loops batch K K"]
    total: Float[Array, "*loops batch K"]
    rows: Float[Array, "*loops batch"]

    @classmethod
    def zeros(cls, loops: tuple[int, ...], batch: int, size: int) -> "Moments":
        """The sums over no rows."""
        shapes = (size, size), (size,), ()
        return cls(*(jnp.zeros((*loops, batch, *shape), jnp.float32) for shape in shapes))


def product_moments(
    x: Num[Array, "..."],
    contracted: tuple[int, ...],
    batch: tuple[int, ...] = (),
    keep: Bool[Array, "*rows"] | None = None,
) -> Moments:
    """The moments of the rows of an activation: all entries along `contracted`, one set per entry of `batch`.

    Args:
      x: activation.
      contracted: dimensions that make up x, in this order.
      batch: dimensions with moments of their own. The others hold the rows.
      keep: which rows count, for the leading dimensions of rows.
    """
    free = [dim for dim in range(x.ndim) if dim not in contracted and dim not in batch]
    x = lax.transpose(x.astype(jnp.float32), (*batch, *free, *contracted))
    nb, nf = len(batch), len(free)
    sizes = x.shape[:nb], x.shape[nb : nb + nf], x.shape[nb + nf :]
    if keep is None:
        count = jnp.float32(math.prod(sizes[1]))
    else:
        # `where`, and not a product: padding may hold NaN.
        x = jnp.where(keep.reshape((1,) * nb + keep.shape + (1,) * (x.ndim - nb - keep.ndim)), x, 0)
        count = jnp.sum(keep, dtype=jnp.float32) * math.prod(sizes[1][keep.ndim :])
    rows = x.reshape(math.prod(sizes[0]), math.prod(sizes[1]), math.prod(sizes[2]))
    return Moments(outer(rows, rows), jnp.sum(rows, axis=1), jnp.full(rows.shape[0], count))


def outer(a: Float[Array, "batch rows K"], b: Float[Array, "batch rows L"]) -> Float[Array, "batch K L"]:
    """sum over rows of a b^T, in float32 whatever the device prefers."""
    return jnp.einsum("brk,brl->bkl", a, b, precision="highest")
