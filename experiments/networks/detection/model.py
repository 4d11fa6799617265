"""The layers of Mask R-CNN and the way from images to boxes, classes and masks."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks.detection import boxes as box
from experiments.networks.detection import losses
from experiments.networks.detection.roi_align import levels_of, mask_targets, roi_align
from experiments.networks.layers import HE, FrozenNorm, conv
from experiments.networks.resnet_imagenet import Block

TINY = nn.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many boxes there are on the way; torchvision's unless told otherwise.

    Attributes:
      anchors: side of the anchors of each level.
      ratios: of their heights to their widths.
      candidates: boxes of each level before suppression.
      proposals: boxes of an image after it.
      detections: of an image.
      score: that a detection has at least.
      trained: candidates and proposals in training.
      anchors_drawn: anchors of an image that are learned from.
      regions_drawn: regions of an image that are learned from.
    """

    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    candidates: int = 1000
    proposals: int = 1000
    detections: int = 100
    score: float = 0.05
    trained: int = 2000
    anchors_drawn: int = 256
    regions_drawn: int = 512


class Pyramid(nn.Module):
    """A ResNet and on its four stages a pyramid of features of one width; its last level is the fourth, halved."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool
    features: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        x = conv(self.widths[0], 7, 2, "conv1", kernel_init=HE)(x)
        x = nn.relu(FrozenNorm(self.epsilon, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        stages = []
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            inner = width if self.bottleneck else 0
            for k in range(count):
                stride = 2 if stage > 0 and k == 0 else 1
                name = f"layer{stage + 1}_{k}"
                x = Block(width, inner, stride, 1, None, frozen=self.epsilon, name=name)(x, False)
            stages.append(x)
        levels: list[jax.Array] = []
        for k in reversed(range(len(stages))):
            side = conv(self.features, 1, 1, f"inner_blocks_{k}", bias=True)(stages[k])
            if levels:
                side += jax.image.resize(levels[0], side.shape, "nearest")
            levels.insert(0, side)
        levels = [conv(self.features, 3, 1, f"layer_blocks_{k}", bias=True)(x) for k, x in enumerate(levels)]
        return [*levels, levels[-1][:, ::2, ::2]]


class ProposalHead(nn.Module):
    """Of every anchor of a level how likely it is an object, and the shift to its box; the same for all levels."""

    count: int

    @nn.compact
    def __call__(self, levels):
        width = levels[0].shape[-1]
        hidden, logits, shifts = (
            conv(width, 3, 1, "conv", bias=True, kernel_init=TINY),
            conv(self.count, 1, 1, "cls_logits", bias=True, kernel_init=TINY),
            conv(4 * self.count, 1, 1, "bbox_pred", bias=True, kernel_init=TINY),
        )
        found = []
        for x in levels:
            y = nn.relu(hidden(x))
            found.append((logits(y).reshape(len(x), -1), shifts(y).reshape(len(x), -1, 4)))
        return found


class RegionHeads(nn.Module):
    """What is in a box, where exactly, and its mask."""

    classes: int
    hidden: int
    mask_layers: int = 4

    def setup(self):
        self.fc6, self.fc7 = nn.Dense(self.hidden), nn.Dense(self.hidden)
        self.cls_score, self.bbox_pred = nn.Dense(self.classes), nn.Dense(4 * self.classes)

    @nn.compact
    def masks(self, x):
        """Logits `[n, 28, 28, classes]` of the masks of boxes, of features `[n, 14, 14, channels]`."""
        width = x.shape[-1]
        for k in range(self.mask_layers):
            x = nn.relu(conv(width, 3, 1, f"mask_head_{k}", bias=True)(x))
        x = nn.relu(nn.ConvTranspose(width, (2, 2), (2, 2), padding="VALID", name="conv5_mask")(x))
        return conv(self.classes, 1, 1, "mask_fcn_logits", bias=True)(x)

    def __call__(self, x):
        """Logits `[n, classes]` and shifts `[n, classes, 4]` of boxes, of features `[n, 7, 7, channels]`."""
        x = nn.relu(self.fc7(nn.relu(self.fc6(x.reshape(len(x), -1)))))
        return self.cls_score(x), self.bbox_pred(x).reshape(len(x), self.classes, 4)


class MaskRCNN(nn.Module):
    """Images `[batch, height, width, 3]`, normalised, of multiples of 32 pixels -> what is in them.

    Called with the images and the sizes of what is no padding, `[batch, 2]`, height and width. Returns by name, of the
    `detections` with the highest scores: `boxes [batch, n, 4]`, `scores [batch, n]` (0 where there is none),
    `labels [batch, n]` (0 is the background), and `masks [batch, n, 28, 28]`, how likely each part of the box is of it.

    Args:
      blocks: blocks of each stage of the ResNet.
      widths: channels of each stage, without the factor 4 of bottlenecks.
      bottleneck: as in `ImageNetResNet`.
      features: channels of the pyramid.
      hidden: width of the dense layers.
      classes: with the background.
      epsilon: of the frozen batch norms; the published weights for COCO were trained with 0.
      sizes: how many boxes there are on the way.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    features: int = 256
    hidden: int = 1024
    classes: int = 91
    epsilon: float = 1e-5
    sizes: Sizes = Sizes()

    def setup(self):
        self.backbone = Pyramid(self.blocks, self.widths, self.bottleneck, self.features, self.epsilon)
        self.rpn = ProposalHead(len(self.sizes.ratios))
        self.roi_heads = RegionHeads(self.classes, self.hidden)

    def __call__(self, images, sizes):
        levels = self.backbone(images)
        found = self.proposals(self.rpn(levels), self.anchors(images, levels), sizes)
        count = len(images)
        pooled = self._pooled(levels, found["boxes"], 7)
        logits, shifts = self.roi_heads(pooled)
        logits = logits.reshape(count, -1, self.classes)
        shifts = shifts.reshape(count, -1, self.classes, 4)
        result = jax.vmap(self._detected)(found["boxes"], found["scores"], logits, shifts, sizes)
        masks = self.roi_heads.masks(self._pooled(levels, result["boxes"], 14))
        of_label = jax.nn.one_hot(result["labels"].reshape(-1, 1, 1), self.classes, dtype=masks.dtype)
        chosen = jnp.sum(masks * of_label, axis=-1)
        return result | {"masks": nn.sigmoid(chosen).reshape(count, -1, *chosen.shape[1:])}

    def losses(self, images: jax.Array, sizes: jax.Array, objects: Any, key: jax.Array) -> dict[str, jax.Array]:
        """What is learned by: the five losses by name, of images with their objects.

        Args:
          images: as in the call.
          sizes: as in the call.
          objects: `boxes [batch, n, 4]`, `labels [batch, n]`, 0 where there is none, and `masks [batch, n, height,
            width]`, booleans.
          key: of what is drawn.
        """
        count, labels, most = len(images), objects["labels"], self.sizes.trained
        first, second = jax.random.split(key, (2, count))
        levels = self.backbone(images)
        said, anchors = self.rpn(levels), self.anchors(images, levels)
        logits, shifts = (jnp.concatenate(each, axis=1) for each in zip(*said, strict=True))
        found = {}
        found["objectness"], found["anchors"] = losses.of_proposals(
            first, logits, shifts, jnp.concatenate(anchors), objects["boxes"], labels > 0, self.sizes.anchors_drawn
        )
        near = self.proposals(jax.lax.stop_gradient(said), anchors, sizes, most, most)
        regions = functools.partial(losses.regions, count=self.sizes.regions_drawn)
        drawn = jax.vmap(regions)(second, near["boxes"], near["scores"] >= 0, objects["boxes"], labels)
        logits, shifts = self.roi_heads(self._pooled(levels, drawn["boxes"], 7))
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in drawn.items()}
        found["classes"], found["boxes"] = losses.of_regions(logits, shifts, flat["labels"], flat["wanted"])
        # Regions of objects come first, and are a quarter at most.
        drawn = {name: x[:, : max(x.shape[1] // 4, 1)] for name, x in drawn.items()}
        logits = self.roi_heads.masks(self._pooled(levels, drawn["boxes"], 14))
        targets = functools.partial(mask_targets, side=logits.shape[1])
        wanted = jax.vmap(targets)(objects["masks"], drawn["boxes"], drawn["object"])
        found["masks"] = losses.of_masks(logits, drawn["labels"].reshape(-1), wanted.reshape(logits.shape[:3]))
        return found

    def anchors(self, images: jax.Array, levels: list[jax.Array]) -> list[np.ndarray]:
        """The anchors of each level, `[n, 4]`."""
        found = []
        for level, side in zip(levels, self.sizes.anchors, strict=True):
            grid = (level.shape[1], level.shape[2])
            stride = (images.shape[1] // grid[0], images.shape[2] // grid[1])
            found.append(box.anchors(grid, stride, side, self.sizes.ratios))
        return found

    def proposals(
        self,
        said: list[tuple[jax.Array, jax.Array]],
        anchors: list[np.ndarray],
        sizes: jax.Array,
        candidates: int | None = None,
        most: int | None = None,
    ) -> dict[str, jax.Array]:
        """Where objects may be: `boxes [batch, n, 4]` and `scores [batch, n]`, -1 where there is none."""
        candidates, most = candidates or self.sizes.candidates, most or self.sizes.proposals
        boxes, scores = [], []
        for (logits, shifts), around in zip(said, anchors, strict=True):
            best, number = jax.lax.top_k(logits, min(candidates, len(around)))
            shifts = jnp.take_along_axis(shifts, number[..., None], axis=1)
            moved = jax.vmap(box.clipped)(box.shifted(jnp.asarray(around)[number], shifts, (1.0,) * 4), sizes)
            stays = jax.vmap(lambda b: box.suppressed(b, box.large(b, 1e-3), 0.7))(moved)
            boxes.append(moved)
            scores.append(jnp.where(stays, nn.sigmoid(best), -1))
        every, scored = jnp.concatenate(boxes, axis=1), jnp.concatenate(scores, axis=1)
        best, number = jax.lax.top_k(scored, min(most, scored.shape[1]))
        chosen = jnp.take_along_axis(every, number[..., None], axis=1)
        return jax.lax.stop_gradient({"boxes": chosen, "scores": best})

    def _pooled(self, levels: list[jax.Array], boxes: jax.Array, side: int) -> jax.Array:
        flat, image = boxes.reshape(-1, 4), jnp.repeat(jnp.arange(len(boxes)), boxes.shape[1])
        return roi_align(levels[:4], flat, image, levels_of(flat, 4), side)

    def _detected(self, proposals: Any, there: Any, logits: Any, shifts: Any, size: Any) -> dict[str, jax.Array]:
        """The detections of one image; each class is suppressed by itself."""
        moved = box.clipped(box.shifted(proposals[:, None], shifts, losses.SHIFTS), size)
        scores = jnp.where(there[:, None] >= 0, nn.softmax(logits), 0)
        scores = jnp.where((scores > self.sizes.score) & box.large(moved, 1e-2), scores, 0)

        def of_class(given):
            boxes, scores = given
            best, number = jax.lax.top_k(scores, len(scores))
            boxes = boxes[number]
            return boxes, jnp.where(box.suppressed(boxes, best > 0, 0.5), best, 0)

        boxes, scores = jax.lax.map(of_class, (moved[:, 1:].swapaxes(0, 1), scores[:, 1:].T))
        best, number = jax.lax.top_k(scores.reshape(-1), min(self.sizes.detections, scores.size))
        labels = jnp.where(best > 0, 1 + number // scores.shape[1], 0)
        return {"boxes": boxes.reshape(-1, 4)[number], "scores": best, "labels": labels}
