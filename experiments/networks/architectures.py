"""The networks of the paper's tables for ImageNet, and the small ones for CIFAR, with random weights or PyTorch's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments.networks import torch_weights
from experiments.networks.resnet import ResNet
from experiments.networks.resnet_imagenet import ImageNetResNet
from experiments.networks.vgg import SIDE, VGG


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A module and what its images and its PyTorch weights look like.

    Attributes:
      module: the Flax module; `module.clone(classes=10, dtype=jnp.bfloat16)` makes others.
      side: side of the images.
      flattened: as in `torch_weights.variables`.
    """

    module: nn.Module
    side: int = 224
    flattened: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def variables(self, weights: Mapping[str, np.ndarray] | Path, module: nn.Module | None = None) -> dict:
        """Variables of PyTorch weights, or of their file, for the module or for a clone of it.

        Raises:
          ValueError: they are those of another network; names a parameter.
        """
        arrays = weights if isinstance(weights, Mapping) else torch_weights.read(weights)
        images = jnp.zeros((1, self.side, self.side, 3))
        return torch_weights.check(torch_weights.variables(arrays, self.flattened), module or self.module, images)


def _akamaster(depth: int) -> Architecture:
    count = (depth - 2) // 6
    options = {"stem": 16, "classes": 10, "projection": False, "relu_every_block": True, "pool": None}
    return Architecture(ResNet(blocks=(count,) * 3, **options), 32)  # type: ignore[arg-type]


def _distiller(depth: int) -> Architecture:
    return Architecture(ResNet(blocks=((depth - 2) // 6,) * 3), 32, {"linear": 4})


ARCHITECTURES = {
    "resnet18": Architecture(ImageNetResNet((2, 2, 2, 2), bottleneck=False)),
    "resnet34": Architecture(ImageNetResNet((3, 4, 6, 3), bottleneck=False)),
    "resnet50": Architecture(ImageNetResNet((3, 4, 6, 3))),
    "resnet101": Architecture(ImageNetResNet((3, 4, 23, 3))),
    "resnext50_32x4d": Architecture(ImageNetResNet((3, 4, 6, 3), groups=32, group_width=4)),
    "vgg11": Architecture(VGG(), 224, {"classifier_0": SIDE * SIDE}),
    "vgg11_bn": Architecture(VGG(batch_norm=True), 224, {"classifier_0": SIDE * SIDE}),
    **{f"cifar10_resnet{depth}": _akamaster(depth) for depth in (20, 32, 44, 56)},
    **{f"cifar100_resnet{depth}": _distiller(depth) for depth in (8, 14, 20, 32)},
}
