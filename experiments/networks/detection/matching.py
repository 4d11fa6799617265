"""Which boxes are learned from, and what: matched with objects, drawn at random, as torchvision does."""

import jax
import jax.numpy as jnp

BACKGROUND, NEITHER = -1, -2


def matched(overlaps: jax.Array, there: jax.Array, low: float, high: float, every: bool) -> jax.Array:
    """The number of the object that each box `[n]` is matched with, or `BACKGROUND`, or `NEITHER`.

    Args:
      overlaps: `[objects, n]`.
      there: `[objects]`, which of them are objects at all.
      low: below it is background.
      high: from it on is an object.
      every: every object is matched with the boxes that it overlaps with most, too; these boxes go to the object that
        they themselves overlap with most.
    """
    overlaps = jnp.where(there[:, None], overlaps, -1)
    best, number = overlaps.max(axis=0), overlaps.argmax(axis=0)
    found = jnp.where(best >= high, number, jnp.where(best < low, BACKGROUND, NEITHER))
    if every:
        most = there[:, None] & (overlaps == overlaps.max(axis=1, keepdims=True))
        found = jnp.where(most.any(axis=0), number, found)
    return found


def drawn(
    key: jax.Array, positive: jax.Array, negative: jax.Array, count: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """A random sample of boxes: up to `share` of `count` are positive, and they come first; negative ones fill it up.

    Args:
      key: of the draw.
      positive: `[n]`, which boxes are.
      negative: `[n]`, which boxes are.
      count: boxes of the sample.
      share: the most that are positive.

    Returns:
      Numbers `[count]` of boxes, and which of them are any.
    """
    luck = jax.random.uniform(key, positive.shape)
    most = min(int(count * share), len(luck))
    first, of_positive = jax.lax.top_k(jnp.where(positive, luck, -1), most)
    second, of_negative = jax.lax.top_k(jnp.where(negative, luck, -1), min(count, len(luck)))
    free = count - jnp.sum(first >= 0)
    second = jnp.where(jnp.arange(len(second)) < free, second, -1)
    number, luck = jnp.concatenate([of_positive, of_negative]), jnp.concatenate([first, second])
    number, luck = (jnp.pad(x, (0, max(count - len(x), 0)), constant_values=-1) for x in (number, luck))
    order = jnp.argsort(luck < 0, stable=True)[:count]
    return jnp.maximum(number[order], 0), luck[order] >= 0
