"""Tables as text."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")


def row_of(rows: Iterable[Row], name: str, where: str, key: str = "path") -> Row:
    """The row whose attribute `key` is `name`.

    Raises:
      KeyError: if there is none `where` they come from, such as "among the parameters".
    """
    for row in rows:
        if getattr(row, key) == name:
            return row
    raise KeyError(f"{name!r} is not {where}")


def shape_text(shape: Sequence[Any]) -> str:
    """A shape as it is printed: 3x3x64x128."""
    return "x".join(map(str, shape)) or "scalar"


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """Aligned lines under a header, without the columns that are empty everywhere."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if any(row.get(c) for row in rows)]
    table = [{c: c for c in columns}, *({c: printable(row.get(c, "")) for c in columns} for row in rows)]
    widths = {c: max(len(row[c]) for row in table) for c in columns}
    return ["  ".join(row[c].ljust(widths[c]) for c in columns).rstrip() for row in table]


def printable(text: str) -> str:
    """One line without control characters: names come from files, and terminals obey what they print."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\xa0" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
