"""The bias fix of the paper: it needs no calibration inputs."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.sharding import partitioned, spec


def absorb_mean(
    w: Float[Array, "..."], mask: Bool[Array, "..."], pattern: str | Pattern, axes: str = "io"
) -> Float[Array, "..."]:
    """The paper's bias fix: the kept weights of every group take up the mean of the pruned ones.

    v = s * (w + sum of the pruned weights of the group / number of the kept), which keeps the sum of every group

    Args:
      w: dense weights.
      mask: True = kept.
      pattern: gives the size m of a group.
      axes: axes of `w`, one letter per dimension.

    Returns:
      Weights like `w`, exact zeros outside the mask. A group that keeps nothing stays zero. Needs no calibration
      inputs; works under `jit`, `vmap` and `grad`. It often raises the error of a layer: look before you use it.

    Raises:
      ValueError: when shapes do not fit, or for a pattern without groups.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> w = jnp.array([[1.0], [2.0], [3.0], [4.0]])
      >>> nm.absorb_mean(w, nm.solve(w, "2:4"), "2:4")[:, 0].tolist()
      [0.0, 0.0, 4.5, 5.5]

    Source: Section 5, "Fixing pruning bias using mean absorption".
    """
    tile = parse_pattern(pattern).tile
    if tile is None:
        raise ValueError(f"{pattern} has no groups whose mean could be absorbed; use an n:m pattern")
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(f"the mask has shape {jnp.shape(mask)}, the weights have {jnp.shape(w)}")
    return partitioned(functools.partial(_absorb, Tiling(jnp.shape(w), axes, tile[0], 1)), spec(w), w, mask)


def _absorb(tiling: Tiling, w, mask) -> Float[Array, "..."]:
    groups, kept = tiling.split(w.astype(jnp.float32 if jnp.finfo(w.dtype).bits < 32 else w.dtype)), tiling.split(mask)
    pruned = jnp.sum(jnp.where(kept, 0, groups), axis=0, keepdims=True)
    share = pruned / jnp.maximum(jnp.sum(kept, axis=0, keepdims=True, dtype=groups.dtype), 1)
    return tiling.join(jnp.where(kept, groups + share, 0)).astype(w.dtype)
