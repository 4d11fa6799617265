"""The contract of a solver: tiles of scores in, the mask that keeps the most of them out.

To add a solver:

1. Write one file here with a frozen dataclass that derives from `Solver`: `supports` and `solve` (and `solve_edges`, if
   it can do better than the lowest score where a tile is padding).
2. Import it in `menu.py` and add it to `MENU` there, before the solvers that it is better than. The contract suite,
   `tests/solvers/test_contract.py`, then covers it for every pattern that it supports.

A name that users should have is also listed in `__init__.py`.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import Pattern
from nm_jax.solvers._proof import Proof


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
      mask: True where an entry is kept.
      objective: sum of the kept scores of each tile (of the finite ones).
      nan: whether a tile had NaN among its scores. They count as the lowest of all, so the mask is still valid.
      proof: what is proved of each tile.
    """

    mask: Bool[Array, "rows cols *tiles"]
    objective: Float[Array, "*tiles"]
    nan: Bool[Array, "*tiles"]
    proof: Proof


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """Finds, tile by tile, a mask of a pattern that keeps as much of the scores as it can.

    max sum(mask * scores)  such that  pattern.full(mask)

    Solvers are hashable configuration and work under `jax.jit` and `jax.vmap`.
    """

    @abc.abstractmethod
    def supports(self, pattern: Pattern) -> bool:
        """Whether the solver can find masks of this pattern."""

    @abc.abstractmethod
    def solve(
        self, scores: Float[Array, "rows cols *tiles"], pattern: Pattern
    ) -> tuple[Bool[Array, "rows cols *tiles"], Proof | None]:
        """The mask of every tile, for float32 or float64 scores of a supported pattern, and what is proved of it.

        Scores may hold infinities and NaN: `replace_nonfinite` makes them finite. A solver without a bound proves
        nothing and says `None`; with one it says `unproved`, `gap` and `rounding`, the scale is filled in."""

    def __call__(
        self,
        scores: Float[Array, "rows cols *tiles"],
        pattern: Pattern,
        valid: Bool[Array, "rows cols *tiles"] | None = None,
    ) -> Solution:
        """Solves every tile.

        Args:
          scores: what to keep the most of, used as given, negatives included. Any float dtype. An entry at infinity
            is kept (at minus infinity, pruned) if any mask does so, and NaN counts as the lowest score of its tile.
          pattern: a pattern that the solver supports.
          valid: False where a tile is padding, which is never kept: such a tile holds at most n.

        Raises:
          ValueError: if the solver does not support the pattern, or the scores do not have its tiles' shape.
        """
        if not self.supports(pattern):
            raise ValueError(f"{self} does not solve {pattern}; pass solver=None for one that does")
        check_scores(scores)
        if pattern.tile is not None and scores.shape[:2] != pattern.tile:
            raise ValueError(f"{pattern} has tiles of {pattern.tile}, got scores of shape {scores.shape}")
        return _solve(self, pattern, scores, valid)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(solver: Solver, pattern: Pattern, scores, valid) -> Solution:
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)
    nan = _nan_tiles(scores)
    if valid is not None:
        scores = jnp.where(valid, scores, jnp.nan)  # padding counts as the lowest score of its tile
    mask, proof = solver.solve(scores, pattern)
    if valid is not None:
        mask = mask & valid
    objective = _objective(mask, scores)
    proof = Proof.none(objective) if proof is None else proof
    return Solution(mask, objective, nan, proof._replace(scale=jnp.abs(objective)))


def _nan_tiles(scores: Float[Array, "rows cols *tiles"]) -> Bool[Array, "*tiles"]:
    """Which tiles have NaN: a loop that hardly ever runs, after one look at all of them."""
    none = blank(scores.shape[2:], bool, scores)
    look = jnp.any(jnp.isnan(scores))
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(carry[0]), jnp.any(jnp.isnan(scores), axis=(0, 1))),
        (look, none),
    )[1]


def _objective(
    mask: Bool[Array, "rows cols *tiles"], scores: Float[Array, "rows cols *tiles"]
) -> Float[Array, "*tiles"]:
    """Sum of the kept scores of each tile that are finite."""
    rows, cols = scores.shape[:2]

    def kept(mask, scores):
        return jnp.where(mask & jnp.isfinite(scores), scores, 0)

    if cols == 1:
        return jnp.sum(kept(mask, scores), axis=(0, 1))

    # Row by row: the CPU compiler does not vectorise reductions over leading axes, but does additions.
    def add_row(i, total):
        row = kept(mask[i], scores[i])
        return functools.reduce(jnp.add, [row[j] for j in range(cols)], total)

    return jax.lax.fori_loop(0, rows, add_row, blank(scores.shape[2:], scores.dtype, scores))


def replace_nonfinite(scores: Float[Array, "rows cols *tiles"]) -> Float[Array, "rows cols *tiles"]:
    """Finite scores with the same order of preference.

    NaN becomes the lowest finite score of its tile. Infinities go just far enough beyond the finite scores that no
    exchange of these (it changes at most two entries a row) outweighs one of them: farther out they would swamp the
    others in fixed point.
    """
    # A loop that hardly ever runs: unlike the branches of a `cond`, it passes the scores on.
    return jax.lax.while_loop(lambda s: ~jnp.all(jnp.isfinite(s)), _replace, scores)


