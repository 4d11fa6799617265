"""How many masks there are of each kind on a small matrix: by the paper's formula, and counted.

The formula counts a transposable mask more than once; for all other kinds it is exact.

Paper: none; paper/table_1 shows it
Time: a second
Data: none
"""

import nm_jax as nm
from experiments.harness import Experiment, Run, Table

SIZE = 8
RATIOS = ((1, 2), (2, 4), (4, 8))
KINDS = {"unstructured": "US-0.5", "n:m": "{n}:{m}", "transposable": "{n}:{m}-T", "sequential": "{n}:{m}-S"}


def measure(run: Run) -> dict:
    """Counts, as strings: they have more digits than a float."""
    del run  # it takes no time
    rows = []
    for kind, name in KINDS.items():
        for n, m in RATIOS:
            pattern = name.format(n=n, m=m)
            formula, exact = (nm.mask_diversity(pattern, (SIZE, SIZE), exact=exact) for exact in (False, True))
            rows.append({"kind": kind, "ratio": f"{n}:{m}", "formula": str(formula), "exact": str(exact)})
    return {"size": SIZE, "rows": rows}


def tables(result: dict) -> list[Table]:
    """One row for each kind and n:m."""
    rows = [(row["kind"], row["ratio"], row["formula"], row["exact"]) for row in result["rows"]]
    title = f"Masks of a matrix of {result['size']} x {result['size']}"
    return [Table("diversity", ("masks", "n:m", "formula", "counted"), rows, title)]


EXPERIMENT = Experiment(measure, tables)
