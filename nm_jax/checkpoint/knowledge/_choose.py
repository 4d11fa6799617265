"""Which tensors of a checkpoint get which pattern along which axes, or why not: rules, records, then what is known."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nm_jax._core.patterns import Pattern, TransposableNM
from nm_jax._core.rules import DenseLeaf, Leaf, LeafRules, Rule, Rules, fit, parse_rules, resolve
from nm_jax.checkpoint._records import EITHER, PRUNABLE
from nm_jax.checkpoint._tensor import Tensor
from nm_jax.checkpoint.knowledge import Axes, Contents, Finding, identify

_LISTED = 12  # names in an error
_USUAL = {2: "oi", 3: "boi", 4: "oibb", 5: "oibbb"}  # axes to propose, by the number of dimensions


class Wanted(NamedTuple):
    """What is asked of a checkpoint.

    Attributes:
      rules: patterns, as in `nm_jax.resolve`.
      partial: what to do with sizes that m does not divide.
      include: regexes of tensors to prune although their kind stays dense by default.
      strict: whether a tensor whose axes are not known is an error.
    """

    rules: Rules
    partial: str = "skip"
    include: Sequence[str] = ()
    strict: bool = False


def choose(tensors: Mapping[str, Tensor], contents: Contents, wanted: Wanted) -> dict[str, Leaf]:
    """What happens to every tensor, by name.

    Raises:
      ValueError: for a rule or an `include` that matches nothing, a rule for tensors whose dtype is never pruned, axes
        that do not fit, sizes that m does not divide with `partial="error"`, or axes that are not known with `strict`.
    """
    if not any(tensor.dtype in PRUNABLE for tensor in tensors.values()):
        raise ValueError(f"no tensor is {', '.join(PRUNABLE)}; there is nothing to prune")
    if wanted.partial not in ("skip", "pad", "error"):
        raise ValueError(f"partial must be 'skip', 'pad' or 'error', got {wanted.partial!r}")
    if isinstance(wanted.rules, LeafRules):
        return _by_plan(tensors, wanted.rules, wanted.partial)
    parsed = parse_rules(wanted.rules)
    rules = (Rule("", parsed, by_name=True),) if isinstance(parsed, Pattern) else parsed
    _check_rules(tensors, rules)
    _check_include(tensors, wanted.include)
    leaves: dict[str, Leaf] = {}
    unclear: list[str] = []
    for name, tensor in tensors.items():
        rule = _first(rules, tensor)
        if tensor.dtype not in PRUNABLE:
            leaves[name] = DenseLeaf(name, tensor.shape, f"dtype {tensor.dtype} is copied as it is")
        elif rule is None:
            leaves[name] = DenseLeaf(name, tensor.shape, "no rule matches")
        elif rule.pattern is None:
            leaves[name] = DenseLeaf(name, tensor.shape, f"by the rule {rule.regex!r}")
        else:
            finding = _know(tensor, contents, rule)
            named = not rule.by_name and finding.kept is not None and finding.kept.layer
            included = named or any(_holds(regex, tensor) for regex in wanted.include)
            why = _unpruned(tensor, finding, rule.pattern, included)
            if why:
                leaves[name] = DenseLeaf(name, tensor.shape, why)
                if finding.kept is None or included:
                    unclear.append(f"{name} {tensor.shape}: {why}")
                continue
            assert finding.axes is not None
            source = f"{EITHER} ({finding.axes.source})" if finding.axes.either else finding.axes.source
            leaves[name] = fit(name, tensor.shape, rule.pattern, finding.axes.axes, wanted.partial, source)
    if wanted.strict and unclear:
        raise ValueError("\n  ".join([f"what {len(unclear)} tensors are is not known:", *unclear]))
    return leaves


def _know(tensor: Tensor, contents: Contents, rule: Rule) -> Finding:
    """What a tensor is: by the rule, by the record of an earlier run, or by what is known of it."""
    if rule.axes is not None:
        if len(rule.axes) != len(tensor.shape):
            raise ValueError(
                f"{tensor.name}: the rule {rule.regex!r} gives axes {rule.axes!r}, but the shape {tensor.shape} has "
                f"{len(tensor.shape)} dimensions; write one letter per dimension"
            )
        return Finding(Axes(rule.axes, f"the rule {rule.regex!r}"))
    record = tensor.record
    if record is not None and len(record.axes) == len(tensor.shape):
        either = record.source.startswith(EITHER)
        source = record.source.removeprefix(f"{EITHER} (").removesuffix(")") if either else record.source
        return Finding(Axes(record.axes, source or "the record of an earlier run", either))
    found = identify(contents, tensor.name)
    if found.axes is None and found.kept is None and not rule.by_name and len(tensor.shape) == 2:
        # The rule says that it is a layer: only its orientation is open, which other layers may tell.
        usual = tensor.name.endswith("weight") and not any(axes == "io" for _, axes in contents.axes_by_bias)
        source = f"the rule {rule.regex!r}, and PyTorch's layers are (out, in)" if usual else found.doubt
        return Finding(Axes("oi", source, either=not usual))
    return found


def _unpruned(tensor: Tensor, finding: Finding, pattern: Pattern, included: bool) -> str:
    """Why a tensor stays dense; empty if it does not."""
    if finding.axes is None and finding.kept is not None and len(tensor.shape) < 2:
        return finding.kept.reason
    line = f"--rule '^{re.escape(tensor.name)}$={pattern}@{_proposed(tensor, finding)}'"
    if finding.kept is not None and not included:
        if finding.axes is not None and not finding.axes.either:
            line = f"--include '^{re.escape(tensor.name)}$'"
        return f"{finding.kept.reason} (to prune it: {line})"
    if finding.axes is None:
        return f"{finding.doubt} (to prune it, say its axes: {line})"
    if finding.axes.either and not (isinstance(pattern, TransposableNM) or pattern.tile is None):
        return f"{finding.axes.source} (to prune it, say its axes: {line}, or take a transposable pattern)"
    return ""


def _proposed(tensor: Tensor, finding: Finding) -> str:
    return finding.axes.axes if finding.axes is not None else _USUAL.get(len(tensor.shape), "b" * len(tensor.shape))


def _by_plan(tensors: Mapping[str, Tensor], plan: LeafRules, partial: str) -> dict[str, Leaf]:
    """What a plan says, which knows every parameter by its path."""
    names = {tensor.path: name for name, tensor in tensors.items() if tensor.dtype in PRUNABLE}
    shapes = {path: jax.ShapeDtypeStruct(tensors[names[path]].shape, jnp.float32) for path in sorted(names)}
    leaves: dict[str, Leaf] = {
        name: DenseLeaf(name, t.shape, f"dtype {t.dtype} is copied as it is") for name, t in tensors.items()
    }
    for path, leaf in zip(shapes, resolve(shapes, plan, partial), strict=True):  # jax.tree.leaves sorts keys
        leaves[names[path]] = dataclasses.replace(leaf, path=names[path])
    return leaves


def _holds(regex: str, tensor: Tensor) -> bool:
    """Whether a regex is found in the name of a tensor, written with dots or with slashes."""
    return bool(re.search(regex, tensor.path) or re.search(regex, tensor.name))


def _first(rules: Sequence[Rule], tensor: Tensor) -> Rule | None:
    return next((rule for rule in rules if _holds(rule.regex, tensor)), None)


def _check_rules(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> None:
    deciding = {name: _first(rules, tensor) for name, tensor in tensors.items()}
    for rule in rules:
        matched = [tensor for tensor in tensors.values() if _holds(rule.regex, tensor)]
        if not matched:
            raise ValueError(f"the rule {rule.regex!r} matches none of the tensors: {_listing(tensors)}")
        decided = [tensor for tensor in matched if deciding[tensor.name] is rule]
        if rule.pattern is None or rule.by_name or not decided:
            continue
        if not any(tensor.dtype in PRUNABLE for tensor in decided):
            first = decided[0]
            raise ValueError(
                f"{first.name}: the rule {rule.regex!r} gives it {rule.pattern}, but it is {first.dtype}, and only "
                f"{', '.join(PRUNABLE)} are pruned; convert it first, or write ({rule.regex!r}, None)"
            )


def _check_include(tensors: Mapping[str, Tensor], include: Sequence[str]) -> None:
    for regex in include:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"include {regex!r} is no valid regular expression: {error}") from None
        if not any(_holds(regex, tensor) for tensor in tensors.values()):
            raise ValueError(f"include {regex!r} matches none of the tensors: {_listing(tensors)}")


def _listing(tensors: Mapping[str, Tensor]) -> str:
    paths = [tensor.path for tensor in tensors.values()]
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(paths[:_LISTED]) + more
