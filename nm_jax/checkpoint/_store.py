"""Checkpoints: one safetensors file, or shards and the index that says which tensor is where.

Tensors are *logical* here: a packed one is one tensor, under the name and with the shape that it has when dense.
"""

import contextlib
import dataclasses
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nm_jax._core.rules import DenseLeaf, Leaf, Rules, resolve
from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._packed import decode, put
from nm_jax.checkpoint._records import Record
from nm_jax.checkpoint._tensorfile import FormatError, TensorFile, parse_json

_INDEX_SUFFIX = ".safetensors.index.json"
Progress: TypeAlias = Callable[[str, int], None]  # called with the name and the bytes of a tensor that is done


def no_progress(name: str, nbytes: int) -> None:
    """Nobody wants to know."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: its name.
      dtype: its dtype, as the format names it.
      shape: its shape when dense.
      file: where it is stored.
      record: what is known of it as a sparse tensor; `None` for one that is not recorded as sparse.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TensorFile
    record: Record | None

    @property
    def path(self) -> str:
        """Its name as rules see it: '/'-joined."""
        return self.name.replace(".", "/")

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        parts = (self.name,) if self.record is None else self.record.parts(self.name)
        return sum(self.file.entries[part].nbytes for part in parts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of its dense values."""
        return self.nbytes if self.record is None else self.record.size * records.PRUNABLE[self.dtype]

    @property
    def loadable(self) -> bool:
        """Whether numpy has its dtype."""
        return self.record is not None or self.file.entries[self.name].numpy_dtype is not None

    @property
    def copyable(self) -> bool:
        """Whether its stored bytes are its dense values."""
        return self.record is None or self.record.parts(self.name)[0] == self.name

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Its dense values, and its mask where one is stored.

        Raises:
          FormatError: if values and mask do not fit each other.
        """
        if self.record is None or self.record.layout == "dense":
            return self.file.read(self.name), None
        values, code = (self.file.read(part) for part in self.record.parts(self.name))
        axes, positions = self.record.axes, self.record.layout == "values+positions"
        try:
            mask = decode(code, self.shape, axes, positions)
            return (values if self.copyable else put(values, mask, axes)), mask
        except ValueError as error:
            raise FormatError(f"{self.file.path}: {self.name!r} is damaged ({error}); prune it again") from None


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

    Raises:
      FormatError: if any of the files is not valid, or they do not fit each other.
      OSError: if they cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.files: list[TensorFile] = []
        self.tensors: dict[str, Tensor] = {}
        self.index: tuple[str, dict[str, Any]] | None = None
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
        known = records.load(file.metadata.get(records.KEY), str(file.path))
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
            self.tensors[name] = Tensor(name, dtype, shape, file, found)

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

    def resolve(self, rules: Rules, partial: str) -> dict[str, Leaf]:
        """What rules say of every tensor, by name.

        Raises:
          ValueError: for rules that do not fit (see `nm_jax.rules`).
        """
        paths = {t.path: name for name, t in self.tensors.items() if t.dtype in records.PRUNABLE}
        shapes = {
            path: jax.ShapeDtypeStruct(self.tensors[name].shape, jnp.float32) for path, name in sorted(paths.items())
        }
        leaves: dict[str, Leaf] = {
            name: DenseLeaf(name, t.shape, f"dtype {t.dtype} is copied as it is") for name, t in self.tensors.items()
        }
        resolved = resolve(shapes, rules, partial)  # in the order of jax.tree.leaves, which sorts keys
        if not resolved:
            raise ValueError(f"{self.path}: no tensor is {', '.join(records.PRUNABLE)}; there is nothing to prune")
        for path, leaf in zip(shapes, resolved, strict=True):
            leaves[paths[path]] = dataclasses.replace(leaf, path=paths[path])
        return leaves


def _find(path: Path) -> Path:
    """The file that a path means."""
    if path.is_dir():
        indices = sorted(path.glob("*" + _INDEX_SUFFIX))
        found = indices or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            listed = ", ".join(file.name for file in found[:5]) or "none"
            raise FormatError(f"{path}: a folder with one index or one safetensors file is expected, found: {listed}")
        return found[0]
    return path


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


@contextlib.contextmanager
def written_beside(target: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write to, which gets the name of the target when the block ends, and is removed if it fails.

    Raises:
      OSError: if the target exists, or its folder does not.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if folder:
            beside.mkdir()
        yield beside
        os.rename(beside, target)
        _sync(target.parent)
    except OSError as error:
        if error.filename in (None, str(beside)):
            error.filename = str(target)  # the name that was asked for
        raise
    finally:
        if folder:
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
