"""Blocks of scores to solve: distributions that are easy, hard, or meant to break a solver; and real weights."""

import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def blocks_of(kind: str, m: int, count: int, seed: int = 0) -> np.ndarray | None:
    """float32 scores (m, m, count); `None` where the data are absent."""
    rng = np.random.default_rng(seed)
    if kind != "real weights":
        return DISTRIBUTIONS[kind](rng, (m, m, count)).astype(np.float32)
    parts = [_tiles(np.abs(a), m) for a in _real_matrices() if min(a.shape) >= m]
    if not parts:
        return None
    tiles = np.concatenate(parts, axis=2)
    return tiles[:, :, rng.permutation(tiles.shape[2])[:count] if count < tiles.shape[2] else slice(None)]


def _tiles(matrix: np.ndarray, m: int) -> np.ndarray:
    """The m x m tiles of a matrix, (m, m, tiles)."""
    tall, wide = (size // m for size in matrix.shape)
    tiles = matrix[: tall * m, : wide * m].reshape(tall, m, wide, m)
    return tiles.transpose(1, 3, 0, 2).reshape(m, m, -1)


@functools.cache
def _real_matrices() -> list[np.ndarray]:
    folder = Path(os.environ.get("NM_JAX_DATA", "")) / "weights"
    matrices = []
    for path in sorted(folder.glob("*.npz")) if "NM_JAX_DATA" in os.environ else ():
        arrays = np.load(path)
        matrices += [
            arrays[key].reshape(len(arrays[key]), -1).astype(np.float32)
            for key in arrays.files
            if arrays[key].ndim >= 2 and arrays[key].dtype.kind == "f" and len(arrays[key]) < 10_000
        ]
    return matrices


def _bfloat16(rng, shape):
    return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32)


DISTRIBUTIONS = {
    "Gaussian": lambda rng, shape: np.abs(rng.normal(size=shape)),
    "heavy-tailed": lambda rng, shape: np.abs(rng.standard_cauchy(shape)),
    "uniform": lambda rng, shape: rng.random(shape),
    "signed": lambda rng, shape: rng.normal(size=shape),
    "four levels": lambda rng, shape: rng.integers(1, 5, shape) / 4,
    "thirds": lambda rng, shape: rng.integers(0, 4, shape) / 3,
    "binary": lambda rng, shape: rng.integers(0, 2, shape),
    "ternary, signed": lambda rng, shape: rng.integers(-1, 2, shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, 0.3),
    "90 % zeros": lambda rng, shape: np.abs(rng.normal(size=shape)) * (rng.random(shape) < 0.1),
    "subnormal": lambda rng, shape: rng.integers(1, 100, shape) * 1e-45,
    "60 decades": lambda rng, shape: 10.0 ** rng.uniform(-30, 30, shape),
    "bfloat16": lambda rng, shape: np.abs(_bfloat16(rng, shape)),
    "bfloat16, signed": _bfloat16,
    "powers of two": lambda rng, shape: 2.0 ** rng.integers(-20, 20, shape),
    "rank one": lambda rng, shape: rng.random((shape[0], 1, shape[2])) * rng.random((1, *shape[1:])),
}
