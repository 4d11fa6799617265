"""Applying masks to parameters."""

import jax.numpy as jnp
from jaxtyping import PyTree

from nm_jax._core.paths import empty, map_located
from nm_jax._masks.trees import leaves_by_path


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """`mask * param` for every leaf that has a mask; the others as they are.

    Args:
      params: parameters.
      masks: a tree of masks with the same paths; `None` where a leaf, or a whole subtree, stays dense.

    Returns:
      A tree like `params`, exact zeros where pruned. Its gradient is zero for pruned entries (hard masking); use
      `nm_jax.ste` for the straight-through one. Works under `jit`, `vmap` and `grad`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> params = {"kernel": jnp.array([[0.1], [-3.0], [2.0], [0.5]])}
      >>> nm.apply_masks(params, nm.compute_masks(params, "2:4"))["kernel"][:, 0].tolist()
      [0.0, -3.0, 2.0, 0.0]
    """
    by_path = leaves_by_path(masks)
    dense = [path for path, mask in by_path.items() if empty(mask)]
    known = set()

    def apply(path, param):
        if path not in by_path and any(path.startswith(f"{above}/") for above in dense):
            return param
        if path not in by_path:
            raise ValueError(f"masks has no entry for {path}; compute them for this tree (None for a dense leaf)")
        known.add(path)
        mask = by_path[path]
        if empty(mask):
            return param
        if jnp.shape(mask) != jnp.shape(param):
            raise ValueError(f"{path}: the mask has shape {jnp.shape(mask)}, the parameter has {jnp.shape(param)}")
        return jnp.where(mask, param, 0)

    masked = map_located(apply, params)
    for path, mask in by_path.items():
        if path not in known and not empty(mask):
            raise ValueError(f"masks has an entry for {path}, which is not among the parameters")
    return masked
