"""Larger steps of sparse weights: a unit that sees a share of its inputs moves by less than a dense one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nm_jax._core.rules import SparseLeaf
from nm_jax._training.find_states import movers
from nm_jax._training.phases import Phases

POWER = 2 / 3  # of the default, from the study of recipes: 1 diverges at learning rates that a dense network bears


@dataclasses.dataclass(frozen=True)
class StepScale:
    """The optimiser's steps of sparse leaves, larger the sparser they are.

    u -> u / density^power

    For the same step of each of its weights, a unit that sees a share of its inputs moves by that share of what a dense
    one does. With power 1 it moves as far (Dey et al., SuPar, NeurIPS 2024, Table 1); with 1/2 the kept entries of a
    step have the norm of the whole.

    Attributes:
      power: 0 leaves the steps as they are; `None`: `POWER`, and 0 for an optimiser whose steps cannot be scaled.
      begin_step: number of dense updates before, whose steps stay as they are.
      phases: which pattern masks have when.
    """

    power: float | None
    begin_step: int
    phases: Phases

    def __post_init__(self):
        if self.power is not None and not 0 <= self.power <= 1:
            raise ValueError(f"scale_steps is a power of 1 / density and needs 0 <= scale_steps <= 1, got {self.power}")

    def check(self, inner_state: Any) -> None:
        """Raises a ValueError for the state of an optimiser whose steps cannot be scaled, if that is asked for."""
        for found in movers(inner_state) if self.power else ():
            raise ValueError(
                f"steps cannot be scaled around {type(found).__name__}, which moves the parameters itself and keeps "
                "what it made of them; use scale_steps=0 and a larger learning rate for sparse leaves inside of it"
            )

    def __call__(
        self,
        done: Int[Array, ""],
        leaves: Sequence[SparseLeaf],
        steps: list[Float[Array, "..."] | None],
        inner_state: Any,
    ) -> list[Float[Array, "..."] | None]:
        """The steps that sparse leaves take after `done` updates, of those that the optimiser makes."""
        power = self.power
        if power is None:
            power = 0.0 if movers(inner_state) else POWER
        if power == 0:
            return steps
        phases, ended = self.phases.leaves(leaves), self.phases.ended(done)
        scaled = []
        for k, step in enumerate(steps):
            if step is not None:
                factor = jnp.array([phase[k].pattern.density ** -power for phase in phases], step.dtype)[ended]
                step = jnp.where(done < self.begin_step, step, factor * step)
            scaled.append(step)
        return scaled
