"""One self-contained HTML page about a checkpoint: no script, no request, right on a phone and on paper."""

import base64
import html
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from nm_jax._core.axes import Tiling
from nm_jax._core.tables import printable, shape_text
from nm_jax.checkpoint import CheckpointReport, TensorReport
from nm_jax.checkpoint._folder import written_beside
from nm_jax.checkpoint._verify import Seen

_SHOWN = 3  # tensors that are shown when none are chosen
_CORNER = 32  # entries of a mask along each axis
_CELL = 10  # pixels of an entry
_BINS = 41
_PRUNED, _KEPT, _LINE = (0, 1, 2)
_PALETTE = bytes.fromhex("f4f5f71d4f91c9ced6")


class Page:
    """The page, and the tensors that it shows closely.

    Args:
      pictures: regular expressions for the names of the tensors to show; none: the first few.

    Raises:
      ValueError: for one that is not valid.
    """

    def __init__(self, pictures: Sequence[str] = ()):
        for regex in pictures:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"--picture {regex!r} is not a regular expression: {error}") from None
        self._pictures = pictures
        self._shown: list[str] = []

    def see(self, seen: Seen) -> None:
        """Takes a look at the next tensor."""
        name = seen.report.name
        if self._pictures:
            wanted = any(re.search(regex, name) for regex in self._pictures)
        else:
            wanted = len(self._shown) < _SHOWN
        if wanted:
            self._shown.append(_figure(seen))

    def render(self, report: CheckpointReport) -> str:
        """The page.

        Raises:
          ValueError: if no tensor was chosen.
        """
        if self._pictures and not self._shown:
            raise ValueError(f"--picture {self._pictures[0]!r} matches no sparse tensor")
        title = _text(Path(report.path).name)
        sections = [
            f"<h1>{title}</h1>",
            _summary(report),
            "<h2>Sparse tensors</h2>",
            _tensors(report.tensors),
            "<h2>Retained magnitude</h2>",
            "<p>The l1 norm that each mask keeps, relative to the best unstructured mask that keeps as many entries "
            "(Fig. 3b of the paper).</p>",
            _retained(report.tensors),
            "<h2>Masks and weights</h2>",
            *self._shown,
            "<h2>Dense tensors</h2>",
            _table(
                ("tensor", "shape", "dtype", "because"),
                ((t.name, shape_text(t.shape), t.dtype, t.reason) for t in report.dense),
            ),
        ]
        return _FRAME.format(title=title, style=_STYLE, body="\n".join(sections))


def write_page(path: str, text: str, replace: bool = False) -> None:
    """Writes a page, which gets its name when it is complete."""
    with written_beside(Path(path), replace=replace) as beside:
        beside.write_text(text, encoding="utf-8")


