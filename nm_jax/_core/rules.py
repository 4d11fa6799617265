"""Which leaves of a pytree become sparse, with which pattern and along which axes, or why not.

Rules are one of

- a pattern or its string (`"2:4-T"`): every leaf whose axes its module, its name and its siblings tell;
- a `Plan` (`nm_jax.plan`), which was read off a model;
- a sequence of `(path regex, pattern or None, optional axes)`: the first whose regex is found in the path decides,
  and a leaf that none matches stays dense, unless the last of the sequence is a bare pattern, which takes the leaves
  that no rule matches as it would alone: `[("head", None), "2:4-T"]`.

What is known of a leaf without axes comes from the class of its module where the tree has it (`modules`), else from
its name, its shape and the leaves beside it (`names`). A name that says nothing leaves a leaf dense; layers of the
frameworks whose axes have two readings are an error, which names all of them and says what to write.
"""

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nm_jax._core.axes import Tiling, check_axes
from nm_jax._core.modules import by_class
from nm_jax._core.names import Siblings, by_name
from nm_jax._core.paths import Located, located, words
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.verdicts import Doubt, Known, Stays, Verdict, settled


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


class KnowsAxes(abc.ABC):
    """What was read off a model: `verify` takes it as an independent judge of axes."""

    @abc.abstractmethod
    def known_axes(self) -> Mapping[str, tuple[str | None, str]]:
        """By path: the axes of a leaf, or `None` and why it has none."""


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
      axes: one letter per dimension: `i` contracted, `o` output, `b` batch.
      source: on what the axes rest: a trace, a rule, the class of its module, its name, its bias.
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern
    axes: str
    source: str = dataclasses.field(default="", compare=False)

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


_LISTED = 12  # paths named in an error


def parse_rules(rules: Rules | Any) -> Pattern | tuple[Rule, ...]:
    """A pattern for every leaf, or the parsed rules.

    Raises:
      ValueError: for anything that is not a pattern or a sequence of (regex, pattern or None, optional axes).
    """
    if isinstance(rules, str | Pattern):
        return parse_pattern(rules)
    if isinstance(rules, LeafRules):
        return rules.as_rules()
    if any(is_array(leaf) for leaf in jax.tree.leaves(rules)):
        raise ValueError(
            "rules must be a pattern like '2:4-T', a plan, or a list of (regex, pattern), got a tree of arrays "
            f"({type(rules).__name__}): are these masks or parameters?"
        )
    if not isinstance(rules, Sequence) or isinstance(rules, bytes) or not rules:
        raise ValueError(f"rules must be a pattern like '2:4-T' or a list of (regex, pattern), got {rules!r}")
    parsed = []
    for k, rule in enumerate(rules):
        if isinstance(rule, str | Pattern) and k > 0 and k == len(rules) - 1:
            parsed.append(Rule("", parse_pattern(rule), by_name=True))
            continue
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) not in (2, 3):
            raise ValueError(f"a rule is (path regex, pattern or None, optional axes), got {rule!r}")
        regex, pattern, axes = (*rule, None)[:3]
        if not isinstance(regex, str):
            raise ValueError(f"the path regex of a rule is a string, got {regex!r} in {rule!r}")
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"the rule {rule!r} has no valid regular expression: {error}") from None
        parsed.append(
            Rule(
                regex,
                None if pattern is None else parse_pattern(pattern),
                None if axes is None else check_axes(axes),
            )
        )
    return tuple(parsed)


def resolve(tree: Any, rules: Rules | Any, partial: str = "skip", floating: bool = True) -> list[Leaf]:
    """What the rules say of every leaf of a tree, in the order of `jax.tree.leaves`.

    Args:
      tree: parameters, shapes (`jax.eval_shape`), or masks.
      rules: see the module.
      partial: what to do with a leaf whose sizes m does not divide: `"skip"` it and say so, `"pad"` (edge tiles hold
        at most n), or `"error"`.
      floating: whether a sparse leaf must be floating point (or a mask).

    Raises:
      ValueError: for a rule that matches nothing, layers whose axes cannot be told (all of them in one message), axes
        that do not fit, a leaf that is not floating point, two leaves with one path, or when no leaf becomes sparse.
    """
    if partial not in ("skip", "pad", "error"):
        raise ValueError(f"partial must be 'skip', 'pad' or 'error', got {partial!r}")
    if isinstance(rules, LeafRules):
        return rules.resolve(tree, partial)
    parsed = parse_rules(rules)
    nodes = located(tree, is_leaf=lambda node: node is None)
    present = [node for node in nodes if node.value is not None]
    if not present:
        return []
    if not isinstance(parsed, Pattern):
        check_matches(parsed, [node.path for node in nodes])
    siblings = Siblings({node.path: tuple(node.value.shape) for node in present if is_array(node.value)})
    found = [_resolve_leaf(node, parsed, siblings, partial, floating) for node in present]
    if doubts := [leaf for leaf in found if isinstance(leaf, _Open)]:
        raise ValueError(_ask(doubts))
    leaves = [leaf for leaf in found if not isinstance(leaf, _Open)]
    wanted = isinstance(parsed, Pattern) or any(rule.pattern is not None for rule in parsed)
    dense = [leaf for leaf in leaves if isinstance(leaf, DenseLeaf)]
    if wanted and len(dense) == len(leaves):
        why = _listing([f"{leaf.path} {leaf.shape}: {leaf.reason}" for leaf in dense])
        raise ValueError(
            "no parameter becomes sparse; read the axes off the model with nm_jax.plan(apply, params, *inputs, "
            f"pattern=...), or write rules like [(path regex, pattern, axes)] for: {why}"
        )
    return leaves


