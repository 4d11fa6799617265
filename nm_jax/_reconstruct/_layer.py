"""The weights that a mask leaves, changed so that a layer's output stays what it was (Section 5 of the paper).

AdaPrune (Eq. 5) finds V with the support of a mask S that minimises ||X W - X V||^2 over calibration inputs X. All that
it needs of them is the Gram matrix H = X^T X (`nm_jax.gram`):

    ||X W - X V||^2 = tr((W - V)^T H (W - V)),

one least squares problem per output, all with the same H and each with its own support. Conjugate gradients solve them
together: one product with H for all outputs is one matrix product.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.sharding import partitioned, spec
from nm_jax._model.gram import Gram
from nm_jax._reconstruct._least_squares import Minimiser, Quadratic, adam, conjugate_gradients
from nm_jax._reconstruct._matrices import InputMoments, LayerMatrices

_PCG_ITERATIONS = 400
_ADAM_ITERATIONS = 1000  # the paper's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The weights of one layer after `reconstruct`, and what they cost.

    Attributes:
      weight: the new weights, exact zeros outside the mask; shape and dtype of the given ones.
      bias: the new bias, or `None` when none was given.
      before: ||X W - X (S * W)||^2 / ||X W||^2, the relative error of the masked weights as they were.
      after: the same for the new weights and the new bias; never above `before`.
      iterations: how many were needed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> gram = nm.Gram.from_inputs(jnp.eye(4))
      >>> mask = jnp.array([[True], [True], [False], [False]])
      >>> found = nm.reconstruct(jnp.ones((4, 1)), gram, mask)
      >>> round(float(found.before), 3), round(float(found.after), 3)
      (0.5, 0.5)
    """

    weight: Float[Array, "..."]
    bias: Float[Array, "..."] | None
    before: Float[Array, "*batch"]
    after: Float[Array, "*batch"]
    iterations: Int[Array, "*batch"]


def reconstruct(
    w: Float[Array, "..."],
    gram: Gram | Sequence[Gram],
    mask: Bool[Array, "..."],
    *,
    bias: Float[Array, "..."] | None = None,
    centred: bool | None = None,
    ridge: float | None = None,
    method: str = "pcg",
    iterations: int | None = None,
    learning_rate: float = 1e-2,
) -> Reconstruction:
    """The weights on a fixed mask that give the outputs closest to those of the dense weights: AdaPrune.

    minimise over V = S * V:  ||X W - X V||^2 + ridge * mean(diag H) * ||W - V||^2

    Args:
      w: dense weights of a layer.
      gram: the Gram matrices of its inputs; they also say which dimensions of `w` are contracted. A sequence of
        records, one per batch of inputs, is added up; `method="adam"` draws one of them for each iteration.
      mask: True = kept, in the shape of `w`.
      bias: the layer's bias, one entry per output in the order of the outputs. It takes up the mean of the change of
        every output, and the weights only what remains.
      centred: leave the mean of the output's change out of the error although no bias is given, because something that
        follows removes it, such as a batch norm that is tuned afterwards. `None`: exactly when there is a bias.
      ridge: how strongly the new weights are pulled toward the dense ones, relative to the mean of diag H (of the
        inputs without their mean, where that of the change does not count). `None`: 0.3 * K / rows of inputs, between
        1e-3 and 0.3, which lowers the error on other inputs when there are few.
      method: `"pcg"`, conjugate gradients preconditioned by diag H until nothing is gained any more; or `"adam"`, what
        the paper does, which has neither ridge nor centring.
      iterations: at most so many, 400 by default; of Adam exactly so many, 1000 by default as in the paper.
      learning_rate: of Adam, relative to the root mean square of the weights.

    Returns:
      The new weights, and the errors before and after. An output for which nothing better was found keeps its masked
      weights and its bias, so that no error grows.

    Raises:
      ValueError: when shapes do not fit each other, or (outside `jit`) when the Gram matrices are not finite.

    Batched over experts, scanned layers and groups of a convolution. In float32 at the highest precision, whatever the
    dtype of the weights. An iteration costs 2 K^2 flops an output. Works under `jit` and `vmap`; sharded weights and
    Gram matrices stay sharded by their outputs; not differentiable. Source: Section 5, Eq. 5.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])  # the second input repeats the first
      >>> found = nm.reconstruct(jnp.ones((2, 1)), nm.Gram.from_inputs(x), jnp.array([[True], [False]]), ridge=0.0)
      >>> [round(float(v), 2) for v in found.weight[:, 0]]
      [2.0, 0.0]
    """
    if method not in ("pcg", "adam"):
        raise ValueError(f"method must be 'pcg' or 'adam', got {method!r}")
    grams = [gram] if isinstance(gram, Gram) else list(gram)
    if not grams:
        raise ValueError("gram is empty: give the Gram matrices of at least one batch")
    layer = LayerMatrices.of(w, grams[0])
    matrices, _, outputs = layer.sizes
    if jnp.shape(mask) != layer.shape:
        raise ValueError(f"the mask has shape {jnp.shape(mask)}, the weights have {layer.shape}")
    if bias is not None and jnp.size(bias) != matrices * outputs:
        raise ValueError(f"the bias has shape {jnp.shape(bias)}, the weights have {matrices * outputs} outputs")
    total = functools.reduce(lambda a, b: a + b, grams)
    if not isinstance(total.h, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(total.h))):
        raise ValueError("the Gram matrices are not finite; look for NaN or infinities in the calibration inputs")
    if iterations is None:
        iterations = _PCG_ITERATIONS if method == "pcg" else _ADAM_ITERATIONS
    how = Minimiser(method, iterations, ridge, bias is not None if centred is None else centred, learning_rate)
    return _reconstruct(w, total, grams if method == "adam" else [], mask, bias, layer, how)


