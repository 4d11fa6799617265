"""Tensors on the host, a chunk of tiles at a time on the device.

Checkpoints have tensors of many shapes, and compiling a solver takes longer than solving a tensor. Tiles are therefore
cut on the host, and solved in chunks of one shape: a solver is compiled once for each pattern.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.nonzero import as_bits
from nm_jax._core.patterns import Pattern, Unstructured
from nm_jax._core.rules import SparseLeaf
from nm_jax.solvers import Proof, Solver

_CHUNK = 1 << 18  # entries of a chunk
_RUNNING = 4  # chunks that the device may have before it


@dataclasses.dataclass(frozen=True)
class Found:
    """The mask of one tensor.

    Attributes:
      mask: True = kept.
      retained: l1 norm of what is kept.
      total: l1 norm of all.
      proof: what is proved of all its tiles.
    """

    mask: Bool[np.ndarray, "..."]
    retained: float
    total: float
    proof: Proof


def find_mask(
    weight: Float[np.ndarray, "*shape"],
    leaf: SparseLeaf,
    solver: Solver,
    scores: Float[np.ndarray, "*shape"] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Found:
    """The mask that keeps the most of the magnitude of a weight, or of given scores.

    Raises:
      CancelledError: as soon as `stopped` says so.
      ValueError: if the weight, or the scores, hold NaN.
    """
    cut = _Cut(leaf.tiling)
    tiles = cut.tiles(as_bits(weight)).view(weight.dtype) if scores is None else cut.tiles(scores)
    valid = cut.tiles(np.ones(weight.shape, bool)) if leaf.tiling.ragged else None
    parts: list[Any] = []
    running: deque[Any] = deque()
    for chunk, shown in _chunks(tiles, valid):
        if stopped():
            raise CancelledError
        running.append(_solve(solver, leaf.pattern, _scores(chunk) if scores is None else chunk, shown))
        if len(running) > _RUNNING:
            parts.append(jax.device_get(running.popleft()))
    parts += jax.device_get(list(running))
    masks, retained, totals, nans, proofs = zip(*parts, strict=True)
    if any(nans):
        raise ValueError("it holds NaN" if scores is None else "its scores hold NaN")
    mask = cut.leaf(np.concatenate(masks, axis=2)[:, :, : tiles.shape[2]])
    kept, total = (float(np.sum(sums, dtype=np.float64)) for sums in (retained, totals))
    if scores is not None:
        kept, total = norm(weight[mask]), norm(weight)
        if np.isnan(total):
            raise ValueError("it holds NaN")
    proof = jax.tree.map(lambda *sums: jnp.asarray(np.sum(sums, dtype=np.float64), jnp.float32), *proofs)
    return Found(mask, kept, total, proof)


@jax.jit
def _scores(tiles: Array) -> Array:
    """Their magnitudes. Apart from the solver, which would otherwise be compiled for every dtype."""
    return jnp.abs(tiles).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(solver: Solver, pattern: Pattern, scores: Array, valid: Array | None):
    solution = solver(scores, pattern, valid)
    return solution.mask, jnp.sum(solution.objective), jnp.sum(scores), jnp.any(solution.nan), solution.proof.total()


def broken_tiles(kept: Bool[np.ndarray, "..."], leaf: SparseLeaf) -> int:
    """How many tiles do not have the pattern."""
    if isinstance(leaf.pattern, Unstructured):  # one tile, which may have more entries than an int32 counts
        return int(np.count_nonzero(kept) > leaf.pattern.kept(kept.size))
    tiles = _Cut(leaf.tiling).tiles(kept)
    return sum(int(count) for count in jax.device_get([_broken(leaf.pattern, chunk) for chunk, _ in _chunks(tiles)]))


@functools.partial(jax.jit, static_argnums=0)
def _broken(pattern: Pattern, tiles: Array) -> Array:
    return jnp.sum(~pattern.allows(tiles))


class _Cut:
    """A leaf cut into tiles and put together again, in the order in which the tiles lie in the leaf's memory: reading
    across rows would miss the cache at every entry."""

    def __init__(self, tiling: Tiling):
        self._tiling = tiling
        like = self._split(np.empty(tiling.shape, bool))
        self._shape, self._order = like.shape, [0, 1, *sorted((2, 3, 4), key=lambda k: -like.strides[k])]

    def _split(self, leaf: np.ndarray) -> np.ndarray:
        return self._tiling.split(leaf)

    def tiles(self, leaf: np.ndarray) -> np.ndarray:
        """(rows, cols, tiles) of a leaf that is contiguous."""
        return self._split(leaf).transpose(self._order).reshape(*self._shape[:2], -1)

    def leaf(self, tiles: np.ndarray) -> np.ndarray:
        """The leaf of these tiles."""
        leaf = np.empty(self._tiling.shape, tiles.dtype)
        there = self._split(leaf).transpose(self._order)
        there[...] = tiles.reshape(there.shape)
        if np.may_share_memory(there, leaf):
            return leaf
        # Padding, or dimensions that had to be merged, made a copy.
        return np.ascontiguousarray(self._tiling.join(there.transpose(np.argsort(self._order))))


def _chunks(tiles: np.ndarray, valid: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Pieces of one shape; the last is filled up with zeros."""
    rows, cols, count = tiles.shape
    size = max(_CHUNK // (rows * cols), 1)
    for start in range(0, count, size):
        end = ((0, 0), (0, 0), (0, max(start + size - count, 0)))
        chunk = np.pad(tiles[:, :, start : start + size], end)
        yield chunk, None if valid is None else np.pad(valid[:, :, start : start + size], end, constant_values=True)


def norm(weight: Float[np.ndarray, "..."]) -> float:
    """Sum of the magnitudes."""
    return float(np.sum(np.abs(weight.astype(np.float32, copy=False)), dtype=np.float64))


def largest_sum(weight: Float[np.ndarray, "..."], count: int) -> float:
    """Sum of the `count` largest magnitudes: what an unstructured mask of so many entries retains.

    The bits of magnitudes are in their order. Counting the leading 16 finds those of the smallest magnitude that is
    wanted; only entries that share them are sorted. A few passes, whatever the values: selection in place takes many
    times longer on weights with ties, as pruned ones are.
    """
    bits = as_bits(weight).reshape(-1)
    shift = 8 * bits.itemsize - 16
    magnitude = bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)  # all but the sign
    pieces = [bits[start : start + _CHUNK] for start in range(0, bits.size, _CHUNK)]
    counts = np.zeros(1 << 15, np.int64)
    for piece in pieces:
        counts += np.bincount((piece & magnitude) >> shift, minlength=counts.size)
    larger = np.append(np.cumsum(counts[::-1])[::-1], 0)[1:]  # entries whose leading bits are larger
    taken = np.clip(count - larger, 0, counts)
    if not shift:  # leading bits are all there are
        chosen = np.flatnonzero(taken)
        values = chosen.astype(bits.dtype).view(weight.dtype).astype(np.float64)
        return float(values @ taken[chosen])
    last = int(np.argmax(taken > 0)) if count else counts.size
    total, ties = 0.0, [bits[:0]]
    for piece in pieces:
        magnitudes = piece & magnitude
        leading = magnitudes >> shift
        total += norm(np.where(leading > last, magnitudes, 0).view(weight.dtype))
        ties.append(magnitudes[leading == last])
    tied = np.sort(np.concatenate(ties))
    return total + norm(tied[tied.size - int(taken[last]) :].view(weight.dtype)) if count else total