def check_matches(rules: Sequence[Rule], paths: Sequence[str]) -> None:
    """A ValueError for a rule that matches none of the paths."""
    for rule in rules:
        if not any(re.search(rule.regex, path) for path in paths):
            raise ValueError(f"the rule {rule.regex!r} matches none of the paths: {_listing(paths)}")


class _Open(NamedTuple):
    """A leaf that should become sparse, and why its axes cannot be told."""

    path: str
    shape: tuple[int, ...]
    pattern: Pattern
    doubt: Doubt


def _ask(doubts: list[_Open]) -> str:
    """What to do about leaves whose axes cannot be told."""
    first, pattern = doubts[0], str(doubts[0].pattern)
    dense = [f"({f'^{re.escape(d.path)}$'!r}, None)" for d in doubts]  # a reading to copy would be a guess
    which = [f"{d.path} {d.shape} ({d.doubt.why})" for d in doubts]
    others = f", and so it is for {len(doubts) - 1} more" if len(doubts) > 1 else ""
    return (
        f"{first.path}: which of the dimensions {first.shape} are contracted is ambiguous{others}. Read the axes off "
        f"the model: nm_jax.plan(apply, params, *inputs, pattern={pattern!r}) goes where rules go. Or give rules: "
        f"[{', '.join(dense[:_LISTED])}, {pattern!r}] leaves them dense; {pattern!r}, AXES in place of None says their "
        f"axes, one letter per dimension (i contraction, o output, b batch). Open: {_listing(which)}"
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype that can be sparse."""
    return isinstance(leaf, Array | np.ndarray | jax.ShapeDtypeStruct)


def _resolve_leaf(
    node: Located, rules: Pattern | tuple[Rule, ...], siblings: Siblings, partial: str, floating: bool
) -> Leaf | _Open:
    path, leaf = node.path, node.value
    if not is_array(leaf):
        return DenseLeaf(path, (), f"not an array but {type(leaf).__name__}")
    shape = tuple(leaf.shape)
    axes: str | None
    if isinstance(rules, Pattern):
        pattern, axes, explicit, source = rules, None, False, ""
    else:
        rule = next((rule for rule in rules if re.search(rule.regex, path)), None)
        if rule is None:
            return DenseLeaf(path, shape, "no rule matches")
        if rule.pattern is None:
            return DenseLeaf(path, shape, f"by the rule {rule.regex!r}")
        pattern, axes, explicit, source = rule.pattern, rule.axes, not rule.by_name, f"the rule {rule.regex!r}"
        if axes is not None and len(axes) != len(shape):
            raise ValueError(
                f"{path}: the rule {rule.regex!r} gives axes {axes!r}, but the shape {shape} has {len(shape)} "
                "dimensions; write one letter per dimension"
            )
    if axes is None:
        verdict = settled(_verdict(node, shape, siblings, explicit), pattern.tile)
        if isinstance(verdict, Stays):
            return DenseLeaf(path, shape, verdict.reason)
        if isinstance(verdict, Doubt):
            return _Open(path, shape, pattern, verdict)
        axes, source = verdict.axes, verdict.source
    if floating and not (jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.bool_):
        raise ValueError(f"{path}: {pattern} needs floating point weights, got {leaf.dtype}; add ({path!r}, None)")
    return fit(path, shape, pattern, axes, partial, source)


def _verdict(node: Located, shape: tuple[int, ...], siblings: Siblings, explicit: bool) -> Verdict:
    """What is known of a leaf without axes. `explicit`: a rule asks for it."""
    if len(shape) < 2:
        return Stays(f"{len(shape)}-D: no contraction and output axes")
    verdict = by_class(node.owner, words(node.path)[-1], shape) or by_name(node.path, shape, siblings)
    if verdict is not None:
        return verdict
    if not explicit:
        return Stays("its name does not tell its axes (use nm_jax.plan, or write a rule)")
    if len(shape) == 2:
        return Known("io", "the rule, which gives no axes: (in, out) as everywhere in JAX")
    return Doubt(("b" * (len(shape) - 2) + "io",), "its name says nothing")


def fit(path: str, shape: tuple[int, ...], pattern: Pattern, axes: str, partial: str, source: str = "") -> Leaf:
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
    return SparseLeaf(path, shape, pattern, axes, source)


def _listing(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more
