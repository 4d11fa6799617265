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
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.patterns import Pattern
from nm_jax.solvers._proof import Proof

_UNROLLED = 16  # entries of a tile that are named one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
      mask: bool, [rows, cols, *tiles]; True where an entry is kept.
      objective: float, [*tiles]; sum of the kept scores of each tile (of the finite ones).
      nan: bool, [*tiles]; whether a tile had NaN among its scores. They count as the lowest, so the mask is valid.
      proof: what is proved of each tile.

    Under `vmap` a solution that is returned has one axis more in front of each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> solution = nm.solvers.TopK()(jnp.array([[3.0], [1.0]]), nm.NM(1, 2))
      >>> float(solution.objective), bool(solution.nan), bool(solution.proof.proved)
      (3.0, False, False)
    """

    mask: Bool[Array, "..."]
    objective: Float[Array, "..."]
    nan: Bool[Array, "..."]
    proof: Proof


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """Finds, tile by tile, a mask of a pattern that keeps as much of the scores as it can.

    max sum(mask * scores)  such that  pattern.full(mask)

    Solvers are hashable configuration and work under `jax.jit` and `jax.vmap`.

    Examples:
      >>> import nm_jax as nm
      >>> nm.solvers.Exact().supports(nm.TransposableNM(2, 4)), nm.solvers.Exact().supports(nm.NM(2, 4))
      (True, False)
    """

    @abc.abstractmethod
    def supports(self, pattern: Pattern) -> bool:
        """Whether the solver can find masks of this pattern."""

    @abc.abstractmethod
    def solve(
        self, scores: Float[Array, "rows cols *tiles"], pattern: Pattern
    ) -> tuple[Bool[Array, "rows cols *tiles"], Proof | None]:
        """The mask of every tile, for float32 or float64 scores of a supported pattern, and what is proved of it.

        Scores may hold infinities and NaN: `well_scaled` makes them finite. A solver without a bound proves nothing and
        says `None`; with one it says `unproved`, `gap` and `rounding`, the scale is filled in."""

    def solve_edges(
        self, scores: Float[Array, "rows cols *tiles"], valid: Bool[Array, "rows cols *tiles"], pattern: Pattern
    ) -> tuple[Bool[Array, "rows cols *tiles"], Proof | None]:
        """The masks of tiles at the edge of a matrix, where what is not `valid` is not there.

        max sum(mask * scores)  such that  pattern.allows(mask), and nothing that is not there is kept

        Where the pattern has a relaxed one, it is solved for that. Otherwise what is not there counts as the lowest
        score of its tile: such a mask is allowed, but need not be the optimum, and nothing is proved of it.
        """
        if pattern.relaxed is not None and self.supports(pattern.relaxed):
            mask, proof = self.solve(jnp.where(valid, scores, -jnp.inf), pattern.relaxed)
        else:
            mask, proof = self.solve(jnp.where(valid, scores, jnp.nan), pattern)[0], None
        return mask & valid, proof

    def __call__(
        self,
        scores: Float[Array | np.ndarray, "rows cols *tiles"],
        pattern: Pattern,
        valid: Bool[Array | np.ndarray, "rows cols *tiles"] | None = None,
    ) -> Solution:
        """Solves every tile.

        Args:
          scores: what to keep the most of, used as given, negatives included. Any float dtype. An entry at infinity
            is kept (at minus infinity, pruned) if any mask does so, and NaN counts as the lowest score of its tile.
          pattern: a pattern that the solver supports.
          valid: False where a tile is padding: nothing is there, so nothing is kept. Such a tile holds at most n of
            what is there, and negative scores are worth no place in it.

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
    if valid is not None:
        scores = jnp.where(valid, scores, 0)
    mask, proof = _with_proof(solver.solve(scores, pattern), scores)
    if valid is not None:
        edge = ~jnp.all(valid, axis=(0, 1))

        def solve_edges():
            return choose(edge, _with_proof(solver.solve_edges(scores, valid, pattern), scores), (mask, proof))

        mask, proof = jax.lax.cond(jnp.any(edge), solve_edges, lambda: (mask, proof))
    objective = _objective(mask, scores)
    return Solution(mask, objective, _nan_tiles(scores), proof._replace(scale=jnp.abs(objective)))


def choose(which: Bool[Array, "*tiles"], chosen, other):
    """One of two trees of (..., *tiles), tile by tile: the first where `which`."""
    return jax.tree.map(
        lambda a, b: jnp.where(which.reshape((1,) * (a.ndim - which.ndim) + which.shape), a, b), chosen, other
    )


def _with_proof(found: tuple[Array, Proof | None], scores: Array) -> tuple[Array, Proof]:
    mask, proof = found
    return mask, Proof.none(scores[0, 0]) if proof is None else proof


