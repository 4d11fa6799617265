"""What `sparse_training` keeps from update to update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from nm_jax._masks.apply import apply_masks
from nm_jax.solvers import Proof


class RefreshStats(NamedTuple):
    """What the last refresh did: one entry per sparse leaf, in the order of the tree's leaves.

    Attributes:
      flip_rate: fraction of mask entries that it changed.
      retained: share of the l1 norm of the dense weights that the mask keeps.
      proof: what is proved of the masks.
      nan: whether the dense weights had NaN.
      drift: how far the parameters that an update was given were from those that the update before left, relative in
        the l1 norm; the largest so far. Rounding alone is below 1e-6 in float32 and 0.01 in bfloat16. More is an edit
        from outside that training was not told of (`nm.with_params` tells it, and sets this to 0), or a transformation
        around `sparse_training` that moves the parameters itself (`optax.lookahead`, `optax.contrib.mechanize`): the
        model has not always been sparse, and the next update undid the edit. All of the first 40 updates after the
        first are looked at, then one in 37.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 4))}}
      >>> stats = nm.refresh_stats(nm.sparse_training(optax.sgd(0.1), "2:4").init(params))
      >>> isinstance(stats, nm.RefreshStats), stats.retained.tolist()
      (True, [0.5, 0.5])
    """

    flip_rate: Float[Array, " leaves"]
    retained: Float[Array, " leaves"]
    proof: Proof
    nan: Bool[Array, " leaves"]
    drift: Float[Array, " leaves"]


class SparseTrainingState(NamedTuple):
    """State of `sparse_training`.

    Attributes:
      step: updates done.
      masks: tree like the parameters, boolean, one byte per sparse weight; `optax.MaskedNode` where a leaf is dense.
      dense: tree like the parameters: the dense weights, at least float32; `optax.MaskedNode` where a leaf is dense
        anyway. `None` when the mask is fixed.
      stats: what the last refresh did.
      inner: state of the inner transformation, made for the dense weights.
      packed: with `packed=True`, tree like the parameters: the positions of what masks keep, as a `PackedWeight`
        without values; `None` or `optax.MaskedNode` where a leaf is not packed.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jnp.ones((4, 8), jnp.bfloat16), "bias": jnp.zeros(8, jnp.bfloat16)}
      >>> state = nm.sparse_training(optax.adam(0.1), "2:4").init(params)
      >>> isinstance(state, nm.SparseTrainingState), int(state.step), state.dense["kernel"].dtype.name
      (True, 0, 'float32')
    """

    step: Int[Array, ""]
    masks: PyTree
    dense: PyTree | None
    stats: RefreshStats
    inner: Any
    packed: Any = None

    # `optax.contrib.schedule_free_eval_params(opt_state, params)` reads these two of a schedule-free optimiser inside:
    # (y - (1 - b1) z) / b1 is sparse when both y and z are.
    @property
    def b1(self) -> Any:
        return self.inner.b1

    @property
    def z(self) -> PyTree:
        return apply_masks(self.inner.z, self.masks)


def check_call(state: Any, params: Any) -> None:
    """Raises a ValueError if `update` was not given the parameters, or a state that is not its own."""
    if params is None:
        raise ValueError("sparse_training needs the parameters: call tx.update(grads, opt_state, params)")
    if not isinstance(state, SparseTrainingState):
        raise ValueError(
            f"this is not a state of sparse_training but a {type(state).__name__}, such as a dense run leaves; call "
            "state = tx.init(params), and to go on with the moments of that run state._replace(inner=its_state)"
        )
    for mask in jax.tree.leaves(state.masks):
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"the masks in the state have become {mask.dtype}: a transformation around sparse_training does "
                "arithmetic on its state (optax.contrib.sam, optax.lookahead with reset_state); put it inside"
            )
