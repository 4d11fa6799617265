"""Whether the parameters that an update is given are those that the last one left."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The first updates are all looked at, then one in a prime number, which keeps step with no period of an outer
# transformation: looking costs a pass over the weights.
_FIRST, _EVERY = 40, 37


def drifted(
    step: Int[Array, ""],
    params: Sequence[Float[Array, "..."]],
    expected: Callable[[], Sequence[Float[Array, "..."]]],
    before: Float[Array, " leaves"],
) -> Float[Array, " leaves"]:
    """The largest distance so far of each parameter from what it should be, relative in the l1 norm.

    Not at the first update, whose parameters may be the dense ones that training began with.

    Args:
      step: number of the update, from 1.
      params: the sparse parameters that it is given.
      expected: what they should be, asked for where they are looked at only.
      before: the largest distance until now.
    """
    if not params:
        return before
    due = (step > 1) & ((step <= _FIRST) | (step % _EVERY == 0))
    params, before = jax.lax.stop_gradient((list(params), before))

    def look(carry):
        distances = [_distance(param, weight) for param, weight in zip(params, expected(), strict=True)]
        return jnp.zeros((), bool), jnp.maximum(carry[1], jnp.stack(distances))

    return jax.lax.while_loop(lambda carry: carry[0], look, (due, before))[1]


def _distance(param: Float[Array, "..."], expected: Float[Array, "..."]) -> Float[Array, ""]:
    difference = jnp.sum(jnp.abs(param.astype(jnp.float32) - expected.astype(jnp.float32)))
    norm = jnp.sum(jnp.abs(expected).astype(jnp.float32))
    return jnp.where(difference > 0, difference / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny), 0)
