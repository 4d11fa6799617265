"""A plan: for every parameter of a model its pattern and axes, or why it stays dense, read off the model."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from nm_jax._core.axes import check_axes
from nm_jax._core.paths import empty, located
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.rules import (
    DenseLeaf,
    KnowsAxes,
    Leaf,
    LeafRules,
    Rule,
    Rules,
    SparseLeaf,
    check_matches,
    fit,
    parse_rules,
)
from nm_jax._core.tables import aligned, row_of, shape_text
from nm_jax._model.tracing import LeafTrace, Trace, trace


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """What a plan says of one parameter.

    Attributes:
      path: '/'-joined keys.
      shape: its shape.
      op: the operations that use it (`"dot"`, `"conv"`, `"gather"`, `"elementwise"`, ...).
      contraction: one letter per dimension, everything that is contracted `i`; `None` if that cannot be told.
      axes: one letter per dimension as it is grouped: `i` along which groups of m run, `o` output, `b` batch; `None` if
        that cannot be told.
      flops: of its contractions in one forward pass, an addition and a multiplication counted as two.
      pattern: its pattern, `None` if it stays dense.
      reason: why it stays dense, or `""`.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}
      >>> row = nm.plan(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 8)), pattern="2:4")["down"]
      >>> row.axes, row.pattern, row.reason, row.flops
      ('io', None, 'the last layer', 512)
    """

    path: str
    shape: tuple[int, ...]
    op: str
    contraction: str | None
    axes: str | None
    flops: int
    pattern: Pattern | None
    reason: str

    @property
    def leaf(self) -> Leaf:
        """As rules resolve it."""
        if self.pattern is None or self.axes is None:
            return DenseLeaf(self.path, self.shape, self.reason)
        return SparseLeaf(self.path, self.shape, self.pattern, self.axes, f"the plan: {self.op}")

    def cells(self, total: int) -> dict[str, str]:
        """The row as it is printed."""
        return {
            "path": self.path,
            "shape": shape_text(self.shape),
            "op": self.op,
            "axes": self.axes or "",
            "FLOPs": f"{100 * self.flops / total:.1f}%" if self.flops else "",
            "pattern": str(self.pattern or "dense"),
            "because": self.reason,
        }


@dataclasses.dataclass(frozen=True)
class Plan(LeafRules, KnowsAxes):
    """What becomes of every parameter of a model. Print it; pass it wherever rules go.

    Attributes:
      leaves: one row per parameter.
      flops: of all contractions of one forward pass, those without parameters included.
      partial: what was done with sizes that m does not divide: `"skip"`, `"pad"` or `"error"`.
      remarks: what the reader of the table should know besides.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> params = {name: jnp.ones((8, 8)) for name in ("first", "middle", "last")}
      >>> forward = lambda p, x: x @ p["first"] @ p["middle"] @ p["last"]
      >>> plan = nm.plan(forward, params, jnp.ones((2, 8)), pattern="2:4-T")
      >>> print(plan)
      1 of 3 parameters become sparse: 33.3% of a forward pass's FLOPs, 22.2% of a training step's
      path    shape  op   axes  FLOPs  pattern  because
      first   8x8    dot  io    33.3%  dense    the first layer
      last    8x8    dot  io    33.3%  dense    the last layer
      middle  8x8    dot  io    33.3%  2:4-T
      >>> nm.Plan.from_json(plan.to_json()) == plan
      True
    """

    leaves: tuple[PlannedLeaf, ...]
    flops: int
    partial: str = "skip"
    remarks: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> PlannedLeaf:
        return row_of(self.leaves, path, "in the plan")

    @property
    def sparse_forward_share(self) -> float:
        """The share of the FLOPs of a forward pass whose weight is N:M sparse."""
        return sum(leaf.flops * bool(_sparse_products(leaf)) for leaf in self.leaves) / max(self.flops, 1)

    @property
    def sparse_flops_share(self) -> float:
        """The share of the FLOPs of a training step that sparse tensor cores can run: the paper's SU (Tables 3, 4).

        A step has three products per layer: forward with W, backward with W^T, and the weights' gradient, which is
        dense. Every N:M pattern makes the first sparse, a transposable one the second as well: 33 % and 66 % at best.
        """
        return sum(leaf.flops * _sparse_products(leaf) for leaf in self.leaves) / max(3 * self.flops, 1)

    def as_rules(self) -> tuple[Rule, ...]:
        return tuple(
            Rule(f"^{re.escape(leaf.path)}$", leaf.pattern, leaf.axes if leaf.pattern else None) for leaf in self.leaves
        )

    def resolve(self, tree: Any, partial: str) -> list[Leaf]:
        if partial not in ("skip", self.partial):
            raise ValueError(f"partial={partial!r}, but the plan was made with {self.partial!r}; give it to `plan`")
        nodes = located(tree, is_leaf=empty)
        shapes = {node.path: None if empty(node.value) else jnp.shape(node.value) for node in nodes}
        if not shapes:
            return []
        planned = {leaf.path: leaf for leaf in self.leaves}
        masked = tuple(f"{path}/" for path, shape in shapes.items() if shape is None)  # by `optax.masked`, at any level
        for path, leaf in planned.items():
            if path not in shapes and not path.startswith(masked):
                raise ValueError(f"the plan is for another tree: it has {path}, and this one has not; plan this model")
            if shapes.get(path) not in (None, leaf.shape):
                raise ValueError(
                    f"the plan is for another tree: {path} has shape {leaf.shape} there, {shapes[path]} here"
                )
        for path, shape in shapes.items():
            if shape is not None and path not in planned:
                raise ValueError(f"the plan is for another tree: it has no {path}; plan this model")
        if not any(leaf.pattern for leaf in self.leaves):
            raise ValueError(f"no parameter becomes sparse by this plan:\n{self}")
        return [planned[path].leaf for path, shape in shapes.items() if shape is not None]

    def known_axes(self) -> dict[str, tuple[str | None, str]]:
        return {leaf.path: (leaf.axes, leaf.reason) for leaf in self.leaves}

    def to_json(self) -> str:
        """The plan as a string that `from_json` reads."""
        rows = [dataclasses.asdict(leaf) | {"pattern": leaf.pattern and str(leaf.pattern)} for leaf in self.leaves]
        return json.dumps({"leaves": rows, "flops": self.flops, "partial": self.partial, "remarks": self.remarks})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
          ValueError: if it did not write this.
        """
        try:
            table = json.loads(text)
            rows = tuple(
                PlannedLeaf(
                    **row | {"shape": tuple(row["shape"]), "pattern": row["pattern"] and parse_pattern(row["pattern"])}
                )
                for row in table["leaves"]
            )
            return cls(rows, table["flops"], table["partial"], tuple(table["remarks"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a plan that to_json wrote: {error!r}") from None

    def _rows(self) -> list[dict[str, str]]:
        """The rows of the table: one per parameter that is contracted, and one per kind of the others."""
        rows = [leaf.cells(max(self.flops, 1)) for leaf in self.leaves if _folded(leaf) is None]
        kinds: dict[tuple[str, str], list[PlannedLeaf]] = {}
        for leaf in self.leaves:
            if (kind := _folded(leaf)) is not None:
                kinds.setdefault(kind, []).append(leaf)
        for leaves in kinds.values():
            cells = leaves[0].cells(max(self.flops, 1))
            rows.append(cells if len(leaves) == 1 else cells | {"path": f"({len(leaves)} parameters)", "shape": ""})
        return rows

    def __str__(self) -> str:
        sparse = [leaf for leaf in self.leaves if leaf.pattern]
        forward, training = 100 * self.sparse_forward_share, 100 * self.sparse_flops_share
        lines = [
            f"{len(sparse)} of {len(self.leaves)} parameters become sparse: {forward:.1f}% of a forward pass's FLOPs, "
            f"{training:.1f}% of a training step's",
            *aligned(self._rows()),
        ]
        return "\n".join([*lines, *self.remarks])


def _sparse_products(leaf: PlannedLeaf) -> int:
    """How many of the three products of a layer have a sparse weight."""
    if leaf.pattern is None:
        return 0
    return sum(groups is not None for groups in (leaf.pattern.contraction_groups, leaf.pattern.output_groups))


def _folded(leaf: PlannedLeaf) -> tuple[str, str] | None:
    """What stands in the table for all parameters of a kind: those that nothing contracts."""
    return None if leaf.flops or leaf.axes else (leaf.op, leaf.reason)


def plan(
    apply: Callable,
    params: PyTree,
    *inputs: Any,
    pattern: str | Pattern,
    rules: Rules | None = None,
    first: str | Pattern | None = None,
    last: str | Pattern | None = None,
    partial: str = "skip",
) -> Plan:
    """Reads off a model how each parameter is used, and says which become sparse, along which axes, and why not.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`; see `nm_jax.trace`.
      params: parameters, in any container; shapes (`jax.eval_shape`) are enough.
      *inputs: the other arguments, arrays or shapes; sizes only matter for the shares of FLOPs.
      pattern: pattern of every parameter that is contracted and has an output axis.
      rules: `(path regex, pattern or None, optional axes)`: the first whose regex is found in the path decides against
        what was traced and against `first` and `last`. Without axes, those traced are taken.
      first: pattern of the first layers, which contract an input or what no other layer has made of it; `None` leaves
        them dense. Several inputs may have a first layer each; an embedding that is looked up is one itself.
      last: the same for the last layers, whose results reach an output without passing another layer: of several heads,
        each.
      partial: parameters whose sizes m does not divide: `"skip"` (they stay dense), `"pad"` or `"error"`.

    Returns:
      A `Plan`, which goes wherever rules go: `sparse_training(inner, plan)`, `compute_masks(params, plan)`.

    Raises:
      ValueError: for a rule that matches no path or whose axes do not fit, and for sizes with `partial="error"`.

    Nothing is guessed: a parameter that is only looked up, that is used in conflicting ways, whose entries cannot be
    followed, or of which a sum with something else is contracted stays dense, with the reason in its row. Evaluates
    nothing; costs one trace of `apply`.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> params = {"up": jnp.ones((3, 8, 16)), "scale": jnp.ones(16), "head": jnp.ones((16, 4))}
      >>> def forward(p, x):  # an ensemble of three, each with its own inputs
      ...     return (jnp.einsum("tbi,tio->tbo", x, p["up"]) * p["scale"]) @ p["head"]
      >>> plan = nm.plan(forward, params, jnp.ones((3, 2, 8)), pattern="2:4", first="2:4")
      >>> [(leaf.path, leaf.axes, str(leaf.pattern)) for leaf in plan.leaves if leaf.pattern]
      [('up', 'bio', '2:4')]
      >>> plan["scale"].reason
      'elementwise, not contracted'
      >>> nm.verify(nm.apply_masks(params, nm.compute_masks(params, plan)), plan).ok
      True
    """
    default = parse_pattern(pattern)
    if partial not in ("skip", "pad", "error"):
        raise ValueError(f"partial must be 'skip', 'pad' or 'error', got {partial!r}")
    parsed: Any = () if rules is None else parse_rules(rules)
    if isinstance(parsed, Pattern):
        raise ValueError(f"rules must be a list of (regex, pattern, axes), got {rules!r}; the pattern goes in pattern=")
    traced = trace(apply, params, *inputs)
    check_matches(parsed, [leaf.path for leaf in traced.leaves])
    ends = _ends(traced, first, last)
    nodes = jax.tree.leaves(params)
    rows = [
        _plan_leaf(leaf, getattr(node, "dtype", None), _asked(leaf, parsed, ends, default), partial)
        for leaf, node in zip(traced.leaves, nodes, strict=True)
    ]
    remarks = [
        f"data is contracted with a constant of shape {shape}: a weight that apply closes over is not planned"
        for shape in dict.fromkeys(traced.constants)
    ]
    return Plan(tuple(rows), traced.flops, partial, tuple(remarks))


def _ends(traced: Trace, first: str | Pattern | None, last: str | Pattern | None) -> dict[str, Rule]:
    """Rules for the first and the last layers, by path."""
    ends = dict.fromkeys(traced.last, Rule("last layer", None if last is None else parse_pattern(last)))
    return ends | dict.fromkeys(traced.first, Rule("first layer", None if first is None else parse_pattern(first)))


def _asked(leaf: LeafTrace, rules: Sequence[Rule], ends: dict[str, Rule], default: Pattern) -> tuple[Rule, str]:
    """The rule for a parameter, and why that leaves it dense."""
    for rule in rules:
        if rule.by_name:
            default = rule.pattern or default
        elif re.search(rule.regex, leaf.path):
            return rule, f"by the rule {rule.regex!r}"
    end = ends.get(leaf.path, Rule("", default))
    return end, f"the {end.regex}"


def _plan_leaf(leaf: LeafTrace, dtype: Any, asked: tuple[Rule, str], partial: str) -> PlannedLeaf:
    rule, why = asked
    row = PlannedLeaf(leaf.path, leaf.shape, leaf.op, leaf.contraction, leaf.axes, leaf.flops, None, "")
    if rule.axes is not None:
        row = dataclasses.replace(row, axes=_fitting(rule.axes, leaf))
    elif leaf.reason:
        return dataclasses.replace(row, reason=leaf.reason)
    if rule.pattern is None:
        return dataclasses.replace(row, reason=why)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dataclasses.replace(row, reason=f"{dtype or 'no array'}: not floating point")
    assert row.axes is not None
    fitted = fit(leaf.path, leaf.shape, rule.pattern, row.axes, partial)
    if isinstance(fitted, DenseLeaf):
        return dataclasses.replace(row, reason=fitted.reason)
    return dataclasses.replace(row, pattern=rule.pattern)


def _fitting(axes: str, leaf: LeafTrace) -> str:
    try:
        return check_axes(axes, leaf.shape)
    except ValueError as error:
        raise ValueError(f"{leaf.path}: {error}") from None
