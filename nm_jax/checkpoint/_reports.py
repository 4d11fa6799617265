"""What the tensors of a checkpoint are, as tables for people and as plain values for programs."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from nm_jax._core.rules import DenseLeaf, Leaf
from nm_jax._core.tables import row_of
from nm_jax._masks.verify import LeafReport, Report
from nm_jax.checkpoint._records import Record
from nm_jax.checkpoint._store import Checkpoint


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a sparse tensor was found to be.

    Attributes:
      contraction: how many groups of m along the contraction axis keep 0, 1, ... m entries; empty for patterns without
        groups.
      output: the same along the output axis, that is in W^T.
      broken: tiles that do not have the pattern.
      outside: entries that are not zero though the stored mask prunes them.
    """

    contraction: tuple[int, ...]
    output: tuple[int, ...]
    broken: int
    outside: int


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One sparse tensor.

    Attributes:
      name: its name.
      record: its pattern, axes and layout, what is kept, and what was retained.
      checked: what was found in the file; `None` from pruning.
    """

    name: str
    record: Record
    checked: Checked | None = None

    @property
    def ok(self) -> bool:
        """Whether it has its pattern."""
        return self.checked is None or not (self.checked.broken or self.checked.outside)

    def violations(self) -> dict[str, int]:
        """Groups that keep more than n, along both axes where both are constrained, and tiles that break the
        pattern."""
        assert self.checked is not None
        found = {"tiles": self.checked.broken, "outside_mask": self.checked.outside}
        pattern = self.record.pattern
        if pattern.contraction_groups is not None:
            found["contraction"] = sum(self.checked.contraction[pattern.contraction_groups.n + 1 :])
        if pattern.output_groups is not None:
            found["output"] = sum(self.checked.output[pattern.output_groups.n + 1 :])
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        table = {"name": self.name, **self.record.to_json(), "size": self.record.size}
        if self.checked is not None:
            groups = {"contraction": list(self.checked.contraction), "output": list(self.checked.output)}
            table |= {"ok": self.ok, "violations": self.violations(), "groups": groups}
        return table

    def row(self) -> LeafReport:
        """The line of a table."""
        record, checked = self.record, self.checked
        row = LeafReport(
            record.leaf(self.name),
            ok=jnp.asarray(self.ok),
            kept=jnp.asarray(record.kept / max(record.size, 1)),
            retained=_optional(record.retained),
            against_unstructured=_optional(record.of_unstructured),
            proof=record.proof,
        )
        if checked is None or not checked.contraction:
            return row
        return dataclasses.replace(row, contraction=_fullest(checked.contraction), output=_fullest(checked.output))


def _optional(value: float | None):
    return None if value is None else jnp.asarray(value)


def _fullest(counts: tuple[int, ...]):
    """The most that a group keeps."""
    return jnp.asarray(max((kept for kept, count in enumerate(counts) if count), default=0))


@dataclasses.dataclass(frozen=True)
class DenseTensor:
    """A tensor that stays dense, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over all tensors of a checkpoint.

    Attributes:
      tensors: how many there are.
      parameters: their entries.
      pruned: entries that masks prune.
      nbytes: bytes that the tensors take in the files.
    """

    tensors: int = 0
    parameters: int = 0
    pruned: int = 0
    nbytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, sparse: Iterable[Record], nbytes: int) -> "Totals":
        """Those of a checkpoint and the records of its sparse tensors."""
        tensors = checkpoint.tensors.values()
        entries = sum(math.prod(tensor.shape) for tensor in tensors)
        return cls(len(tensors), entries, sum(record.size - record.kept for record in sparse), nbytes)


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What every tensor of a checkpoint is: print it, or ask `.ok`.

    Attributes:
      path: the checkpoint.
      tensors: the sparse tensors.
      dense: the others.
      seconds: time spent reading, waiting for masks ("solve") and writing; empty where nothing was pruned.
      totals: sums over all tensors.
      copied: files beside the tensors that were copied as they are.
      rules: the rules that the checkpoint records, as JSON.
      by: the program that wrote it, where it says so.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> nm.save_checkpoint(path, {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}, [("w", "1:4")])
      >>> report = nm.verify_checkpoint(path)
      >>> report.ok, report["w"].record.kept, report.totals.parameters
      (True, 4, 20)
      >>> report.dense[0].reason
      'no rule matches'
    """

    path: str
    tensors: tuple[TensorReport, ...]
    dense: tuple[DenseTensor, ...]
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    totals: Totals = Totals()
    copied: tuple[str, ...] = ()
    rules: tuple[Any, ...] = ()
    by: str = ""

    @property
    def ok(self) -> bool:
        """Whether every tensor that should be sparse has its pattern."""
        return all(tensor.ok for tensor in self.tensors)

    def __getitem__(self, name: str) -> TensorReport:
        return row_of(self.tensors, name, "among the sparse tensors", "name")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        table: dict[str, Any] = {
            "path": self.path,
            "ok": self.ok,
            "by": self.by,
            "rules": list(self.rules),
            "totals": dataclasses.asdict(self.totals),
            "copied": list(self.copied),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "dense": [{**dataclasses.asdict(tensor), "shape": list(tensor.shape)} for tensor in self.dense],
        }
        return table | ({"seconds": {k: round(v, 3) for k, v in self.seconds.items()}} if self.seconds else {})

    def __str__(self) -> str:
        dense = tuple(DenseLeaf(tensor.name, tensor.shape, tensor.reason) for tensor in self.dense)
        return str(Report([tensor.row() for tensor in self.tensors], dense))


def dense_tensors(checkpoint: Checkpoint, leaves: Mapping[str, Leaf]) -> Iterator[DenseTensor]:
    """The tensors that rules leave dense and that no earlier run pruned."""
    for name, leaf in leaves.items():
        tensor = checkpoint.tensors[name]
        if isinstance(leaf, DenseLeaf) and tensor.record is None:
            yield DenseTensor(name, tensor.dtype, leaf.shape, leaf.reason)
