"""Sparse tensors in fewer bytes: the values that are kept, and where they are.

Both run over the rows of W^T, (batch, output, contraction), contraction fastest: the groups of n:m are consecutive.
For a PyTorch weight (`oi`) this is its own order. Where they are is coded in one of two ways, of one bit per entry:

- *mask*: a bit per entry, the lowest bit of a byte first; any mask.
- *positions*: for masks that keep exactly 2 of every 4, two bits per kept value: its place in its group. A group is
  four bits, the first kept value in the lower two; the lower half of a byte comes first. Sixteen columns are one 16-bit
  word of the metadata that sparse tensor cores read.
"""

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from nm_jax._core.axes import Tiling


def _positions_of_masks() -> np.ndarray:
    """For the mask bits of two groups of four, their positions; 255 where a group does not keep exactly two.
    (No positions are coded as 255: that would be the last place twice.)"""
    nibbles = {1 << i | 1 << j: i | j << 2 for i in range(4) for j in range(i + 1, 4)}
    table = np.full(256, 255, np.uint8)
    for low, low_positions in nibbles.items():
        for high, high_positions in nibbles.items():
            table[low | high << 4] = low_positions | high_positions << 4
        table[low] = low_positions  # one group at the end of an odd number of them
    return table


_TO_POSITIONS = _positions_of_masks()
# The code 0 would be the first place twice: it stands for no mask.
_TO_MASK = np.zeros(256, np.uint8)
_TO_MASK[_TO_POSITIONS[_TO_POSITIONS != 255]] = np.flatnonzero(_TO_POSITIONS != 255)


def take(weight: Shaped[np.ndarray, "..."], mask: Bool[np.ndarray, "..."], axes: str) -> Shaped[np.ndarray, " kept"]:
    """The kept values of a weight, of any dtype; `axes` has one letter per dimension."""
    return _lines(weight, axes)[_lines(mask, axes)]


def put(values: Shaped[np.ndarray, " kept"], mask: Bool[np.ndarray, "..."], axes: str) -> Shaped[np.ndarray, "..."]:
    """The weight whose kept values these are, zero elsewhere: the inverse of `take`.

    Raises:
      ValueError: if the mask does not keep as many.
    """
    kept = _lines(mask, axes)
    if values.shape != (count := np.count_nonzero(kept),):
        raise ValueError(f"the mask keeps {count} entries, but there are {values.size} values")
    lines = np.zeros(kept.shape, values.dtype)
    lines[kept] = values
    return _leaf(lines, mask.shape, axes)


def two_of_four(mask: Bool[np.ndarray, "..."], axes: str) -> bool:
    """Whether exactly two of every four entries along the contraction are kept."""
    lines = _lines(mask, axes)
    return lines.shape[2] % 4 == 0 and bool(np.all(lines.reshape(-1, 4).sum(axis=1) == 2))


def encode(mask: Bool[np.ndarray, "..."], axes: str, positions: bool = False) -> UInt8[np.ndarray, " bytes"]:
    """The code of a mask.

    Raises:
      ValueError: if positions are asked for and a group does not keep exactly two of four.
    """
    code = np.packbits(_lines(mask, axes), bitorder="little")
    if positions:
        code = _TO_POSITIONS[code]
        if np.any(code == 255) or 2 * np.count_nonzero(mask) != mask.size or mask.size % 4:
            raise ValueError("positions code masks that keep exactly 2 of every 4; code the mask instead")
    return code


def decode(
    code: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], axes: str, positions: bool = False
) -> Bool[np.ndarray, "..."]:
    """The mask of a code: the inverse of `encode`.

    Raises:
      ValueError: if it is not the code of a mask of this shape.
    """
    batch, contraction, output = Tiling(shape, axes, 1, 1).matrix_shape
    size = batch * contraction * output
    if code.shape != (-(-size // 8),):
        raise ValueError(f"{code.size} bytes do not say which of {size} entries are kept")
    if positions:
        code = _TO_MASK[code]
        whole = code[: size // 8]  # the others hold one group only
        if size % 4 or np.any(code == 0) or np.any(whole < 16):
            raise ValueError("its positions are not two different places of every four, in ascending order")
    bits = np.unpackbits(code, bitorder="little")
    if np.any(bits[size:]):
        raise ValueError("its mask has more bits than there are entries")
    return _leaf(bits[:size].view(bool).reshape(batch, output, contraction), shape, axes)


def _lines(leaf: np.ndarray, axes: str) -> np.ndarray:
    """(batch, output, contraction)."""
    return Tiling(leaf.shape, axes, 1, 1).split(leaf)[0, 0].transpose(0, 2, 1)


def _leaf(lines: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    """The inverse of `_lines`."""
    leaf = Tiling(shape, axes, 1, 1).join(lines.transpose(0, 2, 1)[None, None])
    return np.ascontiguousarray(leaf)
