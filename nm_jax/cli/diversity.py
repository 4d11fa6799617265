"""`nm-jax diversity`."""

import math
from typing import Any

import click

from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import nm
from nm_jax.cli._output import echo, print_json

_LONGEST_NUMBER = 4000  # digits of a count that are printed


class _ShapeType(click.ParamType):
    name = "RxC"

    def convert(self, value, param, ctx):
        sizes = value.lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and len(size) < 10 for size in sizes):
            self.fail(f"{value!r} is not a shape; write contraction x output, like 8x8", param, ctx)
        return tuple(map(int, sizes))


@click.command("diversity")
@click.argument("pattern", type=options.PatternType())
@click.option("--shape", type=_ShapeType(), required=True, help="Contraction x output, like 8x8.")
@options.as_json
def command(pattern, shape, as_json) -> int:
    """Count the masks that PATTERN allows on a matrix (Section 3 of the paper).

    The paper's Eq. 2 over-counts transposable masks; both counts are given.
    """
    exact = nm.mask_diversity(pattern, shape, exact=True)
    formula = None if pattern.relaxed == pattern else nm.mask_diversity(pattern, shape)
    if as_json:
        counts = {"masks": _count_json(exact), "eq2": None if formula is None else _count_json(formula)}
        print_json({"pattern": str(pattern), "shape": list(shape), **counts})
    else:
        echo(f"{pattern} on {shape[0]}x{shape[1]}: {_count(exact)} masks")
        if formula is not None and formula != exact:
            echo(f"Eq. 2 of the paper, which over-counts: {_count(formula)}")
    return exits.DONE


def _count_json(count: int) -> dict[str, Any]:
    """A count of any size: its digits where they are not too many, and its logarithm."""
    log = math.log10(count)
    return {"count": str(count) if log < _LONGEST_NUMBER else None, "log10": round(log, 6)}


def _count(count: int) -> str:
    log = math.log10(count)
    approximate = f"{10 ** (log % 1):.2f}e{int(log)}"
    return f"{count:,} ({approximate})" if log < 30 else approximate
