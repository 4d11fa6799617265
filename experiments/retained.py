"""How much magnitude the optimal masks of each kind keep of pretrained networks, against unstructured ones.

Of all layers but the first whose sizes 8 divides, and of the last layer alone where it does.

Paper: none; paper/figure_3b shows it
Time: 2 minutes on 2 cores
Data: pretrained weights, CIFAR, STS-B (NM_JAX_DATA)
"""

import math
from typing import Any

import jax
import numpy as np

import nm_jax as nm
from experiments.harness import Experiment, Run, Table
from experiments.networks import NETWORKS

TILE, CHUNK = 8, 1 << 13
UNSTRUCTURED = "US-0.5"
PATTERNS = (UNSTRUCTURED, "4:8", "2:4", "1:2", "4:8-T", "2:4-T", "1:2-T", "4:8-S", "2:4-S")


def measure(run: Run) -> dict:
    """Retained magnitude of every network and pattern, in parts of what an unstructured mask of each layer retains."""
    names = list(NETWORKS)[:1] if run.quick else list(NETWORKS)
    rows = []
    with run.progress() as display:
        for name in display.track(names, description="networks"):
            network = NETWORKS[name]
            variables = network.variables()
            params, inputs = variables["params"], network.calibration(1, seed=0)[0]
            plan = nm.plan(network.apply(variables), params, *inputs, pattern="4:8-T", last="4:8-T")
            without = nm.plan(network.apply(variables), params, *inputs, pattern="4:8-T")
            layers = [leaf for leaf in plan.leaves if leaf.pattern]
            last = {leaf.path for leaf in layers if without[leaf.path].pattern is None}
            kept: dict[str, dict[str, float]] = {pattern: _kept(params, layers, pattern) for pattern in PATTERNS}
            for part, paths in (("all", {leaf.path for leaf in layers}), ("last", last)):
                if paths:
                    sums = {pattern: sum(kept[pattern][path] for path in paths) for pattern in PATTERNS}
                    values = {pattern: value / sums[UNSTRUCTURED] for pattern, value in sums.items()}
                    rows.append({"network": network.title, "layers": part, "count": len(paths), "retained": values})
    return {"rows": rows}


def _kept(params: Any, layers: list, pattern: str) -> dict[str, float]:
    """Magnitude that is kept of each layer."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    weights = {"/".join(key.key for key in path): np.abs(np.asarray(w, np.float32)) for path, w in paths}
    if pattern == UNSTRUCTURED:
        return {leaf.path: _largest_half(weights[leaf.path]) for leaf in layers}
    tiles = [_tiles(weights[leaf.path], leaf.axes) for leaf in layers]
    owner = np.repeat(np.arange(len(tiles)), [len(t) for t in tiles])
    whole = np.concatenate(tiles)
    whole = np.pad(whole, ((0, -len(whole) % CHUNK), (0, 0), (0, 0)))
    kept = []
    for chunk in whole.reshape(-1, CHUNK, TILE, TILE):  # of one shape: one program for each pattern
        (mask,) = nm.compute_masks([chunk], [("", pattern, "bio")])
        kept.append((chunk * np.asarray(mask)).sum(axis=(1, 2), dtype=np.float64))
    sums = np.bincount(owner, np.concatenate(kept)[: len(owner)])
    return {leaf.path: float(value) for leaf, value in zip(layers, sums, strict=True)}


def _largest_half(weight: np.ndarray) -> float:
    return float(np.sort(weight, axis=None)[weight.size // 2 :].sum(dtype=np.float64))


def _tiles(weight: np.ndarray, axes: str) -> np.ndarray:
    """The 8 x 8 tiles over contraction and output of a weight."""
    order = [k for letter in "bio" for k in range(weight.ndim) if axes[k] == letter]
    rows, cols = (math.prod(n for n, a in zip(weight.shape, axes, strict=True) if a == letter) for letter in "io")
    tiled = weight.transpose(order).reshape(-1, rows // TILE, TILE, cols // TILE, TILE)
    return tiled.swapaxes(2, 3).reshape(-1, TILE, TILE)


def tables(result: dict) -> list[Table]:
    """Networks down, patterns across."""
    rows = [
        (row["network"], row["layers"], row["count"], *(f"{row['retained'][pattern]:.3f}" for pattern in PATTERNS))
        for row in result["rows"]
    ]
    title = "Magnitude retained at 50 % zeros, in parts of what unstructured masks retain"
    return [Table("retained", ("network", "layers", "", *PATTERNS), rows, title)]


EXPERIMENT = Experiment(measure, tables)
