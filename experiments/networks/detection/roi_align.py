"""RoIAlign: features at regular points of boxes, each box at the level of the pyramid that fits its size."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def levels_of(boxes: jax.Array, count: int) -> jax.Array:
    """Which level each box `[n, 4]` is read from, 0 the finest: a box of 224 x 224 pixels is of the third."""
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    side = jnp.sqrt(sides[:, 0] * sides[:, 1])
    level = jnp.floor(4 + jnp.log2(jnp.maximum(side, 1e-12) / 224) + 1e-6) - 2
    return jnp.clip(level, 0, count - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[jax.Array], boxes: jax.Array, image: jax.Array, level: jax.Array, side: int, samples: int = 2
) -> jax.Array:
    """Features `[n, side, side, channels]` of boxes; the mean of `samples` x `samples` points in each bin.

    Args:
      maps: of each level, `[batch, height, width, channels]`, 4 pixels apart in the first and twice as far in the next.
      boxes: `[n, 4]`, in pixels.
      image: `[n]`, which of the batch each box is in.
      level: `[n]`, which of the maps it is read from.
      side: bins along each side.
      samples: points of a bin along each side.
    """
    shapes = jnp.asarray([x.shape[1:3] for x in maps])[level]
    begins, flat = [0], []
    for x in maps:
        flat.append(x.reshape(-1, x.shape[-1]))
        begins.append(begins[-1] + len(flat[-1]))
    rows = jnp.concatenate(flat)
    begin = jnp.asarray(begins[:-1])[level] + image * shapes[:, 0] * shapes[:, 1]

    scaled = boxes / (4 * 2.0**level)[:, None]
    steps = (jnp.arange(side * samples) + 0.5) / (side * samples)

    def along(axis):
        """Of all points along an axis: both neighbours and their shares, 0 outside of the map."""
        low, high = scaled[:, axis, None], scaled[:, axis + 2, None]
        points = low + jnp.maximum(high - low, 1) * steps[None, :]
        size = shapes[:, 1 - axis, None]
        inside = (points >= -1) & (points <= size)
        points = jnp.clip(points, 0, size - 1)
        before = jnp.floor(points).astype(jnp.int32)
        share = points - before
        after = jnp.minimum(before + 1, size - 1)
        return [(before, (1 - share) * inside), (after, share * inside)]

    def mean(values):
        count, channels = len(values), values.shape[-1]
        return values.reshape(count, side, samples, side, samples, channels).mean(axis=(2, 4))

    total = jnp.zeros((len(boxes), side * samples, side * samples, rows.shape[-1]), rows.dtype)
    for y, down in along(1):
        for x, across in along(0):
            index = begin[:, None, None] + y[:, :, None] * shapes[:, 1, None, None] + x[:, None, :]
            total += rows[index] * (down[:, :, None] * across[:, None, :])[..., None].astype(rows.dtype)
    return mean(total)


def mask_targets(masks: jax.Array, boxes: jax.Array, number: jax.Array, side: int) -> jax.Array:
    """What the masks `[n, side, side]` of boxes should be: the share of each bin that is of the object.

    RoIAlign of the object's mask, with points about a pixel apart, as many as the box has room for.

    Args:
      masks: `[objects, height, width]`, booleans.
      boxes: `[n, 4]`, in pixels, within the image.
      number: `[n]`, the object of each.
      side: bins along each side.
    """

    def along(low, high, size):
        """Of every bin, how much each pixel counts, `[side, size]`."""
        length = jnp.maximum(high - low, 1)
        count = jnp.ceil(length / side)
        step = jnp.arange(-(-size // side))[None, :]
        at = low + (jnp.arange(side)[:, None] + (step + 0.5) / count) * length / side
        share = jnp.where((step < count) & (at >= -1) & (at <= size), 1 / count, 0)
        near = 1 - jnp.abs(jnp.clip(at, 0, size - 1)[..., None] - jnp.arange(size)[None, None, :])
        return jnp.einsum("bs,bsp->bp", share, jnp.maximum(near, 0))

    def of_box(given):
        box, number = given
        height, width = masks.shape[1:]
        down, across = along(box[1], box[3], height), along(box[0], box[2], width)
        return down @ masks[number].astype(down.dtype) @ across.T

    return jax.lax.map(of_box, (boxes, number))
