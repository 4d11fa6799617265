"""Tables as text."""

from collections.abc import Sequence


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """Aligned lines under a header, without the columns that are empty everywhere."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if any(row.get(c) for row in rows)]
    widths = {c: max(len(c), *(len(row.get(c, "")) for row in rows)) for c in columns}
    cells = [{c: c for c in columns}, *rows]
    return ["  ".join(row.get(c, "").ljust(widths[c]) for c in columns).rstrip() for row in cells]
