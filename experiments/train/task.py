"""What is learned."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Params = Any
Extra = Any  # what the model changes in passing: running statistics


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      init: key -> parameters, and what else the model has.
      loss: parameters, the rest, batch, key -> loss, and the rest anew.
      batch: number of the step, from 0 -> its batch. A function of the number alone.
      evaluate: parameters, the rest -> figures by name.
    """

    init: Callable[[jax.Array], tuple[Params, Extra]]
    loss: Callable[[Params, Extra, Any, jax.Array], tuple[jax.Array, Extra]]
    batch: Callable[[int], Any]
    evaluate: Callable[[Params, Extra], dict[str, float]] | None = None


def classification(
    module: nn.Module,
    start: Any,
    batch: Callable[[int], Any],
    evaluate: Any = None,
    *,
    smoothing: float = 0.0,
    compute: Any = None,
) -> Task:
    """Images into classes: `module(images, train)` gives logits, a batch is images and labels.

    Args:
      module: a Flax module.
      start: a function from a key to variables, or variables, which are copied.
      batch: as in `Task`.
      evaluate: as in `Task`.
      smoothing: share of the target that is spread evenly over all classes.
      compute: dtype that parameters and images are rounded to for the forward and the backward pass, such as
        `jnp.bfloat16`; weights, gradients, running statistics and the loss keep theirs. `None`: no rounding.
    """

    def init(key):
        variables = dict(start(key) if callable(start) else jax.tree.map(jnp.array, start))
        return variables.pop("params"), variables

    def loss(params, extra, batch, key):
        images, labels = batch
        if compute is not None:
            params, images = jax.tree.map(lambda x: jnp.asarray(x, compute), (params, images))
        variables = {"params": params, **extra}
        logits, new = module.apply(variables, images, train=True, mutable=list(extra), rngs={"dropout": key})
        if compute is not None:
            logits, new = logits.astype(jnp.float32), jax.tree.map(lambda x, old: x.astype(old.dtype), new, extra)
        return cross_entropy(logits, labels, smoothing), new

    return Task(init, loss, batch, evaluate)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy, of smoothed labels if asked for."""
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()
