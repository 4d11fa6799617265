"""Boxes `[..., 4]`, left, top, right and bottom in pixels: overlaps, shifts, anchors, non-maximum suppression."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = math.log(1000 / 16)  # of the logarithm of a change of size


def area(boxes: jax.Array) -> jax.Array:
    """Area of each box."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(first: jax.Array, second: jax.Array) -> jax.Array:
    """Intersection over union of every box `[n, 4]` with every other `[m, 4]`; 0 where both are empty."""
    low = jnp.maximum(first[:, None, :2], second[None, :, :2])
    high = jnp.minimum(first[:, None, 2:], second[None, :, 2:])
    common = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    whole = area(first)[:, None] + area(second)[None, :] - common
    return jnp.where(whole > 0, common / jnp.where(whole > 0, whole, 1), 0)


def shifted(boxes: jax.Array, shifts: jax.Array, weights: Sequence[float]) -> jax.Array:
    """Boxes moved and scaled by what a network says: of the centre in sizes of the box, of the size by logarithm.

    Args:
      boxes: `[..., 4]`.
      shifts: `[..., 4]`, of x, y, width and height.
      weights: what each of the four was multiplied by.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    shifts = shifts / jnp.asarray(weights, shifts.dtype).reshape((1,) * (shifts.ndim - 1) + (4,))
    centre = shifts[..., :2] * size + centre
    half = 0.5 * jnp.exp(jnp.minimum(shifts[..., 2:], LARGEST)) * size
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def shift_to(boxes: jax.Array, targets: jax.Array, weights: Sequence[float]) -> jax.Array:
    """What `shifted` moves boxes to their targets by; 0 where either is empty.

    Args:
      boxes: `[..., 4]`.
      targets: `[..., 4]`.
      weights: what each of the four is multiplied by.
    """
    size, wanted = (x[..., 2:] - x[..., :2] for x in (boxes, targets))
    there = jnp.all((size > 0) & (wanted > 0), axis=-1, keepdims=True)
    size, wanted = (jnp.where(there, x, 1) for x in (size, wanted))
    moved = (targets[..., :2] + 0.5 * wanted - boxes[..., :2] - 0.5 * size) / size
    found = jnp.concatenate([moved, jnp.log(wanted / size)], axis=-1)
    return jnp.where(there, found * jnp.asarray(weights, found.dtype).reshape((1,) * (found.ndim - 1) + (4,)), 0)


def clipped(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes within an image of a height and a width."""
    limits = jnp.stack([size[1], size[0]]).astype(boxes.dtype)
    limits = jnp.concatenate([limits, limits]).reshape((1,) * (boxes.ndim - 1) + (4,))
    return jnp.clip(boxes, 0, limits)


def large(boxes: jax.Array, least: float) -> jax.Array:
    """Whether both sides have at least that length."""
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= least, axis=-1)


def anchors(grid: tuple[int, int], stride: tuple[int, int], side: int, ratios: Sequence[float]) -> np.ndarray:
    """Boxes of one level, `[height * width * ratios, 4]`: around each position, one of each ratio of its sides."""
    tall = np.sqrt(np.asarray(ratios, np.float32))
    half = np.stack([side / tall, side * tall], axis=1) / np.float32(2)
    shapes = np.round(np.concatenate([-half, half], axis=1))
    y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(grid, stride, strict=True)), indexing="ij")
    places = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (places + shapes).reshape(-1, 4).astype(np.float32)


def suppressed(boxes: jax.Array, there: jax.Array, threshold: float) -> jax.Array:
    """Which boxes stay: those that overlap with none of those that stay and have a higher score by more than that.

    What greedy suppression gives, by repetition until nothing changes: after k rounds the first k are final, and far
    fewer rounds than boxes are needed.

    Args:
      boxes: `[n, 4]`, the highest score first.
      there: `[n]`, which of them are boxes at all.
      threshold: highest overlap of two that stay.
    """
    later = jnp.arange(len(boxes))
    hits = (overlap(boxes, boxes) > threshold) & (later[:, None] < later[None, :])

    def again(state):
        stays, _ = state
        new = there & ~jnp.any(hits & stays[:, None], axis=0)
        return new, jnp.any(new != stays)

    return jax.lax.while_loop(lambda state: state[1], again, (there, jnp.bool_(True)))[0]
