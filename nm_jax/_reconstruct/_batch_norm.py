"""Batch-norm tuning: the running statistics of a network, estimated anew after its weights have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nm_jax._core.paths import located, map_located, words
from nm_jax._model._batches import argument_tuples


def tune_batch_norm(update: Callable[..., PyTree], stats: PyTree, batches: Iterable[Any]) -> PyTree:
    """The statistics of calibration batches: their averages instead of running ones that forget.

    Args:
      update: `update(stats, *inputs)` runs the network in training mode and returns the updated statistics, such as

            def update(stats, *inputs):
                variables = {"params": params, "batch_stats": stats}
                return model.apply(variables, *inputs, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        It must move each statistic by a fixed share toward that of the batch (momentum), as every batch norm does. It
        is called once per batch and once more, as it is: give it `jax.jit` when there are several.
      stats: the present statistics, leaves called `mean` and `var` (Flax Linen's `batch_stats`, Flax NNX's
        `BatchStat`); others stay as they are.
      batches: tuples of inputs (anything else is a single input). Larger batches count more, by their leading size.

    Returns:
      A tree like `stats`. A variance is that of all batches together, what differs between their means included.
      Averages are in float64, of the statistics that the update finds in its own precision.

    Raises:
      ValueError: when there is no batch, when the update does not move the statistics, or when they have other names.

    One pass through the network in training mode per batch. Source: Section A.1.1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def update(stats, x):
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0), "var": 0.9 * stats["var"] + 0.1 * x.var(0)}
      >>> stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> tuned = nm.tune_batch_norm(update, stats, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])])
      >>> [round(float(tuned[name][0]), 3) for name in ("mean", "var")]
      [4.0, 5.0]
    """

    def update_from(start: Callable[[Array], Array], inputs: tuple) -> dict[str, np.ndarray]:
        # A new tree each time: an update may write into the one it gets, as Flax NNX does.
        filled = map_located(lambda path, leaf: start(leaf) if _counts(path) else leaf, stats)
        return _by_path(update(filled, *inputs))

    averages: dict[str, np.ndarray] = {}
    decay: dict[str, np.ndarray] = {}
    total = 0
    for inputs in argument_tuples(batches):
        # An update is decay * old + (1 - decay) * statistic of the batch. From 0 it tells the latter; from a number
        # beside which that is nothing, the decay.
        moved = update_from(jnp.zeros_like, inputs)
        if not decay:
            far = update_from(lambda leaf: jnp.full_like(leaf, _far(leaf.dtype)), inputs)
            old = _leaves(stats)
            decay = {path: _decay(moved[path], far[path], old[path].dtype) for path in moved}
            _check(decay, list(old))
        count = jnp.shape(jax.tree.leaves(inputs)[0])[0]
        total += count
        for path, average in _averages({path: moved[path] / (1 - decay[path]) for path in decay}).items():
            averages[path] = averages.get(path, 0) + count * average
    if not averages:
        raise ValueError("batches is empty: batch norm needs at least one to be tuned on")

    def tuned(path: str, old: Any) -> Any:
        if path not in averages:
            return old
        value = averages[path] / total
        if path.endswith("var"):  # of all batches together: the mean of the squares minus the square of the mean
            value = np.maximum(value - (averages[_mean_of(path)] / total) ** 2, 0)
        return jnp.asarray(value, old.dtype)

    return map_located(tuned, stats)


def _far(dtype: Any) -> float:
    """A power of two that is large beside any statistic, and whose share in an update is exact."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 3 // 4)


def _decay(near: np.ndarray, far: np.ndarray, dtype: Any) -> np.ndarray:
    """The share of the old statistic. One minus it needs more digits than a float32 has: they are those of the shortest
    number that rounds to it, because a momentum is a number that somebody wrote."""
    rounded = ((far - near) / _far(dtype)).astype(dtype)
    return np.array([float(str(share)) for share in rounded.ravel()]).reshape(rounded.shape)


def _leaves(stats: PyTree) -> dict[str, Any]:
    return {leaf.path: leaf.value for leaf in located(stats)}


def _by_path(stats: PyTree) -> dict[str, np.ndarray]:
    """Means and variances, in double precision."""
    return {path: np.asarray(leaf, np.float64) for path, leaf in _leaves(stats).items() if _counts(path)}


def _counts(path: str) -> bool:
    return words(path)[-1] in ("mean", "var")


def _mean_of(path: str) -> str:
    return path.removesuffix("var") + "mean"


def _averages(stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What can be averaged over batches: means, and the means of squares that variances stand for."""
    return {path: s + stats[_mean_of(path)] ** 2 if path.endswith("var") else s for path, s in stats.items()}


def _check(decay: dict[str, np.ndarray], paths: list[str]) -> None:
    if not decay:
        others = [path for path in paths if path.endswith(("mean", "var"))]
        rename = f"; rename {', '.join(others[:4])} in what `update` takes and returns" if others else ""
        raise ValueError(
            f"stats has no leaves called 'mean' and 'var': pass the statistics of batch norm by these names{rename}"
        )
    for path, share in decay.items():
        if path.endswith("var") and _mean_of(path) not in decay:
            raise ValueError(f"{path}: there is no {_mean_of(path)} beside it")
        if not np.all((share > -1e-6) & (share < 1 - 1e-6)):
            raise ValueError(f"{path}: the update does not move it; run the network in training mode")
