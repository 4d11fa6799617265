"""Checkpoints: one safetensors file, or shards and the index that says which tensor is where.

Tensors are *logical* here: a packed one is one tensor, under the name and with the shape that it has when dense.
"""

import errno
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from nm_jax._core.rules import DenseLeaf, Leaf, Rules, SparseLeaf
from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._records import Record, Said
from nm_jax.checkpoint._tensor import Tensor
from nm_jax.checkpoint._tensorfile import FormatError, TensorFile, parse_json
from nm_jax.checkpoint._tied import together
from nm_jax.checkpoint.knowledge import Contents
from nm_jax.checkpoint.knowledge._choose import Wanted, choose

_INDEX_SUFFIX = ".safetensors.index.json"
_LISTED = 12  # tensors that are named in an error
_LARGEST_CONFIG = 1 << 24  # bytes
Progress: TypeAlias = Callable[[str, int], None]  # called with the name and the bytes of a tensor that is done


def no_progress(name: str, nbytes: int) -> None:
    """Nobody wants to know."""


class Checkpoint:
    """What is in a checkpoint. Its files are read when a tensor is, and none stays open.

    Args:
      path: a safetensors file, the index of a sharded checkpoint (`*.safetensors.index.json`), or a folder that holds
        one of the two.

    Attributes:
      path: what it was opened as.
      index: name and content of the index file; `None` without one.
      files: its files, in the order of their names.
      tensors: all tensors, by name.
      said: how it was pruned, where it says so.

    Raises:
      FormatError: if any of the files is not valid, or they do not fit each other.
      OSError: if they cannot be read.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> nm.save_checkpoint(path, {"w": np.eye(4, dtype=np.float32), "b": np.ones(2, np.float32)}, [("w", "1:4")])
      >>> checkpoint = nm.Checkpoint(path)
      >>> {name: (tensor.dtype, tensor.shape) for name, tensor in sorted(checkpoint.tensors.items())}
      {'b': ('F32', (2,)), 'w': ('F32', (4, 4))}
      >>> str(checkpoint.records["w"].pattern)
      '1:4'
      >>> values, mask = checkpoint.tensors["w"].read()
      >>> values[0]
      array([1., 0., 0., 0.], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.files: list[TensorFile] = []
        self.tensors: dict[str, Tensor] = {}
        self.index: tuple[str, dict[str, Any]] | None = None
        self.said: Said | None = None
        found = _find(self.path)
        if found.name.endswith(".json"):
            self.index = (found.name, _read_index(found))
            names = sorted(set(self.index[1]["weight_map"].values()))
        else:
            names = [found.name]
        for name in names:
            self.files.append(TensorFile(found.parent / name))
            self._add(self.files[-1])
        self._check_names()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing is open: a `with` statement says how long a checkpoint is used."""

    @property
    def records(self) -> dict[str, Record]:
        """What is known of the tensors that are recorded as sparse."""
        return {name: tensor.record for name, tensor in self.tensors.items() if tensor.record is not None}

    def _add(self, file: TensorFile) -> None:
        said = records.load(file.metadata.get(records.KEY), str(file.path))
        known = {} if said is None else said.tensors
        self.said = said if self.said is None else self.said
        owners = {part: name for name, record in known.items() for part in record.parts(name)}
        for name, record in known.items():
            _check_parts(file, name, record)
        for part, entry in file.entries.items():
            name = owners.get(part, part)
            if self.index is not None and self.index[1]["weight_map"].get(part) != file.path.name:
                raise FormatError(f"{file.path}: the index does not say that {part!r} is here; download both again")
            found = known.get(name)
            if found is not None and part != found.parts(name)[0]:
                continue  # the mask of a tensor, which its values stand for
            if name in self.tensors:
                raise FormatError(f"{file.path}: the tensor {name!r} is there twice; write the checkpoint again")
            dtype, shape = (entry.dtype, entry.shape) if found is None else (found.dtype, found.shape)
            reason = "" if said is None else said.dense.get(name, "")
            self.tensors[name] = Tensor(name, dtype, shape, file, found, reason)

    def _check_names(self) -> None:
        if self.index is not None:
            stored = {part for file in self.files for part in file.entries}
            if missing := sorted(set(self.index[1]["weight_map"]) - stored):
                raise FormatError(
                    f"{self.path}: no file has the tensor {missing[0]!r} of the index; download both again"
                )
        paths: dict[str, str] = {}
        for tensor in self.tensors.values():
            if (other := paths.setdefault(tensor.path, tensor.name)) != tensor.name:
                raise FormatError(f"{self.path}: rules cannot tell {other!r} from {tensor.name!r}; rename one of them")

    @functools.cached_property
    def contents(self) -> Contents:
        """What there is to tell from what its tensors are."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        metadata = {key: text for file in self.files for key, text in file.metadata.items()}
        return Contents(shapes, _read_config(self.files[0].path.parent / "config.json"), metadata)

    def resolve(
        self,
        rules: Rules,
        partial: str = "skip",
        *,
        include: Sequence[str] = (),
        strict: bool = False,
        none: bool = True,
    ) -> dict[str, Leaf]:
        """What rules, and what is known of the tensors, say of every tensor, by name; arguments as in
        `prune_checkpoint`; `none`: whether there may be no sparse one.

        Raises:
          ValueError: for rules that do not fit.
        """
        try:
            leaves = choose(self.tensors, self.contents, Wanted(rules, partial, include, strict))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        leaves = together(self.tensors, leaves)
        if not none and not any(isinstance(leaf, SparseLeaf) for leaf in leaves.values()):
            why = [f"{leaf.path}: {leaf.reason}" for leaf in leaves.values() if isinstance(leaf, DenseLeaf)]
            more = [f"and {len(why) - _LISTED} more"] if len(why) > _LISTED else []
            listed = [f"{self.path}: no tensor is known to be sparse:", *why[:_LISTED], *more]
            raise ValueError("\n  ".join(listed))
        return leaves


def _read_config(path: Path) -> Any:
    """What a configuration beside the tensors says; `None` without one that can be read."""
    try:
        found = parse_json(path.read_bytes(), str(path)) if path.stat().st_size < _LARGEST_CONFIG else None
    except (OSError, FormatError):
        return None
    return found if isinstance(found, dict) else None


def _find(path: Path) -> Path:
    """The file that a path means."""
    if not path.is_dir():
        return path
    indices = sorted(path.glob("*" + _INDEX_SUFFIX))
    found = indices or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    expected = f"{path}: a folder with one index or one safetensors file is expected"
    if found:
        kind = "indices" if indices else "files without an index"
        listed = ", ".join(file.name for file in found[:5]) + (", ..." if len(found) > 5 else "")
        raise FormatError(f"{expected}, and these are {len(found)} {kind}: {listed}; give the path of one of them")
    below = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    hint = f"there are some in its folders {', '.join(below)}: give one of these" if below else "there is none"
    raise FormatError(f"{expected}; {hint}")


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    index = parse_json(path.read_bytes(), str(path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path}: it has no weight_map; give the index of a sharded checkpoint, or a safetensors file"
        )
    for name in weight_map.values():
        # Shards lie beside their index: a path could lead anywhere.
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise FormatError(f"{path}: {name!r} is not the name of a file beside the index; write the index again")
    return index


def _check_parts(file: TensorFile, name: str, record: Record) -> None:
    """Whether a file stores a tensor as its record says."""
    for part, dtype, shape, _ in records.stored_parts(record, name):
        entry = file.entries.get(part)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            raise FormatError(f"{file.path}: {part!r} is not as its record says; prune the checkpoint again")
