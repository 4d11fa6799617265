"""Case lists and oracles that share no code with the library."""

import functools
import itertools
import os
import pathlib

import numpy as np
import pytest

from nm_jax import NM, SequentialNM, TransposableNM, Unstructured
from nm_jax.solvers import Exact, MeetInTheMiddle

# ----------------------------------------------------------------------------------------------------------- cases


def _spread(rng, shape):
    return 10.0 ** rng.uniform(-30, 30, shape)


def _with(value):
    def make(rng, shape):
        scores = rng.normal(size=shape)
        scores.flat[rng.integers(scores.size)] = value
        return scores

    return make


# Scores of every kind that a solver must give a valid mask for: name -> (rng, shape) -> float64 array.
SCORES = {
    "gaussian": lambda rng, shape: np.abs(rng.normal(size=shape)),
    "heavy_tailed": lambda rng, shape: np.abs(rng.standard_cauchy(shape)),
    "signed": lambda rng, shape: rng.normal(size=shape),
    "negative": lambda rng, shape: -np.abs(rng.normal(size=shape)),
    "ties": lambda rng, shape: rng.integers(0, 4, shape).astype(float),
    "binary": lambda rng, shape: rng.integers(0, 2, shape).astype(float),
    "mostly_zero": lambda rng, shape: np.abs(rng.normal(size=shape)) * (rng.random(shape) < 0.1),
    "zeros": lambda rng, shape: np.zeros(shape),
    "minus_zero": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    "constant": lambda rng, shape: np.full(shape, 0.3),
    "one_huge": _with(1e38),
    "one_negative_huge": _with(-1e38),
    "subnormal": lambda rng, shape: rng.integers(1, 100, shape) * 1e-45,
    "sixty_decades": _spread,
    "infinity": _with(np.inf),
    "minus_infinity": _with(-np.inf),
    "all_infinite": lambda rng, shape: np.where(rng.random(shape) < 0.5, np.inf, -np.inf),
    "largest": lambda rng, shape: np.where(rng.random(shape) < 0.5, 3.4e38, -3.4e38),
}

# Every suite that goes over the patterns goes over these.
PATTERNS = [
    NM(1, 2),
    NM(2, 4),
    NM(4, 8),
    NM(3, 5),
    SequentialNM(1, 2),
    SequentialNM(2, 4),
    SequentialNM(3, 8),
    Unstructured(0.5),
    Unstructured(0.9),
    TransposableNM(1, 2),
    TransposableNM(1, 3),
    TransposableNM(2, 4),
    TransposableNM(3, 4),
    TransposableNM(4, 8),
    TransposableNM(2, 8),
    TransposableNM(2, 4, at_most=True),
    TransposableNM(4, 8, at_most=True),
]

PROVING = (Exact, MeetInTheMiddle)  # the solvers that prove the optimum, on their grid

# ---------------------------------------------------------------------------------------------------------- oracles


def check_mask(mask, pattern):
    """Whether an (contraction, output) mask has its pattern, and keeps exactly as much as it says: plain loops."""
    mask = np.asarray(mask)
    rows, cols = mask.shape
    if isinstance(pattern, Unstructured):
        return int(mask.sum()) == max(mask.size - round(pattern.sparsity * mask.size), 1)
    if not isinstance(pattern, NM | SequentialNM | TransposableNM):  # one that this file does not know
        found = {tile.tobytes() for tile in tiles(mask, *pattern.tile)}
        return found <= {kept.astype(bool).tobytes() for kept in all_masks(pattern)}
    n, m = pattern.n, pattern.m
    exactly = not getattr(pattern, "at_most", False)
    for col in range(cols):
        for start in range(0, rows, m):
            group = [bool(mask[start + k, col]) for k in range(m)]
            if sum(group) > n or (exactly and sum(group) != n):
                return False
            if isinstance(pattern, SequentialNM):
                zeros = "".join("1" if kept else "0" for kept in group)
                if "0" * (m - n) not in zeros:
                    return False
    if isinstance(pattern, TransposableNM):
        for row in range(rows):
            for start in range(0, cols, m):
                kept = sum(bool(mask[row, start + k]) for k in range(m))
                if kept > n or (exactly and kept != n):
                    return False
    return True


@functools.cache
def all_masks(pattern):
    """Every mask of one tile, (count, rows, cols), by enumeration."""
    if not isinstance(pattern, NM | SequentialNM | TransposableNM):
        size = pattern.tile[0] * pattern.tile[1]
        every = np.array(list(itertools.product([False, True], repeat=size))).reshape(-1, *pattern.tile)
        return every[np.asarray(pattern.full(np.moveaxis(every, 0, -1)))].astype(float)
    m = pattern.m
    if isinstance(pattern, TransposableNM):
        sizes = range(pattern.n + 1) if pattern.at_most else [pattern.n]
        rows = [
            [float(k in chosen) for k in range(m)]
            for size in sizes
            for chosen in itertools.combinations(range(m), size)
        ]
        blocks = np.array(list(itertools.product(rows, repeat=m)))
        sums = blocks.sum(axis=1)
        fits = (sums <= pattern.n).all(axis=1) if pattern.at_most else (sums == pattern.n).all(axis=1)
        return blocks[fits]
    if isinstance(pattern, SequentialNM):
        zeros = m - pattern.n
        starts = range(pattern.n + 1)
        return np.array([[[float(not s <= k < s + zeros)] for k in range(m)] for s in starts])
    chosen = itertools.combinations(range(m), pattern.n)
    return np.array([[[float(k in kept)] for k in range(m)] for kept in chosen])


def best_by_enumeration(block, pattern):
    """Largest sum of kept scores over all masks of one tile, in float64."""
    return float((all_masks(pattern) * np.asarray(block, np.float64)).sum(axis=(1, 2)).max())


def algorithm_1(block, zeros):
    """The paper's Algorithm 1 to the letter (with `<`, see the lemma's proof): the entries it keeps."""
    m = len(block)
    edges = sorted((float(block[i][j]), i, j) for i in range(m) for j in range(m))
    pruned = np.zeros((m, m), bool)
    for _, i, j in edges:
        if pruned[i].sum() < zeros or pruned[:, j].sum() < zeros:
            pruned[i, j] = True
    return ~pruned


def worst_group(weight, contracted, m):
    """Most nonzeros in m consecutive entries along one dimension: slices of numpy arrays, nothing of the library."""
    moved = np.moveaxis(np.asarray(weight, np.float32), contracted, 0)
    return max(int((moved[start : start + m] != 0).sum(axis=0).max()) for start in range(0, len(moved), m))


def tiles(matrix, rows, cols):
    """(contraction, output) matrix -> list of tiles, row by row."""
    matrix = np.asarray(matrix)
    return [
        matrix[i : i + rows, j : j + cols]
        for i in range(0, matrix.shape[0], rows)
        for j in range(0, matrix.shape[1], cols)
    ]


def reference_blocks():
    """The reference optima on real blocks; skips where the file is absent."""
    folder = os.environ.get("NM_JAX_DATA")
    path = pathlib.Path(folder or ".") / "reference" / "transposable_blocks.npz"
    if folder is None or not path.exists():
        pytest.skip("reference optima: set NM_JAX_DATA to the folder that has reference/transposable_blocks.npz")
    return np.load(path)
