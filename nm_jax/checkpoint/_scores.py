"""Scores in a file: what masks keep the most of, instead of magnitudes."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, PyTree

from nm_jax._core.paths import by_path
from nm_jax._core.rules import Leaf, SparseLeaf
from nm_jax._model.gram import Gram
from nm_jax.checkpoint._folder import written_beside
from nm_jax.checkpoint._store import Checkpoint
from nm_jax.checkpoint._tensor import Tensor
from nm_jax.checkpoint._tensorfile import TensorFile, TensorWriter, header_size

_FLOATS = ("F32", "F16", "BF16", "F64")


def save_scores(path: str | os.PathLike, scores: PyTree[Array | np.ndarray | Gram | None]) -> None:
    """Writes what `prune_checkpoint(..., scores=)` and `nm-jax prune --scores` read.

    Args:
      path: the file; it must not exist.
      scores: by the names of the tensors, or in a tree with their paths: scores with the shapes of the tensors (used as
        they are), `Gram` records of their inputs, or the diagonals of such records (for |w| sqrt(h), Wanda's scores).
        `None` stands for nothing.

    Raises:
      ValueError: naming the leaf, for a record of an input in feature groups, which a diagonal does not tell.
      OSError: if the file exists or cannot be written.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> nm.save_checkpoint(folder / "dense", {"fc.weight": np.ones((4, 8), np.float32)}, [("fc", None)])
      >>> inputs = nm.Gram.from_inputs(jnp.arange(16.0).reshape(2, 8))
      >>> nm.save_scores(folder / "scores", {"fc.weight": inputs})
      >>> report = nm.prune_checkpoint(folder / "dense", folder / "sparse", "2:4", scores=folder / "scores")
      >>> nm.load_checkpoint(folder / "sparse")[0]["fc.weight"][0]  # the inputs grow along the row
      array([0., 0., 1., 1., 0., 0., 1., 1.], dtype=float32)

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023).
    """
    nodes = by_path(scores, is_leaf=lambda node: isinstance(node, Gram))
    arrays = {path: _array(path, node) for path, node in nodes.items()}
    sizes = [(name, "F32", array.shape, array.nbytes) for name, array in arrays.items()]
    with written_beside(Path(path)) as beside, TensorWriter(beside, header_size(sizes, {})) as writer:
        for name, array in arrays.items():
            writer.write_array(name, array)
        writer.finish({})


def _array(path: str, node: Array | np.ndarray | Gram) -> np.ndarray:
    if not isinstance(node, Gram):
        return np.asarray(node, np.float32)
    if node.groups != 1:
        raise ValueError(f"{path}: its input is in {node.groups} feature groups; save its scores (nm.wanda) instead")
    diagonal = np.asarray(np.diagonal(node.h, axis1=1, axis2=2), np.float32)
    return diagonal[0] if len(diagonal) == 1 else diagonal


class Scores:
    """The scores of the tensors of a checkpoint that become sparse.

    Args:
      path: a safetensors file.
      checkpoint: whose tensors are scored.
      leaves: what becomes of them.

    Raises:
      ValueError: for tensors without scores, or scores that do not fit.
    """

    def __init__(self, path: str | os.PathLike, checkpoint: Checkpoint, leaves: Mapping[str, Leaf]):
        self._file = TensorFile(path)
        self._names = {_path(name): name for name in self._file.entries}
        self._leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, SparseLeaf)}
        missing = [name for name in self._leaves if _path(name) not in self._names]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{path}: it has no scores for {missing[0]!r}{more}; add them, or leave the tensors dense by a rule"
            )
        for name in self._leaves:
            entry = self._file.entries[self._names[_path(name)]]
            shape = checkpoint.tensors[name].shape
            if entry.dtype not in _FLOATS:
                raise ValueError(f"{path}: the scores of {name!r} are {entry.dtype}; write them in {_FLOATS[0]}")
            if entry.shape != shape and self._inputs(name, math.prod(entry.shape)) is None:
                raise ValueError(
                    f"{path}: the scores of {name!r} have the shape {entry.shape}; give {shape}, or the diagonal of "
                    f"a Gram matrix: one number for each input of {shape} with the axes {self._leaves[name].axes!r}"
                )

    def of(self, tensor: Tensor, weight: np.ndarray) -> Float[np.ndarray, "..."]:
        """The scores of a tensor."""
        found = self._file.read(self._names[_path(tensor.name)]).astype(np.float32)
        if found.shape == tensor.shape:
            return np.ascontiguousarray(found)
        shape = self._inputs(tensor.name, found.size)
        assert shape is not None
        norms = np.sqrt(np.maximum(found, 0)).reshape(shape)
        return np.abs(weight.astype(np.float32)) * norms

    def _inputs(self, name: str, size: int) -> tuple[int, ...] | None:
        """The shape of so many inputs, for which the outputs do not matter: those along the groups, or those at every
        kernel position and of every expert too. `None` if there are not as many."""
        leaf = self._leaves[name]
        for letters in ("i", "ib"):
            shape = tuple(n if axis in letters else 1 for n, axis in zip(leaf.shape, leaf.axes, strict=True))
            if math.prod(shape) == size:
                return shape
        return None


def _path(name: str) -> str:
    return name.replace(".", "/").removeprefix("params/")
