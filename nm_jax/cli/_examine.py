"""Going through the sparse tensors of a checkpoint, for `verify` and `report`."""

from collections.abc import Callable
from typing import Any

from nm_jax.cli._late import checkpoint
from nm_jax.cli._output import progress


def examine(
    file: str,
    rules: Any,
    partial: str,
    dense: str | None,
    quiet: bool = False,
    see: Callable[[Any], None] = lambda seen: None,
) -> Any:
    """The report on a checkpoint; `see` is shown each tensor."""
    examination = checkpoint.Examination(file, rules, partial, dense)
    reports = []
    with progress("reading", sum(tensor.nbytes for tensor in examination.sparse()), quiet) as advance:
        for seen in examination:
            reports.append(seen.report)
            see(seen)
            advance(seen.report.name, seen.weight.nbytes)
    return examination.report(reports)
