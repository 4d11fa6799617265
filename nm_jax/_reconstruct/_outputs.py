"""Whether a network is still the same after its weights have changed: its outputs before and after."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nm_jax._model._compiled import Skeleton, evaluation

_COLLAPSED = 0.5  # share of the largest logits that are others, or without logits of the variance
_CHANGED = 0.2  # the same, and of the variance
_ROUNDING = 1e-6  # outputs in float32 that differ by less, relative to their square, are the same


@dataclasses.dataclass(frozen=True)
class OutputChange:
    """How far the outputs of a network are from what they were; its string says it, and whether that is bad.

    Attributes:
      error: ||new - old||^2 / ||old - mean of old||^2; an output that is the same for all inputs has 1.
      agreement: share of the inputs whose largest output is the same one as before, for outputs that look like the
        logits of several classes (examples, classes); otherwise `None`.
      examples: how many inputs that was measured on.
    """

    error: float
    agreement: float | None
    examples: int

    @property
    def collapsed(self) -> bool:
        """Whether the outputs have little to do with what they were: most of the largest logits are others (without
        logits, most of the variance is lost), or they are no nearer than a constant would be."""
        others = self.error if self.agreement is None else 1 - self.agreement
        return not (self.error < 1 and others <= _COLLAPSED)  # NaN is worse than any limit

    @property
    def changed(self) -> bool:
        """Whether they have changed so much that the network needs to be evaluated anew."""
        return not (self.error <= _CHANGED and (self.agreement is None or 1 - self.agreement <= _CHANGED))

    def __str__(self) -> str:
        text = f"error {100 * self.error:.3g}% of their variance"
        if self.agreement is not None:
            text += f", {100 * self.agreement:.1f}% of the largest logits are the same"
        text += f" ({self.examples} examples)"
        if self.collapsed:
            return (
                f"{text}: IT HAS COLLAPSED. Tune its batch norm, if it has one (nm_jax.tune_batch_norm), and evaluate; "
                "otherwise keep more of it (another pattern, more layers dense), give more calibration inputs, or train"
            )
        return f"{text}: evaluate it before you use it" if self.changed else text


def compare_outputs(
    apply: Callable,
    old: PyTree,
    new: PyTree,
    batches: Iterable[tuple],
    row_mask: Callable[..., Array] | None = None,
) -> OutputChange | None:
    """The outputs of a network with two sets of parameters, one batch at a time.

    Args:
      apply: the model's forward pass.
      old: parameters.
      new: parameters with the same structure.
      batches: tuples of inputs.
      row_mask: as in `nm_jax.gram`: rows of the outputs that it leaves out do not count.

    Returns:
      How far they are apart; `None` without an output in floating point.
    """
    (skeleton, before), (_, after) = Skeleton.of(old), Skeleton.of(new)
    run = evaluation(apply, skeleton)
    change, examples, same, compared = 0.0, 0, 0, 0
    spreads: dict[Any, _Spread] = {}
    for inputs in batches:
        keep = None if not callable(row_mask) else np.asarray(row_mask(*inputs)) != 0
        pairs = zip(*(jax.tree.leaves(run(arrays, *inputs)) for arrays in (before, after)), strict=True)
        for index, pair in enumerate(pairs):
            if not jnp.issubdtype(pair[0].dtype, jnp.floating):
                continue
            logits = pair[0].ndim == 2 and pair[0].shape[1] > 1
            was, now = (_counted(np.asarray(output, np.float64), keep) for output in pair)
            change += float(np.sum((now - was) ** 2))
            spreads.setdefault((index, was.shape[1:]), _Spread()).add(was)
            if logits:
                same += int(np.sum(was.argmax(axis=1) == now.argmax(axis=1)))
                compared += len(was)
        examples += np.shape(jax.tree.leaves(inputs)[0])[0] if jax.tree.leaves(inputs) else 1
    if not spreads:
        return None
    whole = sum(spread.value for spread in spreads.values())
    error = change / whole if whole > 0 else float(change > 0)
    return OutputChange(error, same / compared if compared else None, examples)


def _counted(output: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """The rows of an output that count, as rows."""
    output = np.atleast_1d(output)
    if keep is not None and output.shape[: keep.ndim] == keep.shape:
        return output[keep]
    return output


class _Spread:
    """The squared distance of outputs from their mean over all examples; their square where they are all the same."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, outputs: np.ndarray) -> None:
        self.count += len(outputs)
        self.total = self.total + np.sum(outputs, axis=0)
        self.squares += float(np.sum(outputs**2))

    @property
    def value(self) -> float:
        spread = self.squares - float(np.sum(self.total**2)) / self.count
        return spread if spread > _ROUNDING * self.squares else self.squares
