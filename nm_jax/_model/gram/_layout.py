"""What to sum for which parameters, where in a program, and where in the parameters' own order it goes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nm_jax._core.rules import LeafRules, SparseLeaf
from nm_jax._model.gram._moments import Moments
from nm_jax._model.gram._record import Gram
from nm_jax._model.tracing import LeafTrace, Site, Tap, Traced
from nm_jax._model.tracing.views import Dim, extent


class _Consumer(NamedTuple):
    """Which entries of which parameter meet the entries of an activation."""

    leaf: int
    contracted: tuple[Dim, ...]
    batch: tuple[Dim, ...]
    loops: tuple[int, ...]
    fixed: tuple[Dim, ...]


class Slot(NamedTuple):
    """One set of sums. Activations that meet the same parameters in the same way share it, so that a shared layer that
    is used twelve times has one."""

    consumers: tuple[_Consumer, ...]
    loops: tuple[tuple[int, int], ...]  # (number, iterations) of the loops with moments of their own per iteration
    batch: int
    size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is summed, and where in the program.

    Attributes:
      traces: how each parameter is used.
      slots: the sums.
      work: (site, index of the equation) -> what to sum there. Of several equations with the same activation, the
        first does it.
    """

    traces: list[LeafTrace]
    slots: list[Slot]
    work: dict[tuple[int, int], list[tuple[Tap, int]]]

    @classmethod
    def of(cls, traced: Traced, regexes: Sequence[str] | None) -> "Layout":
        traces = [
            LeafTrace(p, s, tuple(u)) for p, s, u in zip(traced.paths, traced.shapes, traced.walk.uses, strict=True)
        ]
        wanted = _wanted(traces, list(taps_of(traced.site)), regexes)
        sources: dict[Any, list[tuple[int, int, Tap]]] = {}
        for site, index, tap in taps_of(traced.site):
            if tap.view.leaf in wanted:
                loops = tuple(number for number, _ in tap.view.fixed if number is not None)
                sources.setdefault((tap.number, tap.layout, tap.windows, loops), []).append((site, index, tap))
        layout = cls(traces, [], {})
        for found in sources.values():
            site, index, tap = found[0]
            slot = _slot([tap for *_, tap in found])
            if slot not in layout.slots:
                layout.slots.append(slot)
            layout.work.setdefault((site, index), []).append((tap, layout.slots.index(slot)))
        return layout

    def zeros(self) -> list[Moments]:
        return [Moments.zeros(tuple(n for _, n in slot.loops), slot.batch, slot.size) for slot in self.slots]

    def records(self, params: PyTree, sums: list[Moments]) -> PyTree[Gram | None]:
        """The sums in the order of the parameters' own dimensions."""
        found: list[Gram | None] = [None] * len(self.traces)
        placed: dict[Any, Moments] = {}
        for k, slot in enumerate(self.slots):
            for consumer in slot.consumers:
                trace = self.traces[consumer.leaf]
                where = _placement(consumer, trace)
                if (k, where) not in placed:  # shared by query, key and value
                    placed[k, where] = _place(sums[k], where)
                record = Gram(*placed[k, where], trace.kinds[0][0], trace.groups)
                before = found[consumer.leaf]
                found[consumer.leaf] = record if before is None else before + record
        return jax.tree.unflatten(jax.tree.structure(params), found)


def taps_of(site: Site) -> Iterable[tuple[int, int, Tap]]:
    """(site, index of the equation, tap), in the order of the program."""
    for index in sorted({*site.taps, *site.inner}):
        for tap in site.taps.get(index, ()):
            yield id(site), index, tap
        for inner in site.inner.get(index, ()):
            yield from taps_of(inner)


def _slot(taps: list[Tap]) -> Slot:
    consumers = []
    for tap in taps:
        loops = tuple((number, extent(dim)) for number, dim in tap.view.fixed if number is not None)
        ordered = sorted(tap.view.fixed, key=lambda pair: pair[0] is None)  # loops first, in the order of nesting
        consumer = _Consumer(
            tap.view.leaf, tap.contracted, tap.batch, tuple(n for n, _ in loops), tuple(dim for _, dim in ordered)
        )
        consumers.append(consumer)
    size = math.prod(extent(dim) for dim in taps[0].contracted)
    batch = math.prod(extent(dim) for dim in taps[0].batch)
    return Slot(tuple(dict.fromkeys(consumers)), loops, batch, size)


# ---------------------------------------------------------------------------------------------- which parameters


def chosen_paths(params: PyTree, leaves: str | Sequence[str] | LeafRules | None) -> tuple[str, ...] | None:
    """The argument `leaves` of `gram` as regular expressions, `None` for every parameter that gives a Gram matrix.

    Raises:
      ValueError: for what is none of these.
    """
    if isinstance(leaves, LeafRules):
        sparse = [leaf for leaf in leaves.resolve(params, "skip") if isinstance(leaf, SparseLeaf)]
        return tuple(f"^{re.escape(leaf.path)}$" for leaf in sparse)
    if leaves is None:
        return None
    regexes = (leaves,) if isinstance(leaves, str) else leaves
    if not isinstance(regexes, Sequence) or not all(isinstance(regex, str) for regex in regexes):
        raise ValueError(
            "leaves is a plan, a regular expression of paths or a list of them; of rules or masks make a plan, or give "
            f"the paths; got {type(leaves).__name__}"
        )
    return tuple(regexes)


