"""The weights that a mask leaves, changed so that a layer's output stays what it was (Section 5 of the paper).

AdaPrune (Eq. 5) finds V with the support of a mask S that minimises ||X W - X V||^2 over calibration inputs X. All that
it needs of them is the Gram matrix H = X^T X (`nm_jax.gram`):

    ||X W - X V||^2 = tr((W - V)^T H (W - V)),

one least squares problem per output, all with the same H and each with its own support. Conjugate gradients solve them
together: one product with H for all outputs is one matrix product. The bias fix needs no inputs at all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.sharding import partitioned, spec
from nm_jax._model.gram import Gram
from nm_jax._reconstruct._matrices import InputMoments, LayerMatrices, sum_rows

Method: TypeAlias = Literal["pcg", "adam"]

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_BURST = 8  # iterations between two looks at the convergence
_TOLERANCE = 3e-4  # share of the objective that a burst must gain for another one to follow
_PCG_ITERATIONS = 400
_ADAM_ITERATIONS = 1000  # the paper's
_RIDGE = 0.3  # times K / rows of inputs, within these bounds
_RIDGE_BOUNDS = (1e-3, 0.3)


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
    """

    weight: Float[Array, "..."]
    bias: Float[Array, "..."] | None
    before: Float[Array, ""]
    after: Float[Array, ""]
    iterations: Int[Array, ""]


class _How(NamedTuple):
    """Static configuration of a reconstruction."""

    method: Method
    iterations: int
    ridge: float | None
    centred: bool
    learning_rate: float


