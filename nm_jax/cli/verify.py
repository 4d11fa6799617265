"""`nm-jax verify`."""

import click

from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._examine import examine
from nm_jax.cli._output import echo, print_json, summary


@click.command("verify")
@click.argument("file", metavar="FILE", type=options.PATH)
@options.with_rules
@options.dense
@options.quiet
@options.as_json
def command(file, rules, partial, dense, quiet, as_json) -> int:
    """Check that the tensors of checkpoint FILE have their pattern.

    The pattern is the one that FILE records, unless --pattern or --rule say another. A transposable pattern is checked
    along both axes. The exit code is 1 if any tensor breaks its pattern.
    """
    report = examine(file, rules, partial, dense, quiet)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        echo(f"{report}\n\n{summary(report.totals, report.totals.nbytes)}")
    return exits.DONE if report.ok else exits.VIOLATED
