"""What refreshing the masks costs: the time that a refresh every 40 steps adds to a training step.

Hubara et al., Tables 2 and A.3: on ResNet-50, 180 % at 4:8-T and 160 % at 2:4-T with an integer program, 70 and 65 %
with min-cost flow, 14 and 13 % with their 2-approximation. Ours is of six 1024 x 1024 layers at 4:8-T and batch 512.

Paper: Tables 2 and A.3
Time: none; from the results of bench/solvers
Data: none
"""

from experiments.harness import Experiment, Table

PAPER = {  # method -> the paper's at 4:8-T and 2:4-T, per cent
    "IntegerProgram": (180, 160),
    "MinCostFlow (assignment gadget)": (70, 65),
    "OR-tools min-cost flow": (70, 65),
    "Greedy (Algorithm 1 to the letter)": (14, 13),
    "Greedy (2-approximation, completed)": (14, 13),
}


def tables(result: dict) -> list[Table]:
    """Every solver, against the paper's of its kind."""
    rows = []
    for row in result["bench/solvers"]["overhead"]:
        paper = [f"{percent} %" for percent in PAPER.get(row["method"], ())] or ["", ""]
        rows.append((row["method"], f"{float(format(row['overhead_percent'], '.2g')):,g} %", row["how"], *paper))
    header = ("solver", "adds, 4:8-T", "how", "paper, 4:8-T", "paper, 2:4-T")
    return [Table("overhead", header, rows, "A refresh every 40 steps")]


EXPERIMENT = Experiment(None, tables, sources=("bench/solvers",))
