"""Training with a mask that stays: plain optax on the kept entries, without a dense copy."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from nm_jax._core.rules import Rules
from nm_jax._training.density import StepScale
from nm_jax._training.drift import drifted
from nm_jax._training.inner import not_to_be_called, refuse_line_searches
from nm_jax._training.refresh import Refresh
from nm_jax._training.sparse_leaves import SparseLeaves
from nm_jax._training.state import SparseTrainingState, check_call


def fixed_mask(
    inner: optax.GradientTransformationExtraArgs, rules: Rules, partial: str, refresh: Refresh, scale: StepScale
) -> optax.GradientTransformationExtraArgs:
    """`sparse_training` with `refresh_every=None`: the parameters are the weights, gradients are masked before `inner`.

    Args:
      inner: the optimiser.
      rules: which leaves are sparse, and how.
      partial: leaves whose sizes m does not divide.
      refresh: finds the masks, once.
      scale: of the optimiser's steps.
    """

    def init(params):
        sparse = SparseLeaves.of(params, rules, partial)
        masks, stats, positions = refresh.start(sparse, sparse.take(params))
        inner_state = inner.init(params)
        refuse_line_searches(inner_state)
        scale.check(inner_state)
        return SparseTrainingState(jnp.zeros((), jnp.int32), sparse.only(masks), None, stats, inner_state, positions)

    def update(updates, state, params=None, **extra_args):
        check_call(state, params)
        sparse = SparseLeaves.of(params, rules, partial)
        weights, masks = sparse.take(params), sparse.stored(state.masks, "masks")
        step = state.step + 1
        drift = drifted(step, weights, lambda: map(_kept, masks, weights), state.stats.drift)

        gradients = [
            None if gradient is None else _kept(mask, gradient)
            for mask, gradient in zip(masks, sparse.take(updates), strict=True)
        ]
        changes, inner_state = inner.update(
            sparse.put(updates, gradients), state.inner, params, **not_to_be_called(extra_args)
        )

        steps = [
            jnp.zeros_like(w) if change is None else change.astype(w.dtype)
            for w, change in zip(
                weights, scale(state.step, sparse.leaves, sparse.take(changes), inner_state), strict=True
            )
        ]
        moved = [w + change for w, change in zip(weights, steps, strict=True)]
        stats = state.stats._replace(drift=drift)
        masks, stats, where = refresh(
            step, sparse.leaves, moved, masks, stats, state.packed, lambda: stats.move, jax.tree.leaves(params)
        )
        kept = [jnp.where(mask, change, -w) for mask, change, w in zip(masks, steps, weights, strict=True)]
        return sparse.put(changes, kept), SparseTrainingState(step, sparse.only(masks), None, stats, inner_state, where)

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(mask: Bool[Array, "*shape"], value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(mask, value, 0)
