"""The sparse leaves of a tree of parameters, apart from the others."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from nm_jax._core.paths import empty
from nm_jax._core.rules import Leaf, Rules, SparseLeaf, resolve
from nm_jax._masks.trees import fill, leaves_by_path


@dataclasses.dataclass(frozen=True)
class SparseLeaves:
    """Takes the entries of the sparse leaves from trees like the parameters, and puts others in their place.

    Attributes:
      every: what the rules say of every leaf of the parameters.
      treedef: their structure.
    """

    every: list[Leaf]
    treedef: Any

    @classmethod
    def of(cls, params: PyTree, rules: Rules, partial: str) -> "SparseLeaves":
        """Those of a tree of parameters, by these rules."""
        return cls(resolve(params, rules, partial), jax.tree.structure(params))

    @property
    def leaves(self) -> tuple[SparseLeaf, ...]:
        """What the rules say of the sparse ones."""
        return tuple(leaf for leaf in self.every if isinstance(leaf, SparseLeaf))

    def take(self, tree: PyTree) -> list[Any]:
        """The entries of the sparse leaves in a tree like the parameters."""
        entries = self.treedef.flatten_up_to(tree)
        return [entry for leaf, entry in zip(self.every, entries, strict=True) if isinstance(leaf, SparseLeaf)]

    def put(self, tree: PyTree, values: Iterable[Any]) -> PyTree:
        """The tree with these in place of the entries of the sparse leaves."""
        remaining = iter(values)
        entries = self.treedef.flatten_up_to(tree)
        return self.treedef.unflatten(
            next(remaining) if isinstance(leaf, SparseLeaf) else entry
            for leaf, entry in zip(self.every, entries, strict=True)
        )

    def only(self, values: Iterable[Any]) -> PyTree:
        """A tree with these for the sparse leaves, and `optax.MaskedNode` for the others."""
        return fill(self.treedef, self.every, values, optax.MaskedNode())

    def stored(self, tree: PyTree, what: str) -> list[Array]:
        """The entries of the sparse leaves in a tree that `only` made, in whatever containers it is now.

        Raises:
          ValueError: if it was made for other parameters.
        """
        by_path = leaves_by_path(tree)
        entries = []
        for leaf in self.every:
            entry = by_path.pop(leaf.path, None)
            if empty(entry) == isinstance(leaf, SparseLeaf):
                differs = "no" if empty(entry) else "unexpected"
                raise ValueError(f"the state has {differs} {what} for {leaf.path}; call init for this tree")
            if empty(entry):
                continue
            if entry.shape != leaf.shape:
                raise ValueError(
                    f"{leaf.path}: the state's {what} have shape {entry.shape}, the parameter has {leaf.shape}; "
                    "call init for this tree"
                )
            entries.append(entry)
        for path, entry in by_path.items():
            if not empty(entry):
                raise ValueError(f"the state has {what} for {path}, which is not among the parameters; call init again")
        return entries
