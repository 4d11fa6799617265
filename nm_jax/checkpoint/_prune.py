"""Pruning a checkpoint of any size, one tensor at a time."""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nm_jax._core.nonzero import as_bits, nonzero
from nm_jax._core.patterns import Pattern
from nm_jax._core.rules import DenseLeaf, Leaf, Rules, SparseLeaf
from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._folder import copy_others, refuse_overlap, written_beside
from nm_jax.checkpoint._packed import encode, take, two_of_four
from nm_jax.checkpoint._records import Layout, Record, Said
from nm_jax.checkpoint._reports import CheckpointReport, TensorReport, Totals, dense_tensors
from nm_jax.checkpoint._scores import Scores
from nm_jax.checkpoint._store import Checkpoint, Progress, no_progress
from nm_jax.checkpoint._tensor import Tensor
from nm_jax.checkpoint._tensorfile import FormatError, TensorFile, TensorWriter, header_size
from nm_jax.checkpoint._tiles import find_mask, largest_sum
from nm_jax.checkpoint._verify import share
from nm_jax.solvers import Solver, default_solver

_AHEAD = 2  # tensors whose masks are found at once
_IN_FLIGHT = 1 << 28  # bytes of tensors that are worked on at once, if these are more than one


class _Pruning(NamedTuple):
    """What is asked for, beside the leaves: how each is stored, given how it was before, among them."""

    rules: list[Any]
    partial: str
    solver: Solver | None
    scores: Scores | None
    layout: Callable[[SparseLeaf, Record | None], Layout]
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
    include: Sequence[str] = (),
    strict: bool = False,
    scores: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> CheckpointReport:
    """Writes a checkpoint whose tensors have the pattern that the rules say.

    mask = argmax sum(mask * |w|)  such that  the mask has the pattern;  w -> mask * w

    Args:
      source: a safetensors file, the index of a sharded checkpoint, or a folder with one of them. It is only read.
      target: a file for a file, a folder for a folder (with its other files copied) or for an index; it must not exist.
        It is written beside its name, and gets it when it is complete.
      rules: a pattern, or `(path regex, pattern or None, optional axes)`. Regexes are sought in the names of the
        tensors as they are, and with '/' for '.'. Without axes they are those that are known: from the record of an
        earlier run, from `config.json`, names, shapes and biases. A tensor whose axes are not known stays dense, and
        its reason says how to give them; where only the orientation is not known, a transposable pattern is the same.
      solver: for the patterns that it supports; `None` takes the default for each.
      partial: tensors whose sizes m does not divide: `"skip"`, `"pad"` or `"error"`, as in `compute_masks`.
      packed: store values and positions, which `load_checkpoint` reads, instead of zeros, which every reader does.
      keep_masks: store a bit-packed mask beside each dense tensor, as `NAME.nm_mask`.
      include: regexes of tensors to prune although they stay dense by default: output heads, routers, embeddings that
        are the output head too.
      strict: whether a tensor whose axes are not known is an error.
      scores: a safetensors file, as `save_scores` writes it, of what masks keep the most of instead of |w|: scores with
        the shape of the tensors, or the diagonals of Gram matrices of their inputs, for |w| sqrt(h) (Wanda).
      overwrite: whether a file, or the folder of a checkpoint, with the name of the target is replaced.
      progress: called with the name and the bytes of each tensor that is done.

    Returns:
      What was pruned, how much was retained, and the time it took. Printed, it is a table.

    Raises:
      FormatError: if the source is damaged, or holds NaN where it should be pruned.
      OSError: if files cannot be read or written, or the target exists.
      ValueError: for rules or scores that do not fit.

    Float32, bfloat16 and float16 are pruned; what is kept is kept bit for bit, and other tensors and metadata are
    copied. Tensors that are dense by the rules but were pruned by an earlier run keep their records. Two copies of one
    tensor get the same mask, or stay dense. Memory: a few times the largest tensor that is pruned, or 256 MB of them. A
    solver is compiled once for each pattern.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> params = {"fc1.weight": np.arange(64, dtype=np.float32).reshape(8, 8)}
      >>> nm.save_checkpoint(folder / "dense.safetensors", params, [("fc1", None)])
      >>> report = nm.prune_checkpoint(folder / "dense.safetensors", folder / "sparse.safetensors", "2:4")
      >>> [(tensor.name, tensor.record.kept) for tensor in report.tensors]
      [('fc1.weight', 32)]
    """
    checkpoint = Checkpoint(source)
    leaves = checkpoint.resolve(rules, partial, include=include, strict=strict)
    given = None if scores is None else Scores(scores, checkpoint, leaves)

    def layout(leaf: SparseLeaf, before: Record | None) -> Layout:
        masked = before is not None and before.layout == "dense+mask"
        return records.layout_of(leaf, packed, keep_masks or masked)

    wanted = _Pruning(records.rules_json(rules), partial, solver, given, layout, progress)
    return _write(checkpoint, Path(target), leaves, wanted, overwrite)


