"""A real PyTorch checkpoint through `nm-jax`: the MiniLM sentence encoder, dense, 2:4-T and 4:8-T, without retraining.

The weights are written as a PyTorch-layout safetensors file, pruned by the command line, and checked by plain numpy
along both axes. A torch model loads each file, unchanged and strictly, and embeds the sentence pairs of STS-B (dev);
the figure is the Spearman correlation of the cosines with the human scores.

Paper: none
Time: 3 minutes on 2 cores
Data: MiniLM, STS-B (NM_JAX_DATA); pip install torch
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

from experiments.data import glue, packed
from experiments.data.wordpiece import Tokenizer
from experiments.harness import Experiment, Run, Table

PATTERNS = ("2:4-T", "4:8-T")
LENGTH, QUICK = 64, 100


def fullest_groups(path: Path, pruned: list[str], m: int) -> tuple[int, int]:
    """The most entries that any group of m keeps, along the inputs and along the outputs of a layer: plain numpy."""
    fullest = [0, 0]
    for name, weight in load_file(path).items():
        if name in pruned:
            out, into = weight.shape
            kept = weight != 0
            fullest[0] = max(fullest[0], int(kept.reshape(out, into // m, m).sum(2).max()))
            fullest[1] = max(fullest[1], int(kept.reshape(out // m, m, into).sum(1).max()))
    return fullest[0], fullest[1]


def unchanged(path: Path, dense: Path) -> bool:
    """Whether every tensor is what it was, bit for bit, or zero where it was pruned."""
    after, before = load_file(path), load_file(dense)
    return list(after) == list(before) and all(
        after[name].dtype == before[name].dtype and np.all((after[name] == before[name]) | (after[name] == 0))
        for name in before
    )


def read_pairs(limit: int | None) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """The sentence pairs as tokens, and their scores."""
    tokenizer = Tokenizer.read(packed.folder() / "weights" / "minilm_vocab.txt")
    pairs = glue.similarity(packed.folder() / "text" / "stsb-en-dev.csv")
    return [tokenizer(texts[:limit], LENGTH) for texts in (pairs.first, pairs.second or [])], pairs.labels[:limit]


def nm_jax(*arguments: str | Path) -> None:
    """Runs the command line without its tables, and stops if it does not succeed."""
    command = [sys.executable, "-m", "nm_jax.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)


def measure(run: Run) -> dict:
    """The dense checkpoint, and the pruned ones."""
    try:
        torch_model: Any = importlib.import_module("experiments.networks.minilm_torch")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install torch safetensors") from None
    texts, scores = read_pairs(QUICK if run.quick else None)

    def spearman(path: Path) -> float:
        first, second = torch_model.embed(path, texts)
        return 100 * float(spearmanr((first * second).sum(1), scores).statistic)

    weights = {name: np.ascontiguousarray(w) for name, w in packed.weights("all_minilm_l6_v2_fp16").items()}
    pruned = [name for name in weights if name.endswith("dense.weight") or (".self." in name and "weight" in name)]
    with tempfile.TemporaryDirectory() as folder, run.progress() as progress:
        dense = Path(folder) / "dense.safetensors"
        save_file(weights, dense, metadata={"format": "pt"})
        rows: list[dict] = [{"pattern": "dense", "spearman": spearman(dense)}]
        for pattern in progress.track(PATTERNS, description="prune"):
            path = Path(folder) / f"{pattern.replace(':', 'of')}.safetensors"
            nm_jax("prune", dense, path, "--pattern", pattern)
            nm_jax("verify", path)
            n, m = map(int, pattern.removesuffix("-T").split(":"))
            along = fullest_groups(path, pruned, m)
            row = {"pattern": pattern, "spearman": spearman(path), "tensors": len(pruned), "fullest_group": along}
            rows.append(row | {"ok": along == (n, n) and unchanged(path, dense)})
    return {"runs": rows}


def tables(result: dict) -> list[Table]:
    """The figure, and what numpy says of the patterns."""
    rows = [
        (
            row["pattern"],
            f"{row['spearman']:.2f}",
            " / ".join(map(str, row.get("fullest_group", ()))),
            {True: "yes", False: "NO", None: ""}[row.get("ok")],
        )
        for row in result["runs"]
    ]
    header = ("pattern", "Spearman, %", "fullest group, W / W^T", "checked by numpy")
    return [Table("spearman", header, rows, "MiniLM, STS-B dev, without retraining")]


def problems(result: dict) -> list[str]:
    """Checkpoints without their pattern."""
    return [f"{row['pattern']}: not as it should be" for row in result["runs"] if not row.get("ok", True)]


EXPERIMENT = Experiment(measure, tables, problems=problems)
