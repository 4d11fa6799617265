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
      step: the update after which the masks were found; 0 until the first refresh.
      phase: which pattern the masks have: 0 where leaves are still dense, then 1; with earlier patterns 1 in the first
        of them, and 1 more after each that has ended.
      move: the l2 norm of the step that the optimiser made in that update, relative to that of the dense weights after
        it; not found for a fixed mask.
      largest_flip_rate: of all refreshes so far; the first masks after dense updates, or of a pattern, are none.
      largest_retained: of all masks of this phase so far.
      largest_move: of all refreshes so far.

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
    step: Int[Array, " leaves"]
    phase: Int[Array, " leaves"]
    move: Float[Array, " leaves"]
    largest_flip_rate: Float[Array, " leaves"]
    largest_retained: Float[Array, " leaves"]
    largest_move: Float[Array, " leaves"]

    @property
    def failing(self) -> Bool[Array, " leaves"]:
        """Whether masks do what ends training badly; a mask that stays, or another decay, may then do better.

        retained < 0.98 * largest_retained, or flip_rate > largest_flip_rate / 2 and move < largest_move / 10

        Kept and pruned weights grow alike, or masks go on changing while the learning rate vanishes. Training with a
        decay too weak for its loss shows the first; that neither is seen does not say that all is well. Compare
        `nm.recipes.fixed_mask`, or decay more strongly. Works under `jit`.
        """
        fallen = self.retained < 0.98 * self.largest_retained
        restless = (self.flip_rate > self.largest_flip_rate / 2) & (self.move < self.largest_move / 10)
        return fallen | restless

    def after(self, before: "RefreshStats", step: Int[Array, ""], changes: Bool[Array, ""]) -> "RefreshStats":
        """These, with the largest of all so far. `changes`: whether masks of this pattern were there before."""
        return self._replace(
            step=jnp.zeros_like(before.step) + step,
            largest_flip_rate=jnp.maximum(before.largest_flip_rate, jnp.where(changes, self.flip_rate, 0)),
            largest_retained=jnp.maximum(jnp.where(changes, before.largest_retained, 0), self.retained),
            largest_move=jnp.maximum(before.largest_move, self.move),
        )


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