def _nan_tiles(scores: Float[Array, "rows cols *tiles"]) -> Bool[Array, "*tiles"]:
    """Which tiles have NaN: a loop that hardly ever runs, after one look at all of them."""
    if math.prod(scores.shape[:2]) <= _UNROLLED:
        return functools.reduce(jnp.bitwise_or, [jnp.isnan(entry) for row in scores for entry in row])
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

    # By entry or by row: the CPU compiler does not vectorise reductions over leading axes, but does additions.
    if rows * cols <= _UNROLLED:
        return functools.reduce(jnp.add, [kept(mask[i, j], scores[i, j]) for i in range(rows) for j in range(cols)])

    def add_row(i, total):
        row = kept(mask[i], scores[i])
        return functools.reduce(jnp.add, [row[j] for j in range(cols)], total)

    return jax.lax.fori_loop(0, rows, add_row, blank(scores.shape[2:], scores.dtype, scores))


def well_scaled(
    scores: Float[Array, "rows cols *tiles"], at_most: bool = False
) -> tuple[Float[Array, "rows cols *tiles"], Int[Array, "*tiles"]]:
    """Finite scores with the same optima, whose sums over a tile neither overflow nor vanish; and e, where they are
    the scores divided by 2^e.

    Where there is an infinity or NaN, or a score that is very small or large, each tile is scaled by a power of two so
    that its largest finite score is between 1/2 and 1 (less if all are subnormal). Infinities then go just far enough
    beyond the finite scores that no exchange of these (it changes at most two entries a row) outweighs one of them:
    farther out they would swamp the others in fixed point. NaN becomes the lowest finite score of its tile.

    With `at_most` nothing has to be kept, so that a negative score is worth no place whatever its size: it does not
    count for the scale, and becomes -1.
    """
    bias, top = _layout(scores.dtype)
    raw = _raw(scores)
    magnitude = raw & jnp.iinfo(raw.dtype).max
    wild = jnp.any((magnitude >> top > bias + 100) | ((magnitude > 0) & (magnitude >> top < bias - 100)))
    # A loop that hardly ever runs: unlike the branches of a `cond`, it passes the scores on.
    carry = (wild, scores, blank(scores.shape[2:], jnp.int32, scores))
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), *_scale(carry[1], at_most)), carry
    )[1:]


def _scale(
    scores: Float[Array, "rows cols *tiles"], at_most: bool
) -> tuple[Float[Array, "rows cols *tiles"], Int[Array, "*tiles"]]:
    raw, (bias, top) = _raw(scores), _layout(scores.dtype)
    magnitude = raw & jnp.iinfo(raw.dtype).max
    finite = magnitude < (2 * bias + 1) << top
    # A float is mantissa * 2^(exponent - bias - top). Integers throughout: floating-point operations may flush
    # subnormal numbers to zero.
    exponent = jnp.maximum(magnitude >> top, 1)
    mantissa = (magnitude & ((1 << top) - 1)) | jnp.where(magnitude >> top > 0, 1 << top, 0).astype(raw.dtype)
    worthless = (raw < 0) & (magnitude > 0) & at_most
    largest = jnp.max(jnp.where(finite & ~worthless, exponent, 1), axis=(0, 1), keepdims=True)
    shift = jnp.minimum(exponent - largest, 0) - top - 1
    factor = jax.lax.bitcast_convert_type(jnp.maximum(shift + bias, 1) << top, scores.dtype)
    values = jnp.where(finite & (shift + bias > 0), mantissa.astype(scores.dtype) * factor, 0)
    values = jnp.where(worthless, -1, jnp.where(raw < 0, -values, values))
    low = jnp.min(jnp.where(finite, values, 1), axis=(0, 1), keepdims=True)
    beyond = 4.0 * scores.shape[0]
    values = jnp.where(finite, values, jnp.where(raw < 0, -beyond, beyond).astype(scores.dtype))
    nan = magnitude > (2 * bias + 1) << top
    return jnp.where(nan, low, values), (largest[0, 0] + 1 - bias).astype(jnp.int32)


def _raw(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(scores, {4: jnp.int32, 8: jnp.int64}[scores.dtype.itemsize])


def _layout(dtype) -> tuple[int, int]:
    """The bias of a float's exponent, and the bits of its mantissa."""
    return {4: (127, 23), 8: (1023, 52)}[jnp.dtype(dtype).itemsize]


def check_scores(scores: Array | np.ndarray) -> None:
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
    rows = list(keys)

    def place(k):
        ahead = [(other >= rows[k]) if j < k else (other > rows[k]) for j, other in enumerate(rows) if j != k]
        return functools.reduce(jnp.add, [a.astype(jnp.int32) for a in ahead])

    return jnp.stack([place(k) for k in range(len(rows))])
