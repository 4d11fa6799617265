"""2:4 matrices as sparse tensor cores read them: the kept values, and two bits of position for each."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt16

from nm_jax._core.axes import Tiling
from nm_jax._core.nonzero import nonzero

GROUP = 4  # consecutive columns of which two are kept
WORD = 16  # columns that one word of metadata covers

Orientation = Literal["both", "forward", "backward"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMatrix:
    """The left operand A of a sparse product: a matrix that keeps two of every four consecutive columns.

    Args:
      values: the two kept entries of every group of four columns, in the order of their columns. Columns are padded
        with groups of zeros to a multiple of 16.
      metadata: one word for 16 columns: four nibbles, the first group in the lowest. The low two bits of a nibble
        are the position of the first kept entry in its group, the high two bits that of the second, which is larger
        (the order of the PTX ISA).
      k: columns of the matrix, without padding.
    """

    values: Shaped[Array, "rows padded_k//2"]
    metadata: UInt16[Array, "rows padded_k//16"]
    k: int = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.values.shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight W, (in, out) as a matrix, packed for one or both of the products of a layer.

    Args:
      forward: W^T, for Y^T = W^T X^T; its groups run along the input axis.
      backward: W, for dX^T = W dY^T; its groups run along the output axis.
      overfull: True if some group had more than two nonzeros, of which the two largest were kept.
      shape: shape of the leaf.
      axes: its axes (`nm_jax.axes`).
    """

    forward: SparseMatrix | None
    backward: SparseMatrix | None
    overfull: Bool[Array, ""]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: str = dataclasses.field(metadata={"static": True})

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out)"""
        return _tiling(self.shape, self.axes).matrix_shape[1:]


def pack(
    w: Float[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    axes: str = "io",
    *,
    orientation: Orientation = "both",
) -> PackedWeight:
    """Kept values and their positions, as sparse tensor cores read them.

    W -> (values, metadata) of W^T along its input axis, and of W along its output axis

    A group that keeps fewer than two entries is filled with zeros. Entries are selected by comparisons and masks;
    nothing is sorted or gathered.

    Args:
      w: one weight of any layout and float dtype.
      mask: True = kept, what is pruned is never read (it may be NaN). `None`: the nonzeros of `w` are kept.
      axes: one letter per dimension (`nm_jax.axes`); of `b` dimensions only such of size 1 (use `jax.vmap` for more).
      orientation: `"forward"` packs W^T for the product X W, `"backward"` W for the product dY W^T, `"both"` both,
        which asks for a transposable mask.

    Returns:
      The packed weight. Under `jit`, of a group with more than two entries to keep, the two largest magnitudes are
      kept (NaN counts as the largest, then the lower position wins), and `overfull` is True.

    Raises:
      ValueError: for a group with more than two entries to keep (when they are concrete), or axes that do not fit.

    For an orientation, the program that XLA makes for a GPU reads the weight once for the values and once for the
    metadata: 5.1 bytes of memory traffic for an entry of bfloat16 (backward) or 5.6 (forward, which transposes),
    where 3.1 is the least. A third read for `overfull` vanishes under `jit` where the flag is not used. Works under
    `jit`, `vmap` and both modes of differentiation (the gradient of a value goes to its entry).
    """
    if orientation not in ("both", "forward", "backward"):
        raise ValueError(f"orientation must be 'both', 'forward' or 'backward', got {orientation!r}")
    _check_axes(w.shape, axes)
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"mask has shape {mask.shape} and the weight {w.shape}; give one boolean for each entry")
    packed = _pack(w, mask, axes, orientation)
    if not isinstance(packed.overfull, jax.core.Tracer) and np.any(packed.overfull):
        raise ValueError(_describe_overfull(nonzero(w) if mask is None else mask, axes, orientation))
    return packed


def repack(packed: PackedWeight, w: Float[Array, "..."]) -> PackedWeight:
    """The values of another weight at the positions of a packed one: for a mask that stays while values change.

    Args:
      packed: whose positions to take.
      w: weight of the same shape.

    Returns:
      The packed weight in the dtype of `w`, with the same metadata. Works under `jit`, `vmap` and both modes of
      differentiation: the gradient of a value goes to its entry, what is not kept gets none.
    """
    if w.shape != packed.shape:
        raise ValueError(f"the weight has shape {w.shape} but {packed.shape} was packed; pack it anew")
    return _repack(packed, w)


@jax.jit
def unpack(packed: PackedWeight) -> Float[Array, "..."]:
    """The sparse weight that was packed: the inverse of `pack`, exactly, in the leaf's own shape.

    Works under `jit`, `vmap` and both modes of differentiation.
    """
    if packed.forward is not None:
        matrix = to_dense(packed.forward).T
    elif packed.backward is not None:
        matrix = to_dense(packed.backward)
    else:
        raise ValueError("nothing was packed: neither forward nor backward is there")
    return _tiling(packed.shape, packed.axes).join(matrix[None, None, None])


@jax.jit
def compress(
    dense: Float[Array, "rows k"], kept: Bool[Array, "rows k"]
) -> tuple[SparseMatrix, Bool[Array, "rows groups"]]:
    """The sparse matrix of the kept entries, and which groups had more than two of them."""
    k = dense.shape[1]
    values, flags = _entries(dense), _entries(kept)
    overfull = jnp.sum(jnp.stack(flags), axis=0) > 2
    flags = _two_largest(values, flags)
    first, second = _positions(flags)
    # What a mask prunes must not leak through a group that keeps fewer than two.
    values = [jnp.where(flag, value, 0) for value, flag in zip(values, flags, strict=True)]
    return SparseMatrix(_pick(values, first, second), _words(first, second), k), overfull


def take(a: SparseMatrix, dense: Float[Array, "rows k"]) -> SparseMatrix:
    """The entries of a dense matrix at the positions of a sparse one."""
    first, second = _decode(a.metadata)
    return SparseMatrix(_pick(_entries(dense), first, second), a.metadata, a.k)


def to_dense(a: SparseMatrix) -> Float[Array, "rows k"]:
    """The matrix, zeros included."""
    first, second = _decode(a.metadata)
    low, high = a.values[:, 0::2], a.values[:, 1::2]
    entries = [jnp.where(first == i, low, jnp.where(second == i, high, 0)) for i in range(GROUP)]
    return jnp.stack(entries, axis=-1).reshape(a.rows, -1)[:, : a.k]


def _entries(matrix: Shaped[Array, "rows k"]) -> list[Shaped[Array, "rows groups"]]:
    """First, second, third and fourth entry of every group, after padding with zeros to whole words."""
    padded = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % WORD)))
    return [padded[:, i::GROUP] for i in range(GROUP)]


def _two_largest(values, flags):
    """`flags` without those that two larger entries beat; nothing changes where there are two at most."""
    sizes = [jnp.where(jnp.isnan(value), jnp.inf, jnp.abs(value)) for value in values]

    def beaten(i):
        rivals = [flags[j] & (sizes[j] >= sizes[i] if j < i else sizes[j] > sizes[i]) for j in range(GROUP) if j != i]
        return sum(rival.astype(jnp.int8) for rival in rivals)

    return [flags[i] & (beaten(i) < 2) for i in range(GROUP)]


def _positions(flags):
    """Two ascending positions for each group that include its kept entries, of which there are two at most."""
    zero, one, two, three = flags
    second = jnp.where(three, 3, jnp.where(two, 2, 1)).astype(jnp.uint8)
    first = jnp.where(zero, 0, jnp.where(one & (two | three), 1, jnp.where(two & three, 2, 0))).astype(jnp.uint8)
    return first, second


def _pick(entries, first, second) -> Shaped[Array, "rows k//2"]:
    """Of every group, the entries at two positions."""
    zero, one, two, three = entries
    low = jnp.where(first == 0, zero, jnp.where(first == 1, one, two))
    high = jnp.where(second == 1, one, jnp.where(second == 2, two, three))
    return jnp.stack([low, high], axis=-1).reshape(first.shape[0], -1)


def _words(first, second) -> UInt16[Array, "rows k//16"]:
    nibbles = (first | (second << 2)).reshape(first.shape[0], -1, WORD // GROUP)
    shifted = [nibbles[..., j].astype(jnp.uint16) << (4 * j) for j in range(WORD // GROUP)]
    return functools.reduce(jnp.bitwise_or, shifted)


def _decode(metadata: UInt16[Array, "rows words"]):
    """First and second position of every group."""
    nibbles = jnp.stack([(metadata >> (4 * j)) & 15 for j in range(WORD // GROUP)], axis=-1)
    nibbles = nibbles.reshape(metadata.shape[0], -1)
    return nibbles & 3, nibbles >> 2


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pack(w, mask, axes: str, orientation: Orientation) -> PackedWeight:
    matrix = _matrix(w, axes)
    kept = nonzero(matrix) if mask is None else _matrix(mask, axes)
    forward = backward = None
    overfull = jnp.zeros((), bool)
    if orientation in ("both", "forward"):
        forward, flags = compress(matrix.T, kept.T)
        overfull |= jnp.any(flags)
    if orientation in ("both", "backward"):
        backward, flags = compress(matrix, kept)
        overfull |= jnp.any(flags)
    return PackedWeight(forward, backward, overfull, w.shape, axes)


@jax.jit
def _repack(packed: PackedWeight, w) -> PackedWeight:
    matrix = _matrix(w, packed.axes)
    return dataclasses.replace(
        packed,
        forward=packed.forward and take(packed.forward, matrix.T),
        backward=packed.backward and take(packed.backward, matrix),
    )


def _tiling(shape: tuple[int, ...], axes: str) -> Tiling:
    return Tiling(tuple(shape), axes, 1, 1)


def _matrix(leaf: Shaped[Array, "..."], axes: str) -> Shaped[Array, "in out"]:
    return _tiling(leaf.shape, axes).split(leaf)[0, 0, 0]


def _check_axes(shape: tuple[int, ...], axes: str) -> None:
    if (batch := _tiling(shape, axes).matrix_shape[0]) != 1:
        raise ValueError(
            f"axes {axes!r} on shape {tuple(shape)} hold {batch} matrices; pack one at a time, or all under jax.vmap"
        )


def _describe_overfull(kept, axes: str, orientation: Orientation) -> str:
    """Where the first group with more than two kept entries is."""
    matrix = np.asarray(_matrix(kept, axes))
    sides = {"forward": ("input", matrix.T), "backward": ("output", matrix)}
    for side in sides if orientation == "both" else (orientation,):
        axis, rows = sides[side]
        counts = np.add.reduceat(rows, np.arange(0, rows.shape[1], GROUP), axis=1, dtype=int)
        for row, group in np.argwhere(counts > 2)[:1]:
            other = "; a mask that is not transposable packs orientation='forward' only" if side == "backward" else ""
            return (
                f"entries {GROUP * group} to {min(GROUP * group + 3, rows.shape[1] - 1)} along the {axis} axis "
                f"({'column' if side == 'forward' else 'row'} {row} of the (in, out) matrix) keep "
                f"{counts[row, group]} of 4, where 2:4 keeps two at most; give a 2:4 mask{other}"
            )
    raise AssertionError("no group keeps more than two")
