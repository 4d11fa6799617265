"""Calibration inputs: one batch after another, each as the arguments of a model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array


def argument_tuples(batches: Any, name: str = "batches") -> Iterator[tuple]:
    """The inputs of every batch as a tuple; what is not a tuple is a single input. Goes through `batches` once.

    Raises:
      ValueError: for what holds no batches (one array, a dict), or may be one batch as well as several (a tuple of
        inputs).
    """
    if isinstance(batches, Array | np.ndarray):
        raise ValueError(
            f"{name} is one array of shape {batches.shape}, and not a list of batches: give [x] for one batch, or "
            "list(x) for one batch per entry of its first dimension"
        )
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise ValueError(f"{name} is a {type(batches).__name__}, and not a list of batches: give [x] for one batch")
    if isinstance(batches, tuple) and len(batches) > 1 and any(_is_input(entry) for entry in batches):
        count = len(batches)
        raise ValueError(
            f"{name} is a tuple of {count} inputs, which may be one batch or {count}: give [({_names(count)})] for one "
            f"batch of {count} inputs, or [{_names(count)}] for {count} batches"
        )
    return (batch if isinstance(batch, tuple) else (batch,) for batch in batches)


def _is_input(entry: Any) -> bool:
    return isinstance(entry, Array | np.ndarray | Mapping)


def _names(count: int) -> str:
    return ", ".join("abc"[:count]) + (", ..." if count > 3 else "")
