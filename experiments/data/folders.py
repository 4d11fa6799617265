"""Images in folders, one for each class, as ImageNet is distributed: `train/n01440764/n01440764_18.JPEG`, and `val`."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data import loading
from experiments.data.errors import DataError
from experiments.data.transforms import Middle, RandomPart

SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}


class Folder:
    """The images of class folders, read when they are asked for; classes are numbered in the order of their names.

    Args:
      path: the folder of the class folders.
      broken: what an image that cannot be read does: `"refuse"` raises, `"skip"` warns once and leaves it out.

    Raises:
      DataError: there is no folder, no class folder, or a class folder without images.
    """

    def __init__(self, path: Path, broken: str = "refuse"):
        if broken not in ("refuse", "skip"):
            raise ValueError(f"broken must be 'refuse' or 'skip', got {broken!r}")
        if not path.is_dir():
            raise DataError(f"{path}: there is no such folder")
        self.path, self.broken = path, broken
        self._said: dict[int, object] = {}  # of which images a warning was given, and by which read
        self.classes = sorted(child.name for child in path.iterdir() if child.is_dir() and child.name[0] != ".")
        if not self.classes:
            raise DataError(f"{path}: it is empty, or has no folder for each class; is it the right folder?")
        self.files: list[Path] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = sorted(file for file in (path / name).iterdir() if file.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"{path / name}: this class folder has no images; add some, or delete the folder")
            self.files += files
            self.labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.int32]:
        """Image and class. The next image that can be read takes the place of one that is skipped."""
        for k in range(len(self)):
            if (found := self.read((number + k) % len(self))) is not None:
                return found
        raise DataError(f"{self.path}: none of its {len(self)} images can be read")

    def read(self, number: int) -> tuple[np.ndarray, np.int32] | None:
        """Image, RGB bytes, and class; `None` if it is skipped.

        Raises:
          DataError: it cannot be read, and is refused.
        """
        file = self.files[number]
        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB")), np.int32(self.labels[number])
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = f"{file}: this image cannot be read ({error})".replace("\n", " ")
            if self.broken == "refuse":
                raise DataError(f"{reason}; repair or delete it, or read the folder with broken='skip'") from error
            mine = object()
            if self._said.setdefault(number, mine) is mine:  # the threads that read ahead come here again and again
                warnings.warn(f"{reason}; skipped", stacklevel=2)
            return None


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """Class folders to train and to test, with the paper's crops.

    Attributes:
      train: to train.
      test: to test.
      side: of the images that the network sees.
    """

    train: Folder
    test: Folder
    side: int = 224
    source: str = "ImageNet folder"

    @property
    def count(self) -> int:
        """Images to train on."""
        return len(self.train)

    def batches(self, size: int, seed: int) -> loading.Batches:
        """Batches to train on: random parts of the images, every image once in each epoch."""
        return loading.Batches(self.train, size, seed, RandomPart(self.side))

    def tests(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches to test on: the middles of all images that can be read, in order; the last batch may be smaller."""
        return loading.in_order(len(self.test), self.test.read, size, Middle(self.side, round(self.side * 256 / 224)))


def imagenet(path: Path, side: int = 224, broken: str = "refuse") -> ImageNet:
    """The folder with `train` and `val`.

    Raises:
      DataError: one of them is missing, is empty, or has other classes than the other one.
    """
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder; it must have train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    train, test = (Folder(path / part, broken) for part in ("train", "val"))
    if train.classes != test.classes:
        name = min(set(train.classes) ^ set(test.classes))
        raise DataError(f"{path}: train and val have different classes; {name} is in one of them alone")
    return ImageNet(train, test, side)
