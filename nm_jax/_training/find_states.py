"""The states of sparse training in the state of any optimiser, and one tree out of theirs."""

import warnings
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from nm_jax._core.paths import empty
from nm_jax._training.state import SparseTrainingState

_MOVERS = (
    optax.LookaheadState,
    optax.contrib.MechanicState,
    optax.contrib.SAMState,
    optax.contrib.ScheduleFreeState,
)


_MOVED = 0.2  # of a weight's l1 norm: rounding is below, in floats of 8 bits too


def states(opt_state: Any) -> list[SparseTrainingState]:
    """All states of `sparse_training` in the state of any optimiser, as plain arrays."""
    found = _all_of(SparseTrainingState, opt_state)
    if not found:
        raise ValueError("this optimiser state holds no state of sparse_training; was tx.init called on it?")
    named = False
    for outer in movers(opt_state):
        # With a fixed mask what they do, sums and averages of sparse weights, has the pattern.
        if any(state.dense is not None for state in _all_of(SparseTrainingState, outer)):
            named = True
            warnings.warn(
                f"{type(outer).__name__} is around sparse_training: it moves the parameters off their pattern, and "
                "the next update undoes what it did; put it inside (optax.lookahead: use a fixed mask)",
                stacklevel=3,
            )

    # Flax NNX wraps every array of an optimiser state in a Variable.
    def wrapped(node):
        return hasattr(node, "get_value")

    plain = [jax.tree.map(lambda n: n.get_value() if wrapped(n) else n, state, is_leaf=wrapped) for state in found]
    moved = max((_drift(state) for state in plain), default=0.0)
    if moved > _MOVED and not named:
        warnings.warn(
            f"an update was given parameters that are {moved:.0%} of their size away from those that the update before "
            "left, and has undone that: after an edit call nm_jax.with_params; a transformation around sparse_training "
            "that moves the parameters belongs inside it",
            stacklevel=3,
        )
    return plain


def _drift(state: SparseTrainingState) -> float:
    """How far parameters were moved from outside; 0 where that is not known yet."""
    drift = state.stats.drift
    known = isinstance(drift, np.ndarray) or (isinstance(drift, jax.Array) and not isinstance(drift, jax.core.Tracer))
    if not known or (isinstance(drift, jax.Array) and not (drift.is_fully_addressable or drift.is_fully_replicated)):
        return 0.0
    return float(np.max(jax.device_get(drift), initial=0.0))


def movers(opt_state: Any) -> list[Any]:
    """The states of optax's transformations that move the parameters themselves, past what is inside them."""
    return _all_of(_MOVERS, opt_state)


def _all_of(kind: Any, tree: PyTree) -> list[Any]:
    """The outermost nodes of a tree that are of a class."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def merge(trees: list[PyTree]) -> PyTree:
    """One tree out of several that are empty in different places, as under `optax.multi_transform`."""
    filled = [tree for tree in trees if not empty(tree)]
    if len(filled) < 2:
        return filled[0] if filled else None
    first = filled[0]
    treedef: Any = jax.tree.structure(first, is_leaf=lambda node: node is not first)
    return treedef.unflatten([merge(list(nodes)) for nodes in zip(*map(treedef.flatten_up_to, filled), strict=True)])


def hollow(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda node: None if empty(node) else node, tree, is_leaf=empty)
