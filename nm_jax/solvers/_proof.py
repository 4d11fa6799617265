"""What is proved of masks: one type, from a tile to a whole network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Proof(NamedTuple):
    """How far masks can be from the optimum, as their solver proved it with a dual bound.

    optimum - objective <= gap + rounding      where `unproved` is 0

    Every field is a sum over tiles, so that the proof of several tiles, matrices or devices is the sum of theirs.

    Attributes:
      unproved: tiles of which nothing is proved: all of them for a solver that gives no bound.
      gap: dual bound minus objective of the scores as the solver rounded them. 0: the masks are optimal for these.
      rounding: the most that it can matter that scores were rounded; 0 for a solver that does not round.
      scale: absolute objective, which makes the others relative.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> proof = nm.solvers.Exact()(jnp.eye(4), nm.TransposableNM(2, 4)).proof
      >>> bool(proof.proved), float(proof.gap)
      (True, 0.0)
    """

    unproved: Float[Array, "*tiles"]
    gap: Float[Array, "*tiles"]
    rounding: Float[Array, "*tiles"]
    scale: Float[Array, "*tiles"]

    @classmethod
    def none(cls, like: Float[Array, "*tiles"]) -> "Proof":
        """No proof for tiles of the shape and dtype of `like`."""
        nothing = jnp.zeros_like(like)
        return cls(jnp.ones_like(like), nothing, nothing, nothing)

    def total(self) -> "Proof":
        """The proof of all tiles together."""
        return jax.tree.map(jnp.sum, self)

    @property
    def proved(self) -> Bool[Array | np.ndarray, "*tiles"]:
        """Whether there is a bound for all tiles."""
        return self.unproved == 0

    @property
    def relative_gap(self) -> Float[Array | np.ndarray, "*tiles"]:
        """The gap relative to the objective; what it is worth where nothing is proved, `proved` says."""
        return self.gap / jnp.maximum(self.scale, jnp.finfo(jnp.result_type(self.scale)).tiny)

    def remark(self) -> str:
        """What is proved, in words; nothing without a proof."""
        if not self.proved:
            return ""
        if self.gap > 0:
            return f"within {float(self.relative_gap):.1e} of the optimum"
        rounding = float(self._replace(gap=self.rounding).relative_gap)
        return f"optimal to {rounding:.0e}, proved" if rounding else "optimal, proved"
