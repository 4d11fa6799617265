"""Variants of a study against its first one: means, spreads, differences of pairs, and what those say."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import nm_jax as nm
from experiments.harness import Experiment, Table

# What evaluations give, as tables call it.
HEADS = {
    "accuracy": "test accuracy, %",
    "f1": "F1, %",
    "exact_match": "exact match, %",
    "spearman": "Spearman, %",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}


def finished(result: dict, name: str, figure: str = "accuracy") -> dict[int, float]:
    """The last evaluation of a variant, by seed, of those that are through."""
    rows = [row for row in result["rows"] if row["name"] == name]
    return {row["seed"]: row["evaluations"][figure][-1] for row in rows if row["epochs_done"] == row["epochs"]}


def tables(result: dict) -> list[Table]:
    """Every variant, and how far its runs are."""
    return [compared("accuracy", result)]


def compared(table: str, result: dict, paper: Mapping[str, str] | None = None) -> Table:
    """Figures of every variant, and its difference to the first variant in the first one, seed by seed, with what that
    says.

    Args:
      table: name of the table.
      result: of a study.
      paper: the first figure in the paper, by variant.
    """
    rows, names = [], list(dict.fromkeys(row["name"] for row in result["rows"]))
    compares, *others = result["figures"]
    for name in names:
        mine = [row for row in result["rows"] if row["name"] == name]
        own, first = (finished(result, each, compares) for each in (name, names[0]))
        paired = [own[seed] - first[seed] for seed in own if seed in first] if name != names[0] else []
        flips = [row["flip_rates"][-1] for row in mine if row.get("flip_rates")]
        done, whole = (sum(row[key] for row in mine) for key in ("epochs_done", "epochs"))
        cells = (
            name,
            mean(own.values()),
            mean(paired, "+.2f"),
            verdict(paired),
            f"{100 * np.mean(flips):.2f} %" if flips else None,
            SPARSE_UNITS[kind(mine[0]["pattern"])],
            *(mean(finished(result, name, figure).values()) for figure in others),
            f"{len(own)} ({done} of {whole} epochs)",
        )
        rows.append((*cells, (paper or {}).get(name)) if paper is not None else cells)
    heads = [HEADS.get(figure, figure.replace("_", " ")) for figure in result["figures"]]
    header = ("", heads[0], f"to {names[0]}", "that is", "last flips", "SU", *heads[1:], "seeds")
    title = f"{result['network']}, {result['data']}, from {result['start']}, preset {result['preset']}"
    notes = "Mean and standard deviation of the seeds that are through; differences are between runs of one seed."
    if (before := result.get("before")) and before["epochs_done"]:
        notes += f" They go on from {before['evaluations'][compares][-1]:.2f}."
    return Table(table, (*header, "paper") if paper is not None else header, rows, title, notes)


# Of the three products of a layer in training, those that sparse tensor cores can take.
SPARSE_UNITS = {"dense": "0 %", "one": "33 %", "both": "66 %", "none": "0 %"}


def kind(pattern: str | None) -> str:
    """Along which axes of a weight hardware can use a pattern."""
    if pattern is None:
        return "dense"
    parsed = nm.parse_pattern(pattern)
    return "both" if isinstance(parsed, nm.TransposableNM) else "one" if isinstance(parsed, nm.NM) else "none"


def verdict(differences: list[float]) -> str | None:
    """What differences of pairs say: worse or better if the 95 % interval of their mean (Student's t) leaves out 0."""
    if len(differences) < 2:
        return None
    reach = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5
    mean = np.mean(differences)
    return "**short**" if mean + reach < 0 else "better" if mean - reach > 0 else f"none shown (± {reach:.2f})"


def mean(values: Iterable[float], form: str = ".2f") -> str | None:
    """Mean and standard deviation of what there is."""
    values = list(values)
    return f"{np.mean(values):{form}} {spread(values)}".strip() if values else None


def spread(values: list[float]) -> str:
    """Standard deviation of a sample, if there is one."""
    return f"± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""


def curves(result: dict) -> Figure | None:
    """The first figure of every variant after each epoch, and how many mask entries refreshes change; mean of the seeds
    that have come so far. Nothing before the first epoch."""
    figure = result["figures"][0]
    found: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["epochs_done"]:
            found.setdefault(row["name"], []).append(row)
    if not found:
        return None
    drawing = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for name, rows in found.items():
        _curve(left, [row["evaluations"][figure] for row in rows], name)
        flips = [row["flip_rates"] for row in rows if row.get("flip_rates")]
        _curve(right, flips, name)
    left.set(xlabel="epoch", ylabel=HEADS.get(figure, figure.replace("_", " ")))
    right.set(xlabel="epoch", yscale="symlog", ylabel="mask entries that the last refresh changed")
    left.legend(fontsize=7)
    return drawing


def _curve(axes: Any, series: list[list[float]], name: str) -> None:
    """The mean over the seeds that are as far, with the range of them; no seed leaves the place of its colour free."""
    longest = max(map(len, series), default=0)
    means, low, high = [], [], []
    for epoch in range(longest):
        values = [one[epoch] for one in series if len(one) > epoch]
        means.append(np.mean(values))
        low.append(min(values))
        high.append(max(values))
    (line,) = axes.plot(range(1, longest + 1), means, marker=".", label=name)
    if len(series) > 1:
        axes.fill_between(range(1, longest + 1), low, high, color=line.get_color(), alpha=0.15)


def against_paper(study: str, paper: Mapping[str, str]) -> Experiment:
    """A table for every preset of a study that there are results of, beside the paper's accuracies by variant."""
    presets = ("paper", "gpu", "cpu")
    sources = tuple(f"configs/{study}/{preset}" for preset in presets)

    def tables(result: dict) -> list[Table]:
        return [compared(p, result[s], paper) for p, s in zip(presets, sources, strict=True) if result.get(s)]

    return Experiment(None, tables, sources=sources)
