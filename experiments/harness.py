"""What every experiment shares: options, progress, results as JSON, tables and figures made of them.

An experiment says how to measure, and how to render what was measured; see `experiments/__init__.py`. What is printed,
drawn and put into the documentation is made from the result alone, so that `--report` shows it again at any time.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from experiments.catalogue import ROOT, Entry, find

RESULTS = ROOT / "results"
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}  # of figures
PACKAGES = ("jax", "numpy", "scipy", "optax", "flax", "torch")


# ------------------------------------------------------------------------------------------------ what an experiment is


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, for the terminal and for the documentation.

    Attributes:
      name: by which the documentation asks for it.
      header: the columns.
      rows: the cells; numbers are written as they are, `None` is empty.
      title: what it shows.
      notes: what to know when reading it.
    """

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: str = ""

    def markdown(self) -> str:
        """For the documentation: the table alone."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(_cell(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

    def rich(self) -> RichTable:
        """For the terminal."""
        caption = self.notes or None
        table = RichTable(title=self.title or self.name, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
        table.title_justify, table.caption_justify = "left", "left"
        rows = [[escape(re.sub("[`*]", "", _cell(cell))) for cell in row] for row in self.rows]
        for k, column in enumerate(self.header):
            numbers = k > 0 and all(re.match(r"[-+\d.]|$", row[k]) for row in rows)
            table.add_column(column, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*row)
        return table


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


@dataclasses.dataclass
class Run:
    """What `measure` is given.

    Attributes:
      args: all options.
      quick: everything, but tiny.
      part: which of the experiment's parts; "" if it has none.
      console: to print on.
      path: where the record will be written.
      command: how it was started.
      begun: when, by `time.perf_counter`.
    """

    args: argparse.Namespace
    part: str
    console: Console
    path: Path
    command: str
    begun: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def quick(self) -> bool:
        """Whether to do everything, but tiny."""
        return self.args.quick

    def record(self, result: dict) -> dict:
        """Writes the record of the result, or of what there is of it so far; returns the result as it was written."""
        record = {
            "command": self.command,
            "commit": _commit(),
            "device": device_name(),
            "cores": core_count(),
            "versions": _versions(),
            "quick": self.quick,
            "seconds": round(time.perf_counter() - self.begun, 1),
            "result": result,
        }
        text = json.dumps(record, indent=1)
        write_text(self.path, text + "\n")
        return json.loads(text)["result"]

    def keep(self, result: dict) -> None:
        """Writes what there is of the result so far beside where it will be, for a run that is cut off."""
        write_text(self.path.with_suffix(".part"), json.dumps(result, indent=1) + "\n")

    def progress(self, *columns: Any) -> Progress:
        """A display of progress bars, with further columns; use it in a `with` statement."""
        fixed = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        return Progress(*fixed, *columns, *times, console=self.console)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How to measure and how to render.

    Attributes:
      measure: makes the result, which JSON can hold; `None`: there is nothing to measure, see `sources`.
      tables: the tables of a result.
      draw: the figure of a result, if it has one.
      problems: what is wrong with a result, in words; anything makes the exit status 1.
      options: adds options of its own.
      parts: what can be measured one by one, and has a result each.
      presets: how much can be measured, by name, each with a result of its own; the first one unless told otherwise.
      sources: names of results that are rendered together: the result is then theirs by name, of those that are there.
      folder: where results go unless told otherwise.
    """

    measure: Callable[[Run], dict] | None
    tables: Callable[[dict], Iterable[Table]]
    draw: Callable[[dict], Figure | None] | None = None
    problems: Callable[[dict], list[str]] = lambda result: []
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    parts: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    folder: Path = RESULTS


# ----------------------------------------------------------------------------------------------------------- the device


def device_name() -> str:
    """The default device: `cpu x86_64`, `gpu NVIDIA H100`."""
    device = jax.devices()[0]
    return f"{device.platform} {platform.machine() if device.platform == 'cpu' else device.device_kind}"


def device_file() -> str:
    """The same as the name of a file, without a suffix: `cpu-x86-64`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower())


def core_count() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _commit() -> str | None:
    """The commit that is checked out, with a `+` if files have changed since; `None` outside of a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed.stdout)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


# -------------------------------------------------------------------------------------------------------------- results


