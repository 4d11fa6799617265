"""Average precision of boxes and masks by the rules of COCO, and what a network finds in the form that they are for."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from experiments.data.coco import Instances, indexed
from experiments.data.detection import interpolated

KINDS = {"box": "bbox", "mask": "segm"}


def average_precision(truth: Instances, found: list[dict]) -> dict[str, float]:
    """`box_ap` and `mask_ap` in percent: over overlaps of 0.5 to 0.95 and all classes. -100 of a set without objects.

    Args:
      truth: what is there.
      found: as `results` gives it.
    """
    content = {**truth.content, "annotations": [{**one, "id": k + 1} for k, one in enumerate(found)]}
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, kind in KINDS.items():
            judged = COCOeval(truth.truth, indexed(content), kind)
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
            scores[f"{name}_ap"] = 100 * float(judged.stats[0])
    return scores


def results(truth: Instances, numbers: Any, detections: Mapping[str, Any], sizes: Any) -> list[dict]:
    """What was found in some images, as COCO wants it, in the pixels of the images as they are.

    Args:
      truth: where the images are from.
      numbers: `[n]`, which of them.
      detections: as `MaskRCNN` gives them: boxes, scores, labels, masks.
      sizes: `[n, 2]`, height and width of each image as the network saw it.
    """
    found = []
    given = zip(numbers, *(np.asarray(detections[k]) for k in ("boxes", "scores", "labels", "masks")), strict=True)
    for (number, boxes, scores, labels, masks), size in zip(given, np.asarray(sizes), strict=True):
        image = truth.images[number]
        shape = image["height"], image["width"]
        boxes = boxes * np.asarray([shape[1] / size[1], shape[0] / size[0]] * 2, np.float32)
        for k in np.flatnonzero(scores > 0):
            left, top, right, bottom = boxes[k].tolist()
            mask = pasted(masks[k], boxes[k], shape) > 0.5
            found.append(
                {
                    "image_id": image["id"],
                    "category_id": int(labels[k]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "score": float(scores[k]),
                    "segmentation": rle.encode(np.asfortranarray(mask, np.uint8)),
                    "iscrowd": 0,
                }
            )
    return found


def pasted(mask: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask of a box in its image, `[height, width]`: with a pixel of nothing around, as torchvision has it."""
    side = len(mask)
    half, centre = (box[2:] - box[:2]) / 2 * (side + 2) / side, (box[2:] + box[:2]) / 2
    left, top, right, bottom = (int(x) for x in np.concatenate([centre - half, centre + half]))
    whole = interpolated(np.pad(mask, 1), (max(bottom - top + 1, 1), max(right - left + 1, 1)))
    found = np.zeros(shape, mask.dtype)
    x, y = np.clip([left, right + 1], 0, shape[1]), np.clip([top, bottom + 1], 0, shape[0])
    found[y[0] : y[1], x[0] : x[1]] = whole[y[0] - top : y[1] - top, x[0] - left : x[1] - left]
    return found
