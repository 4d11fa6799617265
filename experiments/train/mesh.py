"""A run over several devices: whole copies of the state, or each device a part of it."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TILE = 8  # parts end on the boundaries of tiles of up to 8 x 8, so that masks are found without moving weights


def placed(tree: Any, mesh: Mesh, sharded: bool) -> Any:
    """Where each leaf of a state goes.

    Args:
      tree: the state.
      mesh: devices, along one axis.
      sharded: leaves are cut along their longest axis whose parts are whole tiles, those of the optimiser as their
        parameter; what has none is copied to every device. Otherwise everything is.
    """
    (name,) = mesh.axis_names

    def place(leaf):
        axes = [None] * leaf.ndim
        fitting = [k for k in range(leaf.ndim) if leaf.shape[k] % (TILE * mesh.size) == 0] if sharded else []
        if leaf.ndim > 1 and fitting:
            axes[max(fitting, key=lambda k: leaf.shape[k])] = name
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(place, tree)


def split(batch: Any, mesh: Mesh) -> Any:
    """A batch, each device with its share of the examples.

    Raises:
      ValueError: the examples cannot be shared out evenly.
    """
    (size,) = {len(x) for x in jax.tree.leaves(batch)}
    if size % mesh.size:
        raise ValueError(f"a batch of {size} examples on {mesh.size} devices; make it a multiple of {mesh.size}")
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))
