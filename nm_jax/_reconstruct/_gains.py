"""What a pattern keeps of the channels of a layer when one of each group changes places with one of another.

From every group of m channels one is taken out. What group g keeps with candidate c in the empty place is

    gains[g, c] = sum over tiles t of max over p (rest[g, t, p] + candidate[c, t, p]),

where p are the ways in which a row of a tile may be kept, `candidate` is what p keeps of the channel, and `rest` the
most that the other rows keep beside it. Ways are few (two for n:m, six for 2:4-T), so that all pairs of groups and
candidates cost little more than a matrix product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import NM, Pattern, TransposableNM
from nm_jax.solvers import default_solver, solve_matrices
from nm_jax.solvers.base import order_key, rank

_MOST_MASKS = 128  # of a tile, that are tried one by one
_TILES_AT_ONCE = 16  # as many terms are added before the sums go back to memory


@dataclasses.dataclass(frozen=True)
class Channels:
    """A layer as its channels see it.

    Attributes:
      scores: one row per channel; every tile has its columns side by side.
      pattern: what tiles of channels and columns keep.
    """

    scores: Float[Array, "channels columns"]
    pattern: Pattern

    @property
    def exact(self) -> bool:
        """Whether `gains` are what the pattern keeps, or those of n:m, which has one condition less."""
        return _gains_pattern(self.pattern) == self.pattern

    def kept(self, order: Int[np.ndarray, " channels"]) -> float:
        """The most that the pattern keeps with the channels in this order."""
        return float(np.sum(np.asarray(_kept(self.scores, jnp.asarray(order), self.pattern)), dtype=np.float64))

    def gains(self, groups: Int[np.ndarray, "groups size"], place: int) -> Float[np.ndarray, "groups candidates"]:
        """What each group keeps with each candidate in one place; the candidates are what is there now. A group may
        hold several of the pattern's: what those without the place keep is left out."""
        assert self.pattern.tile is not None
        rows = self.pattern.tile[0]
        first, place = place - place % rows, place % rows
        members = groups[:, first : first + rows]
        if isinstance(self.pattern, NM | TransposableNM):  # no place differs from another: one compilation for all
            members, place = np.roll(members, -place, axis=1), 0
        return np.asarray(_gains(self.scores, jnp.asarray(members), place, self.pattern))


def _gains_pattern(pattern: Pattern) -> Pattern:
    """The pattern whose gains are computed."""
    masks = pattern.masks()
    if isinstance(pattern, NM) or (masks is not None and len(masks) <= _MOST_MASKS):
        return pattern
    groups = pattern.contraction_groups
    if groups is None:
        raise ValueError(f"no search is known for {pattern}: it promises nothing of groups of channels")
    return NM(groups.n, groups.m)


@functools.partial(jax.jit, static_argnames="pattern")
def _kept(scores, order, pattern: Pattern):
    permuted = scores[order]
    tiling = Tiling.of(permuted.shape, "io", pattern)
    (solved,) = solve_matrices([permuted], [tiling], pattern, default_solver(pattern))
    return jnp.sum(jnp.where(solved.mask, permuted, 0), axis=1)


@functools.partial(jax.jit, static_argnames=("place", "pattern"))
def _gains(scores, groups, place: int, pattern: Pattern):
    exact = _gains_pattern(pattern)
    rows, cols = exact.tile
    ways = _n_of_m if isinstance(exact, NM) else _listed
    count = len(groups)
    tiles = scores.shape[1] // cols
    padded = -(-tiles // _TILES_AT_ONCE) * _TILES_AT_ONCE
    others = [k for k in range(rows) if k != place]
    # Tiles go first, channels last: sums over tiles are then elementwise.
    by_tile = jnp.pad(scores, ((0, 0), (0, (padded - tiles) * cols))).T.reshape(-1, _TILES_AT_ONCE, cols, len(scores))

    def add(total, chunk):
        rest, candidates = ways(exact, place, chunk[..., groups[:, jnp.array(others)]], chunk[..., groups[:, place]])
        terms = (
            functools.reduce(jnp.maximum, [r[:, None] + c[None] for r, c in zip(rest[k], candidates[k], strict=True)])
            for k in range(_TILES_AT_ONCE)
        )
        return functools.reduce(jnp.add, terms, total), None

    return jax.lax.scan(add, jnp.zeros((count, count), scores.dtype), by_tile)[0]


def _n_of_m(pattern: NM, place, others, candidates):
    """The candidate is kept or not, beside the n - 1 or the n largest of the others."""
    del place
    others = jnp.moveaxis(others[:, 0], -1, 0)  # rows first
    ranks = rank(order_key(others)) if len(others) > 1 else jnp.zeros(others.shape, jnp.int32)

    def largest(n):
        return jnp.sum(jnp.where(ranks < n, others, 0), axis=0)

    rest = [[with_it, without] for with_it, without in zip(largest(pattern.n - 1), largest(pattern.n), strict=True)]
    return rest, [[c, jnp.zeros_like(c)] for c in candidates[:, 0]]


def _listed(pattern: Pattern, place, others, candidates):
    """Every mask of a tile is tried, those with the same row in the place together."""
    found: dict[tuple, list] = {}
    masks = pattern.masks()
    assert masks is not None
    for mask in masks:
        found.setdefault(tuple(mask[place]), []).append(np.delete(mask, place, axis=0))
    blank = jnp.zeros_like(candidates[:, 0])

    def total(terms):
        return functools.reduce(jnp.add, terms, blank)

    rest, kept = [], []
    for row, beside in found.items():
        sums = [total([others[:, col, :, k] for k, col in np.argwhere(mask)]) for mask in beside]
        rest.append(functools.reduce(jnp.maximum, sums))
        kept.append(total([candidates[:, col] for col in np.flatnonzero(row)]))
    return [*zip(*rest, strict=True)], [*zip(*kept, strict=True)]
