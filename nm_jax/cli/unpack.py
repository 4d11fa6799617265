"""`nm-jax unpack`."""

import click

from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._late import checkpoint, nm
from nm_jax.cli._output import echo, print_json, progress, summary


@click.command("unpack")
@click.argument("source", metavar="IN", type=options.PATH)
@click.argument("target", metavar="OUT", type=options.PATH)
@options.force
@options.quiet
@options.as_json
def command(source, target, force, quiet, as_json) -> int:
    """Write the packed checkpoint IN as OUT, with zeros, for every reader.

    Values, positions and masks that --packed and --keep-mask stored become plain tensors again; their patterns stay
    recorded.
    """
    read = sum(tensor.nbytes for tensor in nm.Checkpoint(source).tensors.values())
    with progress("unpacking", read, quiet) as advance:
        report = checkpoint.unpack_checkpoint(source, target, overwrite=force, progress=advance)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        echo(f"wrote {target}\n{summary(report, read)}")
    return exits.DONE
