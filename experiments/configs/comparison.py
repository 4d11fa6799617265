"""Variants of a study against its first one: means, spreads, differences of pairs, and what those say."""

from collections.abc import Mapping

import numpy as np
from scipy import stats

import nm_jax as nm
from experiments.harness import Experiment, Table


def finished(result: dict, name: str, figure: str = "accuracies") -> dict[int, float]:
    """Last accuracies of a variant, or other figures, by seed, of those that are through."""
    rows = [row for row in result["rows"] if row["name"] == name]
    return {row["seed"]: row[figure][-1] for row in rows if row["epochs_done"] == row["epochs"]}


def tables(result: dict) -> list[Table]:
    """Every variant, and how far its runs are."""
    return [compared("accuracy", result)]


def compared(
    table: str,
    result: dict,
    paper: Mapping[str, str] | None = None,
    figure: str = "accuracies",
    label: str = "test accuracy, %",
) -> Table:
    """Accuracy of every variant, and its difference to the first one, seed by seed, with what that says.

    Args:
      table: name of the table.
      result: of a study.
      paper: accuracies of the paper, by variant.
      figure: what is compared instead, as the rows call it.
      label: what the table calls it.
    """
    rows, names = [], list(dict.fromkeys(row["name"] for row in result["rows"]))
    for name in names:
        mine = [row for row in result["rows"] if row["name"] == name]
        own, first = finished(result, name, figure), finished(result, names[0], figure)
        values = list(own.values())
        paired = [own[seed] - first[seed] for seed in own if seed in first] if name != names[0] else []
        flips = [row["flip_rates"][-1] for row in mine if row.get("flip_rates")]
        done, whole = (sum(row[key] for row in mine) for key in ("epochs_done", "epochs"))
        cells = (
            name,
            f"{np.mean(values):.2f} {spread(values)}".strip() if values else None,
            f"{np.mean(paired):+.2f} {spread(paired)}".strip() if paired else None,
            verdict(paired),
            f"{100 * np.mean(flips):.2f} %" if flips else None,
            SPARSE_UNITS[kind(mine[0]["pattern"])],
            f"{len(values)} ({done} of {whole} epochs)",
        )
        rows.append((*cells, (paper or {}).get(name)) if paper is not None else cells)
    header = ("", label, f"to {names[0]}", "that is", "last flips", "SU", "seeds")
    title = f"{result['network']}, {result['data']}, from {result['start']}, preset {result['preset']}"
    notes = "Mean and standard deviation of the seeds that are through; differences are between runs of one seed."
    if (before := result.get("before")) and before[figure]:
        notes += f" They go on from {before[figure][-1]:.2f}."
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


def spread(values: list[float]) -> str:
    """Standard deviation of a sample, if there is one."""
    return f"± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""


def against_paper(study: str, paper: Mapping[str, str]) -> Experiment:
    """A table for every preset of a study that there are results of, beside the paper's accuracies by variant."""
    presets = ("paper", "gpu", "cpu")
    sources = tuple(f"configs/{study}/{preset}" for preset in presets)

    def tables(result: dict) -> list[Table]:
        return [compared(p, result[s], paper) for p, s in zip(presets, sources, strict=True) if result.get(s)]

    return Experiment(None, tables, sources=sources)
