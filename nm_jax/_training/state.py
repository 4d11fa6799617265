"""What `sparse_training` keeps from update to update."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, PyTree

from nm_jax.solvers import Proof


class RefreshStats(NamedTuple):
    """What the last refresh did: one entry per sparse leaf, in the order of the tree's leaves.

    Attributes:
      flip_rate: fraction of mask entries that it changed.
      retained: share of the l1 norm of the dense weights that the mask keeps.
      proof: what is proved of the masks.
      nan: whether the dense weights had NaN.
    """

    flip_rate: Float[Array, " leaves"]
    retained: Float[Array, " leaves"]
    proof: Proof
    nan: Bool[Array, " leaves"]


class SparseTrainingState(NamedTuple):
    """State of `sparse_training`.

    Attributes:
      step: updates done.
      masks: tree like the parameters, boolean, one byte per sparse weight; `optax.MaskedNode` where a leaf is dense.
      dense: tree like the parameters: the dense weights, at least float32; `optax.MaskedNode` where a leaf is dense
        anyway. `None` when the mask is fixed.
      stats: what the last refresh did.
      inner: state of the inner transformation, made for the dense weights.
    """

    step: Int[Array, ""]
    masks: PyTree
    dense: PyTree | None
    stats: RefreshStats
    inner: Any
