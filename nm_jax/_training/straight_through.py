"""Gradient rules through a mask, for arrays: straight-through, and SR-STE."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.custom_jvp
def ste(weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`mask * weight` with the straight-through gradient: pruned entries get a gradient too.

    d ste(w, mask) / dw = 1  (Bengio et al., 2013)

    Args:
      weight: dense weight.
      mask: True = kept.

    Returns:
      The masked weight, exact zeros where pruned, in the weight's dtype. Elementwise; works under `jit`, `vmap`, with
      any sharding and in both modes of differentiation.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> weight, mask = jnp.array([1.0, 2.0]), jnp.array([False, True])
      >>> nm.ste(weight, mask).tolist()
      [0.0, 2.0]
      >>> jax.grad(lambda w: jnp.sum(3 * nm.ste(w, mask)))(weight).tolist()
      [3.0, 3.0]
    """
    return jnp.where(mask, weight, 0)


@ste.defjvp
def _ste_jvp(primals, tangents):
    return ste(*primals), tangents[0]


def sr_ste_term(
    weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"], decay: float | Float[Array, ""] = 2e-4
) -> Float[Array, "*shape"]:
    """What SR-STE adds to the straight-through gradient: a decay of the pruned weights alone.

    decay * (1 - mask) * w  (Zhou et al., ICLR 2021, Eq. 9)

    It pulls the weights that the mask pruned toward zero, so that masks change less and less.

    Args:
      weight: dense weight.
      mask: True = kept.
      decay: strength; 2e-4 in SR-STE and in the paper.

    Returns:
      What to add to the gradient, in the weight's dtype, 0 where the weight is kept. Elementwise; works under `jit`,
      `vmap`, `grad` and with any sharding.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> nm.sr_ste_term(jnp.array([1.0, 2.0]), jnp.array([False, True]), decay=0.5).tolist()
      [0.5, 0.0]
    """
    return jnp.where(mask, 0, decay * weight)


@jax.custom_vjp
def sr_ste(
    weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"], decay: float | Float[Array, ""] = 2e-4
) -> Float[Array, "*shape"]:
    """`mask * weight` with the SR-STE gradient: `ste`, plus `sr_ste_term` once.

    Args:
      weight: dense weight.
      mask: True = kept.
      decay: strength of the decay of pruned weights.

    Returns:
      The masked weight, in the weight's dtype. Elementwise; works under `jit`, `vmap`, with any sharding and under
      reverse-mode differentiation.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> weight, mask = jnp.array([1.0, 2.0]), jnp.array([False, True])
      >>> jax.grad(lambda w: jnp.sum(3 * nm.sr_ste(w, mask, 0.5)))(weight).tolist()
      [3.5, 3.0]
    """
    del decay
    return jnp.where(mask, weight, 0)


def _sr_ste_forward(weight, mask, decay):
    return sr_ste(weight, mask, decay), (weight, mask, decay)


def _sr_ste_backward(residuals, gradient):
    weight, mask, decay = residuals
    return gradient + sr_ste_term(weight, mask, decay).astype(gradient.dtype), None, None


sr_ste.defvjp(_sr_ste_forward, _sr_ste_backward)
