"""Pruning a checkpoint of any size, one tensor at a time."""

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nm_jax._core.nonzero import as_bits
from nm_jax._core.patterns import Pattern
from nm_jax._core.rules import Leaf, Rules, SparseLeaf
from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._packed import encode, take
from nm_jax.checkpoint._records import Record
from nm_jax.checkpoint._reports import CheckpointReport, TensorReport, dense_tensors
from nm_jax.checkpoint._store import Checkpoint, Progress, Tensor, no_progress, written_beside
from nm_jax.checkpoint._tensorfile import FormatError, TensorFile, TensorWriter, header_size
from nm_jax.checkpoint._tiles import find_mask, largest_sum
from nm_jax.checkpoint._verify import share
from nm_jax.solvers import Solver, default_solver

_AHEAD = 2  # tensors whose masks are found at once
_IN_FLIGHT = 1 << 28  # bytes of tensors that are worked on at once, if these are more than one


class _How(NamedTuple):
    """What is asked for."""

    rules: Rules
    partial: str
    solver: Solver | None
    packed: bool
    keep_masks: bool
    progress: Progress


def prune_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    rules: Rules,
    *,
    solver: Solver | None = None,
    partial: str = "skip",
    packed: bool = False,
    keep_masks: bool = False,
    progress: Progress = no_progress,
) -> CheckpointReport:
    """Writes a checkpoint whose tensors have the pattern that the rules say.

    mask = argmax sum(mask * |w|)  such that  the mask has the pattern;  w -> mask * w

    Args:
      source: a safetensors file, the index of a sharded checkpoint, or a folder with one of them. It is only read.
      target: a file for a file, a folder for shards and their index; it must not exist. It is written beside its name,
        and gets it when it is complete.
      rules: a pattern, or `(path regex, pattern or None, optional axes)` (`nm_jax.rules`). Paths are the names of the
        tensors with '/' for '.'; without axes they are PyTorch's for `weight` and Flax's for `kernel`.
      solver: for the patterns that it supports; `None` takes the default for each.
      partial: tensors whose sizes m does not divide: `"skip"`, `"pad"` or `"error"`, as in `compute_masks`.
      packed: store values and positions (`nm_jax.checkpoint._packed`), which `load_checkpoint` reads, instead of
        zeros, which every reader does.
      keep_masks: store a bit-packed mask beside each dense tensor, as `NAME.nm_mask`.
      progress: called with the name and the bytes of each tensor that is done.

    Returns:
      What was pruned, how much was retained, and the time it took.

    Raises:
      FormatError: if the source is damaged, or holds NaN where it should be pruned.
      OSError: if files cannot be read or written, or the target exists.
      ValueError: for rules that do not fit.

    Float32, bfloat16 and float16 are pruned; what is kept is kept bit for bit, and other tensors and metadata are
    copied. Memory: a few times the largest tensor that is pruned, or 256 MB of them. A solver is compiled once for each
    pattern.
    """
    target = Path(target)
    with Checkpoint(source) as checkpoint:
        leaves = checkpoint.resolve(rules, partial)
        job = _Job(leaves, _How(rules, partial, solver, packed, keep_masks, progress))
        with written_beside(target, folder=checkpoint.index is not None) as beside:
            if checkpoint.index is None:
                job.write(checkpoint, checkpoint.files[0], beside)
            else:
                for file in checkpoint.files:
                    job.write(checkpoint, file, beside / file.path.name)
                job.write_index(*checkpoint.index, beside)
        return CheckpointReport(str(target), tuple(job.reports), tuple(dense_tensors(checkpoint, leaves)), job.seconds)


class _Mask(NamedTuple):
    """A weight, its mask, and what to record of it."""

    weight: np.ndarray
    mask: np.ndarray
    record: Record


