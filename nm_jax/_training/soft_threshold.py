"""S-STE, for arrays: weights that shrink to zero instead of being cut off, with the straight-through gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import NM, Pattern, parse_pattern


def s_ste(
    weight: Float[Array, "*shape"],
    scale: float | Float[Array, ""] = 1.0,
    pattern: str | Pattern = "2:4",
    *,
    axes: str = "io",
) -> Float[Array, "*shape"]:
    """`scale` times the weight after a soft threshold, n of every m left, with the straight-through gradient.

    scale * sign(w) * max(|w| - t, 0),    t = the (n + 1)-th largest |w| of each group,    d s_ste(w) / dw = 1

    Unlike `mask * w` it is continuous in w: a weight that comes back begins at 0, and no refresh makes the loss jump.
    What shrinks is made up for by the scale, which stays what `nm.s_ste_scale` said of the first weights.

    Args:
      weight: dense weight.
      scale: one number for the whole weight, from `nm.s_ste_scale`; it gets no gradient.
      pattern: an n:m pattern or its string.
      axes: one letter per dimension: i contraction, o output, b batch.

    Returns:
      The sparse weight, in the weight's dtype: exact zeros, at most n of each group not 0 (fewer where two are equal).
      A sort of each group; works under `jit`, `vmap` and in both modes of differentiation.

    Raises:
      ValueError: for a pattern that is not n:m, and for axes or sizes that do not fit.

    Source: Hu et al. (S-STE), NeurIPS 2024, Section 4.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> weight = jnp.array([[1.0], [-4.0], [2.0], [3.0]])
      >>> nm.s_ste(weight, 2.0)[:, 0].tolist()
      [0.0, -4.0, 0.0, 2.0]
      >>> jax.grad(lambda w: jnp.sum(3 * nm.s_ste(w, 2.0)))(weight)[:, 0].tolist()
      [3.0, 3.0, 3.0, 3.0]
    """
    pattern, tiling = _groups(weight, pattern, axes)
    scale = jnp.asarray(scale, jnp.float32 if weight.dtype.itemsize < 4 else weight.dtype)
    return _s_ste(weight, scale, pattern, tiling)


def s_ste_scale(
    weight: Float[Array, "*shape"], pattern: str | Pattern = "2:4", *, axes: str = "io"
) -> Float[Array, ""]:
    """The scale for `nm.s_ste` that leaves a weight as near to itself as it can: to be found once, before training.

    min ||w - scale * s||^2,    scale = <w, s> / <s, s>,    s = s_ste(w)

    Args:
      weight: dense weight, as training begins with it.
      pattern: an n:m pattern or its string.
      axes: one letter per dimension: i contraction, o output, b batch.

    Returns:
      The scale, float32; 1 where nothing is left of the weight. Works under `jit` and `vmap`.

    Raises:
      ValueError: as `nm.s_ste`.

    Source: Hu et al. (S-STE), NeurIPS 2024, Section 4.2: one scale per tensor, which stays.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> weight = jnp.array([[1.0], [-4.0], [2.0], [3.0]])
      >>> round(float(nm.s_ste_scale(weight)), 3)  # 11 / 5
      2.2
    """
    pattern, tiling = _groups(weight, pattern, axes)
    weight = weight.astype(jnp.float32)
    left = _soft_threshold(weight, pattern, tiling)
    size = jnp.sum(left * left)
    return jnp.where(size > 0, jnp.sum(weight * left) / jnp.where(size > 0, size, 1), 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _s_ste(weight, scale, pattern: NM, tiling: Tiling):
    return (scale * _soft_threshold(weight, pattern, tiling).astype(scale.dtype)).astype(weight.dtype)


@_s_ste.defjvp
def _s_ste_jvp(pattern, tiling, primals, tangents):
    return _s_ste(*primals, pattern, tiling), tangents[0]


def _soft_threshold(weight, pattern: NM, tiling: Tiling):
    size = jnp.abs(tiling.split(weight))
    largest_pruned = pattern.m - pattern.n - 1
    threshold = jnp.sort(size, axis=0)[largest_pruned : largest_pruned + 1]
    return jnp.sign(weight) * tiling.join(jnp.maximum(size - threshold, 0))


def _groups(weight, pattern: str | Pattern, axes: str) -> tuple[NM, Tiling]:
    pattern = parse_pattern(pattern)
    if not isinstance(pattern, NM):
        raise ValueError(f"S-STE has a threshold for each group of n:m, and none for {pattern}; use nm.ste with a mask")
    tiling = Tiling.of(weight.shape, axes, pattern)
    for axis, size, tile in tiling.ragged:
        raise ValueError(f"the {axis} axis has size {size}, which {tile} does not divide; leave the weight dense")
    return pattern, tiling
