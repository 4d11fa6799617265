"""A mask of one layer changed by swaps that keep its pattern, with the weights solved anew.

A swap in a column of the weights drops an entry of a group and takes up another of the same group. An n:m mask stays
one. In a transposable block two columns swap the same two rows in opposite directions: a 2 x 2 exchange.

What a swap would change in the error of its column, were all other weights to stay, is known from H and the pull
(H + ridge)(W - V) alone. For a pair of rows the best exchange of a block is then the best column for each direction,
so that blocks of any size cost m^3. The other weights do not stay, and swaps of one column disturb each other: several
are made at once, the weights solved anew, and the columns whose error did not fall go back to what they were.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.axes import Tiling
from nm_jax._reconstruct._least_squares import Quadratic, conjugate_gradients
from nm_jax._reconstruct._matrices import LayerMatrices, sum_rows

_FIRST = 4  # one of so many tiles of a stripe is changed at once, at first
_GAIN = 1e-5  # share of the error of a stripe that a round must take away


class Places(NamedTuple):
    """Where the tiles of a pattern lie in the matrices of a layer. Tiles that have a column in common are a *stripe*.

    Attributes:
      rows: of each tile, along K.
      matrices: that each of its columns is in.
      columns: there.
      stripes: the tiles of each stripe.
      stripe: of each column of each matrix.
    """

    rows: Int[Array, "m tiles"]
    matrices: Int[Array, "cols tiles"]
    columns: Int[Array, "cols tiles"]
    stripes: Int[Array, "stripes length"]
    stripe: Int[Array, "matrices outputs"]

    @classmethod
    def of(cls, layer: LayerMatrices, tiling: Tiling) -> "Places":
        """For a layer that whole tiles fit."""
        count, rows, outputs = layer.sizes
        along = np.meshgrid(np.arange(count), np.arange(rows), np.arange(outputs), indexing="ij")
        matrix, row, column = (
            np.asarray(tiling.split(layer.join(jnp.asarray(index)))).reshape(tiling.rows, tiling.cols, -1)
            for index in along
        )
        number = matrix[0] * outputs + column[0]
        order = np.argsort(number[0], kind="stable")
        names, lengths = np.unique(number[0], return_counts=True)
        stripes = order.reshape(len(names), lengths[0])
        stripe = np.zeros(count * outputs, np.int32)
        stripe[number[:, stripes[:, 0]]] = np.arange(len(names))
        found = (row[:, 0], matrix[0], column[0], stripes, stripe.reshape(count, outputs))
        return cls(*(jnp.asarray(index, jnp.int32) for index in found))

    def take(self, leaf: Array) -> Array:
        """What the tiles hold."""
        return leaf[self.matrices[None], self.rows[:, None], self.columns[None]]

    def put(self, leaf: Array, tiles: Array) -> Array:
        """The matrices with other tiles."""
        return leaf.at[self.matrices[None], self.rows[:, None], self.columns[None]].set(tiles)


class Round(NamedTuple):
    """Where the search stands.

    Attributes:
      kept: the mask.
      new: the weights solved for it.
      error: of each output.
      quota: how many tiles of each stripe are changed next; 0: nothing more is found there.
    """

    kept: Bool[Array, "matrices K outputs"]
    new: Float[Array, "matrices K outputs"]
    error: Float[Array, "matrices outputs"]
    quota: Int[Array, " stripes"]


def begun(dense, kept, problem: Quadratic, places: Places, iterations: int) -> Round:
    """Before the first swap."""
    stripes, length = places.stripes.shape
    new, error = _solved(dense, kept, problem, iterations, None)
    return Round(kept, new, error, jnp.full(stripes, max(length // _FIRST, 1), jnp.int32))


@functools.partial(jax.jit, static_argnames="iterations")
def exchanged(
    state: Round,
    dense: Float[Array, "matrices K outputs"],
    problem: Quadratic,
    weight: Float[Array, "matrices 1"],
    places: Places,
    iterations: int,
) -> Round:
    """After one more round of swaps: no stripe's error is larger than before."""
    gain, flips = _best_swaps(state, dense, problem, places)
    place = jnp.argsort(jnp.argsort(gain[places.stripes], axis=1), axis=1)
    chosen = (place < state.quota[:, None]) & (gain[places.stripes] < 0)
    chosen = jnp.zeros(gain.shape, bool).at[places.stripes].set(chosen)[None, None]
    kept = places.put(state.kept, places.take(state.kept) ^ (flips & chosen))
    new, error = _solved(dense, kept, problem, iterations, state.new)

    def of_stripes(errors):
        return jnp.zeros(len(state.quota), errors.dtype).at[places.stripe].add(errors * weight)

    better = of_stripes(error) < (1 - _GAIN) * of_stripes(state.error)
    mine = better[places.stripe]
    return Round(
        jnp.where(mine[:, None], kept, state.kept),
        jnp.where(mine[:, None], new, state.new),
        jnp.where(mine, error, state.error),
        jnp.where(better, state.quota, state.quota // 2),
    )


@functools.partial(jax.jit, static_argnames="iterations")
def _solved(dense, kept, problem: Quadratic, iterations: int, start):
    new, _ = conjugate_gradients(dense, kept, problem, iterations, start)
    return new, jnp.maximum(sum_rows((dense - new) * problem.pull(dense - new)), 0)


def _best_swaps(state: Round, dense, problem: Quadratic, places: Places):
    """What the best swap of each tile changes, and which entries it changes."""
    kept = places.take(state.kept)
    v, pull = places.take(state.new), places.take(problem.pull(dense - state.new))
    rows, matrices = places.rows, places.matrices
    h = problem.h[matrices[None, None], rows[:, None, None], rows[None, :, None]]  # out, in, column, tile
    own = (jnp.diagonal(problem.h, axis1=1, axis2=2) + problem.ridge[:, :, 0])[matrices[None], rows[:, None]]
    dropped = 2 * v * pull + v**2 * own
    taken = (pull[None] + v[:, None] * h) ** 2 / jnp.where(own > 0, own, jnp.inf)[None]
    allowed = kept[:, None] & ~kept[None]
    change = jnp.where(allowed, dropped[:, None] - taken, jnp.inf)
    m, cols = kept.shape[:2]
    there, column = jnp.min(change, axis=2), jnp.argmin(change, axis=2)
    both = there if cols == 1 else there + there.swapaxes(0, 1)
    flat = both.reshape(m * m, -1)
    best = jnp.argmin(flat, axis=0)
    gain = jnp.take_along_axis(flat, best[None], axis=0)[0]
    pair = (best // m, best % m)
    tiles = jnp.arange(len(best))

    def only(size, which):
        return jnp.arange(size)[:, None] == which[None]

    row = only(m, pair[0]) | only(m, pair[1])
    column = only(cols, column[pair[0], pair[1], tiles]) | only(cols, column[pair[1], pair[0], tiles])
    return gain, row[:, None] & column[None] & jnp.isfinite(gain)[None, None]
