"""VGG with and without batch norm, as torchvision has it.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments.networks.layers import HE, conv, norm

POOL = 0
# Channels of the convolutions, and where images are halved: configuration A, eleven layers with weights.
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
SIDE = 7  # of the image that the dense layers see


class VGG(nn.Module):
    """Images `[batch, 224, 224, 3]`, normalised, or of any size -> logits `[batch, classes]` in float32.

    Args:
      layers: channels of each convolution, and `POOL`.
      batch_norm: after each convolution.
      hidden: width of the two dense layers before the last.
      classes: number of classes.
      dropout: probability of a zero after each of them, in training.
      dtype: in which is computed, as bfloat16; parameters are float32.
    """

    layers: tuple[int, ...] = VGG11
    batch_norm: bool = False
    hidden: int = 4096
    classes: int = 1000
    dropout: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        number = 0  # of the layer in PyTorch's sequence, where ReLU and pooling count
        for width in self.layers:
            if width == POOL:
                x, number = nn.max_pool(x, (2, 2), (2, 2)), number + 1
                continue
            name = f"features_{number}"
            x = conv(width, 3, 1, name, bias=True, dtype=self.dtype, kernel_init=HE)(x)
            if self.batch_norm:
                x = norm(train, f"features_{number + 1}", self.dtype)(x)
            x, number = nn.relu(x), number + 2 + self.batch_norm
        x = adaptive_mean(x, SIDE).reshape(len(x), -1)
        for number in (0, 3):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=f"classifier_{number}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="classifier_6")(x).astype(jnp.float32)


def adaptive_mean(x, side: int):
    """Means of `side` x `side` windows, `floor(k n / side)` to `ceil((k + 1) n / side)`, which may overlap."""
    for axis in (1, 2):
        n = x.shape[axis]
        if n != side:
            edges = [(k * n // side, -(-(k + 1) * n // side)) for k in range(side)]
            windows = [jnp.mean(x.take(np.arange(a, b), axis), axis, keepdims=True) for a, b in edges]
            x = jnp.concatenate(windows, axis)
    return x
