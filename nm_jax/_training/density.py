"""Steps of sparse weights that move what a layer computes as far as the steps of a dense one would."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from nm_jax._core.rules import Rules
from nm_jax._training.find_states import movers
from nm_jax._training.sparse_leaves import SparseLeaves


class AtDensityState(NamedTuple):
    """State of `at_density`: updates done, and the state of the optimiser."""

    step: Int[Array, ""]
    inner: optax.OptState


def at_density(
    inner: optax.GradientTransformation, rules: Rules, partial: str, begin_step: int
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose steps of sparse leaves are 1 / density times as large.

    u -> u / density    (Dey et al., SuPar, NeurIPS 2024, Table 1: a learning rate proportional to 1 / density)

    A unit that sees a share of its inputs moves by that share of what a dense one does, for the same step of each of
    its weights.

    Args:
      inner: the optimiser.
      rules: which leaves are sparse, and how.
      partial: leaves whose sizes m does not divide.
      begin_step: number of dense updates before, whose steps stay as they are.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        inner_state = inner.init(params)
        for found in movers(inner_state):
            raise ValueError(
                f"steps cannot be scaled around {type(found).__name__}, which moves the parameters itself and keeps "
                "what it made of them; use scale_steps=False and a larger learning rate for sparse leaves inside of it"
            )
        return AtDensityState(jnp.zeros((), jnp.int32), inner_state)

    def update(updates, state, params=None, **extra_args):
        changes, inner_state = inner.update(updates, state.inner, params, **extra_args)
        sparse = SparseLeaves.of(params, rules, partial)
        scaled = [
            None if change is None else jnp.where(state.step < begin_step, change, change / leaf.pattern.density)
            for leaf, change in zip(sparse.leaves, sparse.take(changes), strict=True)
        ]
        return sparse.put(changes, scaled), AtDensityState(state.step + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
