"""Accuracy against log diversity: nine kinds of masks at 50 % on CIFAR-100.

Hubara et al., Fig. 3a: ResNet-18 on CIFAR-100, from 65.5 % (4:8-S) to 70.3 % (unstructured), and the accuracy rises
with the logarithm of the diversity. Here ResNet-8, from scratch and retrained. Diversity is of an 8 x 8 matrix, by the
paper's formula and counted exactly, which differ for transposable masks.

Paper: Figures 3a and A.2
Time: none; from the results of configs/figure_3a_scratch and configs/figure_3a_retrain
Data: none
"""

import math

import numpy as np
from matplotlib.figure import Figure

import nm_jax as nm
from experiments.configs.comparison import finished, spread
from experiments.harness import Experiment, Table

PRESETS = ("paper", "gpu", "cpu")  # the most first
SOURCES = {start: [f"configs/figure_3a_{start}/{preset}" for preset in PRESETS] for start in ("scratch", "retrain")}
COLOURS = {"N": "#d97706", "T": "#2563eb", "S": "#059669", "U": "#6b7280"}


def chosen(result: dict) -> dict[str, dict]:
    """The result with the most training, of those that are there, by where it started."""
    found: dict[str, dict] = {}
    for start, names in SOURCES.items():
        for name in names:
            if name in result:
                found.setdefault(start, result[name])
    return found


def diversity(pattern: str, exact: bool) -> float:
    """Natural logarithm of the number of masks of an 8 x 8 matrix."""
    return math.log(nm.mask_diversity(pattern, (8, 8), exact=exact))


def points(record: dict) -> list[tuple[str, str, list[float]]]:
    """Name, pattern, and accuracies of the seeds that are through, of all masks that have any."""
    patterns = {row["name"]: row["pattern"] for row in record["rows"] if row["pattern"]}
    return [
        (name, pattern, values) for name, pattern in patterns.items() if (values := [*finished(record, name).values()])
    ]


def correlation(record: dict, exact: bool) -> float | None:
    """Of the mean accuracy with the logarithm of the diversity; `None` of fewer than three masks."""
    seen = points(record)
    if len(seen) < 3:
        return None
    logs = [diversity(pattern, exact) for _, pattern, _ in seen]
    return float(np.corrcoef(logs, [np.mean(values) for _, _, values in seen])[0, 1])


def tables(result: dict) -> list[Table]:
    """Every mask, and the correlations."""
    records = chosen(result)
    first = next(iter(records.values()))
    patterns = {row["name"]: row["pattern"] for row in first["rows"]}
    rows: list[tuple] = []
    for name, pattern in patterns.items():
        logs = [f"{diversity(pattern, exact):.1f}" for exact in (False, True)] if pattern else ["", ""]
        rows.append((name, *logs, *(accuracy(record, name) for record in records.values())))
    for exact, label in ((False, "the paper's"), (True, "exact")):
        values = [correlation(record, exact) for record in records.values()]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        rows.append((f"correlation with {label}", "", "", *cells))
    header = ("mask", "ln diversity, the paper's", "exact", *(title(start, r) for start, r in records.items()))
    notes = "Mean and standard deviation of the seeds that are through, and how many; empty: none is yet."
    return [Table("diversity", header, rows, "Test accuracy in % against diversity", notes)]


def accuracy(record: dict, name: str) -> str:
    """Mean, spread, and number of seeds."""
    values = list(finished(record, name).values())
    return f"{np.mean(values):.2f} {spread(values)} ({len(values)})".replace("  ", " ") if values else ""


def title(start: str, record: dict) -> str:
    """Of a column."""
    epochs = record["recipe"]["epochs"]
    return f"{record['network']}, {'from scratch' if start == 'scratch' else 'retrained'}, {epochs} epochs"


def draw(result: dict) -> Figure:
    """One picture for each start."""
    records = chosen(result)
    figure = Figure(figsize=(5.5 * len(records), 4), layout="constrained")
    for axes, (start, record) in zip(figure.subplots(1, len(records), squeeze=False)[0], records.items(), strict=True):
        for name, pattern, values in points(record):
            x, kind = diversity(pattern, exact=True), "U" if name == "US" else name[-1] if name[-1] in "TS" else "N"
            error = np.std(values, ddof=1) if len(values) > 1 else 0
            axes.errorbar(x, np.mean(values), error, marker="o", capsize=2, color=COLOURS[kind])
            axes.annotate(name, (x, np.mean(values)), xytext=(5, 4), textcoords="offset points", fontsize=8)
        if dense := finished(record, "dense"):
            axes.axhline(np.mean([*dense.values()]), color="grey", linestyle="--", label="dense")
            axes.legend(frameon=False)
        axes.set(xlabel="ln of the diversity of an 8 x 8 matrix, exact", ylabel="test accuracy, %")
        axes.set_title(f"{title(start, record)}; {record['data']}", fontsize=9)
    return figure


EXPERIMENT = Experiment(None, tables, draw, sources=tuple(name for names in SOURCES.values() for name in names))
