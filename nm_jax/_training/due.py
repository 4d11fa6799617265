"""After which updates masks are found anew: always as often, ever more rarely, until they have settled."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nm_jax._training.state import RefreshStats

Interval: TypeAlias = int | Callable[[Int[Array, ""]], Int[Array, ""] | Float[Array, ""] | int | float]


@dataclasses.dataclass(frozen=True)
class Due:
    """Whether masks are found after an update.

    First after update `begin_step`; from then on when at least as many updates as the interval says have passed since
    the last time.

    Attributes:
      every: updates between two refreshes, or a schedule: a function of the number of updates done, as optax has them,
        looked at after every update. `None`: the masks of `begin_step` stay.
      begin_step: updates before the first masks.
      end_step: no refresh after this many updates.
      settled: no refresh after one that changed at most this share of the mask entries that the one that changed the
        most of them did.
      always: numbers of updates after which masks are found whatever else says.
    """

    every: Interval | None
    begin_step: int
    end_step: int | None
    settled: float | None
    always: tuple[int, ...] = ()

    def __post_init__(self):
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"refresh_every must be at least 1, or None for a fixed mask, got {self.every}")
        if self.begin_step < 0 or (self.end_step is not None and self.end_step < self.begin_step):
            raise ValueError(f"steps need 0 <= begin_step <= end_step, got {self.begin_step} and {self.end_step}")
        if self.settled is not None and not 0 <= self.settled < 1:
            raise ValueError(f"end_when_settled is a share and needs 0 <= end_when_settled < 1, got {self.settled}")

    def __call__(self, step: Int[Array, ""], stats: RefreshStats, sizes: tuple[int, ...]) -> Bool[Array, ""] | None:
        """Whether they are after update number `step`, of leaves of these sizes; `None` when they never are."""
        needed = jnp.any(step == jnp.array((self.begin_step, *self.always), jnp.int32))
        if self.every is None:
            return needed if self.begin_step > 0 or self.always else None
        if callable(self.every):
            since, interval = step - stats.step[0], jnp.asarray(self.every(step), jnp.float32)
            due = (step > self.begin_step) & (since.astype(jnp.float32) >= jnp.maximum(interval, 1))
        else:
            due = (step >= self.begin_step) & ((step - self.begin_step) % self.every == 0)
        if self.end_step is not None:
            due &= step <= self.end_step
        if self.settled is not None:
            due &= ~self._settled(self.settled, stats, sizes)
        return due | needed

    def _settled(self, share: float, stats: RefreshStats, sizes: tuple[int, ...]) -> Bool[Array, ""]:
        """Never before one has changed something: with a warm-up of the learning rate the first may change nothing."""
        weights = jnp.array(sizes, jnp.float32)
        last, largest = jnp.sum(stats.flip_rate * weights), jnp.sum(stats.largest_flip_rate * weights)
        return (stats.step[0] > self.begin_step) & (largest > 0) & (last <= share * largest)
