"""Weights packed once for the products of a layer, and trained so."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from nm_jax._core.axes import Tiling
from nm_jax._core.nonzero import nonzero
from nm_jax.matmul._compress import GROUP, SparseMatrix, decode, entries, pick, positions, select, to_dense, words

Orientation = Literal["both", "forward", "backward"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedSide:
    """A `SparseMatrix` whose arrays are all floats, as `jax.grad` and optimisers ask of what they differentiate.

    Args:
      values: as in `SparseMatrix`.
      metadata: the words of `SparseMatrix.metadata` as numbers, which have no gradient. Here they also say which values
        only fill a group, and stay zero: the nibble of a group that keeps one entry has its position twice, that of a
        group that keeps none is 1.
      k: as in `SparseMatrix`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> side = nm.pack(jnp.eye(4)).forward
      >>> {str(leaf.dtype) for leaf in jax.tree.leaves(side)}
      {'float32'}
      >>> print(side.matrix.metadata.dtype, side.take(jnp.full((4, 4), 7.0)).values.sum())
      uint16 28.0
    """

    values: Any  # an array, but for what jax puts in its place in trees
    metadata: Any
    k: int = dataclasses.field(metadata={"static": True})

    @property
    def matrix(self) -> SparseMatrix:
        """What implementations take. Raises `ValueError` where a cast has made the metadata unreadable."""
        first, second = self._pairs
        empty, single = first > second, first == second
        second = jnp.where(empty | (single & (second == 0)), 1, second)
        return SparseMatrix(self.values, words(jnp.where(empty | single, 0, first), second), self.k)

    @property
    def intact(self) -> Bool[Array, ""]:
        """Whether the metadata are still words, and not what decay, noise, or an average of two masks makes of them."""
        first, second = self._pairs
        whole = jnp.abs(self.metadata - jnp.round(self.metadata)) < 0.125
        known = (first <= second) | ((first == 1) & (second == 0))
        return jnp.all(whole & (self.metadata >= 0) & (self.metadata < 2**16)) & jnp.all(known)

    def take(self, dense: Shaped[Array, "rows k"]) -> "PackedSide":
        """The entries of a dense matrix at the positions of this one."""
        first, second = self._pairs
        low = (first < second) | ((first == second) & (first == 0))
        high = (first < second) | ((first == second) & (first != 0))
        kept = jnp.stack([low, high], axis=-1).reshape(first.shape[0], -1)
        values = pick(entries(dense), *decode(self.matrix.metadata))
        return dataclasses.replace(self, values=jnp.where(kept, values, jnp.zeros_like(values)))

    @property
    def _pairs(self):
        if self.metadata.dtype == jnp.uint16:  # of positions alone, which nothing differentiates
            return decode(self.metadata)
        if self.metadata.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"the metadata of a packed weight was cast to {self.metadata.dtype}, which cannot hold its positions; "
                "cast with packed.astype(dtype), which leaves them alone"
            )
        return decode(jnp.round(self.metadata).astype(jnp.uint16))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight W, (in, out) as a matrix, packed for one or both of the products of a layer.

    All its arrays are floats: `jax.grad` takes it, and optax updates it, while the mask stays. A weight that is packed
    for both products is there twice, and its gradient too, so that updates of each entry keep both alike (a norm
    over all of them counts it twice; optimisers that mix entries, by factors or orthogonalisation, belong on the
    weight itself, with `repack`). Metadata have a gradient of zero. Should weight decay, noise or an average of two
    masks change them nevertheless, products are NaN, not wrong: keep such parts of an optimiser off them
    (`optax.masked`), or train the weight itself.

    Args:
      forward: W^T, for Y^T = W^T X^T; its groups run along the input axis.
      backward: W, for dX^T = W dY^T; its groups run along the output axis.
      overfull: scalar, the share of the groups that had more than two nonzeros, of which the two largest were kept.
      shape: shape of the leaf.
      axes: its axes, a letter for each dimension: i contraction, o output, b batch.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import nm_jax as nm
      >>> w = jnp.tile(jnp.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]), (2, 1))
      >>> packed = nm.pack(w)
      >>> packed.matrix_shape, packed.forward.values.shape, packed.backward.values.shape
      ((4, 4), (4, 8), (4, 8))
      >>> gradient = jax.grad(lambda p: jnp.sum(nm.nm_matmul(jnp.ones((3, 4)), p)))(packed)
      >>> step = jax.tree.map(lambda p, g: p - 0.1 * g, packed, gradient)
      >>> print(nm.unpack(step)[0])
      [0.7 1.7 0.  0. ]
    """

    forward: PackedSide | None
    backward: PackedSide | None
    overfull: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: str = dataclasses.field(metadata={"static": True})

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out)"""
        return _tiling(self.shape, self.axes).matrix_shape[1:]

    def astype(self, dtype: jax.typing.DTypeLike) -> "PackedWeight":
        """The same weight with values of another dtype."""
        return self._with_sides(lambda side, _: dataclasses.replace(side, values=side.values.astype(dtype)))

    def _with_sides(self, change: Callable, **fields) -> "PackedWeight":
        """`change(side, name)` of the sides that are there."""
        sides = {name: getattr(self, name) for name in ("forward", "backward")}
        changed = {name: side and change(side, name) for name, side in sides.items()}
        return dataclasses.replace(self, **changed, **fields)


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
      w: one weight of any layout and float dtype; infinities and NaN are packed like other values.
      mask: True = kept, what is pruned is never read (it may be NaN). `None`: the nonzeros of `w` are kept.
      axes: one letter per dimension, i contraction, o output, b batch; of `b` dimensions only such of size 1 (use
        `jax.vmap` for more).
      orientation: `"forward"` packs W^T for the product X W, `"backward"` W for the product dY W^T, `"both"` both,
        which asks for a transposable mask.

    Returns:
      The packed weight. Under `jit`, of a group with more than two entries to keep, the two largest magnitudes are
      kept (NaN counts as the largest, then the lower position wins), and `overfull` is the share of such groups.

    Raises:
      ValueError: for a group with more than two entries to keep (when they are concrete), or axes that do not fit.

    For an orientation, the program that XLA makes for an H100 moves 9.3 bytes for an entry of bfloat16 (backward) or
    13.3 (forward, which transposes) with a mask, one less without; those of a product that packs a weight by itself 5.1
    and 5.6. What `overfull` takes vanishes under `jit` where the flag is not used. Works under `jit`, `vmap` and
    reverse-mode differentiation: the gradient of a value goes to its entry, and of a weight packed for both products
    the forward side's is taken, as `nm_matmul` and `unpack` give both sides the same.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> w = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
      >>> mask = nm.solve(abs(w), "2:4-T")
      >>> packed = nm.pack(w, mask)
      >>> bool(jnp.all(nm.unpack(packed) == w * mask))
      True
      >>> forward_only = nm.pack(w, nm.solve(abs(w), "2:4"), orientation="forward")
      >>> forward_only.backward is None
      True
    """
    if orientation not in ("both", "forward", "backward"):
        raise ValueError(f"orientation must be 'both', 'forward' or 'backward', got {orientation!r}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"pack takes a weight of floating point numbers, got {w.dtype}; convert it")
    _check_axes(w.shape, axes)
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"mask has shape {mask.shape} and the weight {w.shape}; give one boolean for each entry")
    packed = _pack(w, mask, axes, orientation)
    if not isinstance(packed.overfull, jax.core.Tracer) and np.any(packed.overfull):
        raise ValueError(_describe_overfull(nonzero(w) if mask is None else mask, axes, orientation))
    return packed