class _Job:
    """The pruning of one checkpoint, and what is known of it so far."""

    def __init__(self, leaves: Mapping[str, Leaf], how: _How):
        self.leaves, self.how = leaves, how
        self.reports: list[TensorReport] = []
        self.seconds = {"read": 0.0, "solve": 0.0, "write": 0.0}
        self.weight_map: dict[str, str] = {}
        self.total_size = 0
        self._compiled: set[Pattern] = set()
        self._lap = time.perf_counter()

    def _spent(self, what: str | None = None) -> None:
        """The time since the last call was spent on this."""
        now = time.perf_counter()
        if what is not None:
            self.seconds[what] += now - self._lap
        self._lap = now

    def write(self, checkpoint: Checkpoint, file: TensorFile, path: Path) -> None:
        """Writes one file. Masks of the next tensors are found while one is written: much of the work on the host uses
        one core only."""
        tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.file is file]
        found: dict[str, Record] = {}
        pending: deque[tuple[Tensor, Future[_Mask] | None]] = deque()

        def finish_first() -> None:
            tensor, mask = pending.popleft()
            if mask is not None:
                found[tensor.name] = self._write_sparse(writer, tensor, mask.result())
            elif tensor.copyable:
                writer.write(tensor.name, tensor.dtype, tensor.shape, file.pieces(tensor.name))
            else:
                writer.write_array(tensor.name, tensor.read()[0])
            self._spent("write")
            self.how.progress(tensor.name, tensor.nbytes)

        self._spent()
        with TensorWriter(path, self._room(file, tensors)) as writer, ThreadPoolExecutor(_AHEAD) as pool:
            for tensor in tensors:
                leaf, ahead = self.leaves[tensor.name], _AHEAD
                if isinstance(leaf, SparseLeaf):
                    weight, _ = tensor.read()
                    self._spent("read")
                    pending.append((tensor, pool.submit(self._find, tensor, leaf, weight)))
                    # The first of a pattern compiles its solver, which the others would do again beside it.
                    ahead = _AHEAD if leaf.pattern in self._compiled else 0
                    self._compiled.add(leaf.pattern)
                else:
                    pending.append((tensor, None))
                while len(pending) > ahead or sum(tensor.nbytes for tensor, _ in pending) > _IN_FLIGHT:
                    finish_first()
            while pending:
                finish_first()
            writer.finish(self._metadata(file, found))
            self._spent("write")
        self.weight_map |= dict.fromkeys(writer.entries, path.name)
        self.total_size += sum(entry.nbytes for entry in writer.entries.values())

    def _find(self, tensor: Tensor, leaf: SparseLeaf, weight: np.ndarray) -> "_Mask":
        """The mask of a tensor, and what to record of it."""
        solver = self.how.solver
        if solver is None or not solver.supports(leaf.pattern):
            solver = default_solver(leaf.pattern)
        try:
            found = find_mask(weight, leaf, solver)
        except ValueError as error:
            raise FormatError(
                f"{tensor.file.path}: {tensor.name!r} cannot be pruned, {error}; repair it, or leave it dense by a rule"
            ) from None
        kept = int(np.count_nonzero(found.mask))
        record = Record(
            leaf.pattern,
            leaf.axes,
            tensor.dtype,
            tensor.shape,
            records.layout_of(leaf, self.how.packed, self.how.keep_masks),
            kept,
            share(found.retained, found.total),
            share(found.retained, largest_sum(weight, kept)),
            records.rounded_up(float(found.proof.relative_gap)) if found.proof.proved else None,
        )
        return _Mask(weight, found.mask, record)

    def _write_sparse(self, writer: TensorWriter, tensor: Tensor, solved: "_Mask") -> Record:
        weight, mask, record = solved
        self._spent("solve")
        parts = record.parts(tensor.name)
        if parts[0] == tensor.name:
            np.multiply(as_bits(weight), mask, out=as_bits(weight))
            writer.write_array(parts[0], weight)
        else:
            writer.write_array(parts[0], take(weight, mask, record.axes))
        if len(parts) > 1:
            writer.write_array(parts[1], encode(mask, record.axes, record.layout == "values+positions"))
        self.reports.append(TensorReport(tensor.name, record))
        return record

    def _room(self, file: TensorFile, tensors: list[Tensor]) -> int:
        """Bytes for a header that is at least as long as the one that will be written."""
        longest, stored = {}, []
        for tensor in tensors:
            leaf = self.leaves[tensor.name]
            if isinstance(leaf, SparseLeaf):
                layout = records.layout_of(leaf, self.how.packed, self.how.keep_masks)
                record = records.longest(leaf, tensor.dtype, layout)
                longest[tensor.name] = record
                stored += records.stored_parts(record, tensor.name)
            else:
                stored.append((tensor.name, tensor.dtype, tensor.shape, tensor.dense_nbytes))
        return header_size(stored, self._metadata(file, longest))

    def _metadata(self, file: TensorFile, found: Mapping[str, Record]) -> dict[str, str]:
        kept = {key: text for key, text in file.metadata.items() if key != records.KEY}
        return {**kept, records.KEY: records.dump(found, self.how.rules, self.how.partial)}

    def write_index(self, name: str, index: dict, folder: Path) -> None:
        """Writes the index of the shards."""
        known = index.get("metadata")
        metadata = {**(known if isinstance(known, dict) else {}), "total_size": self.total_size}
        text = json.dumps(
            {**index, "metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}, indent=2
        )
        with open(folder / name, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
