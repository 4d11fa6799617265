"""From 4:8 to 2:4 and 1:2, and from unstructured to n:8, without training.

Hubara et al., Table A.2: ResNet-50 76.5 % at 4:8, 76.4 % at 2:4 and 75.1 % at 1:2 after AdaPrune.

Paper: Table A.2
Time: none; from the results of adaprune/from_sparse
Data: none
"""

import numpy as np

from experiments.harness import Experiment, Table

SOURCE = "adaprune/from_sparse"
METHODS = {"none": "masks alone", "AdaPrune": "AdaPrune", "none + BNT": "batch norm tuned", "AdaPrune + BNT": "both"}
PERCENTS = {"US-0.8": (5, 10), "80 % overall": (20,)}  # of allowed violations: the interesting ones


def tables(result: dict) -> list[Table]:
    """The start, the masks alone, and what AdaPrune and batch-norm tuning make of them."""
    record = result[SOURCE]
    values = {(row["setting"], row["method"]): f"{np.mean(row['values']):.1f}" for row in record["rows"]}
    rows = [
        (label, values[begin, "none"], *(values[setting, method] for method in METHODS))
        for label, begin, setting in targets(record)
    ]
    title = f"{record['network']}, {record['metric']} in %; dense, trained on alike: {values['dense', 'none']}"
    return [Table("targets", ("", "start", *METHODS.values()), rows, title)]


def targets(record: dict) -> list[tuple[str, str, str]]:
    """Label, start and setting of each row."""
    found = {}
    for row in record["rows"]:
        setting = row["setting"]
        if " to " in setting:
            found[setting] = (setting, setting.split(" to ")[0], setting)
        elif row.get("percent") in PERCENTS.get(row.get("start", ""), ()):
            kinds = set(row["patterns"].values())
            to = kinds.pop() if len(kinds) == 1 else f"n:8, {row['percent']:g} % violations allowed"
            found[setting] = (f"{row['start']} to {to}", row["start"], setting)
    return list(found.values())


EXPERIMENT = Experiment(None, tables, sources=(SOURCE,))
