"""From a leaf of any layout to tiles of a pattern and back: the only place that reshapes weights.

A leaf's *axes* are one letter per dimension: `i` along which groups of m run, `o` output, `b` batch-like. Several
`i` (or `o`) are flattened in order.

| leaf | axes |
|---|---|
| dense kernel of Flax (in, out) | `io` |
| convolution kernel of Flax (height, width, in, out): groups run over input channels at one kernel position | `bbio` |
| attention query, key, value (in, heads, dim) | `ioo` |
| attention out (heads, dim, out) | `iio` |
| experts (expert, in, out) | `bio` |
| linear weight of PyTorch and Equinox (out, in) | `oi` |
| convolution weight of PyTorch and Equinox (out, in, height, width) | `oibb` |
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from nm_jax._core.nonzero import AnyArray
from nm_jax._core.patterns import Pattern


def check_axes(axes: str | Any, shape: tuple[int, ...] | None = None) -> str:
    """`axes`, or a ValueError that says what is wrong with it (for a leaf of this shape, when given)."""
    if not isinstance(axes, str):
        raise ValueError(f"axes must be a string like 'io', got {axes!r}")
    if unknown := set(axes) - set("iob"):
        raise ValueError(
            f"axes {axes!r} has unknown letters {''.join(sorted(unknown))!r}; write one letter per dimension: "
            "i (grouped, contraction), o (output) or b (batch-like)"
        )
    if "i" not in axes:
        raise ValueError(f"axes {axes!r} has no 'i': say which dimension groups of m run along")
    if shape is not None and len(axes) != len(shape):
        raise ValueError(
            f"axes {axes!r} names {len(axes)} dimensions but the shape {tuple(shape)} has {len(shape)}; "
            "write one letter per dimension"
        )
    return axes


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one leaf is cut into the tiles of a pattern.

    Tiles come *tile axes first*: `(rows, cols, batch, row tiles, column tiles)`, so that whatever works on a tile is
    elementwise over the trailing axes, which vectorises on every device.

    Args:
      shape: shape of the leaf.
      axes: one letter per dimension (see the module).
      rows: entries of a tile along the contraction axis.
      cols: entries of a tile along the output axis.
    """

    shape: tuple[int, ...]
    axes: str
    rows: int
    cols: int

    def __post_init__(self):
        check_axes(self.axes, self.shape)

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: str, pattern: Pattern) -> "Tiling":
        """The tiling of a pattern; a pattern over the whole leaf gets one tile, in one column."""
        check_axes(axes, shape)
        if pattern.tile is None:
            return cls(tuple(shape), "i" * len(shape), max(math.prod(shape), 1), 1)
        return cls(tuple(shape), axes, *pattern.tile)

    def _dims(self, letter: str) -> list[int]:
        return [k for k, a in enumerate(self.axes) if a == letter]

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(batch, contraction, output) sizes of the leaf."""
        batch, rows, cols = (math.prod(self.shape[k] for k in self._dims(letter)) for letter in "bio")
        return batch, rows, cols

    @property
    def ragged(self) -> tuple[tuple[str, int, int], ...]:
        """(axis, size, tile size) for each axis that whole tiles do not fit."""
        _, rows, cols = self.matrix_shape
        checks = (("contraction", rows, self.rows), ("output", cols, self.cols))
        return tuple((name, size, tile) for name, size, tile in checks if size % tile)

    def matrix(self, leaf: Shaped[AnyArray, "..."]) -> Shaped[AnyArray, "batch inputs outputs"]:
        """The leaf as matrices (batch, contraction, output)."""
        order = self._dims("b") + self._dims("i") + self._dims("o")
        return leaf.transpose(order).reshape(self.matrix_shape)

    def rows_of_tiles(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "tile_rows rows columns"]:
        """The leaf as rows of tiles (not yet cut along the output axis), for a leaf that whole tiles fit. For most
        layouts this moves nothing."""
        return self.matrix(leaf).reshape(-1, self.rows, self.matrix_shape[2])

    def split(self, leaf: Shaped[AnyArray, "..."]) -> Shaped[AnyArray, "rows cols batch row_tiles col_tiles"]:
        """The leaf's tiles. Edge tiles are padded with zeros; groups never wrap into the next row. Those of a numpy
        array stay on the host."""
        batch = self.matrix_shape[0]
        matrix = self.matrix(leaf)
        if self.ragged:
            pad = np.pad if isinstance(matrix, np.ndarray) else jnp.pad
            matrix = pad(matrix, ((0, 0), (0, -matrix.shape[1] % self.rows), (0, -matrix.shape[2] % self.cols)))
        tall, wide = matrix.shape[1] // self.rows, matrix.shape[2] // self.cols
        return matrix.reshape(batch, tall, self.rows, wide, self.cols).transpose(2, 4, 0, 1, 3)

    def join(self, tiles: Shaped[AnyArray, "rows cols batch row_tiles col_tiles"]) -> Shaped[AnyArray, "..."]:
        """The leaf whose tiles these are: the inverse of `split`; padding is dropped."""
        batch, rows, cols = self.matrix_shape
        tall, wide = tiles.shape[3], tiles.shape[4]
        matrix = _rows_of_matrix(tiles).reshape(batch, tall * self.rows, wide * self.cols)
        order = self._dims("b") + self._dims("i") + self._dims("o")
        leaf = matrix[:, :rows, :cols].reshape([self.shape[k] for k in order])
        return leaf.transpose([order.index(k) for k in range(len(order))])

    def valid(self) -> Shaped[Array, "rows cols batch row_tiles col_tiles"] | None:
        """True where a tile holds an entry of the leaf, False where it holds padding; `None` without padding."""
        return self.split(jnp.ones(self.shape, bool)) if self.ragged else None


def _rows_of_matrix(tiles):
    """(rows, cols, batch, tall, wide) -> (batch, tall, rows, wide, cols).

    Four bytes of a mask are moved as one word: they are neighbours in the result, and a quarter of the entries takes a
    quarter of the time.
    """
    rows, cols, *counts = tiles.shape
    if tiles.dtype != bool or isinstance(tiles, np.ndarray) or cols % 4:
        return tiles.transpose(2, 3, 0, 4, 1)
    parts = [tiles[:, k::4].astype(jnp.uint32) << (8 * k) for k in range(4)]
    words = (parts[0] | parts[1] | parts[2] | parts[3]).transpose(2, 3, 0, 4, 1)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*counts[:2], rows, counts[2], cols) != 0


def matrix_groups(mask: Shaped[Array, "..."], axes: str, m: int) -> tuple[Array, Array]:
    """Kept entries in every group of m, along the contraction axis and along the output axis.

    Args:
      mask: boolean leaf.
      axes: its axes.
      m: group size; a group at the edge may be smaller.

    Returns:
      Two integer arrays of counts, one per group: along the contraction, and along the output axis.
    """
    contraction = Tiling(mask.shape, axes, m, 1).split(mask)
    output = Tiling(mask.shape, axes, 1, m).split(mask)
    return jnp.sum(contraction, axis=(0, 1)), jnp.sum(output, axis=(0, 1))


def same_groups(shape: tuple[int, ...], axes: str, others: str, pattern: Pattern) -> bool:
    """Whether a pattern groups a leaf alike along both axes, so that a mask for one is a mask for the other.

    `iiio` and `bbio` are the same groups where m divides the innermost `i`; of a pattern of single columns, only what
    is contracted matters; and with transposable patterns inputs and outputs may change places.
    """
    if pattern.tile is None:
        return True
    rows, cols = pattern.tile
    swapped = others.translate(str.maketrans("io", "oi"))
    ours = _groups(shape, axes, rows, cols)
    return ours == _groups(shape, others, rows, cols) or (rows == cols and ours == _groups(shape, swapped, rows, cols))


def _groups(shape: tuple[int, ...], axes: str, rows: int, cols: int) -> str:
    """The axes, with `b` for all that no group or block runs along and `-` for dimensions of size 1."""
    letters = list(axes)
    for letter, tile in (("i", rows), ("o", cols)):
        run = 1
        for k in reversed(range(len(shape))):
            if axes[k] == letter and run % tile == 0:
                letters[k] = "b"  # whole tiles fit into the dimensions within
            elif axes[k] == letter:
                run *= shape[k]
    return "".join("-" if size == 1 else letter for size, letter in zip(shape, letters, strict=True))