def unpack_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> CheckpointReport:
    """Writes a checkpoint of which values and positions, or masks, are stored as one with zeros, which every reader
    reads.

    Args:
      source: a checkpoint that records sparse tensors, as `prune_checkpoint` reads it.
      target: as in `prune_checkpoint`.
      overwrite: as in `prune_checkpoint`.
      progress: called with the name and the bytes of each tensor that is done.

    Returns:
      What is in it.

    Raises:
      FormatError: if the source is damaged.
      OSError: if files cannot be read or written, or the target exists.
      ValueError: if nothing is recorded in it.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.said is None:
        raise ValueError(f"{checkpoint.path}: no tensor of it is recorded as sparse; there is nothing to unpack")
    leaves: dict[str, Leaf] = {
        name: DenseLeaf(name, tensor.shape, tensor.reason) for name, tensor in checkpoint.tensors.items()
    }
    said = checkpoint.said
    wanted = _Pruning(said.rules, said.partial, None, None, lambda leaf, before: "dense", progress)
    return _write(checkpoint, Path(target), leaves, wanted, overwrite)


def _write(
    checkpoint: Checkpoint, target: Path, leaves: Mapping[str, Leaf], wanted: _Pruning, overwrite: bool
) -> CheckpointReport:
    if overwrite or not os.path.lexists(target):
        refuse_overlap(checkpoint.path, target)
    folder = checkpoint.index is not None or checkpoint.path.is_dir()
    job, copied = _Job(leaves, wanted), []
    with written_beside(target, folder, overwrite) as beside:
        for file in checkpoint.files:
            job.write(checkpoint, file, beside / file.path.name if folder else beside)
        if checkpoint.index is not None:
            job.write_index(*checkpoint.index, beside)
        if checkpoint.path.is_dir():
            copied = copy_others(checkpoint.path, beside, os.listdir(beside))
    totals = Totals.of(checkpoint, [report.record for report in job.reports], job.total_size)
    return CheckpointReport(
        str(target), tuple(job.reports), tuple(dense_tensors(checkpoint, leaves)), job.seconds, totals, tuple(copied)
    )


class _Mask(NamedTuple):
    """A weight, its mask, and what to record of it."""

    weight: np.ndarray
    mask: np.ndarray
    record: Record


class _Job:
    """The pruning of one checkpoint, and what is known of it so far."""

    def __init__(self, leaves: Mapping[str, Leaf], wanted: _Pruning):
        self.leaves, self.wanted = leaves, wanted
        self.reports: list[TensorReport] = []
        self.seconds = {"read": 0.0, "solve": 0.0, "write": 0.0}
        self.weight_map: dict[str, str] = {}
        self.total_size = 0
        self._compiled: set[Pattern] = set()
        self._stop = threading.Event()
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
            elif tensor.record is not None:
                found[tensor.name] = self._write_sparse(writer, tensor, self._carry(tensor))
            else:
                writer.write(tensor.name, tensor.dtype, tensor.shape, file.pieces(tensor.name))
            self._spent("write")
            self.wanted.progress(tensor.name, tensor.nbytes)

        self._spent()
        with TensorWriter(path, self._room(file, tensors)) as writer, self._workers() as pool:
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
            writer.finish(self._metadata(file, tensors, found))
            self._spent("write")
        self.weight_map |= dict.fromkeys(writer.entries, path.name)
        self.total_size += sum(entry.nbytes for entry in writer.entries.values())

    @contextlib.contextmanager
    def _workers(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that find masks. After an error, or Ctrl-C, nobody waits for them."""
        pool = ThreadPoolExecutor(_AHEAD)
        try:
            yield pool
        except BaseException:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _carry(self, tensor: Tensor) -> "_Mask":
        """A tensor that was pruned before, as it is."""
        assert tensor.record is not None
        weight, mask = tensor.read()
        mask = nonzero(weight) if mask is None else mask
        layout = self.wanted.layout(tensor.record.leaf(tensor.name), tensor.record)
        if layout == "values+positions" and not two_of_four(mask, tensor.record.axes):
            layout = "values+mask"
        kept = int(np.count_nonzero(mask))
        return _Mask(weight, mask, dataclasses.replace(tensor.record, layout=layout, kept=kept))

    def _find(self, tensor: Tensor, leaf: SparseLeaf, weight: np.ndarray) -> "_Mask":
        """The mask of a tensor, and what to record of it."""
        solver = self.wanted.solver
        if solver is None or not solver.supports(leaf.pattern):
            solver = default_solver(leaf.pattern)
        scores = None if self.wanted.scores is None else self.wanted.scores.of(tensor, weight)
        try:
            found = find_mask(weight, leaf, solver, scores, self._stop.is_set)
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
            self.wanted.layout(leaf, None),
            kept,
            share(found.retained, found.total),
            share(found.retained, largest_sum(weight, kept)),
            records.rounded_up(float(found.proof.relative_gap)) if found.proof.proved else None,
            leaf.source,
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
            if isinstance(leaf, SparseLeaf) or tensor.record is not None:
                leaf = leaf if isinstance(leaf, SparseLeaf) else tensor.record.leaf(tensor.name)  # type: ignore[union-attr]
                record = records.longest(leaf, tensor.dtype, self.wanted.layout(leaf, tensor.record))
                longest[tensor.name] = record
                stored += records.stored_parts(record, tensor.name)
            else:
                stored.append((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes))
        return header_size(stored, self._metadata(file, tensors, longest))

    def _metadata(self, file: TensorFile, tensors: list[Tensor], found: Mapping[str, Record]) -> dict[str, str]:
        kept = {key: text for key, text in file.metadata.items() if key != records.KEY}
        if "format" not in kept and (framework := _framework([tensor.name for tensor in tensors])):
            kept = {"format": framework, **kept}
        dense = {}
        for tensor in tensors:
            leaf = self.leaves[tensor.name]
            if tensor.name not in found and isinstance(leaf, DenseLeaf):
                dense[tensor.name] = leaf.reason
        return {**kept, records.KEY: Said(found, dense, self.wanted.rules, self.wanted.partial).dump()}

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


def _framework(names: list[str]) -> str | None:
    """What to write as `format`, which readers ask for as soon as a file has any metadata, where the file did not say:
    the framework whose names these are."""
    last = {name.rpartition(".")[2] for name in names if "/" not in name}
    if "weight" in last:
        return "pt"
    return "flax" if last & {"kernel", "embedding"} else None
