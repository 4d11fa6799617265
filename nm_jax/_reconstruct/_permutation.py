"""An order of the channels of a layer in which a pattern keeps more (a channel permutation)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import lazy_loader
import numpy as np
from jaxtyping import Array, Float, Int

from nm_jax._core.axes import Tiling, check_axes
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._reconstruct._gains import Channels
from nm_jax.solvers.base import check_scores

scipy = lazy_loader.load("scipy")  # loaded when channels are assigned
_ENOUGH = 1e-4  # a round that adds less than this share of what is kept is the last


@dataclasses.dataclass(frozen=True)
class Permutation:
    """An order of the channels of one layer.

    Attributes:
      inputs: the order along the contraction axis: what stands at k is channel `inputs[k]` of the given ones.
      outputs: the same along the output axis; `None` where it is left as it is.
      before: the share of the scores that the best mask kept.
      after: the share that it keeps now; never below `before`.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> found = nm.find_permutation(jnp.array([[3.0], [2.0], [0.0], [0.0]]), "1:2")
      >>> found.before, found.after
      (0.6, 1.0)
    """

    inputs: Int[np.ndarray, " inputs"]
    outputs: Int[np.ndarray, " outputs"] | None
    before: float
    after: float


def find_permutation(
    scores: Float[Array | np.ndarray, "..."],
    pattern: str | Pattern,
    *,
    axes: str = "io",
    outputs: bool = True,
    seed: int = 0,
    rounds: int = 8,
    on_round: Callable[[float], None] | None = None,
) -> Permutation:
    """An order of the channels of one weight in which the best mask keeps more of the scores: permutation search.

    max over orders P, Q, and masks:  sum(mask * P scores Q)  such that  the mask has the pattern

    One channel is taken out of every group, and all are put back where they add most, which is an assignment problem
    and solved as one; again and again. What a group keeps with a channel is the exact optimum of every tile. (Of
    larger blocks than 4 x 4, and of those that keep at most n, the gains are those of n:m, and only what the exact
    solver confirms is done.)

    Args:
      scores: what to keep the most of, for instance `abs(w)`. Any float dtype.
      pattern: a pattern or its string; n:m means n kept of m.
      axes: one letter per dimension; several `i` (or `o`) are one axis, in order, and what is `b` moves together.
      outputs: whether output channels move as well, where the pattern is transposable; otherwise their order has no
        effect.
      seed: of the random choices; the same seed gives the same order.
      rounds: at most so many, in each of which every place of a group is emptied twice on every side; fewer when
        nothing is gained any more.
      on_round: called with the share kept after each round: progress.

    Returns:
      The orders, and the share of the scores kept before and after. To use them, the layers around have to follow:
      `scores[found.inputs]`.

    Raises:
      ValueError: for axes, sizes or a pattern that do not fit, and NaN or infinities among the scores.

    Never worse than the given order. A step costs about inputs^2 / m^2 * outputs * (ways to keep a row of a tile)
    additions and an assignment of inputs / m channels (`scipy.optimize`). Not for use inside `jit`. Source: Pool and
    Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, whose problem this is; their search is another.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> w = jax.random.normal(jax.random.key(0), (16, 8))
      >>> found = nm.find_permutation(jnp.abs(w), "2:4-T")
      >>> better = w[found.inputs][:, found.outputs]
      >>> found.after > found.before
      True
    """
    pattern = parse_pattern(pattern)
    check_scores(scores)
    matrix, both = _matrix(scores, pattern, axes), outputs and _same_sides(pattern)
    if not np.isfinite(total := float(jnp.sum(matrix))):
        raise ValueError("the scores are not finite; look for NaN or infinities in the weights")
    sides: list[Int[np.ndarray, " channels"]] = [np.arange(size) for size in matrix.shape[1:]]
    start = list(sides)
    rng = np.random.default_rng(seed)

    def channels(side: int) -> Channels:
        """The matrix with the other side in its order, as rows of channels."""
        other = jnp.take(matrix, sides[1 - side], axis=2 - side)
        return Channels(jnp.moveaxis(other, 1 + side, 0).reshape(len(sides[side]), -1), pattern)

    if pattern.tile is None:
        share = channels(0).kept(sides[0]) / (total or 1)
        return Permutation(start[0], None, share, share)
    before = after = channels(0).kept(sides[0])
    for _ in range(rounds):
        for side in (0, 1) if both else (0,):
            sides[side] = improved([channels(side)], sides[side], rng)
        last, after = after, channels(0).kept(sides[0])
        if on_round is not None:
            on_round(after / (total or 1))
        if after - last <= _ENOUGH * abs(after):
            break
    if after < before:  # by rounding
        sides, after = start, before
    return Permutation(sides[0], sides[1] if both else None, before / (total or 1), after / (total or 1))


def improved(
    layers: Sequence[Channels], order: Int[np.ndarray, " channels"], rng: np.random.Generator, sweeps: int = 2
) -> Int[np.ndarray, " channels"]:
    """An order of channels in which several layers together keep no less, each in relation to its scores, and none
    less than with the given order.

    Args:
      layers: all have the same channels.
      order: where to start.
      rng: for the places that are emptied.
      sweeps: how many times every place of a group is emptied.
    """
    sizes = [layer.pattern.tile[0] for layer in layers if layer.pattern.tile is not None]
    size = max(sizes)
    if any(size % other for other in sizes) or len(order) % size:
        raise ValueError(f"{len(order)} channels in groups of {sorted(set(sizes))}: there is no common group")
    weights = [1 / max(float(jnp.sum(jnp.abs(layer.scores))), 1e-30) for layer in layers]
    kept = [layer.kept(order) for layer in layers]
    floor = list(kept)
    groups = order.reshape(-1, size)
    diagonal = np.arange(len(groups))
    for place in np.concatenate([rng.permutation(size) for _ in range(sweeps)]):
        gains = [layer.gains(groups, int(place)).astype(np.float64) for layer in layers]
        joint = functools.reduce(np.add, [weight * gain for weight, gain in zip(weights, gains, strict=True)])
        chosen = scipy.optimize.linear_sum_assignment(joint, maximize=True)[1]
        moved = groups.copy()
        moved[:, place] = groups[chosen, place]
        then = [
            now + np.sum(gain[diagonal, chosen] - gain[diagonal, diagonal])
            if layer.exact
            else layer.kept(moved.reshape(-1))
            for now, gain, layer in zip(kept, gains, layers, strict=True)
        ]
        better = sum(weight * (new - now) for weight, new, now in zip(weights, then, kept, strict=True)) > 0
        if better and all(new >= least for new, least in zip(then, floor, strict=True)):
            groups, kept = moved, then
    return groups.reshape(-1)


def _same_sides(pattern: Pattern) -> bool:
    """Whether a pattern asks the same of the outputs as of the inputs, and of more than one at a time."""
    if pattern.tile is None or pattern.output_groups is None:
        return False
    return pattern.tile[0] == pattern.tile[1] and pattern.output_groups == pattern.contraction_groups


def _matrix(scores, pattern: Pattern, axes: str) -> Float[Array, "batch inputs outputs"]:
    """The scores as matrices whose channels move together."""
    check_axes(axes, scores.shape)
    rows, cols = pattern.tile or (1, 1)
    tiling = Tiling(tuple(scores.shape), axes, rows, cols)
    for name, size, tile in tiling.ragged:
        raise ValueError(f"the {name} axis has size {size}, and {tile} does not divide it; {pattern} does not fit")
    scores = jnp.asarray(scores)
    return tiling.matrix(scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores)
