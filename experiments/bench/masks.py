"""Random 2:4 masks that show what a sparse product does with every pattern."""

import numpy as np


def transposable(rng: np.random.Generator, k: int, rows: int) -> np.ndarray:
    """A random 2:4-T mask: permuted circulant blocks."""
    circulant = np.array([[(j - i) % 4 < 2 for j in range(4)] for i in range(4)])
    permutation = rng.random((k // 4, rows // 4, 2, 4)).argsort(axis=-1)
    blocks = circulant[permutation[:, :, 0, :, None], permutation[:, :, 1, None, :]]
    return blocks.swapaxes(1, 2).reshape(k, rows)


def all_pairs(rng: np.random.Generator, k: int, rows: int) -> np.ndarray:
    """A 2:4 mask along k in which neighbouring groups have each of the 36 pairs of patterns, at random."""
    patterns = np.array([[i in kept for i in range(4)] for kept in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))])
    first, second = np.divmod(rng.permuted(np.arange(-(-k // 8) * rows) % 36), 6)
    pairs = np.stack([patterns[first], patterns[second]], axis=1).reshape(rows, -1)
    return pairs[:, :k].T
