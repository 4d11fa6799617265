"""Retained magnitude of masks of each kind, against unstructured ones.

Hubara et al., Fig. 3b: the last layer of ResNet-50 pretrained on ImageNet, at 4:8, 2:4, 4:8-T and 4:8-S; 2:4 and 4:8-T
are nearly alike and 4:8-S far below. Here: the pretrained networks that fit here.

    NM_JAX_DATA=... python -m experiments retained && python -m experiments paper/figure_3b

Paper: Figure 3b
Time: none; from the results of retained
Data: none
"""

from matplotlib.figure import Figure

from experiments import retained
from experiments.harness import Experiment, Table


def tables(result: dict) -> list[Table]:
    """As it was measured."""
    return retained.tables(result["retained"])


def draw(result: dict) -> Figure:
    """A group of bars for each kind of mask, as the paper's."""
    rows = [row for row in result["retained"]["rows"] if row["layers"] == "all"]
    patterns = list(rows[0]["retained"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for k, row in enumerate(rows):
        places = [x + (k - (len(rows) - 1) / 2) * width for x in range(len(patterns))]
        axes.bar(places, [row["retained"][pattern] for pattern in patterns], width, label=row["network"])
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set(ylim=(0.7, 1.01), ylabel="retained magnitude, unstructured = 1")
    axes.legend(fontsize=8)
    return figure


EXPERIMENT = Experiment(None, tables, draw, sources=("retained",))
