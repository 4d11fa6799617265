"""SqueezeNet 1.1: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters" (2016)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Fire(nn.Module):
    """A 1 x 1 convolution down to few channels, then 1 x 1 and 3 x 3 convolutions side by side."""

    squeeze: int
    expand: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.squeeze, (1, 1), name="squeeze1x1")(x))
        wide = [nn.Conv(self.expand, (side, side), name=f"expand{side}x{side}")(x) for side in (1, 3)]
        return nn.relu(jnp.concatenate(wide, axis=-1))


class SqueezeNet(nn.Module):
    """Images `[batch, 227, 227, 3]`, BGR, minus the mean -> logits `[batch, classes]`.

    Args:
      classes: number of classes.
      stem: channels of the first convolution.
      fires: (squeezed, expanded) channels of each fire module; there is a pooling before the first, third and fifth.
    """

    classes: int = 1000
    stem: int = 64
    fires: tuple[tuple[int, int], ...] = (
        (16, 64),
        (16, 64),
        (32, 128),
        (32, 128),
        (48, 192),
        (48, 192),
        (64, 256),
        (64, 256),
    )

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.stem, (3, 3), strides=2, padding="VALID", name="conv1")(x))
        for k, (squeeze, expand) in enumerate(self.fires):
            if k in (0, 2, 4):
                x = _ceil_pool(x)
            x = Fire(squeeze, expand, name=f"fire{k + 2}")(x)
        return jnp.mean(nn.relu(nn.Conv(self.classes, (1, 1), name="conv10")(x)), axis=(1, 2))


def _ceil_pool(x):
    """3 x 3 maxima with stride 2; a window may reach over the edge."""
    edges = [(0, -(size - 3) % 2) for size in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), padding=edges)


def from_torch(weights: Mapping[str, np.ndarray]) -> dict:
    """Variables of a `SqueezeNet` from the arrays of the original, in float32."""
    params: dict = {}
    for key, value in weights.items():
        path, kind = key.rsplit(".", 1)
        node = params
        for layer in path.split("/"):
            node = node.setdefault(layer, {})
        node["bias" if kind == "bias" else "kernel"] = value if kind == "bias" else value.transpose(2, 3, 1, 0)
    return {"params": jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)}
