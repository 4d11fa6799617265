"""How is learned: schedule, optimiser, and the other settings of the papers' regimes."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum, as all vision results of the paper are trained.

    Attributes:
      epochs: how often the data is gone through.
      batch: examples of a step.
      rate: highest learning rate.
      drops: epochs at which the rate becomes a tenth; without any it falls as a cosine, to 0 at the end.
      warmup: epochs in which the rate rises from 0.
      momentum: of the gradients.
      nesterov: whether with Nesterov's correction.
      weight_decay: of all arrays with at least two dimensions: not of biases and scales of normalisation.
      smoothing: of the labels.
      average: decay of the moving average of the weights that is evaluated instead of the last ones; `None`: no.
      accumulate: parts that a batch is gone through in, one after another, with one update.
      compute: dtype of the forward and the backward pass; weights are float32 in any case.
    """

    epochs: int
    batch: int = 128
    rate: float = 0.1
    drops: tuple[int, ...] = ()
    warmup: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    average: float | None = None
    accumulate: int = 1
    compute: str | None = None

    def schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate of a step, by its number."""
        warm = self.warmup * steps_per_epoch
        if self.drops:
            # Counted from the end of the warm-up, where `join_schedules` begins to count.
            drops = {epoch * steps_per_epoch - warm: 0.1 for epoch in self.drops}
            main = optax.piecewise_constant_schedule(self.rate, drops)
        else:
            main = optax.cosine_decay_schedule(self.rate, self.epochs * steps_per_epoch - warm)
        if not warm:
            return main
        return optax.join_schedules([optax.linear_schedule(0.0, self.rate, warm), main], [warm])

    def optimiser(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The dense optimiser; `nm.sparse_training` around it makes it sparse."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.sgd(self.schedule(steps_per_epoch), self.momentum, self.nesterov),
        )


def decayed(params: Any) -> Any:
    """Which leaves have weight decay: those with at least two dimensions."""
    return jax.tree.map(lambda x: x.ndim > 1, params)
