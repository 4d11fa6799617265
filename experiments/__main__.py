"""`python -m experiments` lists the experiments; `python -m experiments NAME` runs one."""

import importlib
import os
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import catalogue
from experiments.data.errors import DataError

# Before TensorStore and others are loaded: they take the log level from here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def listing() -> Table:
    """All experiments."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "shows", "of the paper", "time", "data needed"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for entry in catalogue.entries().values():
        table.add_row(entry.name, entry.shows, entry.paper, entry.time, entry.data)
    return table


def main(arguments: list[str]) -> int:
    """Lists, renders the documentation's tables, or runs; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(listing())
        console.print("python -m experiments NAME [--help]        python -m experiments report --check|--write")
        return 0
    name, *options = arguments
    if name == "report":
        return importlib.import_module("experiments.report").main(options)
    entry = catalogue.find(name)
    harness = importlib.import_module("experiments.harness")
    try:
        return harness.main(entry, importlib.import_module(entry.module).EXPERIMENT, options)
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
