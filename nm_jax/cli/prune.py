"""`nm-jax prune`."""

import dataclasses
import errno
import os
from typing import Any

import click

from nm_jax._core.tables import printable, shape_text
from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import Late, checkpoint, nm
from nm_jax.cli._output import echo, print_json, progress

_rules = Late("nm_jax._core.rules")
_SOLVERS = {"exact": "Exact", "greedy": "Greedy", "flow": "MinCostFlow"}


@click.command("prune")
@click.argument("source", metavar="IN", type=options.PATH)
@click.argument("target", metavar="OUT", type=options.PATH)
@options.with_rules
@click.option("--solver", type=click.Choice(list(_SOLVERS)), help="For transposable patterns; exact by default.")
@click.option("--at-most", is_flag=True, help="Transposable patterns keep at most n, which can retain more.")
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
@options.as_json
def command(
    source,
    target,
    pattern,
    rules,
    partial,
    solver,
    at_most,
    keep_mask,
    packed,
    include,
    strict,
    dry_run,
    as_json,
) -> int:
    """Write a pruned copy of checkpoint IN as OUT.

    OUT gets its name when it is complete; it must not exist. Tensors keep their names, dtypes and shapes, so that
    every reader of IN reads OUT. Float32, bfloat16 and float16 are pruned, everything else is copied.
    """
    chosen = options.library_rules(pattern, rules, at_most)
    if chosen is None:
        raise click.UsageError("say what to prune to: --pattern 2:4-T, or --rule 'regex=pattern'")
    if dry_run:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        _print_plan(source, chosen, partial, include, strict, as_json)
        return exits.DONE
    with nm.Checkpoint(source) as before:
        total = sum(tensor.nbytes for tensor in before.tensors.values())
    with progress("pruning", total) as advance:
        report = nm.prune_checkpoint(
            source,
            target,
            chosen,
            solver=None if solver is None else getattr(nm.solvers, _SOLVERS[solver])(),
            partial=partial,
            packed=packed,
            keep_masks=keep_mask,
            include=include,
            strict=strict,
            progress=advance,
        )
    if as_json:
        print_json(report.to_json())
    else:
        seconds = sum(report.seconds.values())
        echo(f"{report}\n\nwrote {target}: {total / 1e6:.1f} MB in {seconds:.1f} s")
    return exits.DONE


def _print_plan(source: str, rules: Any, partial: str, include: tuple[str, ...], strict: bool, as_json: bool) -> None:
    with nm.Checkpoint(source) as before:
        leaves = before.resolve(rules, partial, include=include, strict=strict)
        sparse = [leaf for leaf in leaves.values() if isinstance(leaf, _rules.SparseLeaf)]
        dense = list(checkpoint.dense_tensors(before, leaves))
    if as_json:
        planned = [
            {"name": x.path, "shape": list(x.shape), "axes": x.axes, "source": x.source, "pattern": str(x.pattern)}
            for x in sparse
        ]
        print_json({"path": source, "tensors": planned, "dense": [dataclasses.asdict(tensor) for tensor in dense]})
        return
    for leaf in sparse:
        echo(f"{printable(leaf.path)}  {shape_text(leaf.shape)}  {leaf.axes}  {leaf.pattern}  {leaf.source}")
    for tensor in dense:
        echo(f"{printable(tensor.name)}  {shape_text(tensor.shape)}  stays dense: {tensor.reason}")
    echo(f"\n{len(sparse)} tensors would be pruned, {len(dense)} stay dense; nothing was written")
