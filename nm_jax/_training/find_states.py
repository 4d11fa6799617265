"""The states of sparse training in the state of any optimiser, and one tree out of theirs."""

import warnings
from typing import Any

import jax
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


def states(opt_state: Any) -> list[SparseTrainingState]:
    """All states of `sparse_training` in the state of any optimiser, as plain arrays."""
    found = _all_of(SparseTrainingState, opt_state)
    if not found:
        raise ValueError("this optimiser state holds no state of sparse_training; was tx.init called on it?")
    for outer in movers(opt_state):
        # With a fixed mask what they do, sums and averages of sparse weights, has the pattern.
        if any(state.dense is not None for state in _all_of(SparseTrainingState, outer)):
            warnings.warn(
                f"{type(outer).__name__} is around sparse_training: it moves the parameters off their pattern, and "
                "the next update undoes what it did; put it inside (optax.lookahead: use a fixed mask)",
                stacklevel=3,
            )

    # Flax NNX wraps every array of an optimiser state in a Variable.
    def wrapped(node):
        return hasattr(node, "get_value")

    return [jax.tree.map(lambda n: n.get_value() if wrapped(n) else n, state, is_leaf=wrapped) for state in found]


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