def write_text(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it finds the old text or the new, whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def results(name: str, folder: Path = RESULTS) -> dict[str, dict]:
    """The results of an experiment, or of a part of one, by device: whole records, as they were written."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / name).glob("*.json"))}


def rendered(entry: Entry, experiment: Experiment, part: str, folder: Path) -> dict[str, dict]:
    """What the experiment makes tables of, by device."""
    if not experiment.sources:
        return {device: record["result"] for device, record in results(f"{entry.name}/{part}", folder).items()}
    found: dict[str, dict] = {}
    for source in experiment.sources:
        for device, record in results(source, folder).items():
            found.setdefault(device, {})[source] = record["result"]
    return found


def table(name: str, experiment: str, device: str, folder: Path = RESULTS) -> Table:
    """One table of the results of an experiment (`bench/gram`) or of a part of one (`adaprune/from_dense/minilm`).

    Raises:
      SystemExit: there is no such table, or no such result.
    """
    entry, part = _split(experiment)
    known = importlib.import_module(entry.module).EXPERIMENT
    found = rendered(entry, known, part, folder)
    if device not in found:
        raise SystemExit(f"{experiment} has no result of {device}; there are {', '.join(found) or 'none'}")
    by_name = {table.name: table for table in known.tables(found[device])}
    if name not in by_name:
        raise SystemExit(f"{experiment} has no table {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


def _split(name: str) -> tuple[Entry, str]:
    """The experiment, and the part, of the name of a result."""
    parent = name.rsplit("/", 1)[0]
    if not (ROOT / f"{name}.py").exists() and (ROOT / f"{parent}.py").exists():
        return find(parent), name.rsplit("/", 1)[1]
    return find(name), ""


# -------------------------------------------------------------------------------------------------------------- running


def main(entry: Entry, experiment: Experiment, arguments: Sequence[str]) -> int:
    """Measures what was asked for, or renders what is there; returns the exit status."""
    args = _parser(entry, experiment).parse_args(arguments)
    if args.device:
        jax.config.update("jax_platforms", args.device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    folder = args.out or (experiment.folder / "quick" if args.quick and not experiment.sources else experiment.folder)
    parts = args.parts.split(",") if experiment.parts else [args.preset] if experiment.presets else [""]
    if unknown := set(parts) - {*experiment.parts, *experiment.presets, ""}:
        kind, known = ("parts", experiment.parts) if experiment.parts else ("preset", experiment.presets)
        raise SystemExit(f"unknown {kind} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    problems = []
    for part in parts:
        if experiment.measure is not None and not args.report:
            command = " ".join(["python", "-m", "experiments", entry.name, *arguments])
            path = folder / entry.name / part / f"{device_file()}.json"
            result = _measure(experiment.measure, Run(args, part, console, path, command))
            shown = {path.stem: result}
        else:
            shown = rendered(entry, experiment, part, folder)
            if not shown:
                wanted = experiment.sources or [f"{entry.name}/{part}".strip("/")]
                console.print(f"no results of {', '.join(wanted)} in {folder}")
        for device, result in shown.items():
            problems += _show(console, experiment, result, folder / entry.name / part / f"{device}.png")
    for problem in problems:
        console.print(f"[bold red]{problem}[/bold red]")
    return 1 if problems else 0


def _parser(entry: Entry, experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m experiments {entry.name}", description=entry.shows)
    parser.epilog = f"The paper's: {entry.paper}. Time: {entry.time}. Data needed: {entry.data}."
    parser.add_argument("--out", type=Path, help="folder of the results, instead of the usual one")
    parser.add_argument("--device", help="platform to run on: cpu, gpu, tpu")
    parser.add_argument("--report", action="store_true", help="measure nothing: show what has been measured")
    parser.add_argument("--quick", action="store_true", help="everything, but tiny; to another folder")
    if experiment.parts:
        every = ",".join(experiment.parts)
        parser.add_argument("--parts", default=every, help=f"comma-separated, of {every}; all unless given")
    if experiment.presets:
        first, known = experiment.presets[0], ", ".join(experiment.presets)
        parser.add_argument("--preset", default=first, help=f"how much, of {known}; {first} unless given")
    experiment.options(parser)
    return parser


def _measure(measure: Callable[[Run], dict], run: Run) -> dict:
    """Measures and writes the record."""
    result = run.record(measure(run))
    run.path.with_suffix(".part").unlink(missing_ok=True)
    run.console.print(f"wrote {run.path}", highlight=False, soft_wrap=True)
    return result


def _show(console: Console, experiment: Experiment, result: dict, picture: Path) -> list[str]:
    """Tables, figure, and what is wrong."""
    for table in experiment.tables(result):
        console.print(table.rich())
    if experiment.draw is not None:
        with matplotlib.rc_context(STYLE):
            if (figure := experiment.draw(result)) is not None:
                picture.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(picture, dpi=130, facecolor="white")
                console.print(f"drew {picture}", highlight=False, soft_wrap=True)
    return experiment.problems(result)
