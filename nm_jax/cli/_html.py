"""Pieces of HTML."""

import html
from collections.abc import Iterable, Sequence

from nm_jax._core.tables import printable


def escaped(text: str) -> str:
    """What files say, as HTML."""
    return html.escape(printable(text))


def table(columns: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    """Rows of cells, and whether they are good. They become cards on a phone, where each cell shows its column."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = [
        f"<tr{'' if good else ' class=bad'}>"
        + "".join(f'<td data-label="{c}">{escaped(v)}</td>' for c, v in zip(columns, row, strict=True))
        + "</tr>"
        for good, row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f}\u00a0%"
