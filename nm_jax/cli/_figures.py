"""Figures of one tensor: its mask, its weights, and how full its groups are."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from nm_jax._core.axes import Tiling
from nm_jax._core.tables import shape_text
from nm_jax.checkpoint._verify import Seen
from nm_jax.cli._html import escaped

_CORNER = 32  # entries of a mask along each axis
_BINS = 41
_PALETTE = bytes.fromhex("f4f5f71d4f91")  # pruned, kept


def figure(seen: Seen) -> str:
    """Picture of the mask, histogram of the kept weights, and how full the groups are."""
    report, record = seen.report, seen.report.record
    assert report.checked is not None
    parts = [
        _mask(seen),
        _histogram(seen.weight[seen.kept]),
    ]
    if report.checked.contraction:
        groups = record.pattern.contraction_groups
        n = groups and groups.n
        parts.append(_occupancy("along the contraction axis (W)", report.checked.contraction, n))
        constrained = record.pattern.tile is not None and record.pattern.tile[1] > 1
        parts.append(_occupancy("along the output axis (W^T)", report.checked.output, n if constrained else None))
    heading = f"<h3>{escaped(report.name)} <small>{shape_text(record.shape)}, {record.pattern}</small></h3>"
    return f'<section>{heading}<div class="figures">{"".join(parts)}</div></section>'


def _matrix(kept: np.ndarray, axes: str) -> np.ndarray:
    """(contraction, output) of the first entry of the batch."""
    return Tiling(kept.shape, axes, 1, 1).split(kept)[0, 0, 0]


def _mask(seen: Seen) -> str:
    """The corner of a mask, a pixel for each entry. The lines between tiles are drawn over it: as pixels they would
    vanish, or not be where they belong, at some sizes."""
    corner = _matrix(seen.kept, seen.report.record.axes)[:_CORNER, :_CORNER]
    picture = base64.b64encode(_png(corner.astype(np.uint8))).decode()
    rows, cols = corner.shape
    tall, wide = seen.report.record.pattern.tile or corner.shape
    lines = [f"M0 {row}H{cols}" for row in range(tall, rows, tall)]
    lines += [f"M{col} 0V{rows}" for col in range(wide, cols, wide) if wide > 1]
    return (
        f'<figure><div class="mask" style="aspect-ratio:{cols}/{rows}">'
        f'<img alt="mask" src="data:image/png;base64,{picture}">'
        f'<svg viewBox="0 0 {cols} {rows}" preserveAspectRatio="none"><path d="{"".join(lines)}"/></svg></div>'
        f"<figcaption>The mask's first {rows} x {cols} entries: contraction axis down, output axis across; coloured is "
        "kept.</figcaption></figure>"
    )


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
