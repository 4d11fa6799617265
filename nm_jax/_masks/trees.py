"""Trees that belong to trees of parameters: one entry per leaf, found by its path."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import PyTree

from nm_jax._core.paths import by_path, empty
from nm_jax._core.patterns import Pattern
from nm_jax._core.rules import DenseLeaf, Leaf, LeafRules, SparseLeaf


def fill(treedef: Any, leaves: Sequence[Leaf], values: Iterable[Any], otherwise: Any) -> PyTree:
    """A tree with the next value for every sparse leaf, and `otherwise` for the others."""
    remaining = iter(values)
    return treedef.unflatten([next(remaining) if isinstance(leaf, SparseLeaf) else otherwise for leaf in leaves])


def dense_leaves(leaves: Sequence[Leaf]) -> tuple[DenseLeaf, ...]:
    return tuple(leaf for leaf in leaves if isinstance(leaf, DenseLeaf))


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, nodes that stand for 'no leaf here' included. Containers do not matter, so
    that the masks in the state of an optimiser fit the parameters of any framework."""
    return by_path(tree, is_leaf=empty)


def masks_by_path(masks: PyTree) -> dict[str, Any]:
    """The leaves of a tree of masks by their path.

    Raises:
      ValueError: for rules or a plan in their place.
    """
    by_path = leaves_by_path(masks)
    if isinstance(masks, LeafRules | Pattern) or any(isinstance(leaf, str | Pattern) for leaf in by_path.values()):
        kind = "rules" if not isinstance(masks, LeafRules) else f"a {type(masks).__name__}"
        raise ValueError(f"masks is {kind}, and not a tree of masks; give nm_jax.compute_masks(params, rules)")
    return by_path
