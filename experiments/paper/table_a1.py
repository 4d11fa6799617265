"""AdaPrune from dense weights: no training, five networks, every pattern.

Hubara et al., Table A.1: ResNet-50 76.1 % dense, 67.4 % bias fix, 74.4 % AdaPrune, 74.8 % with batch-norm tuning.
Compare each row with the dense one above it, which is of the same test data.

Paper: Table A.1
Time: none; from the results of adaprune/from_dense
Data: none
"""

from collections.abc import Callable

import numpy as np

from experiments.adaprune.study import summary
from experiments.harness import Experiment, Table

NETWORKS = ("minilm", "resnet20-cifar100", "resnet20-cifar10", "resnet14-cifar100", "squeezenet")
SHORT = {
    "none": "masks alone",
    "AdaPrune": "**AdaPrune**",
    "none + BNT": "batch norm tuned",
    "AdaPrune + BNT": "**AdaPrune, batch norm tuned**",
}
LONG = SHORT | {
    "AdaPrune, OBC masks": "AdaPrune, masks by OBC scores",
    "bias fix": "bias fix",
    "bias fix + BNT": "bias fix, batch norm tuned",
}


def lines(record: dict, methods: dict[str, str], cell: Callable[[list[float]], str]) -> list[tuple[str, ...]]:
    """One network: a row for each method, a column for each pattern."""
    values = {(row["setting"], row["method"]): row["values"] for row in record["rows"]}
    settings = list(dict.fromkeys(row["setting"] for row in record["rows"]))
    name = f"{record['network']}, {record['metric']}"
    rows: list[tuple[str, ...]] = []
    for method, label in methods.items():
        if any(of == method for _, of in values):
            cells = [cell(values[s, method]) if (s, method) in values else "" for s in settings]
            rows.append((name if not rows else "", label, *cells))
    return rows


def tables(result: dict) -> list[Table]:
    """The main methods; and all of them, with standard deviations."""
    records = {name: result[source] for name in NETWORKS if (source := f"adaprune/from_dense/{name}") in result}
    settings = dict.fromkeys(row["setting"] for record in records.values() for row in record["rows"])
    header = ("network", "", *settings)
    short = [
        line
        for name, record in records.items()
        if name != "resnet14-cifar100"
        for line in lines(record, SHORT, lambda values: f"{np.mean(values):.1f}")
    ]
    full = [line for record in records.values() for line in lines(record, LONG, summary)]
    return [
        Table("short", header, short, "Test figures in %, mean of three calibration samples"),
        Table("full", header, full, "All methods, mean and standard deviation of three calibration samples, %"),
    ]


EXPERIMENT = Experiment(None, tables, sources=tuple(f"adaprune/from_dense/{name}" for name in NETWORKS))
