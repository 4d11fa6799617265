"""The leaves of a pytree by their paths, whatever the containers.

A path is the '/'-joined keys of a leaf, without a leading `params` and without the `value` that Flax's boxes (NNX
variables, Linen's partitioned parameters) append: one path names the same parameter in every container.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import optax

T = TypeVar("T")
# Classes of Flax that hold one array under the attribute `value`.
_BOXES = ("Variable", "VariableState", "AxisMetadata")


class Located(NamedTuple):
    """A leaf of a tree.

    Attributes:
      path: its path.
      value: the leaf.
      owner: the container that holds it under the last key of its path; `None` for a tree that is a leaf.
    """

    path: str
    value: Any
    owner: Any


def empty(node: Any) -> bool:
    """Whether a node of a tree stands for 'no leaf here': `None`, or what `optax.masked` puts in its place."""
    return node is None or isinstance(node, optax.MaskedNode)


def located(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Located]:
    """The leaves in the order of `jax.tree.leaves(tree, is_leaf)`.

    Raises:
      ValueError: if two of them have one path.
    """
    found = list(_below((), tree, None, is_leaf or (lambda node: False)))
    paths = set()
    for leaf in found:
        if leaf.path in paths:
            raise ValueError(f"two leaves have the path {leaf.path!r} (without a leading 'params'); rename one of them")
        paths.add(leaf.path)
    return found


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {leaf.path: leaf.value for leaf in located(tree, is_leaf)}


def map_located(function: Callable[[str, Any], T], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """A tree of `function(path, leaf)`."""
    mapped = [function(leaf.path, leaf.value) for leaf in located(tree, is_leaf)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf), mapped)


def words(path: str) -> list[str]:
    """The names in a path. PyTorch's names are flat and dotted: `{"layers.0.weight": ...}`."""
    return re.split(r"[/.]", path)


def _below(keys: tuple, node: Any, owner: Any, is_leaf: Callable[[Any], bool]):
    children = jax.tree_util.tree_flatten_with_path(node, lambda below: below is not node)[0]
    if is_leaf(node) or any(not below for below, _ in children):
        yield Located(_path(keys), node, owner)
        return
    for below, child in children:
        if _boxed(node, below):
            yield from _below(keys, child, owner, is_leaf)
        else:
            yield from _below((*keys, *below), child, node, is_leaf)


def _boxed(node: Any, keys: tuple) -> bool:
    named = isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value"
    return named and any(b.__name__ in _BOXES and b.__module__.split(".")[0] == "flax" for b in type(node).__mro__)


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removeprefix("params/")