def _wanted(traces: list[LeafTrace], taps: list, regexes: Sequence[str] | None) -> set[int]:
    """The parameters to sum for; a ValueError if one that was asked for gives no Gram matrix."""
    refusals = {k: _refusal(trace, [tap for *_, tap in taps if tap.view.leaf == k]) for k, trace in enumerate(traces)}
    if regexes is None:
        chosen = {k for k, trace in enumerate(traces) if not trace.reason and not refusals[k]}
        if not chosen:
            raise ValueError("no parameter gives a Gram matrix; print nm_jax.trace(apply, params, *inputs) to see why")
        return chosen
    chosen = set()
    for regex in regexes:
        matched = {k for k, trace in enumerate(traces) if re.search(regex, trace.path)}
        if not matched:
            raise ValueError(f"leaves: {regex!r} matches none of {', '.join(t.path for t in traces[:12])} ...")
        chosen |= matched
    for k in sorted(chosen):
        if refusals[k]:
            raise ValueError(f"{traces[k].path}: no Gram matrix, because {refusals[k]}; leave it out of `leaves`")
    return chosen


def _refusal(trace: LeafTrace, taps: list[Tap]) -> str:
    """Why a parameter gives no Gram matrix, or `""`."""
    if trace.doubt:
        return trace.doubt
    if any(use.op == "ragged_dot" for use in trace.contractions):
        return "it is contracted by a ragged product"
    for tap in taps:
        if tap.refusal:
            return tap.refusal
        if _positions([atom for dim in tap.contracted for atom in dim], trace, "i") is None:
            return "only a part of its contraction is used at once, and the products with the rest are missing"
    outputs = [dim for dim, letter in enumerate(trace.kinds[0][0]) if letter == "o"]
    whole = math.prod(trace.shape[dim] for dim in outputs)
    parts = [math.prod(a.size for dim in tap.view.dims for a in dim if a.dim in outputs) < whole for tap in taps]
    if any(parts) and len({tap.number for tap in taps}) > 1:
        return "different outputs have different inputs"
    return ""


# --------------------------------------------------------------------------------------------- into place, at the end


class _Placement(NamedTuple):
    """Where the entries of sums go: along the batch, and along K. `()`: where they are."""

    matrices: int
    batch: tuple[int, ...]
    contracted: tuple[int, ...]


def _positions(atoms, trace: LeafTrace, letter: str) -> np.ndarray | None:
    """The flat index of every entry of a product of atoms in the dimensions with a letter; `None` if that is not every
    index once."""
    contraction = trace.kinds[0][0]
    stride, strides = 1, {}
    for dim in reversed(range(len(contraction))):
        if contraction[dim] == letter:
            strides[dim] = stride
            stride *= trace.shape[dim]
    index = np.zeros(1, np.int64)
    for atom in atoms:
        step = (atom.offset + atom.stride * np.arange(atom.size)) * strides.get(atom.dim, 0)
        index = (index[:, None] + step).reshape(-1)
    return index if letter != "i" or np.array_equal(np.sort(index), np.arange(stride)) else None


def _placement(consumer: _Consumer, trace: LeafTrace) -> _Placement:
    contraction = trace.kinds[0][0]
    contracted = _positions([atom for dim in consumer.contracted for atom in dim], trace, "i")
    assert contracted is not None  # `_refusal` has seen it
    along = [atom for dim in (*consumer.fixed, *consumer.batch) for atom in dim]
    batch = _positions(along, trace, "b")
    assert batch is not None
    # Feature groups are parts of an output dimension: `outputs // groups` apart.
    group = np.zeros(1, np.int64)
    for atom in along:
        steps = np.zeros(atom.size, np.int64)
        if atom.dim is not None and contraction[atom.dim] == "o" and trace.groups > 1:
            steps = (atom.offset + atom.stride * np.arange(atom.size)) * trace.groups // trace.shape[atom.dim]
        group = (group[:, None] + steps).reshape(-1)
    matrices = trace.groups * math.prod(s for s, c in zip(trace.shape, contraction, strict=True) if c == "b")
    index = batch * trace.groups + group
    return _Placement(
        matrices,
        () if np.array_equal(index, np.arange(matrices)) else tuple(index.tolist()),
        () if np.array_equal(contracted, np.arange(len(contracted))) else tuple(np.argsort(contracted).tolist()),
    )


def _place(sums: Moments, where: _Placement) -> Moments:
    """The sums in the order of the dimensions of a parameter."""
    size = sums.h.shape[-1]
    h, total, rows = sums.h.reshape(-1, size, size), sums.total.reshape(-1, size), sums.rows.reshape(-1)
    if where.contracted:
        order = np.array(where.contracted)
        h, total = h[:, order[:, None], order], total[:, order]
    if where.batch:
        index = np.array(where.batch)
        h, total, rows = (jnp.zeros((where.matrices, *y.shape[1:]), y.dtype).at[index].add(y) for y in (h, total, rows))
    return Moments(h, total, rows)


def inner_loops(slot: Slot, number: int | None) -> tuple[int, ...] | None:
    """Iterations of the loops inside of a loop, of those with moments per iteration; `None` if it is not among them."""
    numbers = [n for n, _ in slot.loops]
    return tuple(n for _, n in slot.loops[numbers.index(number) + 1 :]) if number in numbers else None
