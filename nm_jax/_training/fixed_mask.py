"""Training with a mask that stays: plain optax on the kept entries, without a dense copy."""

import jax.numpy as jnp
import optax

from nm_jax._core.rules import Rules
from nm_jax._training.inner import refuse_line_searches
from nm_jax._training.refresh import Refresh
from nm_jax._training.sparse_leaves import SparseLeaves
from nm_jax._training.state import SparseTrainingState


def fixed_mask(
    inner: optax.GradientTransformationExtraArgs, rules: Rules, partial: str, refresh: Refresh
) -> optax.GradientTransformationExtraArgs:
    """`sparse_training` with `refresh_every=None`: the parameters are the weights, gradients are masked before `inner`.

    Args:
      inner: the optimiser.
      rules: which leaves are sparse, and how.
      partial: leaves whose sizes m does not divide.
      refresh: finds the masks, once.
    """

    def init(params):
        sparse = SparseLeaves.of(params, rules, partial)
        masks, stats = refresh.start(sparse.leaves, sparse.take(params))
        inner_state = inner.init(params)
        refuse_line_searches(inner_state)
        return SparseTrainingState(jnp.zeros((), jnp.int32), sparse.only(masks), None, stats, inner_state)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("sparse_training needs the parameters: call tx.update(grads, opt_state, params)")
        sparse = SparseLeaves.of(params, rules, partial)
        weights, masks = sparse.take(params), sparse.stored(state.masks, "masks")
        step = state.step + 1

        gradients = [jnp.where(mask, g, 0) for mask, g in zip(masks, sparse.take(updates), strict=True)]
        changes, inner_state = inner.update(sparse.put(updates, gradients), state.inner, params, **extra_args)

        steps = [change.astype(w.dtype) for w, change in zip(weights, sparse.take(changes), strict=True)]
        moved = [w + change for w, change in zip(weights, steps, strict=True)]
        masks, stats = refresh(step, sparse.leaves, moved, masks, state.stats)
        kept = [jnp.where(mask, change, -w) for mask, change, w in zip(masks, steps, weights, strict=True)]
        return sparse.put(changes, kept), SparseTrainingState(step, sparse.only(masks), None, stats, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
