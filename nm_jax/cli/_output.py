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


def echo(text: str = "") -> None:
    """Prints lines, without control characters."""
    click.echo("\n".join(printable(line) for line in text.split("\n")))


def print_json(table: dict[str, Any]) -> None:
    """Prints a table of plain values."""
    click.echo(json.dumps(table, indent=2, allow_nan=False))


def complain(message: str) -> None:
    """One line to stderr."""
    print(f"nm-jax: {printable(message)}", file=sys.stderr)


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


def of_bytes(count: float) -> str:
    """A number of bytes, as people say it."""
    power = min(max((len(str(int(count))) - 1) // 3, 0), 4)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
