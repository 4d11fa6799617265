"""`nm-jax report`."""

import errno
import os

import click

from nm_jax.cli import _exits as exits
from nm_jax.cli import _options as options
from nm_jax.cli._examine import examine
from nm_jax.cli._late import Late
from nm_jax.cli._output import echo, print_json

_page = Late("nm_jax.cli._page")


@click.command("report")
@click.argument("file", metavar="FILE", type=options.PATH)
@click.option("-o", "--output", required=True, type=options.PATH, help="The page to write; it must not exist.")
@options.with_rules
@options.dense
@click.option("--picture", "pictures", multiple=True, metavar="REGEX", help="Tensors to show; by default the first 3.")
@options.force
@options.quiet
@options.as_json
def command(file, output, rules, partial, dense, pictures, force, quiet, as_json) -> int:
    """Write one HTML page that shows what the tensors of checkpoint FILE are.

    The page is one file that needs no network: a table of the tensors, the magnitude that they retained, group
    violations, histograms, and pictures of masks. The exit code is that of `verify`.
    """
    page = _page.Page(pictures)
    if os.path.lexists(output) and not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), output)
    found = examine(file, rules, partial, dense, quiet, page.see)
    _page.write_page(output, page.render(found), force)
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        echo(f"wrote {output}")
    return exits.DONE if found.ok else exits.VIOLATED
