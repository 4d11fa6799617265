"""A parameter as the matrices that meet the Gram matrices of its layer's inputs."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nm_jax._core.axes import Tiling, check_axes
from nm_jax._model.gram import Gram


class LayerMatrices(NamedTuple):
    """How one leaf is cut into (K, outputs) matrices, one for each Gram matrix of its record.

    Attributes:
      shape: shape of the leaf.
      contraction: one letter per dimension as it is contracted (`Gram.contraction`).
      groups: feature groups of a convolution; its outputs are so many consecutive parts.
    """

    shape: tuple[int, ...]
    contraction: str
    groups: int = 1

    @classmethod
    def of(cls, w: Shaped[Array, "..."], gram: Gram) -> "LayerMatrices":
        """For a leaf and the record of its layer.

        Raises:
          ValueError: when they do not fit.
        """
        layer = cls(tuple(jnp.shape(w)), check_axes(gram.contraction, jnp.shape(w)), gram.groups)
        batch, rows, cols = layer.sizes
        if jnp.shape(gram.h) != (batch, rows, rows) or cols * layer.groups != layer._outputs:
            raise ValueError(
                f"weights of shape {layer.shape}, contracted as {gram.contraction!r} in {gram.groups} groups, need "
                f"Gram matrices of shape {(batch, rows, rows)}, got {jnp.shape(gram.h)}: collect them with the inputs "
                "of this layer"
            )
        return layer

    @property
    def _outputs(self) -> int:
        return math.prod(size for size, letter in zip(self.shape, self.contraction, strict=True) if letter == "o")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(matrices, K, outputs of a matrix)."""
        batch, rows, cols = Tiling(self.shape, self.contraction, 1, 1).matrix_shape
        return batch * self.groups, rows, cols // self.groups

    @property
    def _tiling(self) -> Tiling:
        return Tiling(self.shape, self.contraction, *self.sizes[1:])

    def split(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "matrices K outputs"]:
        """The matrices of a leaf."""
        return self._tiling.split(leaf).transpose(2, 3, 4, 0, 1).reshape(self.sizes)

    def join(self, matrices: Shaped[Array, "matrices K outputs"]) -> Shaped[Array, "..."]:
        """The leaf with these matrices: the inverse of `split`."""
        rows, cols = self.sizes[1:]
        return self._tiling.join(matrices.reshape(-1, 1, self.groups, rows, cols).transpose(3, 4, 0, 1, 2))


def sum_rows(x: Float[Array, "matrices K outputs"]) -> Float[Array, "matrices outputs"]:
    """Sums over K, as a product: on CPUs jax 0.10 takes longer over such a reduction than over a product with H."""
    return jnp.einsum("k,mko->mo", jnp.ones(x.shape[1], x.dtype), x, precision="highest")


class InputMoments(NamedTuple):
    """A record in units of the mean diagonal of its Gram matrices, so that nothing depends on the scale of X.

    Attributes:
      h: X^T X.
      centred: the same of X minus its mean.
      mean: of the rows, such that h = centred + mean mean^T.
      unit: what a constant added to an output is in the units of `mean`.
      rows: of X, at least one.
      spread: the mean diagonal of `centred`.
      noise: what may be wrong in `centred`: the rounding of entries that are large beside their spread.
      weight: the unit of each matrix relative to the largest, to add up what is in different ones.
    """

    h: Float[Array, "matrices K K"]
    centred: Float[Array, "matrices K K"]
    mean: Float[Array, "matrices K 1"]
    unit: Float[Array, "matrices 1"]
    rows: Float[Array, "matrices 1"]
    spread: Float[Array, "matrices 1"]
    noise: Float[Array, "matrices 1"]
    weight: Float[Array, "matrices 1"]

    @classmethod
    def of(cls, gram: Gram) -> "InputMoments":
        """Of a record."""
        h = gram.h.astype(jnp.float32)
        rows = jnp.maximum(gram.rows, 1).astype(jnp.float32)[:, None]
        scale = jnp.mean(jnp.diagonal(h, axis1=1, axis2=2), axis=1, keepdims=True)
        scale = jnp.where(scale > 0, scale, 1)
        h = h / scale[:, :, None]
        mean = (gram.total.astype(jnp.float32) / jnp.sqrt(rows * scale))[:, :, None]
        centred = h - mean * mean.mT
        eps = jnp.finfo(jnp.float32).eps
        spread = jnp.maximum(jnp.mean(jnp.diagonal(centred, axis1=1, axis2=2), axis=1, keepdims=True), eps)
        noise = eps * sum_rows(mean**2)
        return cls(h, centred, mean, jnp.sqrt(rows / scale), rows, spread, noise, scale / jnp.max(scale))

    def shift(self, change: Float[Array, "matrices K outputs"]) -> Float[Array, "matrices outputs"]:
        """What a change of the weights adds to every output, on average."""
        return sum_rows(self.mean * change) / self.unit

    def error(
        self, change: Float[Array, "matrices K outputs"], constant: Float[Array, "matrices outputs"] | None
    ) -> Float[Array, "matrices outputs"]:
        """||X change + constant||^2 of every output; `None` is the constant that makes it least."""
        product = jnp.matmul(self.centred, change, precision="highest")
        spread = jnp.maximum(sum_rows(change * product), 0)
        return spread if constant is None else spread + ((self.shift(change) + constant) * self.unit) ** 2

    def relative(
        self, error: Float[Array, "matrices outputs"], energy: Float[Array, "matrices outputs"]
    ) -> Float[Array, ""]:
        """The errors of all outputs over their energies."""
        whole = jnp.sum(energy * self.weight)
        return jnp.sum(error * self.weight) / jnp.where(whole > 0, whole, 1)
