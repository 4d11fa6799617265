"""What is printed: results to stdout, everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nm_jax._core.tables import printable

ITEM = "\n  "  # before each item of a list in an error
# Files that hold weights too.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


def echo(text: str = "") -> None:
    """Prints lines, without control characters."""
    click.echo("\n".join(printable(line) for line in text.split("\n")))


def print_json(table: dict[str, Any]) -> None:
    """Prints a table of plain values."""
    click.echo(json.dumps(table, indent=2, allow_nan=False))


def complain(message: str) -> None:
    """One line to stderr, and one for each item of a list."""
    lines = [printable(line) for line in message.split(ITEM)]
    print("nm-jax: " + ITEM.join(lines), file=sys.stderr)


@contextlib.contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[str, int], None]]:
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
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total, name="")
        yield lambda name, size: bar.update(task, advance=size, name=printable(name))


def summary(totals: Any, read: int, seconds: float | None = None) -> str:
    """The last lines of a command.

    Args:
      totals: those of a checkpoint, or a report with them.
      read: bytes of the tensors that were read.
      seconds: how long it took; of a report, its own times are taken.
    """
    report = None if hasattr(totals, "parameters") else totals
    totals = totals if report is None else report.totals
    share = totals.pruned / max(totals.parameters, 1)
    tensors = f"{totals.tensors} tensor{'' if totals.tensors == 1 else 's'}"
    size = of_bytes(read) if read == totals.nbytes else f"{of_bytes(read)} before, {of_bytes(totals.nbytes)} after"
    line = f"{tensors}, {totals.parameters:,} parameters, {100 * share:.1f} % of them pruned; {size}"
    if report is not None:
        seconds = sum(report.seconds.values())
    lines = [line if seconds is None else f"{line}; {seconds:.1f} s"]
    if report is not None and report.copied:
        weights = [name for name in report.copied if name.endswith(_WEIGHTS)]
        others = f"; weights among them are as they were: {', '.join(weights[:5])}" if weights else ""
        lines.append(f"{len(report.copied)} other file{'' if len(report.copied) == 1 else 's'} copied{others}")
    return "\n".join(lines)


def of_bytes(count: int) -> str:
    """A number of bytes, as people say it."""
    power = min(max((len(str(count)) - 1) // 3, 0), 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