def reconstruct(
    w: Float[Array, "..."],
    gram: Gram | Sequence[Gram],
    mask: Bool[Array, "..."],
    *,
    bias: Float[Array, "..."] | None = None,
    centred: bool | None = None,
    ridge: float | None = None,
    method: Method = "pcg",
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
      ridge: how strongly the new weights are pulled toward the dense ones. `None`: 0.3 * K / rows of inputs, between
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
    how = _How(method, iterations, ridge, bias is not None if centred is None else centred, learning_rate)
    return _reconstruct(w, total, grams if method == "adam" else [], mask, bias, layer, how)


@functools.partial(jax.jit, static_argnames=("layer", "how"))
def _reconstruct(w, gram, samples, mask, bias, layer: LayerMatrices, how: _How) -> Reconstruction:
    one = PartitionSpec()
    specs = (spec(w), None if bias is None else spec(bias), one, one, one)
    return Reconstruction(
        *partitioned(functools.partial(_on_matrices, layer, how), specs, w, gram, samples, mask, bias)
    )


def _on_matrices(layer: LayerMatrices, how: _How, w, gram, samples, mask, bias):
    """The fields of a `Reconstruction`."""
    moments = InputMoments.of(gram)
    dense, kept = layer.split(w.astype(jnp.float32)), layer.split(mask != 0)
    masked = jnp.where(kept, dense, 0)
    if how.method == "pcg":
        new, iterations = _conjugate_gradients(dense, kept, moments, how)
    else:
        new, iterations = _adam(dense, kept, jnp.stack([record.h for record in samples]), how)
    new = new.astype(w.dtype).astype(jnp.float32)  # judged as it is returned, rounded
    zero = jnp.zeros((dense.shape[0], dense.shape[2]))
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


def _conjugate_gradients(dense, kept, moments: InputMoments, how: _How):
    """Weights on the support, and the number of iterations."""
    h = moments.centred if how.centred else moments.h
    automatic = jnp.clip(_RIDGE * h.shape[1] / moments.rows, *_RIDGE_BOUNDS)
    ridge = (automatic if how.ridge is None else jnp.full_like(automatic, how.ridge))[:, :, None]
    diagonal = jnp.diagonal(h, axis1=1, axis2=2)[:, :, None] + ridge
    preconditioner = jnp.where(kept & (diagonal > 0), 1 / jnp.where(diagonal > 0, diagonal, 1), 0)

    def curvature(direction):
        return _matmul(h, direction) + ridge * direction

    def step(_, state):
        new, residual, direction, slope, gained = state
        steepest = preconditioner * residual
        steeper = sum_rows(residual * steepest)[:, None]
        direction = steepest + _ratio(steeper, slope) * direction
        bent = curvature(direction)
        length = _ratio(steeper, sum_rows(direction * bent)[:, None])
        residual = residual - jnp.where(kept, length * bent, 0)
        gained = gained + jnp.sum(length * steeper, axis=(1, 2))
        return new + length * direction, residual, direction, steeper, gained

    def burst(state):
        new, direction, slope, _, _, iterations = state
        # The residual anew: rounding errors creep into the one that is updated.
        pull = curvature(dense - new)
        objective = jnp.sum((dense - new) * pull, axis=(1, 2))
        start = (new, jnp.where(kept, pull, 0), direction, slope, jnp.zeros_like(objective))
        new, _, direction, slope, gained = jax.lax.fori_loop(0, _BURST, step, start)
        return new, direction, slope, gained, objective, iterations + _BURST

    def unfinished(state):
        *_, gained, objective, iterations = state
        return jnp.any(gained > _TOLERANCE * objective) & (iterations < how.iterations)

    start = jnp.where(kept, dense, 0)
    nothing, one = jnp.zeros((dense.shape[0], 1, dense.shape[2])), jnp.ones(dense.shape[0])
    first = (start, jnp.zeros_like(start), nothing, one, 0 * one, jnp.int32(0))
    new, *_, iterations = jax.lax.while_loop(unfinished, burst, first)
    return new, iterations


def _ratio(part, whole):
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _adam(dense, kept, h: Float[Array, "samples matrices K K"], how: _How):
    """The paper's way: Adam on the squared error of one batch of inputs after another."""
    scale = jnp.mean(jnp.diagonal(h, axis1=2, axis2=3), axis=(0, 2))[None, :, None, None]
    h = h / jnp.where(scale > 0, scale, 1)
    optimiser = optax.adam(how.learning_rate * jnp.sqrt(jnp.mean(dense**2)))
    drawn = jax.random.randint(jax.random.key(0), (how.iterations,), 0, len(h))

    def step(state, k):
        new, moments = state
        gradient = jnp.where(kept, _matmul(h[k], new - dense), 0)
        updates, moments = optimiser.update(gradient, moments)
        return (new + updates, moments), None

    start = jnp.where(kept, dense, 0)
    (new, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), drawn)
    return new, jnp.int32(how.iterations)


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
    """
    measure = functools.partial(_measure, LayerMatrices.of(w, gram), centred)
    return partitioned(measure, PartitionSpec(), w, new, gram, bias_change)


def _measure(layer: LayerMatrices, centred: bool, w, new, gram, bias_change) -> Float[Array, ""]:
    moments = InputMoments.of(gram)
    dense, change = layer.split(w.astype(jnp.float32)), layer.split(new.astype(jnp.float32) - w.astype(jnp.float32))
    zero = jnp.zeros((dense.shape[0], dense.shape[2]))
    constant = zero if bias_change is None else bias_change.astype(jnp.float32).reshape(zero.shape)
    energy = moments.error(dense, None if centred else zero)
    return moments.relative(moments.error(change, None if centred else constant), energy)


def absorb_mean(
    w: Float[Array, "..."], mask: Bool[Array, "..."], pattern: str | Pattern, axes: str = "io"
) -> Float[Array, "..."]:
    """The paper's bias fix: the kept weights of every group take up the mean of the pruned ones.

    v = s * (w + sum of the pruned weights of the group / number of the kept), which keeps the sum of every group

    Args:
      w: dense weights.
      mask: True = kept.
      pattern: gives the size m of a group.
      axes: axes of `w` (`nm_jax.axes`).

    Returns:
      Weights like `w`, exact zeros outside the mask. A group that keeps nothing stays zero. Needs no calibration
      inputs; works under `jit`, `vmap` and `grad`. It often raises the error of a layer: look before you use it.

    Raises:
      ValueError: when shapes do not fit, or for a pattern without groups.

    Source: Section 5, "Fixing pruning bias using mean absorption".
    """
    tile = parse_pattern(pattern).tile
    if tile is None:
        raise ValueError(f"{pattern} has no groups whose mean could be absorbed; use an n:m pattern")
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(f"the mask has shape {jnp.shape(mask)}, the weights have {jnp.shape(w)}")
    return partitioned(functools.partial(_absorb, Tiling(jnp.shape(w), axes, tile[0], 1)), spec(w), w, mask)


def _absorb(tiling: Tiling, w, mask) -> Float[Array, "..."]:
    groups, kept = tiling.split(w.astype(jnp.float32)), tiling.split(mask)
    pruned = jnp.sum(jnp.where(kept, 0, groups), axis=0, keepdims=True)
    share = pruned / jnp.maximum(jnp.sum(kept, axis=0, keepdims=True), 1)
    return tiling.join(jnp.where(kept, groups + share, 0)).astype(w.dtype)
