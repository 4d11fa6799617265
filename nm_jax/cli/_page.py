"""One self-contained HTML page about a checkpoint: no script, no request, right on a phone and on paper."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nm_jax._core.tables import shape_text
from nm_jax.checkpoint import CheckpointReport, TensorReport
from nm_jax.checkpoint._folder import written_beside
from nm_jax.checkpoint._verify import Seen
from nm_jax.cli._figures import figure
from nm_jax.cli._html import escaped, percent, table
from nm_jax.cli._output import of_bytes
from nm_jax.cli._style import FRAME, STYLE

_SHOWN = 3  # tensors that are shown when none are chosen
# The number of an expert in a name: what comes before, and after.
_EXPERT = re.compile(r"^(.*?\bexperts?[._/])\d+(?=[._/]|$)(.*)$")


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
            self._shown.append(figure(seen))

    def render(self, report: CheckpointReport) -> str:
        """The page.

        Raises:
          ValueError: if no tensor was chosen.
        """
        if self._pictures and not self._shown:
            raise ValueError(f"--picture {self._pictures[0]!r} matches no sparse tensor")
        title = escaped(Path(report.path).resolve().name)
        groups = _groups(report.tensors)
        sections = [
            f"<h1>{title}</h1>",
            _summary(report),
            "<h2>Sparse tensors</h2>",
            _tensors(groups),
            "<h2>Retained magnitude</h2>",
            "<p>The l1 norm that each mask keeps, relative to the best unstructured mask that keeps as many entries "
            "(Fig. 3b of the paper).</p>",
            _retained(groups),
            "<h2>Masks and weights</h2>",
            *self._shown,
            "<h2>Dense tensors</h2>",
            table(
                ("tensor", "shape", "dtype", "because"),
                ((True, (t.name, shape_text(t.shape), t.dtype, t.reason)) for t in report.dense),
            ),
            _origin(report),
        ]
        return FRAME.format(title=title, style=STYLE, body="\n".join(sections))


def write_page(path: str, text: str, replace: bool = False) -> None:
    """Writes a page, which gets its name when it is complete."""
    with written_beside(Path(path), replace=replace) as beside:
        beside.write_text(text, encoding="utf-8")


def _summary(report: CheckpointReport) -> str:
    broken = sum(not tensor.ok for tensor in report.tensors)
    verdict = f"{broken} violate their pattern" if broken else "all have their pattern"
    kept, size = (sum(getattr(tensor.record, field) for tensor in report.tensors) for field in ("kept", "size"))
    totals = report.totals
    facts = (
        ("sparse tensors", f"{len(report.tensors)} of {totals.tensors}"),
        ("verdict", verdict),
        ("kept in them", percent(kept / max(size, 1))),
        ("parameters of all", f"{totals.parameters:,}"),
        ("pruned of all", percent(totals.pruned / max(totals.parameters, 1))),
        ("size of all", of_bytes(totals.nbytes)),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="{"bad" if broken else "good"}">{items}</dl>'


def _origin(report: CheckpointReport) -> str:
    """How the checkpoint was made, as far as it says so."""
    if not report.by and not report.rules:
        return "<h2>Origin</h2><p>The file does not say how it was pruned.</p>"
    lines = "".join(f"<li><code>{escaped(_rule(rule))}</code></li>" for rule in report.rules)
    by = f" by {escaped(report.by)}" if report.by else ""
    said = f"Written{by}; the rules of the last run, of which the first that matches decides:"
    return f"<h2>Origin</h2><p>{said}</p><ul>{lines}</ul>"


def _rule(rule: object) -> str:
    """A rule as the command line writes it."""
    if isinstance(rule, list) and len(rule) == 3:
        regex, pattern, axes = rule
        return f"{regex}={pattern or 'dense'}{f'@{axes}' if axes else ''}"
    return rule if isinstance(rule, str) else json.dumps(rule)


def _groups(tensors: Iterable[TensorReport]) -> list[tuple[str, list[TensorReport]]]:
    """Tensors with the name of each, but the experts of a layer that are alike as one: (name, members)."""
    groups: dict[tuple, list[TensorReport]] = {}
    for tensor in tensors:
        record = tensor.record
        name = _EXPERT.sub(r"\1*\2", tensor.name) if tensor.ok else tensor.name
        groups.setdefault((name, record.pattern, record.axes, record.shape, record.dtype, tensor.ok), []).append(tensor)
    return [(members[0].name if len(members) == 1 else key[0], members) for key, members in groups.items()]


def _tensors(groups: Iterable[tuple[str, list[TensorReport]]]) -> str:
    columns = ("tensor", "shape", "dtype", "pattern", "axes", "kept", "retained", "violations W", "violations W^T")
    rows = []
    for name, members in groups:
        record = members[0].record
        violations = [tensor.violations() for tensor in members]
        row = (
            name if len(members) == 1 else f"{name} ({len(members)})",
            shape_text(record.shape),
            record.dtype,
            str(record.pattern),
            record.axes,
            percent(_mean([tensor.record.kept / max(record.size, 1) for tensor in members])),
            percent(_mean([tensor.record.retained for tensor in members])),
            str(sum(found.get("contraction", found["tiles"]) for found in violations)),
            str(sum(found["output"] for found in violations)) if "output" in violations[0] else "",
        )
        rows.append((members[0].ok, row))
    return table(columns, rows)


def _retained(groups: Iterable[tuple[str, list[TensorReport]]]) -> str:
    lines = []
    for name, members in groups:
        share = _mean([tensor.record.of_unstructured for tensor in members])
        bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.2f}%"></i>'
        lines.append(
            f'<div class="bar"><span>{escaped(name)}</span><b>{bar}</b>'
            f'<em data-tensor="{escaped(name)}">{percent(share)}</em></div>'
        )
    return "\n".join(lines)


def _mean(shares: Sequence[float | None]) -> float | None:
    """Of shares that are all known."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if len(known) == len(shares) else None
