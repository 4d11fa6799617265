"""How likely an unstructured sparse matrix has n:m by chance, and the accuracy when what breaks it is allowed.

Hubara et al., Fig. 5a: Eq. 4 at 50 % unstructured sparsity. Fig. 5b: from unstructured to n:m layer by layer, over the
allowed probability of a violation.

Paper: Fig. 5
Time: none; from the results of adaprune/from_sparse
Data: none
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import nm_jax as nm
from experiments.adaprune.study import summary
from experiments.harness import Experiment, Table

SOURCE = "adaprune/from_sparse"


def starts(record: dict) -> list[str]:
    """The unstructured networks."""
    return list(dict.fromkeys(row["start"] for row in record["rows"] if "start" in row))


def tables(result: dict) -> list[Table]:
    """Fig. 5b in figures."""
    record = result[SOURCE]
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    rows = []
    for start in starts(record):
        for percent in dict.fromkeys(row["percent"] for row in record["rows"] if row.get("start") == start):
            chosen = [r for r in record["rows"] if r.get("start") == start and r["percent"] == percent]
            values = {row["method"]: summary(row["values"]) for row in chosen}
            rows.append((start, f"{percent:g} %", f"{chosen[0]['sparsity']:.0%}", *(values.get(m) for m in methods)))
    header = ("start", "violations allowed", "zeros after", *methods)
    return [Table("violations", header, rows, f"{record['network']}, {record['metric']} in %, to n:8 layer by layer")]


def draw(result: dict) -> Figure:
    """Both parts."""
    record = result[SOURCE]
    figure = Figure(figsize=(14, 4), layout="constrained")
    probability, *accuracies = figure.subplots(1, 1 + len(starts(record)))
    draw_probability(probability)
    for axes, start in zip(accuracies, starts(record), strict=True):
        draw_violations(axes, record, start)
        axes.sharey(accuracies[0])
    accuracies[0].set(ylabel=f"{record['network']}, test {record['metric']}, %")
    return figure


def draw_probability(axes: Any) -> None:
    """Fig. 5a: the probability that a group of a half-empty matrix has n:m, over the share of zeros that this asks."""
    for m in (4, 8, 16, 32, 64):
        zeros = range(m + 1)
        fits = [1 - nm.violation_probability(m - k, m, 0.5) for k in zeros]
        axes.plot([k / m for k in zeros], fits, marker=".", label=f"m = {m}")
    axes.set(xlabel="zeros asked for, (m - n) / m", ylabel="probability", title="Eq. 4 at 50 % unstructured sparsity")
    axes.legend()


def draw_violations(axes: Any, record: dict, start: str) -> None:
    """Fig. 5b: accuracy over the allowed probability of violating the pattern."""
    rows = [row for row in record["rows"] if row.get("start") == start]
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [row for row in rows if row["method"] == method]
        means, spreads = zip(*((np.mean(r["values"]), np.std(r["values"])) for r in points), strict=True)
        axes.errorbar([r["percent"] for r in points], means, spreads, marker="o", capsize=2, label=method)
    base = next(row for row in record["rows"] if row["setting"] == start)["values"][0]
    axes.axhline(base, color="grey", linestyle="--", label=start)
    axes.set(
        xscale="log", xlabel="allowed probability of a violation, %\nzeros", title=f"{start}, to n:8 layer by layer"
    )
    axes.set_xticks([row["percent"] for row in points], [f"{r['percent']:g}\n{r['sparsity']:.0%}" for r in points])
    axes.minorticks_off()
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(None, tables, draw, sources=(SOURCE,))
