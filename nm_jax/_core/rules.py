"""Which leaves of a pytree become sparse, with which pattern and along which axes, or why not.

Rules are one of

- a pattern or its string (`"2:4-T"`): every leaf whose axes the frameworks' own names tell;
- a `Plan` (`nm_jax.plan`), which was read off a model;
- a sequence of `(path regex, pattern or None, optional axes)`: the first whose regex is found in the path decides,
  and a leaf that none matches stays dense, unless the last of the sequence is a bare pattern, which takes the leaves
  that no rule matches as it would alone: `[("head", None), "2:4-T"]`.

Paths are the '/'-joined keys of a leaf, without a leading `params` and without the `value` that Flax NNX appends, so
that one rule fits the same layer everywhere.
"""

import abc
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from nm_jax._core.axes import Tiling, check_axes
from nm_jax._core.patterns import Pattern, parse_pattern


class Rule(NamedTuple):
    """One parsed rule: leaves whose path holds `regex` get `pattern` (`None`: stay dense) along `axes`; with `by_name`
    only those whose axes the frameworks' names tell."""

    regex: str
    pattern: Pattern | None
    axes: str | None = None
    by_name: bool = False


class LeafRules(abc.ABC):
    """Rules that know every leaf of one tree by its path and shape, such as a `Plan`."""

    @abc.abstractmethod
    def as_rules(self) -> tuple[Rule, ...]:
        """The same as rules for these paths."""

    @abc.abstractmethod
    def resolve(self, tree: Any, partial: str) -> "list[Leaf]":
        """What `resolve` returns; a ValueError that names the first difference for another tree."""


Rules: TypeAlias = (
    str
    | Pattern
    | LeafRules
    | Sequence[str | Pattern | tuple[str, str | Pattern | None] | tuple[str, str | Pattern | None, str | None]]
)


