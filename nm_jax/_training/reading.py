"""What the state of an optimiser says of sparse training: masks, dense weights, statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.paths import by_path, empty, map_located
from nm_jax._masks.trees import leaves_by_path
from nm_jax._training.find_states import hollow, merge, states
from nm_jax._training.state import RefreshStats, SparseTrainingState
from nm_jax.matmul import PackedWeight
from nm_jax.matmul._parameter import parameter


def masks(opt_state: Any, params: PyTree[Array] | None = None) -> PyTree[Bool[Array, "..."] | None]:
    """The masks in an optimiser state, however deep `sparse_training` sits in it (`chain`, `multi_transform`, ...).

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the parameters, for a tree that is exactly like them. Without, one `None` may stand for a whole subtree
        that `optax.masked` or `multi_transform` kept away, because its structure is not in the state; `apply_masks`
        takes that too.

    Returns:
      A tree like the parameters, True = kept, `None` for a leaf that is dense. No copies; works under `jit`.

    Raises:
      ValueError: for a state without `sparse_training`, or one of other parameters.

    Warns:
      UserWarning: where a transformation around `sparse_training` (`optax.lookahead`, `optax.contrib.sam`, `mechanize`,
        `schedule_free`) moves the parameters off their pattern, or where something else has moved them far (by more
        than 0.2 of the l1 norm of a weight, `RefreshStats.drift`). So do the other functions that read a state.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
      >>> nm.masks(opt_state)["kernel"][:, 0].tolist()  # the largest of each column are kept
      [False, False, True, True]
      >>> nm.masks(opt_state)["bias"] is None
      True
    """
    merged = hollow(merge([state.masks for state in states(opt_state)]))
    return merged if params is None else _like(params, merged, "a mask")


def dense_params(opt_state: Any, params: PyTree[Array] | None = None) -> PyTree[Array | None]:
    """The dense weights behind the sparse parameters.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the parameters; when given, leaves without a dense copy (dense anyway) are taken from here.

    Returns:
      A tree like the parameters, at least float32 for sparse ones; `None` for leaves without a dense copy when
      `params` is not given. No copies; works under `jit`.

    Raises:
      ValueError: with a fixed mask, which has no dense copy; for a state without `sparse_training`, or one of other
        parameters.

    An exponential moving average is sparse when it is taken of these and masked at the end:
    `nm.apply_masks(ema_of_dense, nm.masks(opt_state))`.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
      >>> nm.dense_params(opt_state)["kernel"][:, 0].tolist()
      [0.0, 4.0, 8.0, 12.0]
      >>> average = nm.dense_params(opt_state, params)
      >>> average = optax.incremental_update(nm.dense_params(opt_state, params), average, step_size=0.1)
      >>> nm.verify(nm.apply_masks(average, nm.masks(opt_state)), "2:4").ok
      True
    """
    found = states(opt_state)
    if all(state.dense is None for state in found):
        raise ValueError("the mask is fixed (refresh_every=None), so no dense copy is kept; use the params")
    dense = hollow(merge([state.dense for state in found]))
    if params is None:
        return dense
    stored = _like(params, dense, "dense weights")
    return jax.tree.map(lambda param, weight: param if weight is None else weight, params, stored)


def sparse_params(opt_state: Any, params: PyTree[Array]) -> PyTree[Array]:
    """`params`, with every sparse leaf set to `mask * dense` of the state, in its own dtype.

    Start a loop from it, and its very first gradient is taken at sparse parameters. It also takes back a step that is
    in the parameters but not yet in the state.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the parameters.

    Returns:
      A tree like `params`. Works under `jit`.

    Raises:
      ValueError: for a state without `sparse_training`, or one of other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
      >>> nm.sparse_params(opt_state, params)["kernel"][:, 0].tolist()
      [0.0, 0.0, 8.0, 12.0]
    """
    fixed = all(state.dense is None for state in states(opt_state))
    weights = params if fixed else dense_params(opt_state, params)

    def value(param, mask, weight):
        return param if mask is None else jnp.where(mask, weight.astype(param.dtype), 0)

    return jax.tree.map(value, params, masks(opt_state, params), weights)


def pack_params(opt_state: Any, params: PyTree[Array], dtype: jax.typing.DTypeLike | None = None) -> PyTree:
    """The parameters with those that run on sparse tensor cores packed: once per step, for all of its products.

    ```python
    packed = nm.pack_params(opt_state, params)  # once per step
    grads = jax.grad(lambda params: loss(nm.attach(params, packed), batch))(params)  # for each of its batches
    ```

    The values are those of `params` where the masks of the state keep them; only positions, which change when masks do,
    come from the state.

    Args:
      opt_state: state of an optimiser that has `sparse_training(..., packed=True)` in it.
      params: the parameters.
      dtype: what packed parameters, and their weights, are cast to: the dtype that layers compute in; `None`: as they
        are.

    Returns:
      A tree like `params` with a `nm.matmul.PackedParameter` for every leaf that is packed, which a model takes too.
      Works under `jit`. Writes half of each weight for each of its two products; the program that XLA makes for an H100
      moves 15.3 bytes per entry in bfloat16, where products that pack for themselves move 5.6 forward and 5.1 backward.

    Raises:
      ValueError: for a state without positions, or one of other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True).init(params)
      >>> packed = nm.pack_params(opt_state, nm.sparse_params(opt_state, params))
      >>> packed["kernel"].backward is not None, packed["bias"].shape
      (True, (4,))
    """
    found = [state.packed for state in states(opt_state)]
    if all(where is None for where in found):
        raise ValueError("the state holds no positions to pack at; use sparse_training(..., packed=True)")
    entries: dict[str, PackedWeight] = {}
    for where in found:
        by = by_path(where, lambda node: isinstance(node, PackedWeight) or empty(node))
        entries |= {path: entry for path, entry in by.items() if not empty(entry)}

    def pack(path, param):
        where = entries.pop(path, None)
        if where is None:
            return param
        if jnp.shape(param)[jnp.ndim(param) - len(where.axes) :] != where.shape:
            raise ValueError(f"{path}: the state has positions for shape {where.shape}, params has {jnp.shape(param)}")
        return parameter(where, param if dtype is None else param.astype(dtype))

    packed = map_located(pack, params)
    for path in entries:
        raise ValueError(f"the state has positions for {path}, which is not among params; give the tree that init had")
    return packed


def with_params(opt_state: Any, params: PyTree[Array]) -> Any:
    """The optimiser state after the parameters were edited from outside (loaded, clipped, averaged).

    Without it the next update would overwrite the edit. The dense weights become `params` wherever a mask keeps them
    or they are not zero; pruned entries that are zero keep the dense weight they had. Masks change at the next refresh.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the edited parameters.

    Returns:
      A state of the same structure, whose `RefreshStats.drift` is 0. Works under `jit`.

    Raises:
      ValueError: for a state without `sparse_training`, or one of other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
      >>> params = {"kernel": jnp.clip(nm.sparse_params(opt_state, params)["kernel"], max=10.0)}
      >>> opt_state = nm.with_params(opt_state, params)
      >>> nm.dense_params(opt_state)["kernel"][:, 0].tolist()
      [0.0, 4.0, 8.0, 10.0]
    """
    edited = leaves_by_path(params)

    def reseed(state):
        if not isinstance(state, SparseTrainingState):
            return state
        state = state._replace(stats=state.stats._replace(drift=jax.tree.map(jnp.zeros_like, state.stats.drift)))
        if state.dense is None:
            return state
        kept = leaves_by_path(state.masks)

        def value(path, dense):
            if empty(edited.get(path)):
                raise ValueError(f"params has no leaf {path}, which the state holds dense weights for")
            param = edited[path]
            if jnp.shape(param) != dense.shape:
                raise ValueError(f"{path}: params has shape {jnp.shape(param)}, the state has {dense.shape}")
            return jnp.where(kept[path] | nonzero(param), param.astype(dense.dtype), dense)

        return state._replace(dense=map_located(value, state.dense))

    states(opt_state)  # raises where there is none
    return jax.tree.map(reseed, opt_state, is_leaf=lambda node: isinstance(node, SparseTrainingState))


def refresh_stats(opt_state: Any) -> RefreshStats:
    """What the last refresh did, per sparse leaf, in the order of the leaves of the parameters.

    With several states (`optax.multi_transform`) one after the other.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.

    Returns:
      Arrays with one entry per sparse leaf. For logging, under `jit` too: `refresh_stats(opt_state).flip_rate.mean()`.

    Raises:
      ValueError: for a state without `sparse_training`.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> opt_state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
      >>> stats = nm.refresh_stats(opt_state)
      >>> stats.flip_rate.tolist(), stats.drift.tolist(), round(float(stats.retained[0]), 3)
      ([0.0], [0.0], 0.767)
    """
    found = [state.stats for state in states(opt_state)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _like(params: PyTree, tree: PyTree, what: str) -> PyTree:
    """A tree of a state, with the structure of the parameters and `None` where it has nothing.

    Raises:
      ValueError: for an entry without a parameter, or of another shape.
    """
    entries = {path: entry for path, entry in leaves_by_path(tree).items() if not empty(entry)}

    def entry_of(path, param):
        entry = entries.pop(path, None)
        if entry is not None and entry.shape != jnp.shape(param):
            raise ValueError(f"{path}: the state has {what} of shape {entry.shape}, params has {jnp.shape(param)}")
        return entry

    found = map_located(entry_of, params)
    for path in entries:
        raise ValueError(f"the state has {what} for {path}, which is not among params; give the tree that init had")
    return found
