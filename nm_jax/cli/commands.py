"""The commands of `nm-jax`: options in, tables or JSON out, and the exit codes that scripts rely on."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
import jax
from click.shell_completion import get_completion_class
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nm_jax._core.patterns import Pattern, TransposableNM, mask_diversity, parse_pattern
from nm_jax._core.rules import Rule, Rules, SparseLeaf
from nm_jax.checkpoint import Checkpoint, CheckpointReport, Examination, FormatError, prune_checkpoint
from nm_jax.checkpoint.reports import dense_tensors
from nm_jax.cli.page import Page, write_page
from nm_jax.solvers import Exact, Greedy, MinCostFlow

_VIOLATED, _USAGE, _FILES, _INTERRUPTED, _PIPE = 1, 2, 3, 130, 141
_SOLVERS = {"exact": Exact(), "greedy": Greedy(), "flow": MinCostFlow()}
_LONGEST_NUMBER = 4000  # digits of a count that are printed
_HELP = """Prune, verify and look at safetensors checkpoints with N:M sparsity.

A checkpoint is a safetensors file, the index of a sharded one (*.safetensors.index.json), or a folder with one of
them. Patterns are 'n:m' (n kept of m), 'n:m-T' (transposable), 'n:m-S' (sequential) and 'US-0.5' (unstructured, with
the fraction of zeros).

