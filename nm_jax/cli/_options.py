"""Options that several commands have, and their types."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nm_jax.cli._late import Late, nm

_rules = Late("nm_jax._core.rules")

PATH = click.Path(path_type=str)
_RULE_HELP = "write 'regex=pattern', 'regex=pattern@axes' or 'regex=dense'"


class PatternType(click.ParamType):
    """A pattern by its string."""

    name = "pattern"

    def convert(self, value, param, ctx):
        try:
            return nm.parse_pattern(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RuleType(click.ParamType):
    """A rule, as it is written on the command line."""

    name = "regex=pattern[@axes]"

    def convert(self, value, param, ctx):
        try:
            return _rule(value)
        except ValueError as error:
            self.fail(f"{error}; {_RULE_HELP}", param, ctx)


def _rule(text: str) -> Any:
    regex, found, what = text.rpartition("=")
    pattern, _, axes = what.partition("@")
    if not found:
        raise ValueError(f"{text!r} is not a rule")
    return _rules.Rule(regex, None if pattern == "dense" else nm.parse_pattern(pattern), axes or None)


def _rules_of_file(path: str) -> list[Any]:
    """The rules of a file, one in a line; empty lines and those that begin with '#' are for people."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise nm.FormatError(f"{path}: it is not a text file; {_RULE_HELP} in each line") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(_rule(line.strip()))
            except ValueError as error:
                raise click.UsageError(f"{path}, line {number}: {error}; {_RULE_HELP}") from None
    return found


_RULES = (
    click.option("--pattern", type=PatternType(), help="For every tensor whose axes are known."),
    click.option(
        "--rule",
        "rules",
        type=RuleType(),
        multiple=True,
        help="For tensors whose path (the name, with '/' for '.') holds the regex; the first that matches decides, "
        "before --pattern. 'regex=dense' leaves them dense. Axes are one letter per dimension: i contraction, o "
        "output, b batch; PyTorch's linear weight is oi. May be repeated.",
    ),
    click.option("--exclude", multiple=True, metavar="REGEX", help="Tensors to leave dense. May be repeated."),
    click.option("--rules", "rules_file", type=PATH, metavar="FILE", help="More rules, one in a line, after --rule."),
    click.option(
        "--partial",
        type=click.Choice(["skip", "pad", "error"]),
        default="skip",
        show_default=True,
        help="Tensors whose sizes m does not divide: leave them dense, hold at most n at the edges, or refuse.",
    ),
)


def with_rules(command: Callable) -> Callable:
    """The options that say which tensors get which pattern; the command gets them as `rules`, as the library takes
    them, or `None` without any."""

    @functools.wraps(command)
    def combined(*args, pattern, rules, exclude, rules_file, **rest):
        parsed = [*rules, *([] if rules_file is None else _rules_of_file(rules_file))]
        listed: Any = [*((regex, None) for regex in exclude), *(tuple(rule[:3]) for rule in parsed)]
        if listed and pattern is None and all(rule[1] is None for rule in listed):
            raise click.UsageError("these rules leave everything dense; give --pattern, or --rule 'regex=pattern'")
        if pattern is not None:
            listed = [*listed, pattern] if listed else pattern
        return command(*args, rules=listed if listed else None, **rest)

    for option in reversed(_RULES):
        combined = option(combined)
    return combined


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dense = click.option("--dense", type=PATH, help="The checkpoint before it was pruned, to compute what was retained.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def at_most(rules: Any) -> Any:
    """The same rules, with transposable patterns that keep at most n."""

    def relaxed(pattern: Any) -> Any:
        transposable = isinstance(pattern, nm.TransposableNM)
        return dataclasses.replace(pattern, at_most=True) if transposable else pattern

    patterns = [rule[1] if isinstance(rule, tuple) else rule for rule in _listed(rules)]
    if not any(isinstance(pattern, nm.TransposableNM) for pattern in patterns):
        raise click.UsageError("--at-most is for transposable patterns, like 4:8-T")
    if not isinstance(rules, list):
        return relaxed(rules)
    return [(r[0], relaxed(r[1]), *r[2:3]) if isinstance(r, tuple) else relaxed(r) for r in rules]


def _listed(rules: Any) -> Sequence[Any]:
    return rules if isinstance(rules, list) else [rules]
