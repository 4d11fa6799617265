"""Steps of sparse weights that move what a layer computes as far as the steps of a dense one would."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nm_jax._core.rules import SparseLeaf
from nm_jax._training.find_states import movers
from nm_jax._training.phases import Phases


@dataclasses.dataclass(frozen=True)
class StepScale:
    """The optimiser's steps of sparse leaves, 1 / density times as large.

    u -> u / density    (Dey et al., SuPar, NeurIPS 2024, Table 1: a learning rate proportional to 1 / density)

    A unit that sees a share of its inputs moves by that share of what a dense one does, for the same step of each of
    its weights.

    Attributes:
      wanted: whether they are.
      begin_step: number of dense updates before, whose steps stay as they are.
      phases: which pattern masks have when.
    """

    wanted: bool
    begin_step: int
    phases: Phases

    def check(self, inner_state: Any) -> None:
        """Raises a ValueError for the state of an optimiser whose steps cannot be scaled."""
        for found in movers(inner_state) if self.wanted else ():
            raise ValueError(
                f"steps cannot be scaled around {type(found).__name__}, which moves the parameters itself and keeps "
                "what it made of them; use scale_steps=False and a larger learning rate for sparse leaves inside of it"
            )

    def __call__(
        self, done: Int[Array, ""], leaves: Sequence[SparseLeaf], steps: list[Float[Array, "..."] | None]
    ) -> list[Float[Array, "..."] | None]:
        """The steps that sparse leaves take after `done` updates, of those that the optimiser makes."""
        if not self.wanted:
            return steps
        phases, ended = self.phases.leaves(leaves), self.phases.ended(done)
        scaled = []
        for k, step in enumerate(steps):
            if step is not None:
                density = jnp.array([phase[k].pattern.density for phase in phases], step.dtype)[ended]
                step = jnp.where(done < self.begin_step, step, step / density)
            scaled.append(step)
        return scaled
