"""Crops, mirroring and scaling of single images: bytes `[height, width, 3]` in, float32 out.

The regime of the paper's ResNets (He et al., 2016, as torchvision has it): to train, a random part of the image, scaled
to the side of the input, and mirrored half the time; to test, the middle of the image.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AREA = (0.08, 1.0)  # of the part, of the image's
RATIO = (3 / 4, 4 / 3)  # of its width to its height
TRIES = 10


@dataclasses.dataclass(frozen=True)
class RandomPart:
    """A random part of an image, scaled and mirrored half the time: to train."""

    side: int = 224

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        left, top, width, height = part(image.shape[1], image.shape[0], random)
        part_of = np.ascontiguousarray(image[top : top + height, left : left + width])
        scaled = _resize(part_of, self.side, self.side)
        return normalise(scaled[:, ::-1] if random.random() < 0.5 else scaled)


@dataclasses.dataclass(frozen=True)
class Middle:
    """The middle of an image whose shorter side has been made `shorter` pixels: to test."""

    side: int = 224
    shorter: int = 256

    def __call__(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        scale = self.shorter / min(height, width)
        scaled = _resize(image, *(max(self.shorter, int(n * scale)) for n in (width, height)))
        top, left = (round((n - self.side) / 2) for n in scaled.shape[:2])
        return normalise(scaled[top : top + self.side, left : left + self.side])


def part(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part: area uniform, ratio of the sides log-uniform.

    After ten that did not fit, the middle, of the ratio that is nearest.
    """
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def normalise(image: np.ndarray) -> np.ndarray:
    """Bytes to zero mean and unit variance, by ImageNet's."""
    mean, std = np.asarray(IMAGENET, np.float32)
    return (image.astype(np.float32) / np.float32(255) - mean) / std


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
