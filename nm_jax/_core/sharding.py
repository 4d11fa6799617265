"""Computations that take leaves apart, on meshes with explicit axes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

Out = TypeVar("Out")


def partitioned(function: Callable[..., Out], out_specs: Any, *args: Any) -> Out:
    """`function(*args)` with the shardings inside left to the partitioner.

    With explicit axes every intermediate array needs a sharding that its type can say, and the groups of a sharded
    dimension, or its parts in matrices, have none.

    Args:
      function: of arrays.
      out_specs: partition specs of what it returns, of a tree's leaves or of a whole subtree.
      *args: trees of arrays.

    Returns:
      What the function returns, with these specs if a mesh with explicit axes is involved.
    """
    leaves, treedef = jax.tree.flatten(args)
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
    explicit = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if explicit is None:
        return function(*args)
    # The mesh of the arrays, whether or not the caller has set one.
    with jax.sharding.use_abstract_mesh(explicit):
        # Of bare leaves: specs in the place of arrays are in no tree that says what its leaves are.
        flat = jax.sharding.auto_axes(
            lambda *given: function(*jax.tree.unflatten(treedef, given)), out_sharding=out_specs
        )
        return flat(*leaves)


def spec(leaf: Array) -> PartitionSpec:
    """How an array is sharded, as far as its type says it."""
    return jax.typeof(leaf).sharding.spec


def by_mesh(arrays: Sequence[Array | np.ndarray]) -> list[list[int]]:
    """Which arrays are on one mesh, as indices: a program of its own for each.

    JAX lets an operation of its own for the partitioner (`custom_partitioning`) see one mesh in a program. Arrays that
    are traced are in one program already: one group.
    """
    groups: dict[Any, list[int]] = {}
    for k, array in enumerate(arrays):
        traced = isinstance(array, jax.core.Tracer)
        groups.setdefault(None if traced else jax.typeof(array).sharding.mesh, []).append(k)
    return list(groups.values())


def meshes(arrays: Iterable[Array]) -> list[Any]:
    """The different meshes that arrays are on."""
    found = {jax.typeof(array).sharding.mesh: None for array in arrays}
    return [mesh for mesh in found if not mesh.empty]