\b
Exit codes: 0 done; 1 a tensor does not have its pattern; 2 wrong options or
rules; 3 a file is missing, damaged, in the way, or cannot be written;
130 interrupted. Results go to stdout, everything else to stderr.
"""


class _PatternType(click.ParamType):
    name = "pattern"

    def convert(self, value, param, ctx):
        try:
            return parse_pattern(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _RuleType(click.ParamType):
    name = "regex=pattern[@axes]"

    def convert(self, value, param, ctx):
        regex, found, what = value.rpartition("=")
        pattern, _, axes = what.partition("@")
        try:
            if not found:
                raise ValueError(f"{value!r} is not a rule")
            return Rule(regex, None if pattern == "dense" else parse_pattern(pattern), axes or None)
        except ValueError as error:
            self.fail(f"{error}; write 'regex=pattern', 'regex=pattern@axes' or 'regex=dense'", param, ctx)


class _ShapeType(click.ParamType):
    name = "RxC"

    def convert(self, value, param, ctx):
        sizes = value.lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and len(size) < 10 for size in sizes):
            self.fail(f"{value!r} is not a shape; write contraction x output, like 8x8", param, ctx)
        return tuple(map(int, sizes))


_PATH = click.Path(path_type=str)
_rules_options = [
    click.option("--pattern", type=_PatternType(), help="For every tensor whose name tells its axes."),
    click.option(
        "--rule",
        "rules",
        type=_RuleType(),
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
]
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _with_rules(command):
    for option in reversed(_rules_options):
        command = option(command)
    return command


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nm_jax", prog_name="nm-jax", message="%(prog)s %(version)s")
def app() -> None:
    pass


@app.command()
@click.argument("source", metavar="IN", type=_PATH)
@click.argument("target", metavar="OUT", type=_PATH)
@_with_rules
@click.option("--solver", type=click.Choice(list(_SOLVERS)), help="For transposable patterns; exact by default.")
@click.option("--at-most", is_flag=True, help="Transposable patterns keep at most n, which can retain more.")
@click.option("--keep-mask", is_flag=True, help="Store a bit-packed mask beside each sparse tensor.")
@click.option("--packed", is_flag=True, help="Store values and positions: smaller, read by nm_jax only.")
@click.option("--dry-run", is_flag=True, help="Say what would be pruned, and write nothing.")
@_json_option
def prune(source, target, pattern, rules, partial, solver, at_most, keep_mask, packed, dry_run, as_json) -> int:
    """Write a pruned copy of checkpoint IN as OUT.

    OUT gets its name when it is complete; it must not exist. Tensors keep their names, dtypes and shapes, so that
    every reader of IN reads OUT. Float32, bfloat16 and float16 are pruned, everything else is copied.
    """
    chosen = _rules(pattern, rules, at_most)
    if chosen is None:
        raise click.UsageError("say what to prune to: --pattern 2:4-T, or --rule 'regex=pattern'")
    if dry_run:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        _print_plan(source, chosen, partial, as_json)
        return 0
    with Checkpoint(source) as checkpoint:
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    with _progress("pruning", total) as advance:
        report = prune_checkpoint(
            source,
            target,
            chosen,
            solver=_SOLVERS.get(solver),
            partial=partial,
            packed=packed,
            keep_masks=keep_mask,
            progress=advance,
        )
    if as_json:
        _print_json(report.to_json())
    else:
        seconds = sum(report.seconds.values())
        click.echo(f"{report}\n\nwrote {target}: {total / 1e6:.1f} MB in {seconds:.1f} s")
    return 0


def _print_plan(source: str, rules: Rules, partial: str, as_json: bool) -> None:
    with Checkpoint(source) as checkpoint:
        leaves = checkpoint.resolve(rules, partial)
        sparse = [leaf for leaf in leaves.values() if isinstance(leaf, SparseLeaf)]
        dense = list(dense_tensors(checkpoint, leaves))
    if as_json:
        planned = [{"name": x.path, "shape": list(x.shape), "axes": x.axes, "pattern": str(x.pattern)} for x in sparse]
        _print_json({"path": source, "tensors": planned, "dense": [dataclasses.asdict(tensor) for tensor in dense]})
        return
    for leaf in sparse:
        click.echo(f"{leaf.path}  {'x'.join(map(str, leaf.shape))}  {leaf.axes}  {leaf.pattern}")
    for tensor in dense:
        click.echo(f"{tensor.name}  {'x'.join(map(str, tensor.shape))}  stays dense: {tensor.reason}")
    click.echo(f"\n{len(sparse)} tensors would be pruned, {len(dense)} stay dense; nothing was written")


@app.command()
@click.argument("file", metavar="FILE", type=_PATH)
@_with_rules
@click.option("--dense", type=_PATH, help="The checkpoint before it was pruned, to compute the retained magnitude.")
@_json_option
def verify(file, pattern, rules, partial, dense, as_json) -> int:
    """Check that the tensors of checkpoint FILE have their pattern.

    The pattern is the one that FILE records, unless --pattern or --rule say another. A transposable pattern is checked
    along both axes. The exit code is 1 if any tensor breaks its pattern.
    """
    report = _examine(file, _rules(pattern, rules), partial, dense, None)
    if as_json:
        _print_json(report.to_json())
    else:
        click.echo(str(report))
    return 0 if report.ok else _VIOLATED


@app.command()
@click.argument("file", metavar="FILE", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The page to write; it must not exist.")
@_with_rules
@click.option("--dense", type=_PATH, help="The checkpoint before it was pruned, to compute the retained magnitude.")
@click.option("--picture", "pictures", multiple=True, metavar="REGEX", help="Tensors to show; by default the first 3.")
@_json_option
def report(file, output, pattern, rules, partial, dense, pictures, as_json) -> int:
    """Write one HTML page that shows what the tensors of checkpoint FILE are.

    The page is one file that needs no network: a table of the tensors, the magnitude that they retained, group
    violations, histograms, and pictures of masks. The exit code is that of `verify`.
    """
    page = Page(pictures)
    if os.path.lexists(output):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), output)
    found = _examine(file, _rules(pattern, rules), partial, dense, page)
    write_page(output, page.render(found))
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(f"wrote {output}")
    return 0 if found.ok else _VIOLATED


def _examine(file: str, rules: Rules | None, partial: str, dense: str | None, page: Page | None) -> CheckpointReport:
    with Examination(file, rules, partial, dense) as examination:
        reports = []
        with _progress("reading", sum(tensor.nbytes for tensor in examination.sparse())) as advance:
            for seen in examination:
                reports.append(seen.report)
                if page is not None:
                    page.see(seen)
                advance(seen.report.name, seen.weight.nbytes)
        return examination.report(reports)


@app.command()
@click.argument("pattern", type=_PatternType())
@click.option("--shape", type=_ShapeType(), required=True, help="Contraction x output, like 8x8.")
@_json_option
def diversity(pattern, shape, as_json) -> int:
    """Count the masks that PATTERN allows on a matrix (Section 3 of the paper).

    The paper's Eq. 2 over-counts transposable masks; both counts are given.
    """
    exact = mask_diversity(pattern, shape, exact=True)
    at_most = isinstance(pattern, TransposableNM) and pattern.at_most
    formula = None if at_most else mask_diversity(pattern, shape)
    if as_json:
        counts = {"masks": _count_json(exact), "eq2": None if formula is None else _count_json(formula)}
        _print_json({"pattern": str(pattern), "shape": list(shape), **counts})
    else:
        click.echo(f"{pattern} on {shape[0]}x{shape[1]}: {_count(exact)} masks")
        if formula is not None and formula != exact:
            click.echo(f"Eq. 2 of the paper, which over-counts: {_count(formula)}")
    return 0


def _count_json(count: int) -> dict[str, Any]:
    """A count of any size: its digits where they are not too many, and its logarithm."""
    log = math.log10(count)
    return {"count": str(count) if log < _LONGEST_NUMBER else None, "log10": round(log, 6)}


def _count(count: int) -> str:
    log = math.log10(count)
    approximate = f"{10 ** (log % 1):.2f}e{int(log)}"
    return f"{count:,} ({approximate})" if log < 30 else approximate


@app.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell) -> int:
    """Print the script that completes nm-jax in a shell.

    \b
    bash: eval "$(nm-jax completion bash)"   in ~/.bashrc
    zsh:  eval "$(nm-jax completion zsh)"    in ~/.zshrc
    fish: nm-jax completion fish > ~/.config/fish/completions/nm-jax.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(app, {}, "nm-jax", "_NM_JAX_COMPLETE").source())
    return 0


