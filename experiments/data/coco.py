"""Objects in images as COCO has them: the official JSON of instances, and its folder of images.

Lin et al., "Microsoft COCO: Common Objects in Context" (2014). What is left out is what torchvision's reference leaves
out: crowds, and boxes that are empty within their image. All annotations count when detections are judged.
"""

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from experiments.data.errors import DataError

FIELDS: dict[str, dict[str, Any]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {
        "id": int,
        "image_id": int,
        "category_id": int,
        "iscrowd": int,
        "area": int | float,
        "bbox": list,
        "segmentation": list | dict,
    },
    "categories": {"id": int, "name": str},
}
REFERENCES = {"image_id": "images", "category_id": "categories"}


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is in an image of h x w pixels.

    Attributes:
      boxes: `[n, 4]`, left, top, right and bottom in pixels, float32.
      labels: `[n]`, the ids of their categories.
      masks: `[n, h, w]`, booleans.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


class Instances:
    """Images and the objects in them, by number.

    Args:
      content: the JSON: `images`, `annotations`, `categories`.
      read: name of a file -> its image, bytes `[height, width, 3]`.
      source: what to call it.

    Raises:
      DataError: something in the JSON is missing, is there twice, or belongs to nothing; names the record.
    """

    def __init__(self, content: Any, read: Callable[[str], np.ndarray], source: str):
        _check(content, source)
        self.content, self.source, self._read = content, source, read
        self.truth = indexed(content)
        self.images: list[dict] = content["images"]
        self._annotations: list[list[dict]] = []
        for image in self.images:
            found = [a for a in self.truth.imgToAnns.get(image["id"], []) if not a["iscrowd"]]
            boxes = _boxes(found, image)
            there = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
            self._annotations.append([found[k] for k in np.flatnonzero(there)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[tuple[np.ndarray, Objects], np.int32]:
        """Image and objects, and the number."""
        return (self.image(number), self.objects(number)), np.int32(number)

    @property
    def most(self) -> int:
        """Objects in the image that has the most."""
        return max(map(len, self._annotations), default=0)

    @property
    def classes(self) -> int:
        """Ids of categories, with the background's 0 and with those that are not used."""
        return 1 + max(category["id"] for category in self.content["categories"])

    def image(self, number: int) -> np.ndarray:
        """Bytes `[height, width, 3]`.

        Raises:
          DataError: it cannot be read, or is of another size than is said.
        """
        record = self.images[number]
        image, said = self._read(record["file_name"]), (record["height"], record["width"])
        if image.shape[:2] != said:
            raise DataError(f"{self.source}: {record['file_name']} has {image.shape[:2]} pixels, the JSON says {said}")
        return image

    def objects(self, number: int) -> Objects:
        """What is in an image, without crowds and without empty boxes."""
        record, found = self.images[number], self._annotations[number]
        masks = np.zeros((len(found), record["height"], record["width"]), bool)
        for k, annotation in enumerate(found):
            masks[k] = self.truth.annToMask(annotation)
        return Objects(_boxes(found, record), np.asarray([a["category_id"] for a in found], np.int32), masks)

    def only(self, numbers: list[int]) -> "Instances":
        """Some of the images."""
        images = [self.images[k] for k in numbers]
        ids = {image["id"] for image in images}
        annotations = [a for a in self.content["annotations"] if a["image_id"] in ids]
        content = {**self.content, "images": images, "annotations": annotations}
        return Instances(content, self._read, self.source)

    def with_objects(self) -> "Instances":
        """The images to train on: those with an annotation whose box is more than a pixel wide and high."""

        def counts(image):
            return any(min(a["bbox"][2:]) > 1 for a in self.truth.imgToAnns.get(image["id"], []))

        return self.only([k for k, image in enumerate(self.images) if counts(image)])


def folder(root: Path, part: str) -> Instances:
    """`annotations/instances_PART.json` and the images in `PART/`, as COCO is distributed: `train2017`, `val2017`.

    Raises:
      DataError: a file is missing, is no JSON, or is not what it should be.
    """
    file, images = root / "annotations" / f"instances_{part}.json", root / part
    if not file.is_file() or not images.is_dir():
        missing = images if file.is_file() else file
        wanted = f"annotations/instances_{part}.json and {part}/*.jpg"
        raise DataError(f"{missing}: there is none; {root} must have {wanted}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no JSON: {error}") from None
    found = Instances(content, lambda name: _opened(images / name), str(file))
    there = set(os.listdir(images))
    missing_files = [image["file_name"] for image in found.images if image["file_name"] not in there]
    if missing_files:
        some = f"{len(missing_files)} of the {len(found)} images"
        raise DataError(f"{images}: {some} of {file.name} are not there; the first is {missing_files[0]}")
    return found


def indexed(content: dict) -> COCO:
    """The JSON in the hands of pycocotools, which is told to be silent."""
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _opened(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: this image cannot be read ({error})".replace("\n", " ")) from error


def _boxes(annotations: list[dict], image: dict) -> np.ndarray:
    """Boxes `[n, 4]` within their image, by corners."""
    boxes = np.asarray([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(boxes, 0, np.asarray([image["width"], image["height"]] * 2, np.float32))


def _check(content: Any, source: str) -> None:
    for kind, fields in FIELDS.items():
        records = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{source}: it has no list of {kind}; is it a JSON of instances?")
        ids = set()
        for k, record in enumerate(records):
            for field, form in fields.items():
                if not isinstance(record, dict) or not isinstance(record.get(field), form):
                    raise DataError(f"{source}: {kind}[{k}] has no {field}, or of another type than COCO's")
            if record["id"] in ids:
                raise DataError(f"{source}: the id {record['id']} is there twice in {kind}")
            ids.add(record["id"])
    if not content["images"] or not content["categories"]:
        raise DataError(f"{source}: it has {len(content['images'])} images, {len(content['categories'])} categories")
    if min(category["id"] for category in content["categories"]) < 1:
        raise DataError(f"{source}: ids of categories begin with 1, 0 is the background")
    known = {field: {r["id"] for r in content[kind]} for field, kind in REFERENCES.items()}
    for annotation in content["annotations"]:
        here = f"{source}: annotation {annotation['id']}"
        for field, kind in REFERENCES.items():
            if annotation[field] not in known[field]:
                raise DataError(f"{here} is of {field} {annotation[field]}, which is not among {kind}")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(x, int | float) for x in box) or not np.isfinite(box).all():
            raise DataError(f"{here} has the bbox {box}; it must be four numbers: left, top, width, height")