def repack(packed: PackedWeight, w: Float[Array, "..."]) -> PackedWeight:
    """The values of another weight at the positions of a packed one: for a mask that stays while values change.

    A group that kept fewer than two entries still does: what fills it stays zero.

    Args:
      packed: whose positions to take.
      w: weight of the same shape.

    Returns:
      The packed weight in the dtype of `w`, with the same metadata. Works under `jit`, `vmap` and reverse-mode
      differentiation: the gradient of a value goes to its entry, what is not kept gets none.

    Raises:
      ValueError: where the weight has another shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> packed = nm.pack(jnp.array([[1.0, 0.0, 0.0, 2.0]]), orientation="backward")
      >>> print(nm.unpack(nm.repack(packed, jnp.array([[5.0, 6.0, 7.0, 8.0]]))))
      [[5. 0. 0. 8.]]
    """
    if w.shape != packed.shape:
        raise ValueError(f"the weight has shape {w.shape} but {packed.shape} was packed; pack it anew")
    return _repack(packed, w)


@jax.jit
def unpack(packed: PackedWeight) -> Float[Array, "..."]:
    """The sparse weight that was packed: the inverse of `pack`, in the leaf's own shape.

    Kept entries have the bits that they had, subnormal numbers, NaN and a kept -0.0 included; what was pruned is +0.0,
    whatever it was before.

    Works under `jit`, `vmap` and reverse-mode differentiation.

    Args:
      packed: the packed weight.

    Returns:
      The weight, dense, with its zeros.

    Raises:
      ValueError: if it was packed for no product.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> print(nm.unpack(nm.pack(jnp.array([[1.0, 0.0, -0.0, 2.0]]), orientation="backward")))
      [[1. 0. 0. 2.]]
    """
    return _tiling(packed.shape, packed.axes).join(to_matrix(packed)[None, None, None])


