"""ResNets and ResNeXts for ImageNet, as torchvision has them.

He et al., "Deep Residual Learning for Image Recognition" (2016), with the stride in the 3 x 3 convolution of a
bottleneck; Xie et al., "Aggregated Residual Transformations for Deep Neural Networks" (2017).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.networks.layers import HE, FrozenNorm, conv, norm


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a 3 x 3 one between two of 1 x 1, around a shortcut.

    Args:
      width: channels, of which a bottleneck puts out four times as many.
      inner: channels within a bottleneck; 0: it is none.
      stride: of the 3 x 3 convolution, the first if there are two.
      groups: of the 3 x 3 convolution of a bottleneck.
      dtype: in which is computed.
      frozen: what frozen batch norms add to the variance; `None`: they are trained.
    """

    width: int
    inner: int
    stride: int
    groups: int
    dtype: Any
    frozen: float | None = None

    @nn.compact
    def __call__(self, x, train):
        def layer(k, x, width, side, stride=1, name=None, **options):
            x = conv(width, side, stride, name or f"conv{k}", dtype=self.dtype, kernel_init=HE, **options)(x)
            after = name.replace("conv", "bn") if name else f"bn{k}"
            return (norm(train, after, self.dtype) if self.frozen is None else FrozenNorm(self.frozen, name=after))(x)

        if self.inner:
            out = 4 * self.width
            y = nn.relu(layer(1, x, self.inner, 1))
            y = nn.relu(layer(2, y, self.inner, 3, self.stride, feature_group_count=self.groups))
            y = layer(3, y, out, 1)
        else:
            out = self.width
            y = layer(2, nn.relu(layer(1, x, out, 3, self.stride)), out, 3)
        if self.stride > 1 or x.shape[-1] != out:
            x = layer(0, x, out, 1, self.stride, "downsample_conv")
        return nn.relu(y + x)


class ImageNetResNet(nn.Module):
    """Images `[batch, 224, 224, 3]`, normalised, or of any size -> logits `[batch, classes]` in float32.

    Args:
      blocks: blocks of each stage; every stage but the first halves the image.
      bottleneck: blocks have three convolutions.
      groups: groups of the convolutions in bottlenecks.
      group_width: channels of a group, in the first stage.
      widths: channels of each stage.
      classes: number of classes.
      dtype: in which is computed, as bfloat16; parameters are float32.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = conv(64, 7, 2, "conv1", dtype=self.dtype, kernel_init=HE)(x)
        x = nn.relu(norm(train, "bn1", self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            inner = width * self.group_width // 64 * self.groups if self.bottleneck else 0
            for k in range(count):
                stride = 2 if stage > 0 and k == 0 else 1
                x = Block(width, inner, stride, self.groups, self.dtype, name=f"layer{stage + 1}_{k}")(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="fc")(x).astype(jnp.float32)
