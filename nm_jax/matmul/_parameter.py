"""A weight that trains, with what products need of it packed once for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax.matmul._compress import decode, entries, pick
from nm_jax.matmul._packing import PackedSide, PackedWeight, pack

_SAMPLE = 16  # rows that `attach` compares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedParameter:
    """A sparse weight beside its packed sides: products read these, the gradient goes to every entry of the weight.

    It takes the place of the weight among the parameters: `nm.pack_params` makes it, `nm.attach` puts it to the weights
    that are differentiated, `nm.dot_general`, `nm.einsum` and `nm.nm_matmul` take it. Whatever else takes it as an
    array gets the weight itself.

    Args:
      weight: the sparse weight; dimensions of a batch (of layers, of experts) come first.
      forward: `SparseMatrix` of W^T, for each member of the batch.
      backward: that of W; `None` for a mask that is not transposable.
      intact: whether the packed values were seen to be those of the weight; `None`: they were made of it.
      axes: a letter for each dimension that is none of the batch: i contraction, o output.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True).init(params)
      >>> kernel = nm.pack_params(opt_state, nm.sparse_params(opt_state, params))["kernel"]
      >>> isinstance(kernel, nm.matmul.PackedParameter), kernel.shape, kernel.forward.values.shape
      (True, (4, 4), (4, 8))
    """

    weight: Any  # first: frameworks compare the shape of the first array with that of a new parameter
    forward: Any
    backward: Any
    intact: Any
    axes: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def __jax_array__(self) -> Array:
        return self.weight

    def __getitem__(self, key: Any) -> Any:
        return self if key is Ellipsis else self.weight[key]

    def astype(self, dtype: jax.typing.DTypeLike) -> "PackedParameter":
        """The same in another dtype, packed values included."""

        def cast(side):
            return side and dataclasses.replace(side, values=side.values.astype(dtype))

        return dataclasses.replace(
            self, weight=self.weight.astype(dtype), forward=cast(self.forward), backward=cast(self.backward)
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out)"""
        return _tiling(self).matrix_shape[1:]

    def as_matrix(self) -> "PackedParameter":
        """The same with its weight as a matrix (in, out), or a batch of them."""
        matrix = _over_batch(self, lambda weight: _tiling(self).matrix(weight)[0], self.weight)
        return dataclasses.replace(self, weight=matrix, axes="io")


def positions(mask: Bool[Array, "..."], axes: str, both: bool) -> PackedWeight | None:
    """What packing takes from a mask alone: a packed weight without values, 1/8 byte for an entry and side.

    `None` where products of the leaf would not run sparse: sizes that 4 does not divide, dimensions of a batch that do
    not come first.
    """
    batch = axes.count("b")
    _, k, rows = Tiling(mask.shape, axes, 1, 1).matrix_shape
    if k % 4 or rows % 4 or axes[:batch] != "b" * batch:
        return None

    def find(mask):
        packed = pack(mask.astype(jnp.float32), mask, axes[batch:], orientation="both" if both else "forward")
        return packed._with_sides(
            lambda side, _: PackedSide(None, side.metadata.astype(jnp.uint16), side.k), overfull=None
        )

    for _ in range(batch):
        find = jax.vmap(find)
    return jax.jit(find)(mask)


def parameter(where: PackedWeight, weight: Float[Array, "..."]) -> PackedParameter:
    """A weight packed at known positions."""

    def find(where, weight):
        matrix = Tiling(weight.shape, where.axes, 1, 1).matrix(weight)[0]
        forward, backward = where.forward, where.backward
        return forward.take(matrix.T).matrix, backward and backward.take(matrix).matrix

    for _ in range(weight.ndim - len(where.axes)):
        find = jax.vmap(find)
    forward, backward = jax.jit(find)(where, jax.lax.stop_gradient(weight))
    return PackedParameter(weight, forward, backward, None, where.axes)


def attach(params: Any, packed: Any) -> Any:
    """The parameters with packed sides beside them: what a loss gives to the model.

    `jax.grad(lambda params: loss(nm.attach(params, packed)))(params)` is the straight-through gradient of every
    parameter, and `packed` is made once, however many batches there are.

    Args:
      params: the parameters.
      packed: what `nm.pack_params` made of them.

    Returns:
      A tree like `params` with a `nm.matmul.PackedParameter` wherever `packed` has one. A sample of each, 16 of its
      outputs, is compared with the packed values: products of weights that have changed since are NaN, not those of
      the former weights. Works under `jit`, `grad`, `vmap` and `jax.checkpoint`.

    Raises:
      ValueError: for a parameter of another shape or dtype than the packed one.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True).init(params)
      >>> params = nm.sparse_params(opt_state, params)
      >>> packed = nm.pack_params(opt_state, params)
      >>> loss = lambda params: jnp.sum(nm.nm_matmul(jnp.ones((2, 4)), nm.attach(params, packed)["kernel"]))
      >>> print(jax.grad(loss)(params)["kernel"][0])  # straight through: pruned weights learn
      [2. 2. 2. 2.]
    """

    def one(path, param, entry):
        if not isinstance(entry, PackedParameter):
            return param
        if jnp.shape(param) != entry.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name} has shape {jnp.shape(param)}, and {entry.shape} was packed; pack it anew")
        weight = param.astype(entry.dtype)
        return dataclasses.replace(entry, weight=weight, intact=_intact(entry, jax.lax.stop_gradient(weight)))

    return jax.tree_util.tree_map_with_path(one, params, packed)


def promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    """The `promote_dtype=` of Flax's layers that hands packed parameters on: `nn.Dense(..., promote_dtype=...)`.

    Args:
      args: inputs, kernel and bias, of Linen one by one, of NNX in a tuple; `None` stays.
      dtype: what all are to be; `None`: their common dtype.
      inexact: of `None`, take float32 where no operand is a float.

    Returns:
      The operands in one dtype.

    Raises:
      ValueError: if that is not a float, with `inexact`.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> x, w = nm.matmul.promote_dtype(jnp.ones(3, jnp.bfloat16), jnp.ones(3))
      >>> x.dtype.name, w.dtype.name
      ('float32', 'float32')
    """
    operands = args[0] if len(args) == 1 and isinstance(args[0], tuple) else args
    if dtype is None:
        dtype = jnp.result_type(
            *(operand.dtype if _packed(operand) else operand for operand in operands if operand is not None)
        )
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"layers compute with floats, and dtype is {dtype}; give a float dtype")

    def cast(operand):
        return operand.astype(dtype) if _packed(operand) else jnp.asarray(operand, dtype)

    return tuple(None if operand is None else cast(operand) for operand in operands)


def _packed(operand: Any) -> bool:
    return isinstance(operand, PackedParameter)


def _tiling(packed: PackedParameter) -> Tiling:
    return Tiling(packed.shape[packed.ndim - len(packed.axes) :], packed.axes, 1, 1)


def _over_batch(packed: PackedParameter, function: Callable, *arguments: Any) -> Any:
    for _ in range(packed.ndim - len(packed.axes)):
        function = jax.vmap(function)
    return function(*arguments)


def _intact(packed: PackedParameter, weight: Array) -> Array:
    """Whether a sample of the packed values is that of a weight, for each member of a batch."""

    def same(a, weight):
        rows = _tiling(packed).matrix(weight)[0][:, :_SAMPLE].T
        values = a.values[:_SAMPLE]
        return jnp.all((values == 0) | (values == pick(entries(rows), *decode(a.metadata[:_SAMPLE]))))

    return _over_batch(packed, same, packed.forward, weight)
