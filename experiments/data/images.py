"""Sets of small images in memory, and the batches of a training run."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from experiments.data import cifar as official
from experiments.data import digits, packed


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and their classes, to train and to test.

    Attributes:
      train: bytes or floats, `[count, height, width, channels]`, and labels.
      test: the same.
      normalise: images as they are -> what the network sees, float32.
      border: black pixels around an image of which a random window is taken, and which is mirrored half the time;
        `None`: images are trained on as they are.
      source: where they are from.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    normalise: Callable[[np.ndarray], np.ndarray]
    border: int | None
    source: str

    def batches(self, size: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """The batch of a step, as a function of its number alone; every epoch has its own order, and drops the rest.

        Raises:
          SystemExit: there are fewer images than that.
        """
        images, labels = self.train
        count = len(labels) // size
        if not count:
            raise SystemExit(f"a batch of {size} images out of {len(labels)}; make the batch smaller")
        order: dict[int, np.ndarray] = {}

        def batch(number):
            epoch, position = divmod(number, count)
            if epoch not in order:
                order.clear()
                order[epoch] = np.random.default_rng((seed, 0, epoch)).permutation(len(labels))
            chosen = order[epoch][position * size : (position + 1) * size]
            batch = images[chosen]
            if self.border is not None:
                batch = moved(batch, self.border, np.random.default_rng((seed, 1, number)))
            return self.normalise(batch), labels[chosen]

        return batch

    def tests(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches to test on: all images in order; the last batch may be smaller."""
        images, labels = self.test
        for k in range(0, len(labels), size):
            yield self.normalise(images[k : k + size]), labels[k : k + size]

    @property
    def count(self) -> int:
        """Images to train on."""
        return len(self.train[1])

    def head(self, count: int) -> "Images":
        """The first images alone."""
        train, test = ((images[:count], labels[:count]) for images, labels in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def moved(images: np.ndarray, border: int, random: np.random.Generator) -> np.ndarray:
    """A random window of each image with a black border, mirrored half the time."""
    count, height, width = images.shape[:3]
    padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    tops, lefts = random.integers(0, 2 * border + 1, (2, count))
    mirrored = random.integers(0, 2, (count,))
    result = np.empty_like(images)
    for k in range(count):
        window = padded[k, tops[k] : tops[k] + height, lefts[k] : lefts[k] + width]
        result[k] = window[:, ::-1] if mirrored[k] else window
    return result


def _scaled(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def normalise(images):
        return (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)

    return normalise


_CIFAR = {
    "cifar10": _scaled((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": _scaled((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}


def cifar(name: str, path: Path | None = None) -> Images:
    """`cifar10` or `cifar100`, trained on with windows up to 4 pixels off and mirrored.

    Args:
      name: which.
      path: folder of the official files; `None`: those of the data folder, which are lossy.
    """
    if path is not None:
        return Images(*official.read(name, path), _CIFAR[name], 4, name)

    def read(part):
        labels = packed.labels(f"{name}_jpeg_{part}")
        order = np.random.default_rng(0).permutation(len(labels))  # the files are sorted by class
        return np.stack(packed.images(f"{name}_jpeg_{part}", order)), labels[order]

    return Images(read("train"), read("test"), _CIFAR[name], 4, f"{name}, lossy (JPEG)")


def embedded() -> Images:
    """The handwritten digits, which need no file."""
    train, test, train_labels, test_labels = digits.load()
    labels = (train_labels.astype(np.int32), test_labels.astype(np.int32))
    return Images((train, labels[0]), (test, labels[1]), np.asarray, None, "digits of scikit-learn")
