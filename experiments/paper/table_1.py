"""Mask diversity: how many masks of each kind an 8 x 8 matrix has at 50 % zeros.

Hubara et al., Table 1, by their Eq. 2. At 2:4-T and 4:8-T their formula counts masks more than once.

    python -m experiments diversity && python -m experiments paper/table_1

Paper: Table 1
Time: none; from the results of diversity
Data: none
"""

from experiments.harness import Experiment, Table

PAPER = {  # kind -> 1:2, 2:4, 4:8
    "unstructured": ("1.8e18", "1.8e18", "1.8e18"),
    "n:m": ("4e9", "2.8e12", "5.7e14"),
    "transposable": ("6e4", "4e8", "1.7e13"),
    "sequential": ("4e9", "4e7", "4e5"),
}


def tables(result: dict) -> list[Table]:
    """The paper's figures, those of its formula, and those counted."""
    found = result["diversity"]
    ratios = list(dict.fromkeys(row["ratio"] for row in found["rows"]))
    rows = []
    for kind, paper in PAPER.items():
        mine = {row["ratio"]: row for row in found["rows"] if row["kind"] == kind}
        for source in ("paper", "formula", "exact"):
            values = [f"{int(mine[ratio][source]):.2g}" for ratio in ratios] if source != "paper" else paper
            values = [value.replace("e+", "e").replace("e0", "e") for value in values]
            label = {"paper": "paper", "formula": "Eq. 2", "exact": "counted"}[source]
            rows.append((kind if source == "paper" else "", label, *values))
    return [Table("diversity", ("masks", "", *ratios), rows, "Masks of an 8 x 8 matrix")]


EXPERIMENT = Experiment(None, tables, sources=("diversity",))