def _summary(report: CheckpointReport) -> str:
    broken = sum(not tensor.ok for tensor in report.tensors)
    verdict = f"{broken} violate their pattern" if broken else "all have their pattern"
    kept, size = (sum(getattr(tensor.record, field) for tensor in report.tensors) for field in ("kept", "size"))
    facts = (
        ("sparse tensors", str(len(report.tensors))),
        ("verdict", verdict),
        ("kept in them", _percent(kept / max(size, 1))),
        ("dense tensors", str(len(report.dense))),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="{"bad" if broken else "good"}">{items}</dl>'


def _tensors(tensors: Iterable[TensorReport]) -> str:
    columns = ("tensor", "shape", "dtype", "pattern", "axes", "kept", "retained", "violations W", "violations W^T")
    rows = []
    for tensor in tensors:
        record, violations = tensor.record, tensor.violations()
        rows.append(
            (
                tensor.name,
                shape_text(record.shape),
                record.dtype,
                str(record.pattern),
                record.axes,
                _percent(record.kept / max(record.size, 1)),
                _percent(record.retained),
                str(violations.get("contraction", violations["tiles"])),
                str(violations.get("output", "")),
            )
        )
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows become cards on a phone, where each cell shows its column."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = [
        "<tr>" + "".join(f'<td data-label="{c}">{_text(v)}</td>' for c, v in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _retained(tensors: Iterable[TensorReport]) -> str:
    lines = []
    for tensor in tensors:
        share = tensor.record.of_unstructured
        bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.2f}%"></i>'
        lines.append(
            f'<div class="bar"><span>{_text(tensor.name)}</span><b>{bar}</b>'
            f'<em data-tensor="{_text(tensor.name)}">{_percent(share)}</em></div>'
        )
    return "\n".join(lines)


def _figure(seen: Seen) -> str:
    """Picture of the mask, histogram of the kept weights, and how full the groups are."""
    report, record = seen.report, seen.report.record
    assert report.checked is not None
    picture = base64.b64encode(_picture(seen)).decode()
    matrix = _matrix(seen.kept, record.axes)
    rows, cols = (min(size, _CORNER) for size in matrix.shape)
    parts = [
        f'<figure><img alt="mask" src="data:image/png;base64,{picture}"><figcaption>The mask\'s first {rows} x {cols} '
        "entries: contraction axis down, output axis across; dark is kept.</figcaption></figure>",
        _histogram(seen.weight[seen.kept]),
    ]
    if report.checked.contraction:
        groups = record.pattern.contraction_groups
        n = groups and groups.n
        parts.append(_occupancy("along the contraction axis (W)", report.checked.contraction, n))
        parts.append(_occupancy("along the output axis (W^T)", report.checked.output, n))
    heading = f"<h3>{_text(report.name)} <small>{shape_text(record.shape)}, {record.pattern}</small></h3>"
    return f'<section>{heading}<div class="figures">{"".join(parts)}</div></section>'


def _matrix(kept: np.ndarray, axes: str) -> np.ndarray:
    """(contraction, output) of the first entry of the batch."""
    return cast(np.ndarray, Tiling(kept.shape, axes, 1, 1).split(kept))[0, 0, 0]


def _picture(seen: Seen) -> bytes:
    """The corner of a mask as a PNG; lines between tiles."""
    record = seen.report.record
    corner = _matrix(seen.kept, record.axes)[:_CORNER, :_CORNER]
    pixels = np.repeat(np.repeat(np.where(corner, _KEPT, _PRUNED).astype(np.uint8), _CELL, axis=0), _CELL, axis=1)
    if record.pattern.tile is not None:
        rows, cols = record.pattern.tile
        pixels[rows * _CELL :: rows * _CELL] = _LINE
        if cols > 1:
            pixels[:, cols * _CELL :: cols * _CELL] = _LINE
    return _png(pixels)


def _png(pixels: np.ndarray) -> bytes:
    """A PNG of indices into the palette."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each line begins with its filter: none
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", _PALETTE), chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _histogram(values: np.ndarray) -> str:
    """The kept weights, as bars over their range."""
    values = values.astype(np.float32)
    values = values[np.isfinite(values)]
    limit = float(np.quantile(np.abs(values), 0.999)) if values.size else 0.0
    limit = limit or 1.0
    counts, _ = np.histogram(np.clip(values, -limit, limit), _BINS, (-limit, limit))
    tallest = max(int(counts.max()), 1)
    bars = "".join(
        f'<rect x="{10 * k}" y="{200 - 200 * c / tallest:.1f}" width="9" height="{200 * c / tallest:.1f}"/>'
        for k, c in enumerate(counts)
    )
    return (
        f'<figure><svg viewBox="0 0 {10 * _BINS} 200" preserveAspectRatio="none" role="img" aria-label="histogram">'
        f"{bars}</svg>"
        f"<figcaption>Kept weights, from {-limit:.3g} to {limit:.3g}; the outermost bars hold all beyond.</figcaption>"
        "</figure>"
    )


def _occupancy(where: str, counts: Sequence[int], n: int | None) -> str:
    """How many groups keep 0, 1, ... m entries; too many are marked."""
    total = max(sum(counts), 1)
    lines = "".join(
        f"<tr{' class=bad' if n is not None and kept > n and count else ''}><td>{kept}</td>"
        f'<td><b><i style="width:{100 * count / total:.2f}%"></i></b></td><td>{count}</td></tr>'
        for kept, count in enumerate(counts)
    )
    return (
        f'<figure><table class="groups"><tbody>{lines}</tbody></table>'
        f"<figcaption>Groups by kept entries, {where}.</figcaption></figure>"
    )


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.2f}\u00a0%"


def _text(name: str) -> str:
    """What files say, as HTML."""
    return html.escape(printable(name))


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}: sparsity</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { --ink: #1b2430; --soft: #5b6675; --line: #d9dde3; --kept: #1d4f91; --bad: #b3261e; --good: #1b6e3c; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: var(--ink); background: #fff;
  font: 16px/1.45 system-ui, sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; break-after: avoid; }
h3 { font-size: 1rem; margin: 1.2rem 0 .6rem; overflow-wrap: anywhere; break-after: avoid; }
small, p, figcaption, dt { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 0; padding: .8rem 1rem; border-left: 4px solid; }
dl.good { border-color: var(--good); } dl.bad { border-color: var(--bad); }
dt { font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { overflow-wrap: anywhere; }
tr { break-inside: avoid; }
b { display: block; background: #eceff3; height: .8rem; font-weight: normal; }
b i { display: block; background: var(--kept); height: 100%; }
.bar { display: grid; grid-template-columns: minmax(8rem, 2fr) 3fr 5rem; gap: .8rem; align-items: center;
  font-size: .85rem; padding: .15rem 0; break-inside: avoid; }
.bar span { overflow-wrap: anywhere; } .bar em { font-style: normal; text-align: right; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { font-size: .8rem; margin-top: .4rem; }
img { width: 100%; max-width: 24rem; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
svg { width: 100%; height: 12rem; display: block; border-bottom: 1px solid var(--line); }
svg rect { fill: var(--kept); }
.groups td:nth-child(1) { width: 2rem; } .groups td:nth-child(3) { width: 5rem; text-align: right; padding-right: 0; }
.groups .bad { color: var(--bad); } .groups .bad i { background: var(--bad); }
@media screen and (max-width: 640px) {
  body { padding: 1rem; }
  table:not(.groups) thead { display: none; }
  table:not(.groups) tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  table:not(.groups) td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  table:not(.groups) td:empty { display: none; }
  table:not(.groups) td::before { content: attr(data-label); color: var(--soft); flex: none; }
  table:not(.groups) td:first-child { font-weight: 600; } table:not(.groups) td:first-child::before { content: none; }
  .bar { grid-template-columns: 1fr 5rem; } .bar span { grid-column: 1 / -1; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 11px; }
  body { padding: 0; font-size: 1rem; max-width: none; }
  .figures { grid-template-columns: 1fr 1fr; } img { max-width: 5cm; } svg { height: 4cm; }
}
"""
