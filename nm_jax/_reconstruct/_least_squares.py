"""The weights on a support that give the outputs closest to given ones: least squares, given the Gram matrices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from nm_jax._reconstruct._matrices import InputMoments, sum_rows

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_BURST = 8  # iterations between two looks at the convergence
_TOLERANCE = 3e-4  # share of the objective that a burst must gain for another one to follow
_RIDGE = 0.3  # times K / rows of inputs, within these bounds
_RIDGE_BOUNDS = (1e-3, 0.3)


class Minimiser(NamedTuple):
    """How the least-squares problems of a layer are solved; the fields are arguments of `nm_jax.reconstruct`."""

    method: str
    iterations: int
    ridge: float | None
    centred: bool
    learning_rate: float


class Quadratic(NamedTuple):
    """What the weights minimise: (W - V)^T (H + ridge) (W - V), for each output."""

    h: Float[Array, "matrices K K"]
    ridge: Float[Array, "matrices 1 1"]

    @classmethod
    def of(cls, moments: InputMoments, how: Minimiser) -> "Quadratic":
        """The problem of a layer."""
        h = moments.centred if how.centred else moments.h
        automatic = jnp.clip(_RIDGE * h.shape[1] / moments.rows, *_RIDGE_BOUNDS)
        ridge = (automatic if how.ridge is None else jnp.full_like(automatic, how.ridge))[:, :, None]
        if how.centred:
            # An offset of the inputs is no part of the problem, but where it is so large that rounding hides their
            # spread, nothing can be told from it.
            ridge = (ridge[:, :, 0] * moments.spread + moments.noise**2 / moments.spread)[:, :, None]
        return cls(h, ridge)

    @property
    def diagonal(self) -> Float[Array, "matrices K 1"]:
        return jnp.diagonal(self.h, axis1=1, axis2=2)[:, :, None] + self.ridge

    def pull(self, change: Float[Array, "matrices K outputs"]) -> Float[Array, "matrices K outputs"]:
        """(H + ridge) times a change."""
        return _matmul(self.h, change) + self.ridge * change


def conjugate_gradients(
    dense: Float[Array, "matrices K outputs"],
    kept: Bool[Array, "matrices K outputs"],
    problem: Quadratic,
    iterations: int,
    start: Float[Array, "matrices K outputs"] | None = None,
) -> tuple[Float[Array, "matrices K outputs"], Int[Array, ""]]:
    """The weights on the support, from the dense ones or others there, and the number of iterations."""
    most, diagonal, curvature = iterations, problem.diagonal, problem.pull
    preconditioner = jnp.where(kept & (diagonal > 0), 1 / jnp.where(diagonal > 0, diagonal, 1), 0)

    def step(_, state):
        new, residual, direction, slope, gained = state
        steepest = preconditioner * residual
        steeper = sum_rows(residual * steepest)[:, None]
        direction = steepest + _ratio(steeper, slope) * direction
        bent = curvature(direction)
        length = _ratio(steeper, sum_rows(direction * bent)[:, None])
        residual = residual - jnp.where(kept, length * bent, 0)
        gained = gained + jnp.sum(length * steeper, axis=(1, 2))
        return new + length * direction, residual, direction, steeper, gained

    def burst(state):
        new, direction, slope, _, _, iterations = state
        # The residual anew: rounding errors creep into the one that is updated.
        pull = curvature(dense - new)
        objective = jnp.sum((dense - new) * pull, axis=(1, 2))
        start = (new, jnp.where(kept, pull, 0), direction, slope, jnp.zeros_like(objective))
        new, _, direction, slope, gained = jax.lax.fori_loop(0, _BURST, step, start)
        return new, direction, slope, gained, objective, iterations + _BURST

    def unfinished(state):
        *_, gained, objective, iterations = state
        return jnp.any(gained > _TOLERANCE * objective) & (iterations < most)

    start = jnp.where(kept, dense if start is None else start, 0)
    none = jnp.zeros_like(dense[:, 0, 0])
    first = (start, jnp.zeros_like(start), jnp.zeros_like(dense[:, :1]), none + 1, none, jnp.int32(0))
    new, *_, taken = jax.lax.while_loop(unfinished, burst, first)
    return new, taken


def _ratio(part, whole):
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def adam(
    dense: Float[Array, "matrices K outputs"],
    kept: Bool[Array, "matrices K outputs"],
    h: Float[Array, "samples matrices K K"],
    how: Minimiser,
) -> tuple[Float[Array, "matrices K outputs"], Int[Array, ""]]:
    """The paper's way: Adam on the squared error of one batch of inputs after another."""
    scale = jnp.mean(jnp.diagonal(h, axis1=2, axis2=3), axis=(0, 2))[None, :, None, None]
    h = h / jnp.where(scale > 0, scale, 1)
    optimiser = optax.adam(how.learning_rate * jnp.sqrt(jnp.mean(dense**2)))
    drawn = jax.random.randint(jax.random.key(0), (how.iterations,), 0, len(h), jnp.int32)

    def step(state, k):
        new, moments = state
        gradient = jnp.where(kept, _matmul(h[k], new - dense), 0)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, moments = optimiser.update(gradient, moments)
        return (new + updates, moments), None

    start = jnp.where(kept, dense, 0)
    (new, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), drawn)
    return new, jnp.int32(how.iterations)