@functools.partial(jax.jit, static_argnames=("layer", "how"))
def _reconstruct(w, gram, samples, mask, bias, layer: LayerMatrices, how: Minimiser) -> Reconstruction:
    one = PartitionSpec()
    specs = (spec(w), None if bias is None else spec(bias), one, one, one)
    return Reconstruction(
        *partitioned(functools.partial(_on_matrices, layer, how), specs, w, gram, samples, mask, bias)
    )


def _on_matrices(layer: LayerMatrices, how: Minimiser, w, gram, samples, mask, bias):
    """The fields of a `Reconstruction`."""
    moments = InputMoments.of(gram)
    dense, kept = layer.split(w.astype(jnp.float32)), layer.split(mask.astype(bool))
    masked = jnp.where(kept, dense, 0)
    if how.method == "pcg":
        new, iterations = conjugate_gradients(dense, kept, Quadratic.of(moments, how), how.iterations)
    else:
        new, iterations = adam(dense, kept, jnp.stack([record.h for record in samples]), how)
    new = new.astype(w.dtype).astype(jnp.float32)  # judged as it is returned, rounded
    zero = jnp.zeros_like(dense[:, 0])
    # The mean of a change counts, unless something that follows removes it.
    unchanged = None if bias is None and how.centred else zero
    before, constant = moments.error(masked - dense, unchanged), unchanged
    if bias is not None:
        old_bias = bias.reshape(zero.shape)
        moved = (old_bias.astype(jnp.float32) - moments.shift(new - dense)).astype(bias.dtype)
        constant = moved.astype(jnp.float32) - old_bias.astype(jnp.float32)
    after = moments.error(new - dense, constant)
    better = after < before
    energy = moments.error(dense, unchanged)
    weight = layer.join(jnp.where(better[:, None], new, masked)).astype(w.dtype)
    bias = None if bias is None else jnp.where(better, moved, old_bias).reshape(bias.shape)
    after = jnp.where(better, after, before)
    return weight, bias, moments.relative(before, energy), moments.relative(after, energy), iterations


@functools.partial(jax.jit, static_argnames="centred")
def output_error(
    w: Float[Array, "..."],
    new: Float[Array, "..."],
    gram: Gram,
    *,
    bias_change: Float[Array, "..."] | None = None,
    centred: bool = False,
) -> Float[Array, ""]:
    """How far the outputs of a layer with new weights are from those with the old ones, relative to the latter.

    ||X W - X V - b||^2 / ||X W||^2

    Args:
      w: old weights.
      new: new weights V.
      gram: the Gram matrices of the layer's inputs, of those that `new` was made for or of others.
      bias_change: new minus old bias.
      centred: leave out the means over the rows, of the change and of the output.

    Returns:
      The error of the whole layer; 0 for outputs that are all zero. Works under `jit` and `vmap`.

    Raises:
      ValueError: when shapes do not fit each other.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> w = jnp.ones((4, 2))
      >>> round(float(nm.output_error(w, 0.5 * w, nm.Gram.from_inputs(jnp.eye(4)))), 3)
      0.25
    """
    measure = functools.partial(_measure, LayerMatrices.of(w, gram), centred)
    return partitioned(measure, PartitionSpec(), w, new, gram, bias_change)


def _measure(layer: LayerMatrices, centred: bool, w, new, gram, bias_change) -> Float[Array, ""]:
    moments = InputMoments.of(gram)
    dense, change = layer.split(w.astype(jnp.float32)), layer.split(new.astype(jnp.float32) - w.astype(jnp.float32))
    zero = jnp.zeros_like(dense[:, 0])
    constant = zero if bias_change is None else bias_change.astype(jnp.float32).reshape(zero.shape)
    energy = moments.error(dense, None if centred else zero)
    return moments.relative(moments.error(change, None if centred else constant), energy)
