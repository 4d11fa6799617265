"""`nm-jax`: its commands, and what becomes of their errors."""

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from nm_jax import __version__
from nm_jax.cli import _exits as exits
from nm_jax.cli._late import Late, nm
from nm_jax.cli._output import complain
from nm_jax.cli._signals import SAID, catch

# In the order in which they are listed.
COMMANDS = (
    "prune",
    "verify",
    "report",
    "ls",
    "unpack",
    "diversity",
    "completion",
)
_jax = Late("jax")
_HELP = """Prune, verify and look at safetensors checkpoints with N:M sparsity.

A checkpoint is a safetensors file, the index of a sharded one (*.safetensors.index.json), or a folder with one of
them. Patterns are 'n:m' (n kept of m), 'n:m-T' (transposable), 'n:m-S' (sequential) and 'US-0.5' (unstructured, with
the fraction of zeros).

\b
Exit codes: 0 done; 1 a tensor does not have its pattern; 2 wrong options or
rules; 3 a file is missing, damaged, in the way, or cannot be written;
130 interrupted; 141 nobody reads the output any more. Results go to stdout,
everything else to stderr.
"""


class _PipeClosed(Exception):
    """Whoever read the output has seen enough."""


class _Commands(click.Group):
    """Loads a command's own module when it is needed."""

    def list_commands(self, ctx):
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx, name):
        del ctx
        return importlib.import_module(f"nm_jax.cli.{name}").command if name in COMMANDS else None

    def invoke(self, ctx):
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # which click would turn into the exit code 1
            raise _PipeClosed from None


@click.group(
    cls=_Commands,
    help=_HELP,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nm-jax", message="%(prog)s %(version)s")
@click.pass_context
def app(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `nm-jax`.

    Args:
      arguments: those of the command line by default.

    Returns:
      The exit code (see `nm-jax --help`).
    """
    catch(ctrl_c=arguments is None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # names may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    code = _run(arguments)
    if code == exits.INTERRUPTED and arguments is None:
        # A thread may still look for a mask, which leaving would wait for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return app.main(arguments, prog_name="nm-jax", standalone_mode=False) or exits.DONE
    except (click.Abort, KeyboardInterrupt):
        return _fail(SAID, exits.INTERRUPTED)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "nm-jax"
        return _fail(f"{error.format_message()} (see {command} --help)", exits.USAGE)
    except _PipeClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.PIPE
    except OSError as error:
        return _fail(_explain(error), exits.FILES)
    except MemoryError:
        return _fail("out of memory: it takes a few times the largest tensor", exits.FILES)
    except (ValueError, RuntimeError) as error:
        return _of_the_library(error)


def _of_the_library(error: Exception) -> int:
    """Kept apart: what it asks for takes long to load."""
    if isinstance(error, nm.FormatError):
        return _fail(str(error), exits.FILES)
    if isinstance(error, ValueError):
        return _fail(str(error), exits.USAGE)
    if isinstance(error, _jax.errors.JaxRuntimeError):
        return _fail(f"the device failed: {str(error).splitlines()[0]}; try JAX_PLATFORMS=cpu", exits.FILES)
    raise error


def _fail(message: str, code: int) -> int:
    complain(message)
    return code


_WHAT_TO_DO = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another name, or remove it first",
    errno.EISDIR: "give the path of a file",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "write somewhere else",
    errno.ENOSPC: "free some space, or write somewhere else",
    errno.EDQUOT: "free some space, or write somewhere else",
    errno.EFBIG: "files may not be so large here; write somewhere else",
}


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    advice = _WHAT_TO_DO.get(error.errno or 0, "try again, or on another disk")
    return f"{where}{error.strerror or error}; {advice}"
