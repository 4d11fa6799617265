"""`nm-jax prune`."""

import dataclasses
import errno
import math
import os
import time
from typing import Any

import click

from nm_jax._core.tables import aligned, shape_text
from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import Late, checkpoint, nm
from nm_jax.cli._output import complain, echo, print_json, progress, summary

_rules = Late("nm_jax._core.rules")
_SOLVERS = {"exact": "Exact", "greedy": "Greedy", "flow": "MinCostFlow"}


@click.command("prune")
@click.argument("source", metavar="IN", type=options.PATH)
@click.argument("target", metavar="OUT", type=options.PATH)
@options.with_rules
@click.option("--solver", type=click.Choice(list(_SOLVERS)), help="For transposable patterns; exact by default.")
@click.option("--at-most", is_flag=True, help="Transposable patterns keep at most n, which can retain more.")
@click.option(
    "--scores",
    type=options.PATH,
    metavar="FILE",
    help="What masks keep the most of, instead of |w|: a safetensors file with the tensors' names, of scores or of the "
    "diagonals of Gram matrices of their inputs (nm.save_scores writes one).",
)
@click.option("--keep-mask", is_flag=True, help="Store a bit-packed mask beside each sparse tensor.")
@click.option("--packed", is_flag=True, help="Store values and positions: smaller, read by nm_jax only.")
@click.option(
    "--include",
    multiple=True,
    metavar="REGEX",
    help="Prune these too, which stay dense by default: output heads, routers. May be repeated.",
)
@click.option("--strict", is_flag=True, help="Stop if the axes of a tensor are not known.")
@click.option("--dry-run", is_flag=True, help="Say what would be pruned, and write nothing.")
@options.force
@options.quiet
@options.as_json
def command(
    source,
    target,
    rules,
    partial,
    at_most,
    solver,
    keep_mask,
    include,
    strict,
    dry_run,
    force,
    quiet,
    as_json,
    **more,
) -> int:
    """Write a pruned copy of checkpoint IN as OUT.

    OUT gets its name when it is complete; it must not exist. Of a folder, the other files are copied. Tensors keep
    their names, dtypes and shapes, so that every reader of IN reads OUT. Float32, bfloat16 and float16 are pruned,
    everything else is copied.
    """
    if rules is None:
        raise click.UsageError("say what to prune to: --pattern 2:4-T, or --rule 'regex=pattern'")
    rules = options.at_most(rules) if at_most else rules
    if dry_run:
        if os.path.lexists(target) and not force:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        start = time.perf_counter()
        before = nm.Checkpoint(source)
        leaves = before.resolve(rules, partial, include=include, strict=strict)
        _print_plan(before, leaves, time.perf_counter() - start, quiet, as_json)
        return exits.DONE
    read = sum(tensor.nbytes for tensor in nm.Checkpoint(source).tensors.values())
    with progress("pruning", read, quiet) as advance:
        report = nm.prune_checkpoint(
            source,
            target,
            rules,
            solver=None if solver is None else getattr(nm.solvers, _SOLVERS[solver])(),
            partial=partial,
            keep_masks=keep_mask,
            include=include,
            strict=strict,
            overwrite=force,
            progress=advance,
            **more,
        )
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        echo(f"{report}\n\nwrote {target}\n{summary(report, read)}")
        if not report.tensors:
            complain("nothing was pruned; the reasons are above, and --rule and --include ask for more")
    return exits.DONE


def _print_plan(before: Any, leaves: dict[str, Any], seconds: float, quiet: bool, as_json: bool) -> None:
    sparse = [leaf for leaf in leaves.values() if isinstance(leaf, _rules.SparseLeaf)]
    earlier = [name for name in before.records if not isinstance(leaves[name], _rules.SparseLeaf)]
    dense = list(checkpoint.dense_tensors(before, leaves))
    parameters = sum(math.prod(tensor.shape) for tensor in before.tensors.values())
    pruned = sum(math.prod(leaf.shape) * (1 - leaf.pattern.density) for leaf in sparse)
    pruned += sum(before.records[name].size - before.records[name].kept for name in earlier)
    nbytes = sum(tensor.nbytes for tensor in before.tensors.values())
    if as_json:
        planned = [
            {"name": x.path, "shape": list(x.shape), "axes": x.axes, "source": x.source, "pattern": str(x.pattern)}
            for x in sparse
        ]
        totals = checkpoint.Totals(len(before.tensors), parameters, round(pruned), nbytes)
        stays = [dataclasses.asdict(tensor) for tensor in dense]
        table = {"path": str(before.path), "totals": dataclasses.asdict(totals), "tensors": planned, "earlier": earlier}
        print_json({**table, "dense": stays})
        return
    if quiet:
        return
    rows = [
        {
            "tensor": x.path,
            "shape": shape_text(x.shape),
            "axes": x.axes,
            "becomes": str(x.pattern),
            "because": x.source,
        }
        for x in sparse
    ]
    for name in earlier:
        record = before.records[name]
        row = {"tensor": name, "shape": shape_text(record.shape), "axes": record.axes, "becomes": str(record.pattern)}
        rows.append({**row, "because": "an earlier run pruned it"})
    rows += [
        {"tensor": x.name, "shape": shape_text(x.shape), "becomes": "stays dense", "because": x.reason} for x in dense
    ]
    echo("\n".join(aligned(rows)))
    echo(f"\n{len(sparse)} tensors would be pruned, {len(dense)} stay dense; nothing was written")
    echo(summary(checkpoint.Totals(len(before.tensors), parameters, round(pruned), nbytes), nbytes, seconds))