@jax.custom_vjp
def to_matrix(packed: PackedWeight) -> Float[Array, "in out"]:
    """The (in, out) matrix of a packed weight, whose gradient goes to both of its sides."""
    if packed.forward is not None:
        side, matrix = packed.forward, to_dense(packed.forward.matrix).T
    elif packed.backward is not None:
        side, matrix = packed.backward, to_dense(packed.backward.matrix)
    else:
        raise ValueError("nothing was packed: neither forward nor backward is there")
    return nan_unless(side.intact, matrix)


to_matrix.defvjp(lambda packed: (to_matrix(packed), packed), lambda packed, matrix: (gradient_of(packed, matrix),))


@jax.jit
def nan_unless(intact: Bool[Array, ""], result: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(intact, result, jnp.nan)


def gradient_of(packed: PackedWeight, matrix: Float[Array, "in out"]) -> PackedWeight:
    """The gradient of a packed weight, from that of its matrix."""

    def change(side, name):
        taken = side.take(matrix.T if name == "forward" else matrix)
        return dataclasses.replace(taken, metadata=jnp.zeros_like(side.metadata))

    return packed._with_sides(change, overfull=jnp.zeros_like(packed.overfull))


def _pack_side(dense: Float[Array, "rows k"], kept: Bool[Array, "rows k"]):
    """The packed side, and which groups had more than two entries to keep."""
    a, flags, overfull = select(dense, kept)
    first, second = positions(flags)
    count = jnp.sum(jnp.stack(flags), axis=0)
    only = jnp.where(flags[3], 3, jnp.where(flags[2], 2, jnp.where(flags[1], 1, 0))).astype(first.dtype)
    one = jnp.ones_like(first)
    first = jnp.where(count == 0, one, jnp.where(count == 1, only, first))
    second = jnp.where(count == 0, jnp.zeros_like(second), jnp.where(count == 1, only, second))
    return PackedSide(a.values, words(first, second).astype(jnp.float32), a.k), overfull


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pack(w, mask, axes: str, orientation: Orientation) -> PackedWeight:
    matrix = _matrix(w, axes)
    kept = nonzero(matrix) if mask is None else _matrix(mask, axes)
    sides: dict[str, PackedSide | None] = {"forward": None, "backward": None}
    shares = []
    for name in sides:
        if orientation in ("both", name):
            turned, kept_here = (matrix.T, kept.T) if name == "forward" else (matrix, kept)
            # A weight that is packed twice has one gradient: that of its forward side.
            once = jax.lax.stop_gradient(turned) if orientation == "both" and name == "backward" else turned
            sides[name], overfull = _pack_side(once, kept_here)
            shares.append(jnp.mean(overfull, dtype=jnp.float32))
    return PackedWeight(**sides, overfull=functools.reduce(jnp.maximum, shares), shape=w.shape, axes=axes)


@jax.jit
def _repack(packed: PackedWeight, w) -> PackedWeight:
    matrix = _matrix(w, packed.axes)
    twice = jax.lax.stop_gradient(matrix) if packed.forward is not None else matrix

    def change(side, name):
        return side.take(matrix.T if name == "forward" else twice)

    return packed._with_sides(change)


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
