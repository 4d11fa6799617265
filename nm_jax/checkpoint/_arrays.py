"""Arrays in memory to a checkpoint, and back."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.paths import empty
from nm_jax._core.rules import DenseLeaf, Rules, SparseLeaf, resolve
from nm_jax._masks.trees import leaves_by_path
from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._folder import written_beside
from nm_jax.checkpoint._packed import encode, take
from nm_jax.checkpoint._records import Record, Said
from nm_jax.checkpoint._store import Checkpoint
from nm_jax.checkpoint._tensor import Tensor
from nm_jax.checkpoint._tensorfile import TensorWriter, dtype_name, header_size
from nm_jax.checkpoint._tiles import broken_tiles


def save_checkpoint(
    path: str | os.PathLike,
    params: PyTree[Array | np.ndarray],
    rules: Rules,
    *,
    masks: PyTree[Bool[Array | np.ndarray, "..."] | None] = None,
    partial: str = "skip",
    packed: bool = False,
    keep_masks: bool = False,
) -> None:
    """Writes sparse parameters as one safetensors file, named by their '/'-joined paths.

    Args:
      path: the file; it must not exist.
      params: parameters that have their patterns already, in any container.
      rules: the rules they were made with; the file records them.
      masks: their masks, as `nm.masks(opt_state)` gives them; `None` takes what is not zero.
      partial: as in `compute_masks`.
      packed: store values and positions instead of zeros; `load_checkpoint` and the command line read them.
      keep_masks: store a bit-packed mask beside each sparse parameter.

    Raises:
      ValueError: naming the leaf, where parameters do not have their pattern or are not zero outside their mask.
      OSError: if the file exists or cannot be written.

    Everything is gathered to the host.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> params = {"Dense_0": {"kernel": np.tile(np.eye(4, dtype=np.float32), (2, 1)), "bias": np.ones(4, np.float32)}}
      >>> nm.save_checkpoint(path, params, "1:4-T", packed=True)
      >>> loaded, masks = nm.load_checkpoint(path, like=params)
      >>> bool((loaded["Dense_0"]["kernel"] == params["Dense_0"]["kernel"]).all())
      True
    """
    leaves = resolve(params, rules, partial)
    arrays = {leaf.path: np.asarray(array) for leaf, array in zip(leaves, jax.tree.leaves(params), strict=True)}
    given = {} if masks is None else leaves_by_path(masks)
    parts: dict[str, np.ndarray] = {}
    found: dict[str, Record] = {}
    for leaf in leaves:
        array = arrays[leaf.path]
        if isinstance(leaf, SparseLeaf):
            mask = given.get(leaf.path)
            kept = nonzero(np.ascontiguousarray(array)) if empty(mask) else np.asarray(mask)
            found[leaf.path] = _check(leaf, array, kept, packed, keep_masks)
            parts |= _parts(found[leaf.path], leaf.path, array, kept)
        else:
            parts[leaf.path] = array
    dense = {leaf.path: leaf.reason for leaf in leaves if isinstance(leaf, DenseLeaf)}
    metadata = {records.KEY: Said(found, dense, records.rules_json(rules), partial).dump()}
    sizes = [(name, dtype_name(array.dtype), array.shape, array.nbytes) for name, array in parts.items()]
    with written_beside(Path(path)) as beside, TensorWriter(beside, header_size(sizes, metadata)) as writer:
        for name, array in parts.items():
            writer.write_array(name, array)
        writer.finish(metadata)


def _check(leaf: SparseLeaf, array: np.ndarray, kept: np.ndarray, packed: bool, keep_masks: bool) -> Record:
    """The record of a parameter that has its pattern."""
    dtype = dtype_name(array.dtype)
    if dtype not in records.PRUNABLE:
        raise ValueError(
            f"{leaf.path}: sparse tensors are {', '.join(records.PRUNABLE)}, got {array.dtype}; convert it"
        )
    if kept.shape != array.shape:
        raise ValueError(f"{leaf.path}: the mask has shape {kept.shape}, the parameter has {array.shape}")
    if np.any(nonzero(np.ascontiguousarray(array)) & ~kept):
        raise ValueError(f"{leaf.path}: it is not zero where its mask prunes it; apply the masks before saving")
    if broken_tiles(kept, leaf):
        raise ValueError(f"{leaf.path}: it does not have the pattern {leaf.pattern}; prune it before saving")
    layout = records.layout_of(leaf, packed, keep_masks)
    if layout == "values+positions" and 2 * np.count_nonzero(kept) != kept.size:
        layout = "values+mask"  # fewer than two in some group
    return Record(leaf.pattern, leaf.axes, dtype, leaf.shape, layout, int(np.count_nonzero(kept)), source=leaf.source)


def _parts(record: Record, name: str, array: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    """What a sparse parameter is stored as."""
    parts = record.parts(name)
    stored = {parts[0]: array if parts[0] == name else take(array, kept, record.axes)}
    if len(parts) > 1:
        stored[parts[1]] = encode(kept, record.axes, record.layout == "values+positions")
    return stored


def load_checkpoint(path: str | os.PathLike, like: Any = None) -> tuple[PyTree[np.ndarray], PyTree[np.ndarray | None]]:
    """The parameters and masks of a checkpoint, in any layout.

    Args:
      path: a safetensors file, the index of a sharded checkpoint, or a folder with one of them.
      like: a tree with the structure and the paths that are wanted; its leaves may be arrays, shapes
        (`jax.eval_shape`), or anything. `None` gives dictionaries by name, without the tensors of dtypes that numpy
        has not, of which a warning tells.

    Returns:
      `(params, masks)` on the host. A mask is `None` for a tensor that is not recorded as sparse, the stored mask where
      there is one, and otherwise what is not zero.

    Raises:
      FormatError: if a file is damaged.
      ValueError: if the checkpoint has no tensor for a path of `like`, or one of another shape.
      OSError: if a file cannot be read.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> nm.save_checkpoint(path, {"w": np.eye(4, dtype=np.float32), "b": np.ones(2, np.float32)}, [("w", "1:4")])
      >>> params, masks = nm.load_checkpoint(path)
      >>> sorted(params), int(masks["w"].sum()), masks["b"]
      (['b', 'w'], 4, None)
      >>> nm.load_checkpoint(path, like={"w": params["w"]})[0]["w"][0]
      array([1., 0., 0., 0.], dtype=float32)
    """
    checkpoint = Checkpoint(path)
    if like is None:
        return _read(checkpoint, [name for name, tensor in checkpoint.tensors.items() if _loadable(tensor)])
    names = {name.replace(".", "/").removeprefix("params/"): name for name in checkpoint.tensors}
    wanted = leaves_by_path(like)
    if missing := [path for path in wanted if path not in names]:
        raise ValueError(f"{path}: it has no tensor for {missing[0]}; its paths are {', '.join(list(names)[:12])}")
    for leaf, value in wanted.items():
        shape = checkpoint.tensors[names[leaf]].shape
        if hasattr(value, "shape") and tuple(value.shape) != shape:
            raise ValueError(
                f"{path}: {names[leaf]!r} has the shape {shape}, and `like` wants {tuple(value.shape)} for {leaf}; "
                "give the structure of the model that was saved"
            )
    params, masks = _read(checkpoint, [names[leaf] for leaf in wanted])
    treedef: Any = jax.tree.structure(like, is_leaf=empty)
    return treedef.unflatten(params.values()), treedef.unflatten(masks.values())


def _loadable(tensor: Tensor) -> bool:
    if tensor.loadable:
        return True
    warnings.warn(f"{tensor.name!r} is left out: numpy has no dtype {tensor.dtype}", stacklevel=3)
    return False


def _read(checkpoint: Checkpoint, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray | None]]:
    """Tensors and their masks."""
    params: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray | None] = {}
    for name in names:
        tensor = checkpoint.tensors[name]
        params[name], mask = tensor.read()
        if tensor.record is not None and mask is None:
            mask = nonzero(params[name])
        masks[name] = mask
    return params, masks
