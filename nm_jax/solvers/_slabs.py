"""Solving many matrices with one pattern: compiled once, and never more than a slab of tiles unfolded at a time.

A solver wants tiles unfolded, entry by entry, which costs another copy of the weights when it is done for all of them.
Here a loop unfolds a slab, solves it and stores its mask. Large matrices are read in place, a few rows of tiles at a
time; small ones, which would leave a slab mostly empty, are unfolded into a common pool first.

    solve_matrices
      no entries                         _nothing
      the whole leaf, or small groups    _solve_at_once          one call of the solver
      large matrices of groups           _solve_in_place         a loop, some rows of groups at a time
      blocks                             _Slabs.solve            one loop for all matrices of the pattern
          _Large.read   some rows of blocks of one large matrix -> the solver -> masks and proofs of a slab
          _read_pool    blocks of the small (or padded) ones -> the same
          _collect      from the slabs back to each matrix
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern
from nm_jax.solvers._proof import Proof
from nm_jax.solvers.base import Solver, blank, check_scores

_SLAB_ENTRIES = 1 << 19  # fits the last-level cache, and leaves enough tiles to fill the vectors of any device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solved:
    """The mask of one matrix, and what its tiles add up to.

    Attributes:
      mask: True = kept, in the shape of the matrix.
      proof: of all its tiles.
      nan: number of tiles with NaN among their scores.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> from nm_jax._core.axes import Tiling
      >>> pattern = nm.NM(1, 2)
      >>> scores, tiling = jnp.ones((4, 4)), Tiling.of((4, 4), "io", pattern)
      >>> (solved,) = nm.solvers.solve_matrices([scores], [tiling], pattern, nm.solvers.TopK())
      >>> float(solved.nan), solved.mask.sum().item()
      (0.0, 8)
    """

    mask: Bool[Array, "..."]
    proof: Proof
    nan: Float[Array, ""]


def solve_matrices(
    scores: Sequence[Float[Array, "..."]],
    tilings: Sequence[Tiling],
    pattern: Pattern,
    solver: Solver,
    transform: Callable[[Array], Array] | None = None,
) -> list[Solved]:
    """Solves matrices of any layout that share a pattern.

    Args:
      scores: what to keep the most of, one array per matrix.
      tilings: how each is cut into tiles of the pattern.
      pattern: the pattern of all.
      solver: the solver of all.
      transform: elementwise function from the arrays to the scores, such as `jnp.abs`; it is applied slab by slab, so
        that the scores need no memory of their own.

    Raises:
      ValueError: for scores that are not floating point.

    Example: see `Solved`.

    Temporary memory: one byte per entry, 17 per tile, the pool of matrices that are smaller than a slab (or padded),
    and a slab. Unstructured masks take twice the weights: the scores, and integers in their order.
    """
    for score in scores:
        check_scores(score)
    transform = transform or (lambda x: x)
    if any(not score.size for score in scores):  # nothing to solve
        some = [k for k, score in enumerate(scores) if score.size]
        found = iter(solve_matrices([scores[k] for k in some], [tilings[k] for k in some], pattern, solver, transform))
        return [next(found) if score.size else _nothing(score) for score in scores]
    if not scores:
        return []
    if pattern.tile is None or pattern.tile[1] == 1:  # a few elementwise passes, which need no common pool
        ready = zip(scores, tilings, strict=True)
        return [
            (_solve_in_place if pattern.tile and not t.ragged and s.size > _SLAB_ENTRIES else _solve_at_once)(
                s, t, pattern, solver, transform
            )
            for s, t in ready
        ]
    return _Slabs(scores, tilings, *pattern.tile, transform).solve(pattern, solver)


def _nothing(score: Array) -> Solved:
    zero = blank((), jnp.float32, score)
    return Solved(blank(score.shape, bool, score), Proof(*(zero for _ in Proof._fields)), zero)


def _solve_in_place(score, tiling: Tiling, pattern, solver, transform) -> Solved:
    """A large matrix of tiles of one column, some rows of tiles at a time."""
    rows = tiling.rows_of_tiles(score)
    count, tall, wide = rows.shape
    most = min(max(_SLAB_ENTRIES // (tall * wide), 1), count)
    dtype = jnp.float64 if score.dtype.itemsize == 8 else jnp.float32
    height = next(k for k in range(most, 0, -1) if count % k == 0)

    def slab(k, carry):
        masks, *sums = carry
        slab = jax.lax.dynamic_slice_in_dim(rows, k * height, height)

        # A loop, because it is a fusion boundary: else the compiler reads and transforms each score for each other one.
        def unfold(i, tiles):
            row = transform(jax.lax.dynamic_index_in_dim(slab, i, 1, keepdims=False))
            return jax.lax.dynamic_update_index_in_dim(tiles, row.astype(tiles.dtype)[None], i, 0)

        tiles = jax.lax.fori_loop(0, tall, unfold, blank((tall, 1, height, wide), dtype, score))
        solution = solver(tiles, pattern)
        masks = jax.lax.dynamic_update_slice_in_dim(masks, solution.mask[:, 0].transpose(1, 0, 2), k * height, 0)
        found = solution.proof.total(), jnp.sum(solution.nan, dtype=jnp.float32)
        return masks, *jax.tree.map(jnp.add, tuple(sums), found)

    empty = Proof(*(blank((), dtype, score) for _ in Proof._fields))
    start = blank(rows.shape, bool, score), empty, blank((), jnp.float32, score)
    masks, proof, nan = jax.lax.fori_loop(0, count // height, slab, start)
    batch = tiling.matrix_shape[0]
    tiles = masks.reshape(batch, count // batch, tall, wide).transpose(2, 0, 1, 3)[:, None]
    return Solved(tiling.join(tiles), proof, nan)


def _solve_at_once(scores, tiling: Tiling, pattern, solver, transform) -> Solved:
    solution = solver(tiling.split(transform(scores)), pattern, tiling.valid())
    return Solved(tiling.join(solution.mask), solution.proof.total(), jnp.sum(solution.nan, dtype=jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Large:
    """A matrix that is read in place: `count` slabs of `height` rows of tiles; the last one overlaps its neighbour."""

    tiling: Tiling
    rows: Float[Array, "tile_rows rows columns"]
    height: int
    count: int

    @property
    def wide(self) -> int:
        return self.rows.shape[2] // self.tiling.cols

    def read(self, k, size: int, transform, dtype):
        """Tiles of slab k, (rows, cols, size), zeros after the last."""
        start = jnp.minimum(k * self.height, self.rows.shape[0] - self.height)
        rows, cols, wide = self.tiling.rows, self.tiling.cols, self.wide

        # A row of tiles at a time, which fits the nearest cache.
        def unfold(k, tiles):
            row = transform(jax.lax.dynamic_index_in_dim(self.rows, start + k, 0, keepdims=False)).astype(dtype)
            row = row.reshape(rows, wide, cols).transpose(0, 2, 1)
            return jax.lax.dynamic_update_slice_in_dim(tiles, row, k * wide, 2)

        return jax.lax.fori_loop(0, self.height, unfold, blank((rows, cols, size), dtype, self.rows))

    def gather(self, slabs):
        """(..., slabs, size) -> (..., batch, row tiles, column tiles): each row of tiles once."""
        lead = slabs.shape[:-2]
        tile_rows = slabs[..., : self.height * self.wide].reshape(*lead, self.count * self.height, self.wide)
        last = (self.count - 1) * self.height
        overlap = self.count * self.height - self.rows.shape[0]
        if overlap:
            parts = [tile_rows[..., :last, :], tile_rows[..., last + overlap :, :]]
            tile_rows = jnp.concatenate(parts, axis=-2)
        batch, contraction, _ = self.tiling.matrix_shape
        return tile_rows.reshape(*lead, batch, contraction // self.tiling.rows, self.wide)


class _Slabs:
    """The loop over slabs, and where each matrix is in it."""

    def __init__(self, scores: Sequence[Array], tilings: Sequence[Tiling], rows: int, cols: int, transform: Callable):
        self.tilings, self.transform = tilings, transform
        self.rows, self.cols, self.like = rows, cols, scores[0]
        self.dtype = jnp.float64 if any(s.dtype.itemsize == 8 for s in scores) else jnp.float32
        widest = max(-(-t.matrix_shape[2] // cols) for t in tilings)
        target = max(_SLAB_ENTRIES // (rows * cols), widest)

        self.large: dict[int, _Large] = {}
        pooled: list[int] = []
        for k, (score, tiling) in enumerate(zip(scores, tilings, strict=True)):
            if tiling.ragged or score.size < _SLAB_ENTRIES:
                pooled.append(k)
                continue
            tile_rows = tiling.rows_of_tiles(score)
            height = min(max(target // (tile_rows.shape[2] // cols), 1), tile_rows.shape[0])
            self.large[k] = _Large(tiling, tile_rows, height, -(-tile_rows.shape[0] // height))

        self.pooled = {k: math.prod(self._counts(k)) for k in pooled}
        self.pool: Array | None
        self.valid: Array | None
        self.pool, self.valid = self._unfold(scores) if pooled else (None, None)
        pool_size = sum(self.pooled.values())
        used = [large.height * large.wide for large in self.large.values()]
        self.size = max(used, default=min(target, pool_size))
        self.pool_slabs = -(-pool_size // self.size)
        if pooled:
            spare = self.pool_slabs * self.size - pool_size
            self.pool, self.valid = (
                None
                if x is None
                else jnp.pad(x, ((0, 0), (0, 0), (0, spare)), constant_values=fill).reshape(
                    *x.shape[:2], self.pool_slabs, self.size
                )
                for x, fill in ((self.pool, 0), (self.valid, True))
            )

    def _counts(self, k: int) -> tuple[int, int, int]:
        """Tiles of matrix k: (batch, row tiles, column tiles)."""
        batch, rows, cols = self.tilings[k].matrix_shape
        return batch, -(-rows // self.rows), -(-cols // self.cols)

    def _unfold(self, scores):
        """Tiles of the small matrices one after another, and which of their entries are not padding."""

        def flat(tiles):
            return tiles.reshape(self.rows, self.cols, -1)

        tiles = [flat(self.tilings[k].split(self.transform(scores[k]).astype(self.dtype))) for k in self.pooled]
        valid = [self.tilings[k].valid() for k in self.pooled]
        if all(v is None for v in valid):
            return jnp.concatenate(tiles, axis=2), None
        shown = [jnp.ones(t.shape, bool) if v is None else flat(v) for t, v in zip(tiles, valid, strict=True)]
        return jnp.concatenate(tiles, axis=2), jnp.concatenate(shown, axis=2)

    def solve(self, pattern: Pattern, solver: Solver) -> list[Solved]:
        readers: list[Callable] = []
        begins, slabs = [], 0  # the first slab of each reader
        for large in self.large.values():
            readers.append(functools.partial(self._read_large, large))
            begins.append(slabs)
            slabs += large.count
        if self.pool is not None:
            readers.append(self._read_pool)
            begins.append(slabs)
            slabs += self.pool_slabs

        def slab(k, carry):
            k = jnp.asarray(k, jnp.int32)  # a Python integer under `jax.disable_jit`
            # Scalars that the compiler sees: an operation of the partitioner may not hold constant arrays.
            which = functools.reduce(jnp.add, [(k >= begin).astype(jnp.int32) for begin in begins]) - 1
            begin = functools.reduce(jnp.maximum, [jnp.where(k >= begin, begin, 0) for begin in begins])
            tiles, valid = jax.lax.switch(which, readers, k - begin)
            solution = solver(tiles, pattern, valid)
            found = (solution.mask, solution.proof, solution.nan)
            # By slab, not by tile: tiles may be more than an int32 counts.
            return jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, k, whole.ndim - 2), carry, found
            )

        empty = (
            blank((self.rows, self.cols, slabs, self.size), bool, self.like),
            Proof(*[blank((slabs, self.size), self.dtype, self.like) for _ in Proof._fields]),
            blank((slabs, self.size), bool, self.like),
        )
        found = jax.lax.fori_loop(0, slabs, slab, empty)
        return self._collect(jax.tree.map(lambda x: x.reshape(*x.shape[:-2], slabs * self.size), found))

    def _read_large(self, large: _Large, k):
        tiles = large.read(k, self.size, self.transform, self.dtype)
        return tiles, None if self.valid is None else jnp.ones(tiles.shape, bool)

    def _read_pool(self, k):
        return tuple(
            None if x is None else jax.lax.dynamic_index_in_dim(x, k, axis=2, keepdims=False)
            for x in (self.pool, self.valid)
        )

    def _collect(self, found) -> list[Solved]:
        """The parts of each matrix, out of the pieces of all: trees of (..., tiles)."""
        parts: dict[int, Any] = {}

        def cut(start: int, shape: tuple[int, ...]):
            """`math.prod(shape)` tiles of all that was found, in this shape."""
            return jax.tree.map(
                lambda x: x[..., start : start + math.prod(shape)].reshape(*x.shape[:-1], *shape), found
            )

        start = 0
        for k, large in self.large.items():
            shape = (large.count, self.size)
            parts[k] = jax.tree.map(large.gather, cut(start, shape))
            start += math.prod(shape)
        for k, count in self.pooled.items():
            parts[k] = cut(start, self._counts(k))
            start += count
        return [
            Solved(tiling.join(mask), proof.total(), jnp.sum(nan, dtype=jnp.float32))
            for tiling, (mask, proof, nan) in ((self.tilings[k], parts[k]) for k in range(len(self.tilings)))
        ]
