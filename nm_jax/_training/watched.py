"""Dense training that finds the masks its weights would have, and leaves them alone."""

import jax
import jax.numpy as jnp
import optax

from nm_jax._core.rules import Rules
from nm_jax._training.refresh import Refresh
from nm_jax._training.sparse_leaves import SparseLeaves
from nm_jax._training.state import SparseTrainingState, check_call


def watched(
    inner: optax.GradientTransformationExtraArgs, rules: Rules, partial: str, refresh: Refresh
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with the masks of its weights and their statistics in the state; what it does is not changed.

    Args:
      inner: the optimiser.
      rules: which leaves have masks, and which.
      partial: leaves whose sizes m does not divide.
      refresh: finds the masks when they are due.
    """

    def init(params):
        sparse = SparseLeaves.of(params, rules, partial)
        masks, stats, _ = refresh.start(sparse, sparse.take(params))
        return SparseTrainingState(jnp.zeros((), jnp.int32), sparse.only(masks), None, stats, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        check_call(state, params)
        sparse, step = SparseLeaves.of(params, rules, partial), state.step + 1
        changes, inner_state = inner.update(updates, state.inner, params, **extra_args)
        moved = [
            weight if change is None else weight + change.astype(weight.dtype)
            for weight, change in zip(sparse.take(params), sparse.take(changes), strict=True)
        ]
        masks, stats, _ = refresh(
            step,
            sparse.leaves,
            moved,
            sparse.stored(state.masks, "masks"),
            state.stats,
            None,
            lambda: state.stats.move,
            jax.tree.leaves(params),
        )
        return changes, SparseTrainingState(step, sparse.only(masks), None, stats, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
