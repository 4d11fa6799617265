"""What the tensors of a checkpoint are, as tables for people and as plain values for programs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from nm_jax._core.rules import DenseLeaf, Leaf
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
class CheckpointReport:
    """What every tensor of a checkpoint is: print it, or ask `.ok`.

    Attributes:
      path: the checkpoint.
      tensors: the sparse tensors.
      dense: the others.
      seconds: time spent reading, waiting for masks ("solve") and writing; empty where nothing was pruned.
    """

    path: str
    tensors: tuple[TensorReport, ...]
    dense: tuple[DenseTensor, ...]
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every tensor that should be sparse has its pattern."""
        return all(tensor.ok for tensor in self.tensors)

    def __getitem__(self, name: str) -> TensorReport:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(f"{name!r} is not among the sparse tensors")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        table: dict[str, Any] = {
            "path": self.path,
            "ok": self.ok,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "dense": [{**dataclasses.asdict(tensor), "shape": list(tensor.shape)} for tensor in self.dense],
        }
        return table | ({"seconds": {k: round(v, 3) for k, v in self.seconds.items()}} if self.seconds else {})

    def __str__(self) -> str:
        dense = tuple(DenseLeaf(tensor.name, tensor.shape, tensor.reason) for tensor in self.dense)
        return str(Report([tensor.row() for tensor in self.tensors], dense))


def dense_tensors(checkpoint: Checkpoint, leaves: Mapping[str, Leaf]) -> Iterator[DenseTensor]:
    """The tensors that rules leave dense."""
    for name, leaf in leaves.items():
        if isinstance(leaf, DenseLeaf):
            yield DenseTensor(name, checkpoint.tensors[name].dtype, leaf.shape, leaf.reason)
