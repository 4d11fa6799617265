"""`nm-jax ls`."""

import click

from nm_jax._core.tables import aligned, shape_text
from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import checkpoint, nm
from nm_jax.cli._output import echo, of_bytes, print_json, summary


@click.command("ls")
@click.argument("file", metavar="FILE", type=options.PATH)
@options.as_json
def command(file, as_json) -> int:
    """List the tensors of checkpoint FILE, and what it records of them.

    Only headers are read; `verify` looks at the tensors.
    """
    found = nm.Checkpoint(file)
    tensors = found.tensors.values()
    if as_json:
        print_json({"path": file, "tensors": [_plain(tensor) for tensor in tensors]})
        return exits.DONE
    rows = []
    for tensor in tensors:
        record = tensor.record
        row = {"tensor": tensor.name, "dtype": tensor.dtype, "shape": shape_text(tensor.shape)}
        row |= {"bytes": of_bytes(tensor.nbytes), "pattern": "", "axes": "", "stored": ""}
        if record is not None:
            row |= {"pattern": str(record.pattern), "axes": record.axes, "stored": record.layout}
        rows.append({**row, "because": tensor.reason})
    echo("\n".join(aligned(rows)))
    echo()
    stored = sum(tensor.nbytes for tensor in tensors)
    echo(summary(checkpoint.Totals.of(found, found.records.values(), stored), stored))
    return exits.DONE


def _plain(tensor):
    record = None if tensor.record is None else tensor.record.to_json()
    plain = {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "nbytes": tensor.nbytes}
    return {**plain, "record": record, "reason": tensor.reason}
