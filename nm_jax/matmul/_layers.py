"""Sparse products for the layers of neural network libraries, in the signatures that those let a caller replace."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax.matmul._api import Sides, choose_sides, multiply, sparse_sides
from nm_jax.matmul._choice import default_device, is_gpu, warn_once
from nm_jax.matmul._parameter import PackedParameter
from nm_jax.matmul.base import Implementation, Product, is_multiplied


def dot_general(
    pattern: str | Pattern = "2:4-T",
    *,
    implementation: str | Implementation | None = None,
    device: jax.Device | None = None,
) -> Callable[..., Array]:
    """A `jax.lax.dot_general` for layers whose weight, the right operand, has 2:4 zeros.

    `nn.Dense(features, dot_general=nm.dot_general("2:4-T"))`, and likewise `nn.DenseGeneral`, `nnx.Linear`,
    `nnx.LinearGeneral`, and `qkv_dot_general=`, `out_dot_general=` of attention. Where a class is asked for
    (`dot_general_cls`), pass `functools.partial(nm.dot_general, "2:4-T")`.

    Products and gradients are those of `nm_matmul`, with its choice of implementation; the weight is never checked, as
    layers are initialised with dense weights. Groups of four run over the contracted dimensions of the weight,
    flattened in its own order, as in the rules of `sparse_training`. Batch dimensions (of experts) become a `vmap`.
    Of a `nm.matmul.PackedParameter` (`nm.pack_params`) nothing is packed in the call; Flax's layers hand it on with
    `promote_dtype=nm.matmul.promote_dtype`, and with their own give the weight alone, which is then packed here.

    These products stay dense: of sizes that are no multiple of four, which `sparse_training` skips too; with an
    `out_sharding`, or a `preferred_element_type` that is not the operands' dtype, which kernels do not know; of
    operands of two dtypes. That is said in a warning, once for each shape, where sparse products could have run.
    Leave out the argument in layers that are trained dense: their weights have no pattern to use.

    Args:
      pattern: as in `nm_matmul`.
      implementation: as in `nm_matmul`.
      device: as in `nm_matmul`.

    Returns:
      A function with the signature of `jax.lax.dot_general`, hashable, equal to that of another call with the same
      arguments. Where nothing runs sparse it *is* `jax.lax.dot_general`.

    Raises:
      ValueError: as `nm_matmul`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> dot = nm.dot_general("2:4-T", implementation="reference")  # nn.Dense(4, dot_general=dot)
      >>> x, w = jnp.ones((3, 4)), jnp.tile(jnp.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), (2, 1))
      >>> print(dot(x, w, (((1,), (0,)), ((), ())))[0])
      [2. 2. 2. 2.]
    """
    return _DotGeneral(_known(pattern), implementation, device)


def einsum(
    pattern: str | Pattern = "2:4-T",
    *,
    implementation: str | Implementation | None = None,
    device: jax.Device | None = None,
) -> Callable[..., Array]:
    """A `jax.numpy.einsum` of an input and a weight that has 2:4 zeros, for `nnx.Einsum(..., einsum_op=)`.

    Args:
      pattern: as in `dot_general`.
      implementation: as in `dot_general`.
      device: as in `dot_general`.

    Returns:
      A function of `(subscripts, x, weight)` for explicit subscripts of two operands without ellipsis, in each of
      which a letter occurs once. Contracted letters are those that both operands have and the result has not; others
      that both have are batch dimensions. All else is left to `jax.numpy.einsum`.

    Raises:
      ValueError: as `nm_matmul`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> product = nm.einsum("2:4-T", implementation="reference")  # nnx.Einsum(..., einsum_op=product)
      >>> w = jnp.tile(jnp.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), (2, 1)).reshape(4, 2, 2)
      >>> product("bti,ihd->bthd", jnp.ones((1, 3, 4)), w).shape
      (1, 3, 2, 2)
    """
    return _Einsum(_known(pattern), implementation, device)


def conv_general_dilated(
    pattern: str | Pattern = "2:4-T",
    *,
    implementation: str | Implementation | None = None,
    device: jax.Device | None = None,
) -> Callable[..., Array]:
    """A `jax.lax.conv_general_dilated` whose 1 x 1 convolutions run sparse: `nn.Conv(..., conv_general_dilated=)`.

    A 1 x 1 convolution without padding, dilation and feature groups, of any stride, is a product over channels. All
    others stay dense, which a warning says once for each kernel shape where sparse products could have run.

    Args:
      pattern: as in `dot_general`.
      implementation: as in `dot_general`.
      device: as in `dot_general`.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`; where nothing runs sparse it is that.

    Raises:
      ValueError: as `nm_matmul`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> conv = nm.conv_general_dilated("2:4-T", implementation="reference")  # nn.Conv(..., conv_general_dilated=conv)
      >>> w = jnp.tile(jnp.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), (2, 1))[None, None]
      >>> conv(jnp.ones((1, 5, 5, 4)), w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
      (1, 3, 3, 4)
    """
    return _Convolution(_known(pattern), implementation, device)


def _known(pattern: str | Pattern) -> Pattern:
    sparse_sides(pattern)
    return parse_pattern(pattern)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How the products of a layer are to run. A dataclass, so that equal layers compare equal and hit jit's cache."""

    pattern: Pattern
    implementation: str | Implementation | None
    device: jax.Device | None

    def sides(self, what: str, lhs, rhs, tokens: int, k: int, rows: int, kwargs) -> Sides:
        """What runs the products of X (tokens, k) and W (k, rows); all dense if something speaks against sparse."""
        packed = isinstance(rhs, PackedParameter)
        both = rhs.backward is not None if packed else sparse_sides(self.pattern)
        preferred = kwargs.get("preferred_element_type")
        why = None
        if k % 4 or (both and rows % 4):
            why = "4 does not divide its sizes"
        elif lhs.dtype != rhs.dtype or not is_multiplied(rhs.dtype):
            why = f"its operands are {lhs.dtype} and {rhs.dtype}"
        elif preferred is not None and jnp.dtype(preferred) != rhs.dtype:
            why = f"its result is to be {jnp.dtype(preferred)}"
        elif kwargs.get("out_sharding") is not None:
            why = "it has an out_sharding"
        if why:
            self.report(what, why)
            return Sides(None, None)
        return choose_sides(Product(rhs.dtype, tokens, rows, k, packed), both, self.implementation, self.device)

    def report(self, what: str, why: str) -> None:
        """Say once that a product is dense, unless all are on this device."""
        if self.implementation is not None or is_gpu(self.device or default_device()):
            warn_once(f"{what} runs dense: {why}")


@dataclasses.dataclass(frozen=True)
class _DotGeneral(_Layer):
    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None):
        (over_lhs, over_rhs), (batch_lhs, batch_rhs) = dimension_numbers
        free_lhs = _others(lhs.ndim, over_lhs, batch_lhs)
        free_rhs = _others(rhs.ndim, over_rhs, batch_rhs)
        # Groups run in the order of the weight's dimensions, whatever the order they are named in.
        pairs = sorted(zip(over_rhs, over_lhs, strict=True))
        packed = isinstance(rhs, PackedParameter)
        if packed and not _packed_for(rhs, [right for right, _ in pairs], batch_rhs):
            self.report(f"the packing of a weight of shape {rhs.shape}", "the product contracts other dimensions")
            rhs, packed = rhs.weight, False
        x = _Flat(lhs, (batch_lhs, free_lhs, [left for _, left in pairs]))
        w = _Flat(_array(rhs), (batch_rhs, [right for right, _ in pairs], free_rhs))
        kwargs = {"preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
        what = f"a product with a weight of shape {rhs.shape}"
        sides = self.sides(what, lhs, rhs, x.sizes[1], x.sizes[2], w.sizes[2], kwargs)
        if sides.dense:
            return jax.lax.dot_general(lhs, _array(rhs), dimension_numbers, precision, **_given(kwargs))
        product = functools.partial(multiply, sides=sides, precision=precision)
        if packed:
            y = _of_packed(product, x.array(), rhs.as_matrix())
        else:
            y = jax.vmap(product)(x.array(), w.array()) if batch_lhs else product(x.array()[0], w.array()[0])
        return y.reshape([*x.shape(0), *x.shape(1), *w.shape(2)])


@dataclasses.dataclass(frozen=True)
class _Flat:
    """An array with its dimensions in three flattened groups."""

    leaf: Array
    groups: tuple[Sequence[int], ...]

    def shape(self, group: int) -> list[int]:
        return [self.leaf.shape[dim] for dim in self.groups[group]]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(self.shape(group)) for group in range(3)]

    def array(self) -> Array:
        return jnp.transpose(self.leaf, [dim for group in self.groups for dim in group]).reshape(self.sizes)


@dataclasses.dataclass(frozen=True)
class _Einsum(_Layer):
    def __call__(self, subscripts, x, w, *, precision=None, preferred_element_type=None, out_sharding=None):
        kwargs = {"precision": precision, "preferred_element_type": preferred_element_type}
        operands, _, result = subscripts.replace(" ", "").partition("->")
        left, _, right = operands.partition(",")
        over = [letter for letter in right if letter in left and letter not in result]
        batch = [letter for letter in right if letter in left and letter in result]
        order = batch + [letter for letter in left + right if letter not in over + batch]
        distinct = all(letters.isalpha() and len(set(letters)) == len(letters) for letters in (left, right, result))
        plain = out_sharding is not None or not distinct or sorted(order) != sorted(result) or x.dtype != w.dtype
        if plain:
            self.report(f"the einsum {subscripts!r}", "it is no plain product of two operands")
            return jnp.einsum(subscripts, x, _array(w), **_given({**kwargs, "out_sharding": out_sharding}))

        def dims(letters):
            return tuple(left.index(a) for a in letters), tuple(right.index(a) for a in letters)

        y = _DotGeneral(self.pattern, self.implementation, self.device)(x, w, (dims(over), dims(batch)), **kwargs)
        return jnp.transpose(y, [order.index(letter) for letter in result])


@dataclasses.dataclass(frozen=True)
class _Convolution(_Layer):
    def __call__(
        self,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=None,
        rhs_dilation=None,
        dimension_numbers=None,
        feature_group_count=1,
        batch_group_count=1,
        precision=None,
        preferred_element_type=None,
        **kwargs,
    ):
        kwargs["preferred_element_type"] = preferred_element_type
        rhs = _array(rhs)
        dims = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        what = f"a convolution with a kernel of shape {rhs.shape}"
        out, channels, *window = (rhs.shape[dim] for dim in dims.rhs_spec)
        x = _channels_last(lhs, dims.lhs_spec)[:, *(slice(None, None, step) for step in window_strides)]
        padded = not isinstance(padding, str) and any(before or after for before, after in padding)
        dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        if math.prod(window) != 1 or padded or dilated or feature_group_count * batch_group_count != 1:
            self.report(what, "it is not 1 x 1 without padding, dilation and groups")
            sides = Sides(None, None)
        else:
            sides = self.sides(what, lhs, rhs, math.prod(x.shape[:-1]), channels, out, kwargs)
        if sides.dense:
            return jax.lax.conv_general_dilated(
                lhs,
                rhs,
                window_strides,
                padding,
                lhs_dilation,
                rhs_dilation,
                dimension_numbers,
                feature_group_count,
                batch_group_count,
                precision,
                **_given(kwargs),
            )
        w = jnp.transpose(rhs, (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0])).reshape(channels, out)
        y = multiply(x, w, sides, precision)
        order = (dims.out_spec[0], *dims.out_spec[2:], dims.out_spec[1])
        return jnp.transpose(y, [order.index(dim) for dim in range(y.ndim)])


def _array(w: Array | PackedParameter) -> Array:
    return w.weight if isinstance(w, PackedParameter) else w


def _packed_for(w: PackedParameter, over: Sequence[int], batch: Sequence[int]) -> bool:
    """Whether a weight was packed for a product over these of its dimensions."""
    before = w.ndim - len(w.axes)
    contracted = [before + dim for dim, letter in enumerate(w.axes) if letter == "i"]
    return list(over) == contracted and list(batch) == list(range(before))


def _of_packed(product: Callable, x: Array, w: PackedParameter) -> Array:
    """The products of x (batch, tokens, k) and the weights of as many matrices."""
    before = w.ndim - 2
    if not before:
        return product(x[0], w)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[before:]), w)
    return jax.vmap(product)(x, flat)


def _channels_last(array: Array, spec: Sequence[int]) -> Array:
    """An array of dimensions (batch, channels, *positions), wherever they are, as (batch, *positions, channels)."""
    return jnp.transpose(array, (spec[0], *spec[2:], spec[1]))


def _others(ndim: int, *used: Sequence[int]) -> list[int]:
    return [dim for dim in range(ndim) if not any(dim in dims for dims in used)]


def _given(kwargs: dict) -> dict:
    """The arguments that are not `None`: older versions of jax do not know all of them."""
    return {name: value for name, value in kwargs.items() if value is not None}
