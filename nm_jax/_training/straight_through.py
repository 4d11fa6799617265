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
      The masked weight, exact zeros where pruned, in the weight's dtype. Works under `jit`, `vmap` and both modes of
      differentiation.
    """
    return jnp.where(mask, weight, 0)


@ste.defjvp
def _ste_jvp(primals, tangents):
    return ste(*primals), tangents[0]


def sr_ste_term(
    weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"], decay: float = 2e-4
) -> Float[Array, "*shape"]:
    """What SR-STE adds to the straight-through gradient: a decay of the pruned weights alone.

    decay * (1 - mask) * w  (Zhou et al., ICLR 2021, Eq. 9)

    It pulls the weights that the mask pruned toward zero, so that masks change less and less.

    Args:
      weight: dense weight.
      mask: True = kept.
      decay: strength; 2e-4 in SR-STE and in the paper.
    """
    return jnp.where(mask, 0, decay * weight)


@jax.custom_vjp
def sr_ste(weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"], decay: float = 2e-4) -> Float[Array, "*shape"]:
    """`mask * weight` with the SR-STE gradient: `ste`, plus `sr_ste_term` once.

    Args:
      weight: dense weight.
      mask: True = kept.
      decay: strength of the decay of pruned weights.

    Returns:
      The masked weight, in the weight's dtype. Works under `jit`, `vmap` and reverse-mode differentiation.
    """
    del decay
    return jnp.where(mask, weight, 0)


def _sr_ste_forward(weight, mask, decay):
    return sr_ste(weight, mask, decay), (weight, mask, decay)


def _sr_ste_backward(residuals, gradient):
    weight, mask, decay = residuals
    return gradient + sr_ste_term(weight, mask, decay).astype(gradient.dtype), None, None


sr_ste.defvjp(_sr_ste_forward, _sr_ste_backward)
