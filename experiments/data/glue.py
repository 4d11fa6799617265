"""Sentences and pairs of sentences with a label or a score: GLUE's tables, and STS-B.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding" (2019).
"""

import csv
import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Examples of a task.

    Attributes:
      first: sentences.
      second: the other sentence of each; `None`: there are no pairs.
      labels: classes, int32, or scores, float64.
    """

    first: list[str]
    second: list[str] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Sentences":
        return Sentences(self.first[rows], self.second and self.second[rows], self.labels[rows])


# Columns of the sentences, and that of the class.
TABLES = {"SST-2": (("sentence",), "label"), "MRPC": (("#1 String", "#2 String"), "Quality")}


def read(path: Path, task: str) -> Sentences:
    """A table of GLUE with a line of names: tabs, no quoting.

    Args:
      path: the file.
      task: a key of `TABLES`.

    Raises:
      ValueError: a line that is not as it should be, with its number.
    """
    columns, label = TABLES[task]
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not lines or not {*columns, label} <= set(lines[0]):
        raise ValueError(f"{path}: line 1 does not name the columns {', '.join((*columns, label))} of {task}")
    header = lines[0]
    texts: list[list[str]] = [[] for _ in columns]
    labels = []
    for number, line in enumerate(lines[1:], 2):
        row = _row(path, number, line, header)
        for text, column in zip(texts, columns, strict=True):
            text.append(_sentence(path, number, row[column]))
        if row[label] not in ("0", "1"):
            raise ValueError(f"{path}: line {number}: {label} is {row[label]!r}, not 0 or 1")
        labels.append(int(row[label]))
    return Sentences(texts[0], texts[1] if len(texts) > 1 else None, np.array(labels, np.int32))


def similarity(path: Path) -> Sentences:
    """STS-B as a table with commas: two sentences, and how similar they are, from 0 to 5.

    Raises:
      ValueError: a line that is not as it should be, with its number.
    """
    first, second, scores = [], [], []
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.reader(file), 1):
            row = _row(path, number, line, ["first", "second", "score"])
            first.append(_sentence(path, number, row["first"]))
            second.append(_sentence(path, number, row["second"]))
            try:
                score = float(row["score"])
            except ValueError:
                score = np.nan
            if not 0 <= score <= 5:
                raise ValueError(f"{path}: line {number}: the score is {row['score']!r}, not a number from 0 to 5")
            scores.append(score)
    return Sentences(first, second, np.array(scores, np.float64))


def _row(path: Path, number: int, line: list[str], header: list[str]) -> dict[str, str]:
    if len(line) != len(header):
        raise ValueError(f"{path}: line {number} has {len(line)} columns, not {len(header)}")
    return dict(zip(header, line, strict=True))


def _sentence(path: Path, number: int, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{path}: line {number}: an empty sentence")
    return text
