"""The weights of one block, fitted together by Adam."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from nm_jax._model._compiled import Arrays
from nm_jax._model.blocks import Block, Program

_LOOKS = 4  # how often new weights are judged on the way
_TINY = 1e-30


class Sample(NamedTuple):
    """One batch at a block.

    Attributes:
      inputs: of the model.
      given: what the pruned blocks before this one made of them.
      target: what the dense network passes on behind it.
      keep: which rows count; `None`: all.
    """

    inputs: tuple
    given: tuple
    target: tuple
    keep: Bool[Array, "..."] | None


class Weights(NamedTuple):
    """Parameters on the way: entries, and a factor for each output."""

    entries: dict[int, Array]
    factors: dict[int, Array]


class Compiled:
    """A block of the program for one shape of batches, and what is compiled of it."""

    def __init__(self, program: Program, block: Block, name: str):
        self._program, self._block, self.name = program, block, name
        self.run = jax.jit(functools.partial(program.run, block))
        self.squares = jax.jit(self._squares)
        self.gradient = jax.jit(jax.grad(self._loss))

    def _squares(self, params: Arrays, sample: Sample) -> Float[Array, "values 3"]:
        """||f - Y||^2, ||Y||^2 and the size of Y, of every value that the block makes."""
        found = self._program.run(self._block, params, sample.inputs, sample.given)
        sums = []
        for own, target, made in zip(found, sample.target, self._block.made, strict=True):
            if not made or not jnp.issubdtype(own.dtype, jnp.floating):
                continue
            y = target.astype(jnp.float32)
            change = own.astype(jnp.float32) - y
            count = jnp.float32(y.size)
            if sample.keep is not None:
                y, change, ones = (self._kept(values, sample.keep) for values in (y, change, jnp.ones_like(y)))
                count = jnp.sum(ones)
            sums.append(jnp.stack([jnp.sum(change**2), jnp.sum(y**2), count]))
        if not sums:
            raise ValueError(f"the block of {self.name} passes on nothing in floating point; give other boundaries")
        return jnp.stack(sums)

    def _kept(self, values: Array, keep: Array) -> Array:
        if values.shape[: keep.ndim] != keep.shape:
            raise ValueError(
                f"row_mask has shape {keep.shape}, but the block of {self.name} passes on a value of shape "
                f"{values.shape}, which does not begin so; give a mask that fits, or other boundaries"
            )
        return jnp.where(keep.reshape(keep.shape + (1,) * (values.ndim - keep.ndim)), values, 0)

    def _loss(self, weights: Weights, masks: Arrays, params: Arrays, sample: Sample) -> Float[Array, ""]:
        squares = self._squares({**params, **folded(weights, masks, params)}, sample)
        return jnp.sum(squares[:, 0] / jnp.maximum(squares[:, 1], _TINY))


def folded(weights: Weights, masks: Arrays, params: Arrays) -> dict[int, Array]:
    """The parameters, in their own precision: factors multiplied in, zeros where they are pruned."""
    found = {}
    for k, entries in weights.entries.items():
        whole = entries * weights.factors[k]
        found[k] = (jnp.where(masks[k], whole, 0) if k in masks else whole).astype(params[k].dtype)
    return found


def error(blocks: Sequence[Compiled], params: Arrays, samples: Sequence[Sample]) -> float:
    """The relative error of the values that a block makes: the mean over them."""
    each = [np.asarray(b.squares(params, sample), np.float64) for b, sample in zip(blocks, samples, strict=True)]
    sums = np.sum(each, axis=0)
    return float(np.mean(sums[:, 0] / np.maximum(sums[:, 1], _TINY)))


def fitted(
    blocks: Sequence[Compiled],
    params: Arrays,
    masks: Arrays,
    factors: dict[int, tuple[int, ...]],
    samples: Sequence[Sample],
    order: Sequence[int],
    rate: float,
    judge: Callable[[Arrays], float],
) -> tuple[Arrays, float, float, int]:
    """The best parameters seen, the error before and with them, and after how many steps they were seen.

    Args:
      blocks: the block, as the shapes of each sample have it.
      params: all parameters.
      masks: of those to fit, where they have one.
      factors: those to fit, and the shapes of their outputs' factors.
      samples: batches to fit on.
      order: one of them for each step.
      rate: of the first step, relative to the root mean square of each parameter.
      judge: the error of parameters.
    """
    steps = len(order)
    weights = Weights(
        {k: jnp.asarray(params[k], jnp.float32) for k in factors},
        {k: jnp.ones(shape, jnp.float32) for k, shape in factors.items()},
    )
    _, energy, count = np.asarray(blocks[0].squares(params, samples[0]), np.float64)[0]
    units = {k: _size(weights.entries[k], float(np.sqrt(energy / max(count, 1)))) for k in factors}
    schedule = optax.cosine_decay_schedule(rate, max(steps, 1))
    rule = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))

    @jax.jit
    def update(gradient: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            moves, state = rule.update(gradient, state)
        entries = {k: w + units[k] * moves.entries[k] for k, w in weights.entries.items()}
        return Weights(entries, jax.tree.map(jnp.add, weights.factors, moves.factors)), state

    state = rule.init(weights)
    before = after = judge(params)
    if not np.isfinite(before):
        raise ValueError(
            f"the output of the block of {blocks[0].name} is not finite; look for NaN or infinities in the inputs"
        )
    found: Arrays = {k: params[k] for k in factors}
    taken = 0
    looks = {round(steps * (k + 1) / _LOOKS) for k in range(_LOOKS)}
    for step, k in enumerate(order, 1):
        weights, state = update(blocks[k].gradient(weights, masks, params, samples[k]), state, weights)
        if step in looks:
            new = folded(weights, masks, params)
            if (seen := judge({**params, **new})) < after:
                found, after, taken = {**new}, seen, step
    return found, before, after, taken


def _size(entries: Array, otherwise: float) -> Float[Array, ""]:
    """What a step of a parameter is relative to: its root mean square, or where it is zero that of what is fitted."""
    kept = jnp.maximum(jnp.sum(entries != 0), 1)
    size = jnp.sqrt(jnp.sum(entries**2) / kept.astype(jnp.float32))
    return jnp.where(size > 0, size, otherwise)
