"""Batches of inputs of about the same length: less padding, and few different shapes to compile."""

from collections.abc import Callable
from typing import Any

import numpy as np

MULTIPLE = 16


def bucket(length: int, multiple: int = MULTIPLE) -> int:
    """The next multiple."""
    return -(-length // multiple) * multiple


def in_order(lengths: np.ndarray, size: int, multiple: int = MULTIPLE) -> list[tuple[np.ndarray, int]]:
    """For evaluation: every example once, the shortest first. Rows of each batch, and the length to cut it to."""
    ordered = np.argsort(lengths, kind="stable")
    parts = (ordered[start : start + size] for start in range(0, len(ordered), size))
    return [(rows, bucket(int(lengths[rows].max()), multiple)) for rows in parts]


def drawn(
    lengths: np.ndarray, size: int, step: int, seed: int, multiple: int = MULTIPLE, pool: int = 50
) -> tuple[np.ndarray, int]:
    """For training: the rows of a step and the length to cut them to, a function of the number of the step alone.

    An epoch is a permutation, cut into pools of `pool` batches that are sorted by length, its batches again in random
    order. What does not fill a batch at the end of an epoch is left out of it.

    Raises:
      ValueError: a batch has more examples than there are.
    """
    per_epoch = len(lengths) // size
    if per_epoch == 0:
        raise ValueError(f"a batch of {size} examples out of {len(lengths)}; make the batch smaller")
    epoch, number = divmod(step, per_epoch)
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(lengths))[: per_epoch * size]
    pools = [order[start : start + pool * size] for start in range(0, len(order), pool * size)]
    batches = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools]).reshape(-1, size)
    rows = batches[draw.permutation(per_epoch)[number]]
    return rows, bucket(int(lengths[rows].max()), multiple)


def mapped(
    function: Callable[[np.ndarray, int], Any], lengths: np.ndarray, size: int, multiple: int = MULTIPLE
) -> list[np.ndarray]:
    """What a function of the rows of a batch and of the length to cut them to gives, for every row, in their order."""
    found: dict[int, np.ndarray] = {}
    for rows, length in in_order(lengths, size, multiple):
        found.update(zip(rows.tolist(), np.asarray(function(rows, length)), strict=True))
    return [found[row] for row in range(len(lengths))]
