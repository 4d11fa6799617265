"""What experiments there are, read from their files without importing them."""

import ast
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
FIELDS = ("Paper", "Time", "Data")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One experiment.

    Attributes:
      name: path of its file, without the suffix.
      shows: first line of its docstring.
      paper: the paper's figure or table.
      time: how long it takes.
      data: what it needs from outside; "none": nothing.
    """

    name: str
    shows: str
    paper: str
    time: str
    data: str

    @property
    def module(self) -> str:
        """What to import."""
        return "experiments." + self.name.replace("/", ".")


def entries() -> dict[str, Entry]:
    """All experiments by name: the files here that have an `EXPERIMENT`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if "EXPERIMENT" in _assigned(tree):
            name = path.relative_to(ROOT).with_suffix("").as_posix()
            found[name] = _entry(name, ast.get_docstring(tree) or "")
    return found


def find(name: str) -> Entry:
    """The experiment of that name, which may be written as a path or as a module.

    Raises:
      SystemExit: there is none; with those that are nearest.
    """
    known = entries()
    wanted = name.removesuffix(".py").removeprefix("experiments/").removeprefix("experiments.").replace(".", "/")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, cutoff=0.4) or list(known)
    raise SystemExit(f"no experiment {name!r}; did you mean {', '.join(near)}? python -m experiments lists them")


def _assigned(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _entry(name: str, docstring: str) -> Entry:
    fields = dict(line.split(": ", 1) for line in docstring.splitlines() if line.startswith(FIELDS) and ": " in line)
    if missing := [field for field in FIELDS if field not in fields]:
        raise SystemExit(f"{name}: its docstring says nothing of {', '.join(missing)}")
    return Entry(name, docstring.splitlines()[0], *(fields[field] for field in FIELDS))
