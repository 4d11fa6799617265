"""What Mask R-CNN learns by, of padded boxes: torchvision's losses of proposals, of regions, and of masks."""

import jax
import jax.numpy as jnp
import optax

from experiments.networks.detection import boxes as box
from experiments.networks.detection.matching import BACKGROUND, drawn, matched

BETA = 1 / 9  # where the loss of shifts goes from square to linear
SHIFTS = (10.0, 10.0, 5.0, 5.0)  # what shifts of detections are multiplied by; those of anchors by nothing


def smooth(difference: jax.Array) -> jax.Array:
    """Square near 0, linear elsewhere; summed over the four numbers of a box."""
    size = jnp.abs(difference)
    return jnp.sum(jnp.where(size < BETA, 0.5 * size**2 / BETA, size - 0.5 * BETA), axis=-1)


def of_proposals(
    keys: jax.Array,
    logits: jax.Array,
    shifts: jax.Array,
    anchors: jax.Array,
    boxes: jax.Array,
    there: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Losses of what the proposal network says of anchors: object or not, and the shift to its box.

    Means over the anchors that are drawn in all images; shifts count for those of objects.

    Args:
      keys: of the draw in each image.
      logits: `[batch, n]`.
      shifts: `[batch, n, 4]`.
      anchors: `[n, 4]`.
      boxes: `[batch, objects, 4]`.
      there: `[batch, objects]`, which of them are objects at all.
      count: anchors drawn in an image, up to half of them of objects.
    """

    def of_image(key, logits, shifts, boxes, there):
        match = matched(box.overlap(boxes, anchors), there, 0.3, 0.7, every=True)
        number, valid = drawn(key, match >= 0, match == BACKGROUND, count, 0.5)
        match = match[number]
        positive = valid & (match >= 0)
        wanted = box.shift_to(anchors[number], boxes[jnp.maximum(match, 0)], (1.0,) * 4)
        is_object = optax.sigmoid_binary_cross_entropy(logits[number], positive.astype(logits.dtype))
        moved = smooth(shifts[number] - wanted)
        return jnp.sum(is_object * valid), jnp.sum(moved * positive), jnp.sum(valid)

    is_object, moved, total = jax.vmap(of_image)(keys, logits, shifts, boxes, there)
    total = jnp.maximum(total.sum(), 1)
    return is_object.sum() / total, moved.sum() / total


def regions(
    key: jax.Array, proposals: jax.Array, real: jax.Array, boxes: jax.Array, labels: jax.Array, count: int
) -> dict[str, jax.Array]:
    """The regions of one image that the heads learn from: proposals, and the objects' own boxes, drawn at random.

    Args:
      key: of the draw.
      proposals: `[n, 4]`.
      real: `[n]`, which of them are proposals at all.
      boxes: `[objects, 4]`.
      labels: `[objects]`, 0 where there is none.
      count: regions drawn, up to a quarter of them of objects.

    Returns:
      `boxes [count, 4]`, `labels [count]`, 0 for background and -1 for none, `object [count]`, the number of the object
      of each, and `wanted [count, 4]`, the shift to its box. The regions of objects come first.
    """
    every = jnp.concatenate([proposals, boxes])
    real = jnp.concatenate([real, labels > 0])
    match = matched(box.overlap(boxes, every), labels > 0, 0.5, 0.5, every=False)
    number, valid = drawn(key, real & (match >= 0), real & (match == BACKGROUND), count, 0.25)
    chosen, match = every[number], match[number]
    thing = jnp.maximum(match, 0)
    label = jnp.where(valid, jnp.where(match >= 0, labels[thing], 0), -1)
    found = {"boxes": chosen, "labels": label, "object": thing, "wanted": box.shift_to(chosen, boxes[thing], SHIFTS)}
    return jax.lax.stop_gradient(found)


def of_regions(
    logits: jax.Array, shifts: jax.Array, labels: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses of the classes and of the shifts of regions: means over all regions, of objects and of background.

    Args:
      logits: `[n, classes]`.
      shifts: `[n, classes, 4]`, of which the one of the region's class counts.
      labels: `[n]`, as `regions` has them.
      wanted: `[n, 4]`.
    """
    valid, thing = labels >= 0, jnp.maximum(labels, 0)
    total = jnp.maximum(valid.sum(), 1)
    classified = optax.softmax_cross_entropy_with_integer_labels(logits, thing)
    moved = smooth(jnp.take_along_axis(shifts, thing[:, None, None], axis=1)[:, 0] - wanted)
    return jnp.sum(classified * valid) / total, jnp.sum(moved * (labels > 0)) / total


def of_masks(logits: jax.Array, labels: jax.Array, wanted: jax.Array) -> jax.Array:
    """Loss of the masks of regions: the mean over all pixels of those of objects, each in its class alone.

    Args:
      logits: `[n, side, side, classes]`.
      labels: `[n]`, as `regions` has them.
      wanted: `[n, side, side]`, from 0 to 1.
    """
    of_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    chosen = jnp.sum(logits * of_label[:, None, None, :], axis=-1)
    mean = optax.sigmoid_binary_cross_entropy(chosen, wanted).mean(axis=(1, 2))
    there = labels > 0
    return jnp.sum(mean * there) / jnp.maximum(there.sum(), 1)