def _rules(pattern: Pattern | None, rules: Sequence[Rule], at_most: bool = False) -> Rules | None:
    """Rules as the library takes them; `None` when there are none."""
    patterns = [*(rule.pattern for rule in rules), pattern]
    if at_most and not any(isinstance(p, TransposableNM) for p in patterns):
        raise click.UsageError("--at-most is for transposable patterns, like 4:8-T")

    def relaxed(p: Pattern | None) -> Pattern | None:
        return dataclasses.replace(p, at_most=True) if at_most and isinstance(p, TransposableNM) else p

    listed: list[Any] = [(rule.regex, relaxed(rule.pattern), rule.axes) for rule in rules]
    last = relaxed(pattern)
    if last is None:
        return listed or None
    return [*listed, last] if listed else last


# ------------------------------------------------------------------------------------------------------------- output


def _print_json(table: dict[str, Any]) -> None:
    click.echo(json.dumps(table, indent=2, allow_nan=False))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    """A bar on a terminal; silent elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, name="")
        yield lambda name, size: progress.update(task, advance=size, name=_printable(name))


def _printable(text: str) -> str:
    """One line without control characters: names come from files."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `nm-jax`.

    Args:
      arguments: those of the command line by default.

    Returns:
      The exit code (see `nm-jax --help`).
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    try:
        return app.main(arguments, prog_name="nm-jax", standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted, and nothing was written", _INTERRUPTED)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "nm-jax"
        return _fail(f"{error.format_message()} (see {command} --help)", _USAGE)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE
    except OSError as error:
        return _fail(_explain(error), _FILES)
    except FormatError as error:
        return _fail(str(error), _FILES)
    except MemoryError:
        return _fail("out of memory: it takes a few times the largest tensor", _FILES)
    except jax.errors.JaxRuntimeError as error:
        return _fail(f"the device failed: {str(error).splitlines()[0]}; try JAX_PLATFORMS=cpu", _FILES)
    except ValueError as error:
        return _fail(str(error), _USAGE)


def _stop(number, frame):
    """Ends as Ctrl-C does: by an exception, so that half-written files are removed."""
    del number, frame
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"nm-jax: {_printable(message)}", file=sys.stderr)
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
