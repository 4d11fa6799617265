"""Checking that a checkpoint really has the pattern that it should have."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nm_jax._core.axes import Tiling
from nm_jax._core.nonzero import nonzero
from nm_jax._core.rules import DenseLeaf, Leaf, Rules, SparseLeaf
from nm_jax.checkpoint._records import Record, rounded
from nm_jax.checkpoint._reports import Checked, CheckpointReport, TensorReport, dense_tensors
from nm_jax.checkpoint._store import Checkpoint, Progress, Tensor, no_progress
from nm_jax.checkpoint._tensorfile import FormatError
from nm_jax.checkpoint._tiles import broken_tiles, largest_sum, norm


def verify_checkpoint(
    path: str | os.PathLike,
    rules: Rules | None = None,
    *,
    partial: str = "skip",
    dense: str | os.PathLike | None = None,
    progress: Progress = no_progress,
) -> CheckpointReport:
    """Checks that every tensor of a checkpoint has its pattern, one at a time.

    Args:
      path: a safetensors file, the index of a sharded checkpoint, or a folder with one of them.
      rules: what the tensors should be; `None` takes what the checkpoint says of itself.
      partial: as in `prune_checkpoint`.
      dense: the checkpoint before it was pruned, for the retained magnitude; without it, it is what was recorded.
      progress: called with the name and the bytes of each tensor that is done.

    Returns:
      A report: `.ok`, the tensors, and a readable table as its string. A pattern holds when no group keeps *more* than
      n; along both axes where it is transposable.

    Raises:
      FormatError: if a file is damaged.
      OSError: if it cannot be read.
      ValueError: for rules that do not fit, or none where the checkpoint has no record.
    """
    examination = Examination(path, rules, partial, dense)
    reports = []
    for seen in examination:
        reports.append(seen.report)
        progress(seen.report.name, seen.weight.nbytes)
    return examination.report(reports)


class Seen(NamedTuple):
    """A sparse tensor, what it is, its values and which of them are kept."""

    report: TensorReport
    weight: np.ndarray
    kept: np.ndarray


class Examination:
    """Goes through the sparse tensors of a checkpoint; arguments as in `verify_checkpoint`."""

    def __init__(
        self,
        path: str | os.PathLike,
        rules: Rules | None = None,
        partial: str = "skip",
        dense: str | os.PathLike | None = None,
    ):
        self.checkpoint = Checkpoint(path)
        self.leaves = _recorded(self.checkpoint) if rules is None else self.checkpoint.resolve(rules, partial)
        self._dense = None if dense is None else Checkpoint(dense)

    def sparse(self) -> list[Tensor]:
        """The tensors that it goes through."""
        return [self.checkpoint.tensors[name] for name, leaf in self.leaves.items() if isinstance(leaf, SparseLeaf)]

    def __iter__(self) -> Iterator[Seen]:
        for tensor in self.sparse():
            leaf = self.leaves[tensor.name]
            assert isinstance(leaf, SparseLeaf)
            weight, mask = tensor.read()
            kept = nonzero(weight)
            outside = 0 if mask is None else int(np.count_nonzero(kept & ~mask))
            kept = kept if mask is None else mask
            record = self._record(tensor, leaf, int(np.count_nonzero(kept)))
            if self._dense is not None:
                record = self._compare(record, tensor.name, kept, self._dense)
            groups = _groups(kept, leaf)
            report = TensorReport(tensor.name, record, Checked(*groups, broken_tiles(kept, leaf), outside))
            yield Seen(report, weight, kept)

    def report(self, tensors: list[TensorReport]) -> CheckpointReport:
        """The reports of all its tensors as one."""
        return CheckpointReport(
            str(self.checkpoint.path), tuple(tensors), tuple(dense_tensors(self.checkpoint, self.leaves))
        )

    def _record(self, tensor: Tensor, leaf: SparseLeaf, kept: int) -> Record:
        known = tensor.record
        layout = "dense" if known is None else known.layout
        same = known is not None and (known.pattern, known.axes) == (leaf.pattern, leaf.axes)
        if known is not None and same:
            return dataclasses.replace(known, kept=kept)
        return Record(leaf.pattern, leaf.axes, tensor.dtype, tensor.shape, layout, kept)

    def _compare(self, record: Record, name: str, kept: np.ndarray, dense: Checkpoint) -> Record:
        original = dense.tensors.get(name)
        if original is None or (original.shape, original.dtype) != (record.shape, record.dtype):
            raise FormatError(
                f"{dense.path}: it has no {name!r} of this shape and dtype; give the checkpoint before pruning"
            )
        weight, _ = original.read()
        retained, total, best = norm(weight[kept]), norm(weight), largest_sum(weight, record.kept)
        return dataclasses.replace(record, retained=share(retained, total), of_unstructured=share(retained, best))


def share(part: float, whole: float) -> float | None:
    """part / whole, as the header has it; nothing of nothing is all of it."""
    if not (math.isfinite(part) and math.isfinite(whole)):
        return None
    return rounded(part / whole) if whole > 0 else 1.0


def _recorded(checkpoint: Checkpoint) -> dict[str, Leaf]:
    if not checkpoint.records:
        raise ValueError(f"{checkpoint.path}: no pattern is recorded in it; say which one it should have (--pattern)")
    dense = "no pattern is recorded"
    return {
        name: DenseLeaf(name, tensor.shape, dense) if tensor.record is None else tensor.record.leaf(name)
        for name, tensor in checkpoint.tensors.items()
    }


def _groups(kept: np.ndarray, leaf: SparseLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many groups keep 0, 1, ... m entries, along the contraction and along the output axis."""
    if leaf.pattern.tile is None:
        return (), ()
    m = leaf.pattern.tile[0]

    def along(rows: int, cols: int) -> tuple[int, ...]:
        groups = Tiling(leaf.shape, leaf.axes, rows, cols).split(kept)
        counts = np.sum(groups, axis=(0, 1), dtype=np.uint16)
        return tuple(int(count) for count in np.bincount(counts.reshape(-1), minlength=m + 1))

    return along(m, 1), along(1, m)
