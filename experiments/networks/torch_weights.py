"""State dicts of PyTorch: reading their files, without PyTorch, and turning them into Flax variables by name."""

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

# Layers that PyTorch numbers have a number here too: `layer1.0` is `layer1_0`.
NAMES = (
    (r"^module\.", ""),
    (r"\b(layer\d|features|classifier)\.(\d+)", r"\1_\2"),
    (r"\b(shortcut|downsample)\.0", r"\1_conv"),
    (r"\b(shortcut|downsample)\.1", r"\1_bn"),
)
STATISTICS = {"running_mean": "mean", "running_var": "var"}


def variables(weights: Mapping[str, np.ndarray], flattened: Mapping[str, int] | None = None) -> dict:
    """Flax variables of the arrays of a convolutional network.

    Args:
      weights: arrays by their PyTorch names.
      flattened: dense layers that see an image of so many positions, which comes with its channels first in PyTorch and
        last here.
    """
    found: dict = {"params": {}, "batch_stats": {}}
    for key, value in weights.items():
        *layers, kind = _translate(key).split(".")
        if kind == "num_batches_tracked":
            continue
        name = STATISTICS.get(kind) or ("bias" if kind == "bias" else "scale" if value.ndim == 1 else "kernel")
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            positions = (flattened or {}).get("/".join(layers), 1)
            value = value.reshape(len(value), -1, positions).transpose(2, 1, 0).reshape(-1, len(value))
        node = found["batch_stats" if kind in STATISTICS else "params"]
        for layer in layers:
            node = node.setdefault(layer, {})
        node[name] = value
    return jax.tree.map(jnp.asarray, {name: tree for name, tree in found.items() if tree})


def _translate(key: str) -> str:
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def check(found: dict, module: nn.Module, *inputs: Any) -> dict:
    """Returns the variables as they are, if they are those of the module.

    Raises:
      ValueError: a parameter is missing, is one too many, or has another shape; names the first one.
    """
    wanted = _shapes(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    there = _shapes(found)
    for path in [*wanted, *there]:
        if wanted.get(path) != there.get(path):
            has, wants = (f"has shape {s[path]}" if path in s else "is missing" for s in (there, wanted))
            wants = wants.replace("is missing", "has no such parameter").replace("has shape", "wants")
            raise ValueError(f"these are the weights of another network: {path} {has}, {type(module).__name__} {wants}")
    return found


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


# -------------------------------------------------------------------------------------------------------------- files


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz`, `.safetensors` or PyTorch file by their names. Nothing in the file is executed.

    Raises:
      ValueError: the file is none of these, or has more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:
        try:
            found = _zipped(file) if zipfile.is_zipfile(path) else _plain(file)
        except (pickle.UnpicklingError, EOFError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no state dict of PyTorch that can be read here: {error}") from error
    return _tensors(found.get("state_dict", found) if isinstance(found, Mapping) else found, path)


def _tensors(found: Any, path: Path) -> dict[str, np.ndarray]:
    if not isinstance(found, Mapping) or not all(isinstance(value, _Tensor | np.ndarray) for value in found.values()):
        raise ValueError(f"{path}: it has more than tensors by name; save model.state_dict() alone")
    return {name: value.array() if isinstance(value, _Tensor) else value for name, value in found.items()}


_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Tensor:
    """A view of a storage, whose bytes may be further down the file."""

    def __init__(self, storage: Any, offset: int, shape: tuple, strides: tuple, *rest: Any):
        (self.bytes, self.dtype), self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        flat = np.frombuffer(self.bytes(), self.dtype)[self.offset :]
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False))


class _Unpickler(pickle.Unpickler):
    """Knows tensors, and refuses whatever else a pickle may call."""

    def __init__(self, file: BinaryIO, storage: Callable[[str], Callable[[], bytes]]):
        super().__init__(file, encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it has a {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return self._storage(key), dtype


def _zipped(file: BinaryIO) -> Any:
    """Since PyTorch 1.6: a zip file with the pickle and a file for each storage."""
    archive = zipfile.ZipFile(file)
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")

    def storage(key):
        content = archive.read(f"{folder}data/{key}")
        return lambda: content

    with archive.open(pickled) as stream:
        return _Unpickler(stream, storage).load()  # type: ignore[arg-type]


def _plain(file: BinaryIO) -> Any:
    """Before: magic number, version, machine, the pickle, the keys of the storages, and these one by one."""
    contents: dict[str, bytes] = {}
    dtypes: dict[str, Any] = {}

    class Unpickler(_Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            dtypes[pid[2]] = pid[1]
            return super().persistent_load(pid)

    def load():
        return Unpickler(file, lambda key: lambda: contents[key]).load()

    if load() != 0x1950A86A20F9469CFC6C:
        raise pickle.UnpicklingError("it begins with another number")
    load(), load()
    found = load()
    for key in load():
        (count,) = struct.unpack("<q", file.read(8))
        contents[key] = file.read(count * np.dtype(dtypes[key]).itemsize)
    return found
