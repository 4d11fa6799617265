"""Readers of the data folder: images packed into npz files, and weights.

The folder is the one that the environment variable `NM_JAX_DATA` names.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def folder() -> Path:
    """The data folder; an error says what to set when there is none."""
    path = os.environ.get("NM_JAX_DATA")
    if not path or not Path(path).is_dir():
        raise SystemExit("set NM_JAX_DATA to the folder with the pretrained weights and the data")
    return Path(path)


def weights(name: str) -> dict[str, np.ndarray]:
    """Arrays of a weight file by the names that the original network gives them."""
    with np.load(folder() / "weights" / f"{name}.npz") as file:
        return dict(file)


def labels(name: str) -> np.ndarray:
    """Classes of the images of a file."""
    with np.load(folder() / "vision" / f"{name}.npz") as file:
        return file["labels"].astype(np.int32)


def images(name: str, chosen: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The chosen images of a file, RGB bytes."""
    with np.load(folder() / "vision" / f"{name}.npz") as file:
        data, offsets = file["data"], file["offsets"].astype(np.int64)
        # Small images share one JPEG header, which is stored once.
        header = file["header"].tobytes() if "header" in file.files else b""
    decoded = []
    for k in chosen:
        stream = io.BytesIO(header + data[offsets[k] : offsets[k + 1]].tobytes())
        decoded.append(np.asarray(Image.open(stream).convert("RGB")))
    return decoded


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of an image; one that is too small is enlarged first."""
    if (shortest := min(image.shape[:2])) < side:
        size = [round(n * side / shortest) for n in (image.shape[1], image.shape[0])]
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]
