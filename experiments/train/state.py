"""What a run consists of from step to step, and what is evaluated of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nm_jax as nm
from experiments.train.task import Extra, Params, Task


class State(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      step: steps made; the position in the data, too.
      key: data of the key of the run; folded with the number of a step it gives that step's.
      params: parameters.
      extra: what else the model has.
      opt_state: state of the optimiser.
      average: moving averages of the dense weights and of `extra`; `None` if there are none.
    """

    step: jax.Array
    key: jax.Array
    params: Params
    extra: Extra
    opt_state: Any
    average: Any = None


def start(task: Task, tx: optax.GradientTransformation, seed: int = 0, average: bool = False) -> State:
    """The state before the first step."""
    key = jax.random.key(seed)
    params, extra = task.init(key)
    state = State(jnp.int32(0), jax.random.key_data(key), params, extra, tx.init(params))
    return state._replace(average=jax.tree.map(jnp.array, averaged_of(state))) if average else state


def averaged_of(state: State) -> tuple[Params, Extra]:
    """What a moving average is taken of: the dense weights where masks change, the parameters elsewhere."""
    if any(found.dense is not None for found in sparse_states(state.opt_state)):
        return nm.dense_params(state.opt_state, state.params), state.extra
    return state.params, state.extra


def evaluated(state: State) -> tuple[Params, Extra]:
    """Parameters, and the rest, to evaluate and to write out; N:M sparse wherever those of training are."""
    if state.average is None:
        return state.params, state.extra
    params, extra = state.average
    if sparse_states(state.opt_state):
        # Also with masks that stay: the average has a trace of the parameters from before the first step.
        params = nm.apply_masks(params, nm.masks(state.opt_state))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, state.params), extra


def sparse_states(opt_state: Any) -> list[nm.SparseTrainingState]:
    """The states of sparse training in that of an optimiser; none if it is dense."""

    def is_sparse(node):
        return isinstance(node, nm.SparseTrainingState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_sparse) if is_sparse(node)]


def flips(opt_state: Any) -> dict[str, float]:
    """Mask entries that the last refresh changed, of all; nothing where masks do not change."""
    if not any(found.dense is not None for found in sparse_states(opt_state)):
        return {}
    sizes = [mask.size for mask in jax.tree.leaves(nm.masks(opt_state))]
    return {"flip_rate": float(np.average(nm.refresh_stats(opt_state).flip_rate, weights=sizes))}