@dataclasses.dataclass(frozen=True)
class SparseLeaf:
    """A leaf that the rules make sparse.

    Attributes:
      path: '/'-joined keys.
      shape: its shape.
      pattern: its pattern.
      axes: one letter per dimension (`nm_jax.axes`).
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern
    axes: str

    @property
    def tiling(self) -> Tiling:
        """How the leaf is cut into tiles."""
        return Tiling.of(self.shape, self.axes, self.pattern)


@dataclasses.dataclass(frozen=True)
class DenseLeaf:
    """A leaf that stays dense, and why.

    Attributes:
      path: '/'-joined keys.
      shape: its shape.
      reason: why it stays dense.
    """

    path: str
    shape: tuple[int, ...]
    reason: str


Leaf: TypeAlias = SparseLeaf | DenseLeaf


# Leaf names of the frameworks, and what their dimensions are. The first that is found decides; a number of dimensions
# that it does not list is ambiguous beyond two, because rank alone never decides there.
_CONVENTIONS: tuple[tuple[str, dict[int, str]], ...] = (
    (r"(^|/)(query|key|value)/kernel$", {2: "io", 3: "ioo"}),
    (r"(^|/)out/kernel$", {2: "io", 3: "iio"}),
    (r"(^|/)kernel$", {2: "io", 4: "bbio"}),
    (r"(^|/)weight$", {2: "oi", 4: "oibb"}),
)
_EMBEDDING = r"(^|/)embedding$|embed[^/]*/weight$"
_LISTED = 12  # paths named in an error


def empty(node: Any) -> bool:
    """Whether a node of a tree stands for 'no leaf here': `None`, or what `optax.masked` puts in its place."""
    return node is None or isinstance(node, optax.MaskedNode)


def path_of(keys: Iterable[Any]) -> str:
    """'/'-joined keys of a leaf, without a leading `params` and without the trailing attribute `value`."""
    keys = tuple(keys)
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    names = jax.tree_util.keystr(keys, simple=True, separator="/")
    return names.removeprefix("params/")


def parse_rules(rules: Rules) -> Pattern | tuple[Rule, ...]:
    """A pattern for every leaf, or the parsed rules.

    Raises:
      ValueError: for anything that is not a pattern or a sequence of (regex, pattern or None, optional axes).
    """
    if isinstance(rules, str | Pattern):
        return parse_pattern(rules)
    if isinstance(rules, LeafRules):
        return rules.as_rules()
    if not isinstance(rules, Sequence) or not rules:
        raise ValueError(f"rules must be a pattern like '2:4-T' or a list of (regex, pattern), got {rules!r}")
    parsed = []
    for k, rule in enumerate(rules):
        if isinstance(rule, str | Pattern) and k > 0 and k == len(rules) - 1:
            parsed.append(Rule("", parse_pattern(rule), by_name=True))
            continue
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) not in (2, 3):
            raise ValueError(f"a rule is (path regex, pattern or None, optional axes), got {rule!r}")
        regex, pattern, axes = (*rule, None)[:3]
        try:
            re.compile(regex)
        except (re.error, TypeError) as error:
            raise ValueError(f"the rule {rule!r} has no valid regular expression: {error}") from None
        parsed.append(
            Rule(
                regex,
                None if pattern is None else parse_pattern(pattern),
                None if axes is None else check_axes(axes),
            )
        )
    return tuple(parsed)


def resolve(tree: Any, rules: Rules, partial: str = "skip") -> list[Leaf]:
    """What the rules say of every leaf of a tree, in the order of `jax.tree.leaves`.

    Args:
      tree: parameters, shapes (`jax.eval_shape`), or masks.
      rules: see the module.
      partial: what to do with a leaf whose sizes m does not divide: `"skip"` it and say so, `"pad"` (edge tiles hold
        at most n), or `"error"`.

    Raises:
      ValueError: for a rule that matches nothing, a leaf whose axes its name does not tell, axes that do not fit,
        a leaf that is not floating point, or when no leaf at all becomes sparse.
    """
    if partial not in ("skip", "pad", "error"):
        raise ValueError(f"partial must be 'skip', 'pad' or 'error', got {partial!r}")
    if isinstance(rules, LeafRules):
        return rules.resolve(tree, partial)
    parsed = parse_rules(rules)
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)[0]
    paths = [path_of(keys) for keys, _ in nodes]
    present = [(path, leaf) for path, (_, leaf) in zip(paths, nodes, strict=True) if leaf is not None]
    if not present:
        return []
    if not isinstance(parsed, Pattern):
        for rule in parsed:
            if not any(re.search(rule.regex, path) for path in paths):
                raise ValueError(f"the rule {rule.regex!r} matches none of the paths: {_listing(paths)}")
    leaves = [_resolve_leaf(path, leaf, parsed, partial) for path, leaf in present]
    wanted = isinstance(parsed, Pattern) or any(rule.pattern is not None for rule in parsed)
    dense = [leaf for leaf in leaves if isinstance(leaf, DenseLeaf)]
    if wanted and len(dense) == len(leaves):
        why = _listing([f"{leaf.path} {leaf.shape}: {leaf.reason}" for leaf in dense])
        raise ValueError(f"no parameter becomes sparse; write rules like [(path regex, pattern, axes)] for: {why}")
    return leaves


def _resolve_leaf(path: str, leaf: Any, rules: Pattern | tuple[Rule, ...], partial: str) -> Leaf:
    if not isinstance(leaf, Array | np.ndarray | jax.ShapeDtypeStruct):
        return DenseLeaf(path, (), f"not an array but {type(leaf).__name__}")
    shape = tuple(leaf.shape)
    axes: str | None
    if isinstance(rules, Pattern):
        pattern, axes, explicit = rules, None, False
    else:
        rule = next((rule for rule in rules if re.search(rule.regex, path)), None)
        if rule is None:
            return DenseLeaf(path, shape, "no rule matches")
        if rule.pattern is None:
            return DenseLeaf(path, shape, f"by the rule {rule.regex!r}")
        pattern, axes, explicit = rule.pattern, rule.axes, not rule.by_name
        if axes is not None and len(axes) != len(shape):
            raise ValueError(
                f"{path}: the rule {rule.regex!r} gives axes {axes!r}, but the shape {shape} has {len(shape)} "
                "dimensions; write one letter per dimension"
            )
    if axes is None:
        axes, reason = _axes_by_name(path, shape, pattern, explicit)
        if axes is None:
            return DenseLeaf(path, shape, reason)
    if not (jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.bool_):
        raise ValueError(f"{path}: {pattern} needs floating point weights, got {leaf.dtype}; add ({path!r}, None)")
    return fit(path, shape, pattern, axes, partial)


def fit(path: str, shape: tuple[int, ...], pattern: Pattern, axes: str, partial: str) -> Leaf:
    """The leaf with its pattern, or dense if its sizes do not allow it.

    Raises:
      ValueError: for such sizes, with `partial="error"`.
    """
    if 0 in shape:
        return DenseLeaf(path, shape, "it has no entries")
    tiling = Tiling.of(shape, axes, pattern)
    if partial != "pad":
        for axis, size, tile in tiling.ragged:
            if partial == "error":
                raise ValueError(
                    f"{path}: the {axis} axis has size {size}, which {tile} does not divide; "
                    f"pass partial='pad' or 'skip', or add the rule ({path!r}, None)"
                )
            return DenseLeaf(path, shape, f"{axis} size {size} is not a multiple of {tile}")
    return SparseLeaf(path, shape, pattern, axes)


def _axes_by_name(path: str, shape: tuple[int, ...], pattern: Pattern, explicit: bool) -> tuple[str | None, str]:
    """(axes, "") or (None, why the leaf stays dense)."""
    if len(shape) < 2:
        return None, f"{len(shape)}-D: no contraction and output axes"
    if re.search(_EMBEDDING, path):
        return None, "an embedding is looked up, not contracted (give axes to prune it)"
    convention = next((axes for regex, axes in _CONVENTIONS if re.search(regex, path)), None)
    if convention is None and not explicit:
        return None, "its name does not tell its axes (write a rule)"
    known = {2: "io"} if convention is None else convention
    if len(shape) in known:
        return known[len(shape)], ""
    raise ValueError(
        f"{path}: which of the dimensions {shape} are contracted is ambiguous; add a rule with one letter per "
        f"dimension (i contraction, o output, b batch), like ({path!r}, {str(pattern)!r}, "
        f"{'b' * (len(shape) - 2) + 'io'!r}), or ({path!r}, None)"
    )


def _listing(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more
