"""How weights that a mask prunes are pulled toward zero while training goes on: one class per way."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nm_jax._training.straight_through import sr_ste_term


@dataclasses.dataclass(frozen=True)
class Decay(abc.ABC):
    """A decay of pruned weights. Without one they drift as noise moves them, and refreshes swap them in untrained.

    A decay of your own overrides one of the two methods, or both; each gets one sparse leaf, its mask and its dense
    weight, and keeps shapes and dtypes.

    Attributes:
      strength: how strong it is; what 1 means is each class's own.

    Examples:
      >>> import dataclasses, jax.numpy as jnp, optax, nm_jax as nm
      >>> @dataclasses.dataclass(frozen=True)
      ... class Constant(nm.Decay):  # as fast, however large a weight is
      ...     def step(self, step, weight, mask):
      ...         return step - jnp.where(mask, 0, self.strength * jnp.sign(weight))
      >>> tx = nm.sparse_training(optax.sgd(0.1), "2:4", decay=Constant(1e-3))
    """

    strength: float

    def __post_init__(self):
        if not self.strength >= 0:
            raise ValueError(f"decay must not be negative, got {self.strength}")

    def gradient(
        self, gradient: Float[Array, "*shape"], weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """The gradient that the optimiser gets, of the straight-through gradient."""
        del weight, mask
        return gradient

    def step(
        self, step: Float[Array, "*shape"], weight: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """The step that the dense weight takes, of the step that the optimiser makes."""
        del weight, mask
        return step


@dataclasses.dataclass(frozen=True)
class GradientDecay(Decay):
    """The decay of SR-STE, on the gradient: g + strength * (1 - mask) * w.

    What it does depends on the scale of the loss, and on the optimiser: Adam divides it by the size of the gradient.

    Attributes:
      strength: 2e-4 in SR-STE and in the paper. FST finds 1e-6 to 1e-4 for transformers, by the flip rate.

    Source: Zhou et al., ICLR 2021, Eq. 9; that it belongs on the gradient under Adam: Hu et al. (FST), ICML 2024,
    Section 4.2.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> gradient, weight, mask = jnp.ones(2), jnp.array([1.0, 2.0]), jnp.array([False, True])
      >>> nm.GradientDecay(0.5).gradient(gradient, weight, mask).tolist()
      [1.5, 1.0]
    """

    def gradient(self, gradient, weight, mask):
        return gradient + sr_ste_term(weight, mask, self.strength) if self.strength else gradient


@dataclasses.dataclass(frozen=True)
class StepDecay(Decay):
    """A decay beside the optimiser's step, as large as that step is: independent of the scale of the loss.

    u - rate * (1 - mask) * w,    rate = min(1, strength * rms(u) / rms(w))

    u is the optimiser's step of a leaf and w its dense weight. It follows the learning rate to zero, and is the same
    for a loss that is summed and one that is averaged wherever u is (Adam and its like). A pruned weight that every
    step moves one way, each as far as the average one does, settles at rms(w) / strength: that is how strong the
    evidence must be for a refresh to swap it in.

    Attributes:
      strength: 3 is the default of `sparse_training`. 1 changes masks more, 10 hardly at all.

    Under differentiation of a whole update the rate is a constant. Works under `jit`, `vmap` and with any sharding (two
    sums over each leaf per step).

    Source: decoupled as the weight decay of AdamW (Loshchilov and Hutter, ICLR 2019); the strength is from the study of
    recipes in the documentation.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> step, weight, mask = jnp.array([0.25, 0.25]), jnp.array([1.0, 1.0]), jnp.array([False, True])
      >>> nm.StepDecay(2.0).step(step, weight, mask).tolist()
      [-0.25, 0.25]
    """

    strength: float = 3.0

    def step(self, step, weight, mask):
        size = _norm(weight)
        rate = self.strength * _norm(step) / jnp.where(size > 0, size, 1)  # of weights that are all 0: any
        rate = jnp.where(rate >= 0, jnp.minimum(rate, 1), 0)  # NaN: squares of both have overflowed
        return step - jnp.where(mask, 0, rate * weight)


def relative_size(step: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    """rms(step) / rms(weight); of weights that are all 0, the norm of the step."""
    size = _norm(weight)
    return _norm(step) / jnp.where(size > 0, size, 1)


def _norm(value: Float[Array, "*shape"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jax.lax.stop_gradient(value) ** 2))


def as_decay(decay: float | Decay) -> Decay:
    """A number is the strength of SR-STE's.

    Raises:
      ValueError: if it is negative.
    """
    return decay if isinstance(decay, Decay) else GradientDecay(decay)
