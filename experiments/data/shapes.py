"""A drawn data set in the form of COCO: discs, rectangles, triangles and rings that hide parts of each other."""

import math

import numpy as np
from pycocotools import mask as rle

from experiments.data.coco import Instances

KINDS = ("disc", "rectangle", "triangle", "ring")
MOST = 4  # objects of an image
SMALLEST, LARGEST = 0.12, 0.3  # half an object, of the side of the image
VISIBLE = 0.3  # of an object, or else it is left out


def drawn(count: int, side: int, seed: int) -> Instances:
    """Images of random shapes, in memory; image and objects are functions of the seed and the number alone.

    Args:
      count: images.
      side: height and width.
      seed: sets of different seeds have no image in common.
    """
    pictures: dict[str, np.ndarray] = {}
    images: list[dict] = []
    annotations: list[dict] = []
    for k in range(count):
        picture, objects = picture_of(np.random.default_rng((seed, k)), side)
        name = f"{k:06d}.png"
        pictures[name] = picture
        images.append({"id": k + 1, "file_name": name, "height": side, "width": side})
        for kind, mask in objects:
            annotations.append(_annotation(len(annotations) + 1, k + 1, kind + 1, mask))
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(KINDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Instances(content, pictures.__getitem__, f"{count} images of {side} x {side} of drawn shapes")


def picture_of(random: np.random.Generator, side: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image, bytes `[side, side, 3]`, and the kind and the mask of each object; one in 17 images has none."""
    count = 0 if random.random() < 1 / 17 else int(random.integers(1, MOST + 1))
    picture = random.uniform(0, 255, 3) + random.normal(0, 12, (side, side, 3))
    masks: list[tuple[int, np.ndarray, int]] = []
    for _ in range(count):
        kind = int(random.integers(len(KINDS)))
        mask = shape(kind, side, random)
        picture[mask] = random.uniform(0, 255, 3) + random.normal(0, 12, (mask.sum(), 3))
        masks = [(before, other & ~mask, area) for before, other, area in masks] + [(kind, mask, int(mask.sum()))]
    left = [(kind, mask) for kind, mask, area in masks if mask.sum() >= VISIBLE * area and mask.any()]
    return np.clip(picture, 0, 255).astype(np.uint8), left


def shape(kind: int, side: int, random: np.random.Generator) -> np.ndarray:
    """The pixels, `[side, side]`, whose centres are within a turned shape."""
    half = side * random.uniform(SMALLEST, LARGEST)
    middle = random.uniform(half, side - half, 2)
    ratio, turn = random.uniform(0.6, 1), random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:side, :side] + 0.5 - middle[:, None, None]
    u, v = (math.cos(turn) * x + math.sin(turn) * y) / half, (math.cos(turn) * y - math.sin(turn) * x) / half
    round_ = np.hypot(u, v / ratio)
    if KINDS[kind] == "disc":
        return round_ < 1
    if KINDS[kind] == "ring":
        return (round_ < 1) & (round_ > 0.55)
    if KINDS[kind] == "rectangle":
        return (abs(u) < 0.8) & (abs(v) < 0.8 * ratio)
    return (u > -0.5) & (u < 1) & (abs(v) < (1 - u) * math.sqrt(1 / 3))


def _annotation(number: int, image: int, category: int, mask: np.ndarray) -> dict:
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": rle.toBbox(encoded).tolist(),
        "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
    }
