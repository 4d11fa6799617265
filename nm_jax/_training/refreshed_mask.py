"""Training with masks that are found anew: SR-STE on a dense copy of every sparse weight."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from nm_jax._core.rules import Rules
from nm_jax._training.decay import Decay, relative_size
from nm_jax._training.density import StepScale
from nm_jax._training.drift import drifted
from nm_jax._training.inner import not_to_be_called, refuse_line_searches
from nm_jax._training.refresh import Refresh
from nm_jax._training.sparse_leaves import SparseLeaves
from nm_jax._training.state import SparseTrainingState, check_call


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One sparse weight in an update.

    Attributes:
      param: what the model has now.
      gradient: what the loop found there; `None` for a frozen weight.
      mask: True = kept.
      dense: the dense weight behind it.
    """

    param: Float[Array, "*shape"]
    gradient: Float[Array, "*shape"] | None
    mask: Bool[Array, "*shape"]
    dense: Float[Array, "*shape"]

    def expected(self) -> Float[Array, "*shape"]:
        """What the update before left of the parameter, up to rounding."""
        return jnp.where(self.mask, self.dense, 0)

    def dense_gradient(self, decay: Decay) -> Float[Array, "*shape"] | None:
        """The straight-through gradient, with the decay of what is pruned; none for a frozen weight."""
        if self.gradient is None:
            return None
        return decay.gradient(self.gradient.astype(self.dense.dtype), self.dense, self.mask)

    def moved(self, step: Float[Array, "*shape"] | None, decay: Decay) -> Float[Array, "*shape"]:
        """The dense weight after a step of the optimiser, and the decay of what is pruned."""
        if step is None:
            return self.dense
        step = step.astype(self.dense.dtype)
        return self.dense + (step if self.gradient is None else decay.step(step, self.dense, self.mask))

    def change(self, mask: Bool[Array, "*shape"], dense: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What takes the parameter to `mask * dense`, in its own dtype."""
        return jnp.where(mask, dense.astype(self.param.dtype) - self.param, -self.param)


def refreshed_mask(
    inner: optax.GradientTransformationExtraArgs,
    rules: Rules,
    partial: str,
    refresh: Refresh,
    scale: StepScale,
    decay: Decay,
) -> optax.GradientTransformationExtraArgs:
    """`sparse_training` with masks that follow the dense weights.

    Args:
      inner: the optimiser of the dense weights.
      rules: which leaves are sparse, and how.
      partial: leaves whose sizes m does not divide.
      refresh: finds the masks when they are due.
      scale: of the optimiser's steps.
      decay: of pruned weights.
    """

    def init(params):
        sparse = SparseLeaves.of(params, rules, partial)
        # Copies, never aliases of the parameters: the caller may donate both.
        dense = [jnp.array(w, jnp.float32 if w.dtype.itemsize < 4 else w.dtype, copy=True) for w in sparse.take(params)]
        masks, stats, positions = refresh.start(sparse, dense)
        inner_state = inner.init(sparse.put(params, dense))
        refuse_line_searches(inner_state)
        scale.check(inner_state)
        return SparseTrainingState(
            jnp.zeros((), jnp.int32), sparse.only(masks), sparse.only(dense), stats, inner_state, positions
        )

    def update(updates, state, params=None, **extra_args):
        check_call(state, params)
        sparse = SparseLeaves.of(params, rules, partial)
        masks, stored = sparse.stored(state.masks, "masks"), sparse.stored(state.dense, "dense weights")
        weights = [
            _Weight(*parts) for parts in zip(sparse.take(params), sparse.take(updates), masks, stored, strict=True)
        ]
        step = state.step + 1
        drift = drifted(step, sparse.take(params), lambda: [w.expected() for w in weights], state.stats.drift)

        gradients = sparse.put(updates, [w.dense_gradient(decay) for w in weights])
        changes, inner_state = inner.update(
            gradients, state.inner, sparse.put(params, stored), **not_to_be_called(extra_args)
        )

        steps = scale(state.step, sparse.leaves, sparse.take(changes), inner_state)
        moved = [w.moved(change, decay) for w, change in zip(weights, steps, strict=True)]
        stats = state.stats._replace(drift=drift)

        def moves():
            return jnp.stack([_relative(change, weight) for change, weight in zip(steps, moved, strict=True)])

        masks, stats, where = refresh(
            step, sparse.leaves, moved, masks, stats, state.packed, moves, jax.tree.leaves(params)
        )
        kept = [w.change(mask, dense) for w, mask, dense in zip(weights, masks, moved, strict=True)]
        return sparse.put(changes, kept), SparseTrainingState(
            step, sparse.only(masks), sparse.only(moved), stats, inner_state, where
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _relative(step: Float[Array, "*shape"] | None, weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.float32(0) if step is None else relative_size(step.astype(weight.dtype), weight).astype(jnp.float32)
