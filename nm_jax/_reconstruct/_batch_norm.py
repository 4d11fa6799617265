"""Batch-norm tuning: the running statistics of a network, estimated anew after its weights have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nm_jax._core.rules import path_of


def tune_batch_norm(
    update: Callable[..., PyTree[Array]], stats: PyTree[Array], batches: Iterable[Any]
) -> PyTree[Array]:
    """The statistics of calibration batches: their exact averages instead of running ones that forget.

    Args:
      update: `update(stats, *inputs)` runs the network in training mode and returns the updated statistics, such as

            def update(stats, *inputs):
                variables = {"params": params, "batch_stats": stats}
                return model.apply(variables, *inputs, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        It must move each statistic by a fixed share toward that of the batch (momentum), as every batch norm does. It
        is called once per batch and once more: give it `jax.jit` when there are several.
      stats: the present statistics, leaves called `mean` and `var` (Flax Linen's `batch_stats`, Flax NNX's
        `BatchStat`); others stay as they are.
      batches: tuples of inputs (anything else is a single input). Larger batches count more, by their leading size.

    Returns:
      A tree like `stats`. A variance is that of all batches together, what differs between their means included.

    Raises:
      ValueError: when there is no batch, or when the update does not move the statistics.

    One pass through the network in training mode per batch. Source: Section A.1.1.
    """

    def update_from(value: int, inputs: tuple) -> dict[str, np.ndarray]:
        # A new tree each time: an update may write into the one it gets, as Flax NNX does.
        def fill(keys, leaf):
            return jnp.full_like(leaf, value) if _counts(path_of(keys)) else leaf

        return _by_path(update(jax.tree_util.tree_map_with_path(fill, stats), *inputs))

    averages: dict[str, np.ndarray] = {}
    decay: dict[str, np.ndarray] = {}
    total = 0
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        # An update is decay * old + (1 - decay) * statistic of the batch: from 0 it tells the latter, from 1 the decay.
        moved = update_from(0, inputs)
        if not decay:
            decay = {path: new - moved[path] for path, new in update_from(1, inputs).items()}
            _check(decay)
        count = jnp.shape(jax.tree.leaves(inputs)[0])[0]
        total += count
        for path, average in _averages({path: moved[path] / (1 - decay[path]) for path in decay}).items():
            averages[path] = averages.get(path, 0) + count * average
    if not averages:
        raise ValueError("batches is empty: batch norm needs at least one to be tuned on")

    def tuned(keys, old):
        path = path_of(keys)
        if path not in averages:
            return old
        value = averages[path] / total
        if path.endswith("var"):  # of all batches together: the mean of the squares minus the square of the mean
            value = np.maximum(value - (averages[_mean_of(path)] / total) ** 2, 0)
        return jnp.asarray(value, old.dtype)

    return jax.tree_util.tree_map_with_path(tuned, stats)


def _by_path(stats: PyTree[Array]) -> dict[str, np.ndarray]:
    """Means and variances, in double precision."""
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(stats)[0]}
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items() if _counts(path)}


def _counts(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("mean", "var")


def _mean_of(path: str) -> str:
    return path.removesuffix("var") + "mean"


def _averages(stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What can be averaged over batches: means, and the means of squares that variances stand for."""
    return {path: s + stats[_mean_of(path)] ** 2 if path.endswith("var") else s for path, s in stats.items()}


def _check(decay: dict[str, np.ndarray]) -> None:
    if not decay:
        raise ValueError("stats has no leaves called 'mean' and 'var': pass the statistics of batch norm")
    for path, share in decay.items():
        if path.endswith("var") and _mean_of(path) not in decay:
            raise ValueError(f"{path}: there is no {_mean_of(path)} beside it")
        if not np.all((share > -1e-6) & (share < 1 - 1e-6)):
            raise ValueError(f"{path}: the update does not move it; run the network in training mode")
