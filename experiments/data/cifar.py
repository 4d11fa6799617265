"""CIFAR-10 and CIFAR-100 as www.cs.toronto.edu/~kriz/cifar.html has them, for Python or as binary files."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.errors import DataError

PIXELS = 3 * 32 * 32
# name -> suffix -> files to train, file to test, bytes of labels before the pixels of a record
FILES = {
    "cifar10": {
        "": ([f"data_batch_{k}" for k in range(1, 6)], "test_batch", 0),
        ".bin": ([f"data_batch_{k}.bin" for k in range(1, 6)], "test_batch.bin", 1),
    },
    "cifar100": {"": (["train"], "test", 0), ".bin": (["train.bin"], "test.bin", 2)},
}
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def read(name: str, path: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images `uint8[count, 32, 32, 3]` and classes `int32[count]` to train and to test.

    Args:
      name: `cifar10` or `cifar100`, of which the fine classes are read.
      path: folder of the files, or the one that the archive was unpacked in.

    Raises:
      DataError: the folder or one of the files is missing, or is no such file.
    """
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder")
    for folder in (path / folder for folder in FOLDERS):
        for train, test, labels in FILES[name].values():
            if (folder / test).is_file():
                if missing := [file for file in train if not (folder / file).is_file()]:
                    raise DataError(f"{folder / missing[0]}: this file of {name} is missing")
                parts = [_file(folder / file, labels, name) for file in train]
                images, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                return (images, classes), _file(folder / test, labels, name)
    wanted = " or ".join(test for _, test, _ in FILES[name].values())
    raise DataError(f"{path}: no files of {name}, neither {wanted}, in it; unpack its archive there")


def _file(file: Path, labels: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    raw = file.read_bytes()
    classes: Any
    try:
        if labels:
            records = np.frombuffer(raw, np.uint8).reshape(-1, labels + PIXELS)
            classes, pixels = records[:, labels - 1], records[:, labels:]  # coarse before fine
        else:
            found = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
            classes, pixels = found["labels" if name == "cifar10" else "fine_labels"], found["data"]
        images = np.asarray(pixels, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        classes = np.asarray(classes, np.int32).reshape(len(images))
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{file}: this is no file of {name}, or it is damaged ({error}); fetch it again") from error
    if not len(images) or classes.min() < 0 or classes.max() >= int(name.removeprefix("cifar")):
        raise DataError(f"{file}: it has no images, or other classes than {name}; fetch it again")
    return np.ascontiguousarray(images), classes


class _Unpickler(pickle.Unpickler):
    """Knows arrays, and refuses whatever else a pickle may call."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        known = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        if (module, name) in known | {("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it has a {module}.{name}")
