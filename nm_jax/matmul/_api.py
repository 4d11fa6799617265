"""`nm_matmul`: the product of a layer with a 2:4 weight, whose gradients run sparse too."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nm_jax._core.nonzero import nonzero
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax.matmul._choice import choose
from nm_jax.matmul._compress import SparseMatrix, compress
from nm_jax.matmul._packing import PackedWeight, gradient_of, nan_unless, pack, to_matrix
from nm_jax.matmul._parameter import PackedParameter
from nm_jax.matmul.base import Implementation, Product, is_multiplied, sum_dtype


def nm_matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "in out"] | PackedWeight | PackedParameter,
    pattern: str | Pattern = "2:4-T",
    *,
    implementation: str | Implementation | None = None,
    precision: jax.lax.PrecisionLike = None,
    device: jax.Device | None = None,
) -> Float[Array, "*batch out"]:
    """The product with a 2:4 weight, its forward and its input gradient on sparse tensor cores.

    Y = X W,   dX = dY W^T,   dW = X^T dY  (every entry: the straight-through gradient)

    With `"2:4-T"` the first two run sparse, with `"2:4"` the first alone. The weight gradient is dense, so that pruned
    weights learn and the mask can change (Section 4 of the paper).

    What `implementation=None` means is decided for each product when it is traced: of the sparse kernels that support
    device, dtype, shape and version of jax, the one that gains the most over the dense product, the packing of the
    weight included, going by what was *measured* on that device (`experiments/bench/matmul.py` measures,
    `nm_jax.matmul.save_profile` saves). Everywhere else, on CPU above all, it is the plain dense product, which gives
    the same result and packs nothing; on a GPU a warning then says why, once.

    Args:
      x: any leading dimensions. Operands are promoted to one dtype; bfloat16 and float16 are accumulated in float32.
      w: weight with exact zeros where it is pruned, or a packed one. A weight that has no 2:4 pattern is an error when
        it is concrete; while tracing, sparse kernels use the two largest of each group, and a dense product uses it
        as it is. Of a `PackedParameter` products read the packed sides, and its weight gets the gradient.
      pattern: `"2:4"`, `"2:4-T"`, or another whose masks are 2:4 masks too (1:4, 1:2, 2:4-S). Of a packed weight the
        input gradient runs sparse if it was packed for that.
      implementation: `None`, `"hopper"`, `"ampere"`, `"reference"` or an `Implementation`. A named one runs, for both
        products, or raises.
      precision: of dense products, as in `jax.numpy.dot`; kernels multiply bfloat16 and float16 exactly.
      device: where it will run, for compiling ahead of time; `None`: the default device.

    Returns:
      x W in the promoted dtype.

    Raises:
      ValueError: for a pattern that sparse tensor cores do not read (4:8, unstructured), shapes or dtypes that do not
        fit, a concrete weight without the pattern, a named implementation that cannot run.

    Works under `jit`, `vmap` (a batch of x becomes one product, weights of a batch are multiplied one after another by
    a sparse implementation, and the choice sees the shape of one example) and reverse-mode differentiation of any
    order; forward mode through a sparse implementation or a packed weight is refused by jax. The gradient of a packed
    weight goes to its values, on both sides alike, and through `repack` or `pack` to the kept entries of the weight.
    Kernels see the operands of one device: under a mesh that the compiler partitions, `None` means dense; call it
    inside `jax.shard_map` to run kernels there.

    An infinity or a NaN in x reaches the outputs of its own token alone. Those whose weight keeps it are infinite or
    NaN; the others are NaN where zeros are multiplied, as dense products and `reference` do, and sparse tensor cores
    mostly do not.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> w = jax.random.normal(jax.random.key(0), (8, 4))
      >>> w = w * nm.solve(abs(w), "2:4-T")
      >>> x = jnp.ones((3, 8))
      >>> y = nm.nm_matmul(x, w, "2:4-T", implementation="reference")
      >>> bool(jnp.allclose(y, x @ w, atol=1e-5))
      True
      >>> to_w = jax.grad(lambda w: jnp.sum(nm.nm_matmul(x, w, "2:4-T", implementation="reference")))(w)
      >>> print(to_w[0])  # straight through: pruned weights learn
      [3. 3. 3. 3.]
    """
    both = sparse_sides(pattern)
    if isinstance(w, PackedWeight | PackedParameter):
        both = w.backward is not None
    dtype = _check(x, w, both)
    packed = isinstance(w, PackedWeight | PackedParameter)
    k, rows = w.matrix_shape if isinstance(w, PackedWeight | PackedParameter) else w.shape
    product = Product(np.dtype(dtype), math.prod(x.shape[:-1]), rows, k, packed)
    if isinstance(w, PackedParameter):
        w = w.as_matrix()
    sides = choose_sides(product, both, implementation, device)
    return multiply(x.astype(dtype), w.astype(dtype), sides, precision)


def sparse_sides(pattern: str | Pattern) -> bool:
    """Whether a pattern makes both products sparse (True) or the forward product alone (False); refuses others."""
    pattern = parse_pattern(pattern)
    groups = pattern.contraction_groups
    if groups is None or not groups.two_of_four:
        raise ValueError(
            f"sparse tensor cores read two kept of every four, and a {pattern} mask may keep more of some four; "
            "train with sparse_training(..., '2:4-T') ('2:4': forward product only), or give the weight a 2:4 mask "
            "(nm.compute_masks(params, '2:4-T'))"
        )
    return pattern.output_groups is not None and pattern.output_groups.two_of_four


@dataclasses.dataclass(frozen=True)
class Sides:
    """What runs the two products of a layer; `None`: a dense product."""

    forward: Implementation | None
    backward: Implementation | None

    @property
    def dense(self) -> bool:
        return self.forward is None and self.backward is None


def choose_sides(
    product: Product, both: bool, implementation: str | Implementation | None, device: jax.Device | None
) -> Sides:
    """What runs X W, which is `product`, and with `both` dY W^T."""
    if not min(product.tokens, product.k, product.rows):
        return Sides(None, None)
    forward = choose(implementation, product, device)
    return Sides(forward, choose(implementation, product.transposed, device) if both else None)


def multiply(
    x: Float[Array, "*batch in"],
    w: Array | PackedWeight | PackedParameter,
    sides: Sides,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*batch out"]:
    """X W by the chosen implementations, for operands of one dtype."""
    if sides.dense:
        return _dot(x, _dense(w), x.ndim - 1, 0, precision)
    y = _product(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w, sides, precision, False)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _check(x, w, both: bool):
    """The common dtype of the operands, or a ValueError."""
    if isinstance(w, PackedWeight):
        if w.forward is None:
            raise ValueError("the weight was packed with orientation='backward'; the product needs 'both' or 'forward'")
        size, values = w.matrix_shape[0], w.forward.values
    elif isinstance(w, PackedParameter):
        if w.ndim != len(w.axes):
            raise ValueError(f"w is a batch of packed weights, of shape {w.shape}; map over it with jax.vmap")
        size, values = w.matrix_shape[0], w.weight
    elif w.ndim != 2:
        raise ValueError(f"w must be a matrix (in, out) or packed, got shape {w.shape}; reshape it, or use dot_general")
    else:
        size, values = w.shape[0], w
    if x.ndim < 1 or x.shape[-1] != size:
        raise ValueError(f"x has shape {x.shape} but the weight takes {size} inputs; its last axis must be that")
    for name, operand in (("x", x), ("the weight", values)):
        if not is_multiplied(operand.dtype):
            raise ValueError(
                f"nm_matmul multiplies floating point numbers of 16, 32 and 64 bits, and {name} is {operand.dtype}; "
                "convert it, to bfloat16 for instance"
            )
    dtype = jnp.result_type(x, values)
    if values is w and not isinstance(w, jax.core.Tracer):
        pack(w, orientation="both" if both else "forward")  # raises where it has no 2:4 pattern
    return dtype


# ----------------------------------------------------------------------------------------------- one rule, both sides


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(
    x: Float[Array, "tokens k"], w: Array | PackedWeight | PackedParameter, sides: Sides, precision, transposed: bool
) -> Float[Array, "tokens rows"]:
    """X W, or X W^T. Each is the input gradient of the other, which makes derivatives of any order right."""
    implementation = sides.backward if transposed else sides.forward
    if implementation is None:
        return _dot(x, _dense(w), 1, 1 if transposed else 0, precision)
    if isinstance(w, PackedWeight):
        side = w.backward if transposed else w.forward
        assert side is not None  # or no implementation would have been chosen for this side
        y = sparse_product(implementation, side.matrix, x)
        return nan_unless(side.intact, y)
    if isinstance(w, PackedParameter):
        y = sparse_product(implementation, w.backward if transposed else w.forward, x)
        return y if w.intact is None else nan_unless(w.intact, y)
    left = w if transposed else w.T
    a, _ = compress(left, nonzero(left))
    return sparse_product(implementation, a, x)


def _product_forward(x, w, sides, precision, transposed):
    return _product(x, w, sides, precision, transposed), (x, w)


def _product_backward(sides, precision, transposed, residuals, gradient):
    x, w = residuals
    to_x = _product(gradient, w, sides, precision, not transposed)
    left, right = (gradient, x) if transposed else (x, gradient)
    to_w = _dot(left, right, 0, 0, precision)
    if isinstance(w, PackedWeight):
        to_w = gradient_of(w, to_w)
    elif isinstance(w, PackedParameter):
        to_w = PackedParameter(to_w, None, None, None, w.axes)
    return to_x, to_w


_product.defvjp(_product_forward, _product_backward)


def _dense(w: Array | PackedWeight | PackedParameter) -> Float[Array, "in out"]:
    if isinstance(w, PackedParameter):
        return w.weight
    return to_matrix(w) if isinstance(w, PackedWeight) else w


def _dot(a, b, over_a: int, over_b: int, precision) -> Array:
    """A dense product accumulated in float32 at least, in the dtype of the operands."""
    dimensions = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision, sum_dtype(a.dtype)).astype(a.dtype)


# ------------------------------------------------------------------------------------------------------------- batches


def sparse_product(
    implementation: Implementation, a: SparseMatrix, x: Float[Array, "tokens k"]
) -> Float[Array, "tokens rows"]:
    """X A^T by an implementation, which gets one matrix at a time under `vmap`."""

    @jax.custom_batching.custom_vmap
    def one(a, x):
        return nm_sparse_product(implementation, a, x)

    @one.def_vmap
    def many(size, batched, a, x):
        if not any(jax.tree.leaves(batched[0])):
            return one(a, x.reshape(-1, x.shape[-1])).reshape(size, -1, a.rows), True

        def at(index):
            return jax.tree.map(lambda leaf, varies: leaf[index] if varies else leaf, (a, x), tuple(batched))

        return jax.lax.map(lambda index: one(*at(index)), jnp.arange(size)), True

    return one(a, x)


@functools.partial(jax.jit, static_argnums=0)
def nm_sparse_product(implementation: Implementation, a: SparseMatrix, x: Array) -> Array:
    """X A^T; a function of its own, so that jaxprs and profiles of compiled programs name it."""
    return implementation.product(a, x)
