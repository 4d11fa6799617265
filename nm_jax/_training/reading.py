"""What the state of an optimiser says of sparse training: masks, dense weights, statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.rules import empty, path_of
from nm_jax._masks.trees import leaves_by_path
from nm_jax._training.state import RefreshStats, SparseTrainingState


def masks(opt_state: Any) -> PyTree[Bool[Array, "..."] | None]:
    """The masks in an optimiser state, however deep `sparse_training` sits in it (`chain`, `multi_transform`, ...).

    Returns:
      A tree like the parameters, True = kept, `None` for a leaf that is dense.
    """
    return _hollow(_merge([state.masks for state in _states(opt_state)]))


def dense_params(opt_state: Any, params: PyTree[Array] | None = None) -> PyTree[Array | None]:
    """The dense weights behind the sparse parameters.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the parameters; when given, leaves without a dense copy (dense anyway) are taken from here.

    Returns:
      A tree like the parameters, at least float32 for sparse ones; `None` for leaves without a dense copy when
      `params` is not given.

    An exponential moving average is sparse when it is taken of these and masked at the end:
    `nm.apply_masks(ema_of_dense, nm.masks(opt_state))`.
    """
    states = _states(opt_state)
    if all(state.dense is None for state in states):
        raise ValueError("the mask is fixed (refresh_every=None), so no dense copy is kept; use the params")
    dense = _hollow(_merge([state.dense for state in states]))
    if params is None:
        return dense
    by_path = leaves_by_path(dense)

    def pick(keys, param):
        stored = by_path.get(path_of(keys))
        return param if stored is None else stored

    return jax.tree_util.tree_map_with_path(pick, params)


def sparse_params(opt_state: Any, params: PyTree[Array]) -> PyTree[Array]:
    """`params`, with every sparse leaf set to `mask * dense` of the state, in its own dtype.

    Start a loop from it, and its very first gradient is taken at sparse parameters. It also takes back a step that is
    in the parameters but not yet in the state.
    """
    by_mask = leaves_by_path(masks(opt_state))
    fixed = all(state.dense is None for state in _states(opt_state))
    by_dense = {} if fixed else leaves_by_path(dense_params(opt_state))

    def value(keys, param):
        mask = by_mask.get(path_of(keys))
        if mask is None:
            return param
        dense = by_dense.get(path_of(keys))
        return jnp.where(mask, param if dense is None else dense.astype(param.dtype), 0)

    return jax.tree_util.tree_map_with_path(value, params)


def with_params(opt_state: Any, params: PyTree[Array]) -> Any:
    """The optimiser state after the parameters were edited from outside (loaded, clipped, averaged).

    Without it the next update would overwrite the edit. The dense weights become `params` wherever a mask keeps them
    or they are not zero; pruned entries that are zero keep the dense weight they had. Masks change at the next refresh.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the edited parameters.

    Returns:
      A state of the same structure.
    """
    edited = leaves_by_path(params)

    def reseed(state):
        if not isinstance(state, SparseTrainingState) or state.dense is None:
            return state
        kept = leaves_by_path(state.masks)

        def value(keys, dense):
            path = path_of(keys)
            if empty(edited.get(path)):
                raise ValueError(f"params has no leaf {path}, which the state holds dense weights for")
            param = edited[path]
            if jnp.shape(param) != dense.shape:
                raise ValueError(f"{path}: params has shape {jnp.shape(param)}, the state has {dense.shape}")
            return jnp.where(kept[path] | nonzero(param), param.astype(dense.dtype), dense)

        return state._replace(dense=jax.tree_util.tree_map_with_path(value, state.dense))

    _states(opt_state)  # raises where there is none
    return jax.tree.map(reseed, opt_state, is_leaf=lambda node: isinstance(node, SparseTrainingState))


def refresh_stats(opt_state: Any) -> RefreshStats:
    """What the last refresh did, per sparse leaf, in the order of the leaves of the parameters.

    With several states (`optax.multi_transform`) one after the other. Scalars for logging under `jit`:
    `refresh_stats(opt_state).flip_rate.mean()`.
    """
    found = [state.stats for state in _states(opt_state)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _states(opt_state: Any) -> list[SparseTrainingState]:
    """All states of `sparse_training` in the state of any optimiser, as plain arrays."""

    def ours(node):
        return isinstance(node, SparseTrainingState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=ours) if ours(node)]
    if not found:
        raise ValueError("this optimiser state holds no state of sparse_training; was tx.init called on it?")

    # Flax NNX wraps every array of an optimiser state in a Variable.
    def wrapped(node):
        return hasattr(node, "get_value")

    return [jax.tree.map(lambda n: n.get_value() if wrapped(n) else n, state, is_leaf=wrapped) for state in found]


def _merge(trees: list[PyTree]) -> PyTree:
    """One tree out of several that are empty in different places, as under `optax.multi_transform`."""
    filled = [tree for tree in trees if not empty(tree)]
    if len(filled) < 2:
        return filled[0] if filled else None
    first = filled[0]
    treedef: Any = jax.tree.structure(first, is_leaf=lambda node: node is not first)
    return treedef.unflatten([_merge(list(nodes)) for nodes in zip(*map(treedef.flatten_up_to, filled), strict=True)])


def _hollow(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda node: None if empty(node) else node, tree, is_leaf=empty)
