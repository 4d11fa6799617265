"""Checking that a checkpoint really has the pattern that it should have."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nm_jax._core.axes import Tiling
from nm_jax._core.nonzero import nonzero
from nm_jax._core.rules import DenseLeaf, Leaf, Rules, SparseLeaf
from nm_jax.checkpoint._records import Record, rounded
from nm_jax.checkpoint._reports import Checked, CheckpointReport, TensorReport, Totals, dense_tensors
from nm_jax.checkpoint._store import Checkpoint, Progress, no_progress
from nm_jax.checkpoint._tensor import Tensor
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

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> nm.save_checkpoint(path, {"w": np.eye(4, dtype=np.float32)}, [("w", "1:4-T")])
      >>> nm.verify_checkpoint(path).ok
      True
      >>> nm.verify_checkpoint(path)["w"].violations()
      {'tiles': 0, 'outside_mask': 0, 'contraction': 0, 'output': 0}
    """
    examination = Examination(path, rules, partial, dense)
    reports = []
    for seen in examination:
        reports.append(seen.report)
        progress(seen.report.name, seen.weight.nbytes)
    return examination.report(reports)


_ROWS = 256  # of tiles, whose groups are counted at once


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
        self.leaves = (
            _recorded(self.checkpoint) if rules is None else self.checkpoint.resolve(rules, partial, none=False)
        )
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
        checkpoint = self.checkpoint
        stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        said = checkpoint.said
        return CheckpointReport(
            str(checkpoint.path),
            tuple(tensors),
            tuple(dense_tensors(checkpoint, self.leaves)),
            totals=Totals.of(checkpoint, [tensor.record for tensor in tensors], stored),
            rules=() if said is None else tuple(said.rules),
            by="" if said is None else said.by,
        )

    def _record(self, tensor: Tensor, leaf: SparseLeaf, kept: int) -> Record:
        known = tensor.record
        layout = "dense" if known is None else known.layout
        same = known is not None and (known.pattern, known.axes) == (leaf.pattern, leaf.axes)
        if known is not None and same:
            return dataclasses.replace(known, kept=kept)
        return Record(leaf.pattern, leaf.axes, tensor.dtype, tensor.shape, layout, kept, source=leaf.source)

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
        name: DenseLeaf(name, tensor.shape, tensor.reason or dense)
        if tensor.record is None
        else tensor.record.leaf(name)
        for name, tensor in checkpoint.tensors.items()
    }


def _groups(kept: np.ndarray, leaf: SparseLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many groups keep 0, 1, ... m entries, along the contraction and along the output axis."""
    if leaf.pattern.tile is None:
        return (), ()
    m = leaf.pattern.tile[0]

    def along(rows: int, cols: int) -> tuple[int, ...]:
        groups = Tiling(leaf.shape, leaf.axes, rows, cols).split(kept)
        found = np.zeros(m + 1, np.int64)
        # A part at a time: counts take more memory than a mask, and a long sum would not be interrupted.
        for batch, start in itertools.product(range(groups.shape[2]), range(0, groups.shape[3], _ROWS)):
            counts = np.sum(groups[:, :, batch, start : start + _ROWS], axis=(0, 1), dtype=np.uint16)
            found += np.bincount(counts.reshape(-1), minlength=m + 1)
        return tuple(map(int, found))

    return along(m, 1), along(1, m)
