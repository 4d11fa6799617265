"""What the results of detection share: networks, images, and what is learned and judged."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nm_jax as nm
from experiments.configs.study import Preset
from experiments.data import coco, coco_score, shapes
from experiments.data.detection import Detection
from experiments.data.errors import DataError, reading
from experiments.networks import torch_weights
from experiments.networks.detection import MaskRCNN, Sizes, variables
from experiments.train import Task

TEST_BATCH = 20
FIGURES = ("box_ap", "mask_ap")

SMALL = MaskRCNN(
    blocks=(1, 1, 1, 1),
    widths=(16, 32, 32, 64),
    bottleneck=False,
    features=32,
    hidden=64,
    classes=1 + len(shapes.KINDS),
    sizes=Sizes(
        anchors=(12, 24, 48, 96, 192),
        candidates=32,
        proposals=32,
        detections=10,
        trained=48,
        anchors_drawn=64,
        regions_drawn=16,
    ),
)
MIDDLE = MaskRCNN(blocks=(2, 2, 2, 2), bottleneck=False, features=128, hidden=512, classes=1 + len(shapes.KINDS))


def drawn(count: int, tests: int, side: int) -> Detection:
    """Drawn shapes to train on and others to test on."""
    train, test = shapes.drawn(count, side, seed=0).with_objects(), shapes.drawn(tests, side, seed=1)
    return Detection(train, test, side, side, side)


def official(path: Path | None) -> Detection:
    """COCO's images of 2017, scaled to a shorter side of 800 and at most 1333 pixels.

    Raises:
      DataError: no folder was named, or it has not what COCO has.
    """
    if path is None:
        raise DataError(
            "this preset trains on COCO: name its folder, --data FOLDER, which has annotations, train2017 and val2017"
        )
    train, test = (coco.folder(path, part) for part in ("train2017", "val2017"))
    return Detection(train.with_objects(), test, side=1344, shorter=800, longer=1333)


def pretrained(path: Path | None) -> dict:
    """Torchvision's weights of `maskrcnn_resnet50_fpn`.

    Raises:
      DataError: no file was named, or it has other weights.
    """
    if path is None:
        raise DataError("this preset starts from a trained maskrcnn_resnet50_fpn: name its weights, --weights FILE")
    with reading():
        return torch_weights.check(variables(torch_weights.read(path)), MaskRCNN(), *_inputs(64))


def _inputs(side: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.float32)


def planned(preset: Preset, pattern: str) -> nm.Plan:
    """What the network itself says of its layers, without a rule."""
    inputs = _inputs(64)
    found = dict(jax.eval_shape(preset.module.init, jax.random.key(0), *inputs))
    params = found.pop("params")

    def apply(params, rest, *inputs):
        return preset.module.apply({"params": params, **rest}, *inputs)

    return nm.plan(apply, params, found, *inputs, pattern=pattern)


def task(preset: Preset, data: Detection, start: Any, seed: int) -> Task:
    """Images into boxes and masks, judged by their average precision; from the variables `start`, or from scratch."""
    module = preset.module

    def init(key):
        if start is None:
            found = jax.jit(module.init)(key, *(jnp.zeros(x.shape, x.dtype) for x in _inputs(data.side)))
        else:
            found = jax.tree.map(jnp.array, start)
        found = dict(found)
        return found.pop("params"), found

    def loss(params, extra, batch, key):
        seen, _ = batch
        objects = {name: seen[name] for name in ("boxes", "labels", "masks")}
        losses = module.apply({"params": params, **extra}, seen["image"], seen["size"], objects, key, method="losses")
        return sum(losses.values()), extra

    detect = jax.jit(module.apply)

    def evaluate(params, extra):
        found = []
        for seen, numbers in data.tests(TEST_BATCH):
            detections = jax.device_get(detect({"params": params, **extra}, seen["image"], seen["size"]))
            found += coco_score.results(data.test, numbers, detections, seen["size"])
        return coco_score.average_precision(data.test, found)

    return Task(init, loss, data.batches(preset.recipe.batch, seed), evaluate)
