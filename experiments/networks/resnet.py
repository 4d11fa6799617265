"""ResNets for 32 x 32 images: He et al., "Deep Residual Learning for Image Recognition" (2016), Section 4.2.

Two families share the module; what differs between them are its options:

| | CIFAR-100 (karanchahal/distiller) | CIFAR-10 (akamaster/pytorch_resnet_cifar10) |
|---|---|---|
| stem | 64 channels | 16 channels |
| shortcut | convolution and batch norm | strided, padded with zero channels (option A) |
| ReLU | after the last block of a stage only | after every block |
| pooling | 4 x 4 windows, 256 features | the whole image, 64 features |
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments.networks import layers, torch_weights


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; no ReLU after the sum."""

    width: int
    stride: int
    projection: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return layers.norm(train, name, self.dtype)

        def conv(side, stride, name):
            return layers.conv(self.width, side, stride, name, dtype=self.dtype)

        y = nn.relu(norm("bn1")(conv(3, self.stride, "conv1")(x)))
        y = norm("bn2")(conv(3, 1, "conv2")(y))
        if x.shape == y.shape:
            return y + x
        if self.projection:
            return y + norm("shortcut_bn")(conv(1, self.stride, "shortcut_conv")(x))
        missing = self.width - x.shape[-1]
        halves = (missing // 2, missing - missing // 2)
        return y + jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), halves))


class ResNet(nn.Module):
    """Images `[batch, 32, 32, 3]`, normalised -> logits `[batch, classes]` in float32.

    Args:
      blocks: blocks of each stage; every stage but the first halves the image.
      widths: channels of each stage.
      stem: channels of the first convolution.
      classes: number of classes.
      projection: shortcuts that change the shape are convolutions; otherwise zero-padded.
      relu_every_block: ReLU after every block; otherwise after the last one of a stage.
      pool: side of the pooling windows; `None` takes the mean over the image.
      dtype: in which is computed, as bfloat16; parameters are float32.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    stem: int = 64
    classes: int = 100
    projection: bool = True
    relu_every_block: bool = False
    pool: int | None = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = layers.conv(self.stem, 3, 1, "conv1", dtype=self.dtype)(x)
        x = nn.relu(layers.norm(train, "bn1", self.dtype)(x))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for k in range(count):
                stride = 2 if stage > 0 and k == 0 else 1
                x = Block(width, stride, self.projection, self.dtype, name=f"layer{stage + 1}_{k}")(x, train)
                if self.relu_every_block or k == count - 1:
                    x = nn.relu(x)
        x = jnp.mean(x, axis=(1, 2)) if self.pool is None else nn.avg_pool(x, (self.pool,) * 2, (self.pool,) * 2)
        return nn.Dense(self.classes, dtype=self.dtype, name="linear")(x.reshape(len(x), -1)).astype(jnp.float32)


def from_torch(weights: Mapping[str, np.ndarray], side: int) -> dict:
    """Variables of a `ResNet` from the arrays of the PyTorch network.

    Args:
      weights: arrays by their PyTorch names.
      side: side of the pooled image; the last layer sees its channels first there, and last here.
    """
    return torch_weights.variables(weights, {"linear": side * side})
