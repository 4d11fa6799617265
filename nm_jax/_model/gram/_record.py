"""What least squares needs to know of the inputs of one layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from nm_jax._core.axes import check_axes
from nm_jax._model.gram._moments import product_moments


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("h", "total", "rows"),
    meta_fields=("contraction", "groups"),
)
@dataclasses.dataclass(frozen=True)
class Gram:
    """What least squares needs to know of the inputs X of one layer. Records of the same layer add up.

    K runs over the dimensions of the parameter that are contracted, in their order, the last fastest; `batch` is the
    product of its batch dimensions times `groups` (1 if there are none).

    Attributes:
      h: X^T X, the sum over rows of x x^T.
      total: the sum of the rows.
      rows: how many rows there were.
      contraction: one letter per dimension of the parameter as it is *contracted*: convolution `iiio`, dense `io`,
        experts `bio`, experts on one shared input `oio`.
      groups: feature groups of a convolution: its outputs are `groups` consecutive parts, with one H each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> record = nm.Gram.from_inputs(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> record.h[0].tolist(), record.total[0].tolist(), int(record.rows[0])
      ([[10.0, 14.0], [14.0, 20.0]], [4.0, 6.0], 2)
      >>> int((record + record).rows[0])
      4
    """

    h: Float[Array, "batch K K"]
    total: Float[Array, "batch K"]
    rows: Float[Array, " batch"]
    contraction: str = "io"
    groups: int = 1

    def __add__(self, other: "Gram") -> "Gram":
        if (self.contraction, self.groups, self.h.shape) != (other.contraction, other.groups, other.h.shape):
            raise ValueError(
                "only Gram matrices of one layer add up: these are "
                f"{self.contraction!r} {self.h.shape} in {self.groups} groups and "
                f"{other.contraction!r} {other.h.shape} in {other.groups}"
            )
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def from_inputs(
        cls,
        x: Num[Array | np.ndarray, "..."],
        contraction: str = "io",
        mask: Shaped[Array | np.ndarray, "..."] | None = None,
    ) -> "Gram":
        """The record of given rows.

        Args:
          x: inputs of the layer, (rows, K), each row in the order of the dimensions that are contracted; with a leading
            dimension for the batch dimensions of the parameter, if it has any.
          contraction: one letter per dimension of the parameter as it is contracted.
          mask: rows that count, True = counts; all if not given.

        Raises:
          ValueError: for shapes that do not fit.
        """
        check_axes(contraction)
        if x.ndim not in (2, 3):
            raise ValueError(f"x must be (rows, K) or (batch, rows, K), got the shape {x.shape}; flatten the rows")
        if mask is not None and mask.shape != x.shape[-2:-1]:
            raise ValueError(f"mask has shape {mask.shape}, but x {x.shape} has {x.shape[-2]} rows; give one per row")
        batch = tuple(range(x.ndim - 2))
        moments = product_moments(
            jnp.asarray(x), (x.ndim - 1,), batch, None if mask is None else jnp.asarray(mask).astype(bool)
        )
        return cls(*moments, contraction)

    @classmethod
    def from_moments(
        cls,
        h: Num[Array | np.ndarray, "..."],
        total: Num[Array | np.ndarray, "..."],
        rows: Num[Array | np.ndarray, "..."] | int | float,
        contraction: str = "io",
        groups: int = 1,
    ) -> "Gram":
        """The record of sums that you have already.

        Args:
          h: sums of x x^T, (batch, K, K), or (K, K) for one matrix.
          total: sums of x, (batch, K) or (K,).
          rows: how many rows there were, one number or one for each matrix.
          contraction: one letter per dimension of the parameter as it is contracted.
          groups: feature groups of a convolution.

        Raises:
          ValueError: for shapes that do not fit each other.
        """
        check_axes(contraction)
        h, total = jnp.asarray(h, jnp.float32), jnp.asarray(total, jnp.float32)
        if h.ndim == 2:
            h, total = h[None], total[None]
        if h.ndim != 3 or h.shape[1] != h.shape[2]:
            raise ValueError(f"h must be (batch, K, K) or (K, K), got the shape {h.shape}")
        if total.shape != h.shape[:2]:
            raise ValueError(f"total must be {h.shape[:2]} to fit h of shape {h.shape}, got {total.shape}")
        if h.shape[0] % groups:
            raise ValueError(f"h has {h.shape[0]} matrices, which {groups} groups do not divide")
        if jnp.shape(rows) not in ((), h.shape[:1]):
            raise ValueError(f"rows must be one number or one per matrix {h.shape[:1]}, got {jnp.shape(rows)}")
        return cls(h, total, jnp.broadcast_to(jnp.asarray(rows, jnp.float32), h.shape[:1]), contraction, groups)
