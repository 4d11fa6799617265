"""The tables of the documentation, rendered from the results: `python -m experiments report --check` or `--write`.

A table stands in a page between two comments, and is what the results say:

    <!-- table: speed of bench/solvers on cpu-x86-64 -->
    <!-- end -->
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.catalogue import ROOT
from experiments.harness import table, write_text

MARKED = re.compile(r"(<!-- table: (\S+) of (\S+) on (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and the documentation."""
    return [ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").rglob("*.md"))]


def render(text: str) -> str:
    """A page with its tables as they should be.

    Raises:
      SystemExit: there is no such table, or a comment has no end.
    """
    begun = [line for line in text.splitlines() if line.startswith("<!-- table:")]
    found = [match[1].strip() for match in MARKED.finditer(text)]
    if begun != found:
        raise SystemExit(f"no table in the form of experiments/report.py: {next(x for x in begun if x not in found)}")
    return MARKED.sub(lambda match: f"{match[1]}\n{table(match[2], match[3], match[4]).markdown()}\n\n{match[6]}", text)


def stale(paths: Iterable[Path]) -> dict[Path, str]:
    """Those pages whose tables are not what the results say, with the text that they should have."""
    texts = {path: path.read_text() for path in paths}
    return {path: new for path, text in texts.items() if (new := render(text)) != text}


def main(arguments: Sequence[str]) -> int:
    """Checks or writes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments report", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="exit status 1 if a table differs from the results")
    what.add_argument("--write", action="store_true", help="write the tables anew")
    args = parser.parse_args(arguments)
    changed = stale(pages())
    for path, text in changed.items():
        if args.write:
            write_text(path, text)
        print(f"{path.name}: {'written' if args.write else 'not what the results say; run with --write'}")
    return int(bool(changed) and args.check)
