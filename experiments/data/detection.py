"""Images with objects as a network is given them: scaled, padded to one shape, mirrored, in batches."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data import loading
from experiments.data.coco import Instances, Objects
from experiments.data.errors import DataError
from experiments.data.transforms import normalise


@dataclasses.dataclass(frozen=True)
class Fit:
    """Images and objects scaled as torchvision's reference does, and padded to one shape.

    Attributes:
      side: height and width of what the network sees, a multiple of 32.
      shorter: the shorter side of an image, unless the longer one becomes too long.
      longer: the most that the longer side may have.
      objects: of an image, with those that are not there.
      mirrored: half of the images are, to train.
    """

    side: int
    shorter: int
    longer: int
    objects: int
    mirrored: bool = False

    def __post_init__(self):
        if self.side % 32 or self.longer > self.side:
            raise ValueError(f"the side {self.side} must be a multiple of 32, and at least {self.longer}")

    def __call__(self, given: tuple[np.ndarray, Objects], random: Any = None) -> dict[str, np.ndarray]:
        """`image [side, side, 3]`, `size [2]` of it that is no padding, `boxes [n, 4]`, `labels [n]` and `masks
        [n, side, side]`; a label of 0 says that there is no object."""
        image, objects = given
        boxes, masks = objects.boxes, objects.masks
        if len(boxes) > self.objects:
            raise DataError(f"an image has {len(boxes)} objects, and there is place for {self.objects}")
        height, width = image.shape[:2]
        if self.mirrored and random.random() < 0.5:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        scale = min(self.shorter / min(height, width), self.longer / max(height, width))
        shape = max(int(height * scale), 1), max(int(width * scale), 1)
        rows, columns = (np.arange(new) * old // new for new, old in zip(shape, (height, width), strict=True))
        found: dict[str, np.ndarray] = {
            "image": np.zeros((self.side, self.side, 3), np.float32),
            "size": np.asarray(shape, np.float32),
            "boxes": np.zeros((self.objects, 4), np.float32),
            "labels": np.zeros(self.objects, np.int32),
            "masks": np.zeros((self.objects, self.side, self.side), bool),
        }
        count = len(boxes)
        found["image"][: shape[0], : shape[1]] = interpolated(normalise(image), shape)
        found["boxes"][:count] = boxes * np.asarray([shape[1] / width, shape[0] / height] * 2, np.float32)
        found["labels"][:count] = objects.labels
        found["masks"][:count, : shape[0], : shape[1]] = masks[:, rows][:, :, columns]
        return found


@dataclasses.dataclass(frozen=True)
class Detection:
    """Images to train on and to test on.

    Attributes:
      train: to train on; those without objects are left out.
      test: to test on.
      side: as in `Fit`.
      shorter: as in `Fit`.
      longer: as in `Fit`.
    """

    train: Instances
    test: Instances
    side: int
    shorter: int
    longer: int

    @property
    def source(self) -> str:
        """Where they are from."""
        return self.train.source

    @property
    def count(self) -> int:
        """Images to train on."""
        return len(self.train)

    def _fit(self, instances: Instances, mirrored: bool) -> Fit:
        return Fit(self.side, self.shorter, self.longer, max(instances.most, 1), mirrored)

    def batches(self, size: int, seed: int) -> loading.Batches:
        """Batches of what `Fit` gives, and of the numbers of the images."""
        return loading.Batches(self.train, size, seed, self._fit(self.train, True))

    def tests(self, size: int) -> Iterator[Any]:
        """Every image once, in order."""
        return loading.in_order(len(self.test), self.test.__getitem__, size, self._fit(self.test, False))

    def head(self, count: int) -> "Detection":
        """The first images alone."""
        train, test = (each.only(list(range(min(count, len(each))))) for each in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def interpolated(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """An image scaled to another shape: linear between the centres of pixels, without smoothing."""
    for axis, new in enumerate(shape):
        old = image.shape[axis]
        if old == new:
            continue
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = at.astype(int)
        share = (at - low).astype(image.dtype).reshape(-1, *[1] * (image.ndim - axis - 1))
        first, second = (np.take(image, np.minimum(k, old - 1), axis) for k in (low, low + 1))
        image = first * (1 - share) + second * share
    return image
