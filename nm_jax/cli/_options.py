"""Options that several commands have, and their types."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from nm_jax.cli._late import Late, nm

_rules = Late("nm_jax._core.rules")

PATH = click.Path(path_type=str)


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
        regex, found, what = value.rpartition("=")
        pattern, _, axes = what.partition("@")
        try:
            if not found:
                raise ValueError(f"{value!r} is not a rule")
            return _rules.Rule(regex, None if pattern == "dense" else nm.parse_pattern(pattern), axes or None)
        except ValueError as error:
            self.fail(f"{error}; write 'regex=pattern', 'regex=pattern@axes' or 'regex=dense'", param, ctx)


_RULES = (
    click.option("--pattern", type=PatternType(), help="For every tensor whose name tells its axes."),
    click.option(
        "--rule",
        "rules",
        type=RuleType(),
        multiple=True,
        help="For tensors whose path (the name, with '/' for '.') holds the regex; the first that matches decides, "
        "before --pattern. 'regex=dense' leaves them dense. Axes are one letter per dimension: i contraction, o "
        "output, b batch; PyTorch's linear weight is oi. May be repeated.",
    ),
    click.option(
        "--partial",
        type=click.Choice(["skip", "pad", "error"]),
        default="skip",
        show_default=True,
        help="Tensors whose sizes m does not divide: leave them dense, hold at most n at the edges, or refuse.",
    ),
)


def with_rules(command: Callable) -> Callable:
    """The options that say which tensors get which pattern."""
    for option in reversed(_RULES):
        command = option(command)
    return command


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dense = click.option("--dense", type=PATH, help="The checkpoint before it was pruned, to compute what was retained.")


def library_rules(pattern: Any, rules: Sequence[Any], at_most: bool = False) -> Any:
    """Rules as the library takes them; `None` when there are none."""
    patterns = [*(rule.pattern for rule in rules), pattern]
    if at_most and not any(p and p.relaxed for p in patterns):
        raise click.UsageError("--at-most is for transposable patterns, like 4:8-T")

    def relaxed(p: Any) -> Any:
        return p.relaxed or p if at_most and p else p

    listed: list[Any] = [(rule.regex, relaxed(rule.pattern), rule.axes) for rule in rules]
    last = relaxed(pattern)
    if last is None:
        return listed or None
    return [*listed, last] if listed else last
