"""What the header of a pruned checkpoint says of its sparse tensors, so that any later reader knows their pattern.

It is one string of the header's `__metadata__`, named `nm_jax`: JSON with the rules, for each sparse tensor its
pattern, axes, layout, and what pruning retained, and for each dense one why it is. Readers that do not know it ignore
it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from nm_jax import __version__
from nm_jax._core.axes import check_axes
from nm_jax._core.patterns import Group, Pattern, parse_pattern
from nm_jax._core.rules import Rule, Rules, SparseLeaf, parse_rules
from nm_jax.checkpoint._tensorfile import FormatError, parse_json
from nm_jax.solvers import Proof

KEY = "nm_jax"
Layout: TypeAlias = Literal["dense", "dense+mask", "values+mask", "values+positions"]
# Suffixes of the names under which the parts of a tensor are stored.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "dense": ("",),
    "dense+mask": ("", ".nm_mask"),
    "values+mask": (".nm_values", ".nm_mask"),
    "values+positions": (".nm_values", ".nm_positions"),
}
PRUNABLE = {"BF16": 2, "F16": 2, "F32": 4}  # dtypes that can be sparse, and their bytes
_VERSION = 2
_READ = (1, 2)  # versions that are read; the first has no reasons
EITHER = "either orientation"  # how the source of axes begins that are only known up to exchanging i and o


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of one sparse tensor.

    Attributes:
      pattern: its pattern.
      axes: one letter per dimension.
      dtype: dtype of its values, as the format names it.
      shape: its shape when dense.
      layout: how it is stored: `"dense"` with zeros, `"dense+mask"` with a bit-packed mask beside it, or only its
        values with a mask or positions.
      kept: entries that are kept.
      retained: kept share of the l1 norm; `None` where it is not known (of a norm that is not finite, for instance).
      of_unstructured: the same, relative to the unstructured mask that keeps as many entries (the paper's Fig. 3b).
      gap: relative distance to the proved optimum, 0 = optimal; `None` without a proof.
      source: on what its axes rest, like `"the rule 'mlp'"` or `"siblings: a bias of 768"`; empty if unknown.
    """

    pattern: Pattern
    axes: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    kept: int
    retained: float | None = None
    of_unstructured: float | None = None
    gap: float | None = None
    source: str = ""

    @property
    def proof(self) -> Proof:
        """The gap as a proof; JSON has `null` for none."""
        return Proof(*map(jnp.float32, (self.gap is None, self.gap or 0, 0, 1)))

    @property
    def size(self) -> int:
        """Entries of the tensor when dense."""
        return math.prod(self.shape)

    def leaf(self, name: str) -> SparseLeaf:
        """The tensor as rules see it."""
        return SparseLeaf(name, self.shape, self.pattern, self.axes, self.source)

    def parts(self, name: str) -> tuple[str, ...]:
        """The names under which the tensor is stored: its values, and the code of its mask where there is one."""
        return tuple(name + suffix for suffix in _SUFFIXES[self.layout])

    def to_json(self) -> dict[str, Any]:
        """The record as a table of plain values."""
        return {**dataclasses.asdict(self), "pattern": str(self.pattern), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, name: str, table: Any) -> "Record":
        """The inverse of `to_json`.

        Raises:
          ValueError: for anything else.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        table = {"source": "", **table} if isinstance(table, dict) else table  # files from before have none
        if not isinstance(table, dict) or set(table) != fields:
            raise ValueError(f"the record of {name!r} does not have the fields {', '.join(sorted(fields))}")
        shape, layout, kept = table["shape"], table["layout"], table["kept"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the record of {name!r} has no valid shape")
        if layout not in get_args(Layout):
            raise ValueError(f"the record of {name!r} has the unknown layout {layout!r}")
        if type(kept) is not int or not 0 <= kept <= math.prod(shape):
            raise ValueError(f"the record of {name!r} keeps {kept!r} entries of {math.prod(shape)}")
        for field in ("retained", "of_unstructured", "gap"):
            if type(table[field]) not in (int, float, type(None)):
                raise ValueError(f"the record of {name!r} has no valid {field}")
        for field in ("pattern", "source"):
            if not isinstance(table[field], str):
                raise ValueError(f"the record of {name!r} has no valid {field}")
        if table["dtype"] not in tuple(PRUNABLE):  # anything may stand there: compared, not hashed
            raise ValueError(f"the record of {name!r} has the dtype {table['dtype']!r}, which is never pruned")
        check_axes(table["axes"], tuple(shape))
        return cls(**{**table, "pattern": parse_pattern(table["pattern"]), "shape": tuple(shape)})


def layout_of(leaf: SparseLeaf, packed: bool, keep_masks: bool) -> Layout:
    """How to store a tensor: positions are enough where exactly two of every four are kept."""
    if not packed:
        return "dense+mask" if keep_masks else "dense"
    two_of_four = leaf.pattern.contraction_groups == Group(2, 4, exactly=True) and not leaf.tiling.ragged
    return "values+positions" if two_of_four else "values+mask"


def stored_parts(record: Record, name: str) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of what a tensor is stored as."""
    size, itemsize = record.size, PRUNABLE[record.dtype]
    first, *rest = record.parts(name)
    shape = record.shape if first == name else (record.kept,)
    values = (first, record.dtype, shape, math.prod(shape) * itemsize)
    code_size = -(-size // 8)
    return [values, *((part, "U8", (code_size,), code_size) for part in rest)]


class Said(NamedTuple):
    """What a header says of its file.

    Attributes:
      tensors: the records of its sparse tensors.
      dense: why the others are dense.
      rules: the rules of the last run, as JSON.
      partial: what it did with sizes that m does not divide.
      by: the program that wrote it.
    """

    tensors: Mapping[str, Record]
    dense: Mapping[str, str]
    rules: list[Any]
    partial: str = "skip"
    by: str = ""

    def dump(self) -> str:
        """The string for the header."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            reasons.setdefault(reason, []).append(name)
        table = {
            "version": _VERSION,
            "by": f"nm_jax {__version__}",
            "rules": self.rules,
            "partial": self.partial,
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
            "dense": reasons,
        }
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False)


def rules_json(rules: Rules) -> list[Any]:
    """Rules as plain values."""
    parsed = parse_rules(rules)
    return [_rule_json(rule) for rule in (parsed if isinstance(parsed, tuple) else [parsed])]


def _rule_json(rule: Rule | Pattern) -> str | list[str | None]:
    if isinstance(rule, Pattern) or rule.by_name:
        return str(rule.pattern if isinstance(rule, Rule) else rule)
    return [rule.regex, None if rule.pattern is None else str(rule.pattern), rule.axes]


def load(text: str | None, where: str) -> Said | None:
    """What a header's string says; `None` without one.

    Raises:
      FormatError: if the string is not one that `dump` wrote.
    """
    if text is None:
        return None
    table = parse_json(text.encode(), f"{where}: its {KEY} record")
    try:
        if not isinstance(table, dict) or table.get("version") not in _READ:
            raise ValueError(f"its version is not one of {_READ}; install the nm_jax that wrote it")
        tensors, dense, rules = table.get("tensors"), table.get("dense", {}), table.get("rules", [])
        partial, by = table.get("partial", ""), table.get("by", "")
        if not isinstance(tensors, dict):
            raise ValueError("it has no table of tensors")
        if not isinstance(dense, dict) or not all(_are_names(names) for names in dense.values()):
            raise ValueError("its reasons are not lists of names")
        if not isinstance(rules, list) or not isinstance(partial, str) or not isinstance(by, str):
            raise ValueError("it does not say how it was made")
        found = {name: Record.from_json(name, record) for name, record in tensors.items()}
        return Said(found, {name: why for why, names in dense.items() for name in names}, rules, partial, by)
    except ValueError as error:
        raise FormatError(f"{where}: its {KEY} record is damaged ({error}); prune the checkpoint again") from None


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def rounded(value: float) -> float | None:
    """A share, short enough for the header; `None` if it is not finite."""
    return round(float(value), 6) if np.isfinite(value) else None


def rounded_up(value: float) -> float | None:
    """A gap, short enough for the header, and 0 only if it is 0."""
    return math.ceil(value * 1e6) / 1e6 if np.isfinite(value) else None


def longest(leaf: SparseLeaf, dtype: str, layout: Layout) -> Record:
    """A record that no record of this tensor is longer than, for the room to reserve."""
    share = -1111111.111111
    return Record(
        leaf.pattern, leaf.axes, dtype, leaf.shape, layout, math.prod(leaf.shape), share, share, share, leaf.source
    )