def _replace(scores: Float[Array, "rows cols *tiles"]) -> Float[Array, "rows cols *tiles"]:
    most = jnp.finfo(scores.dtype).max
    finite = jnp.isfinite(scores)
    low = jnp.min(jnp.where(finite, scores, most), axis=(0, 1), keepdims=True)
    high = jnp.max(jnp.where(finite, scores, -most), axis=(0, 1), keepdims=True)
    none = low > high
    low, high = jnp.where(none, 0, low), jnp.where(none, 0, high)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    reach = jnp.where(largest > 0, 2 * scores.shape[0] * largest, 1)
    scores = jnp.where(scores == jnp.inf, jnp.minimum(high + reach, most), scores)
    scores = jnp.where(scores == -jnp.inf, jnp.maximum(low - reach, -most), scores)
    return jnp.where(jnp.isnan(scores), low, scores)


def well_scaled(scores: Float[Array, "rows cols *tiles"]) -> Float[Array, "rows cols *tiles"]:
    """Finite scores with the same optima, whose sums over a tile neither overflow nor vanish.

    Where there is an infinity or NaN, or a score that is very small or large, each tile is scaled by a power of two so
    that its largest finite score is between 1/4 and 1 (less if all are subnormal). Infinities then go beyond what any
    exchange of finite scores is worth, NaN to the lowest score of its tile.
    """
    if not scores.size:
        return scores
    bias, top = _layout(scores.dtype)
    raw = _raw(scores)
    magnitude = raw & jnp.iinfo(raw.dtype).max
    wild = jnp.any((magnitude >> top > bias + 100) | ((magnitude > 0) & (magnitude >> top < bias - 100)))
    # A loop that hardly ever runs: unlike the branches of a `cond`, it passes the scores on.
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(wild), _scale(carry[1])), (wild, scores)
    )[1]


def _scale(scores: Float[Array, "rows cols *tiles"]) -> Float[Array, "rows cols *tiles"]:
    raw, (bias, top) = _raw(scores), _layout(scores.dtype)
    magnitude = raw & jnp.iinfo(raw.dtype).max
    finite = magnitude < _raw(jnp.full((), jnp.inf, scores.dtype))
    # A float is mantissa * 2^(exponent - constant). Integers throughout: floating-point operations may flush subnormal
    # numbers to zero.
    exponent = jnp.maximum(magnitude >> top, 1)
    mantissa = (magnitude & ((1 << top) - 1)) | jnp.where(magnitude >> top > 0, 1 << top, 0)
    largest = jnp.max(jnp.where(finite & (magnitude > 0), exponent, 1), axis=(0, 1), keepdims=True)
    shift = exponent - largest - top - 1
    factor = jax.lax.bitcast_convert_type(jnp.maximum(shift + bias, 1) << top, scores.dtype)
    values = jnp.where(finite & (shift + bias > 0), mantissa.astype(scores.dtype) * factor, 0)
    values = jnp.where(raw < 0, -values, values)
    low = jnp.min(jnp.where(finite, values, 1), axis=(0, 1), keepdims=True)
    beyond = 4 * scores.shape[0]
    values = jnp.where(finite, values, jnp.where(raw < 0, -beyond, beyond))
    return jnp.where(jnp.isnan(scores), low, values).astype(scores.dtype)


def _raw(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(scores, {4: jnp.int32, 8: jnp.int64}[scores.dtype.itemsize])


def _layout(dtype) -> tuple[int, int]:
    """The bias of a float's exponent, and the bits of its mantissa."""
    return {4: (127, 23), 8: (1023, 52)}[jnp.dtype(dtype).itemsize]


def check_scores(scores: Array) -> None:
    """Raises a ValueError for scores that are not floating point."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be floating point, got {scores.dtype}; convert them first")


def blank(shape: tuple[int, ...], dtype, like: Array) -> Array:
    """Zeros to begin a loop with. Inside `jax.shard_map` they differ between devices where `like` does, as the type
    checks of a loop's carry ask."""
    nothing = jnp.any(like[:0] != 0)  # False, with the type of `like`
    return jnp.broadcast_to(nothing.astype(dtype), shape)


def order_key(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers in the order of the scores, NaN lowest; subnormals stay apart, which float comparisons may not grant."""
    raw = _raw(scores)
    low, high = jnp.iinfo(raw.dtype).min, jnp.iinfo(raw.dtype).max
    key = jnp.where(raw >= 0, raw, jnp.where(raw == low, 0, raw ^ high))
    return jnp.where(jnp.isnan(scores), low, key)


def rank(keys: Int[Array, " size *rest"]) -> Int[Array, " size *rest"]:
    """Place of every entry along the first axis in descending order; ties go to the lower index first.

    All pairs are compared: for groups this is faster than sorting, and it vectorises.
    """
    index = jnp.arange(keys.shape[0], dtype=jnp.int32).reshape(-1, *[1] * (keys.ndim - 1))
    place = jnp.zeros(keys.shape, jnp.int32)
    for k in range(keys.shape[0]):
        other = keys[k : k + 1]
        ahead = (other > keys) | ((other == keys) & (k < index))
        place = place + ahead.astype(jnp.int32)
    return place
