"""Layers as PyTorch has them: paddings, initial weights and batch norm's constants."""

from typing import Any

import flax.linen as nn

# What is added to running statistics is a tenth; PyTorch calls that a momentum of 0.1.
MOMENTUM = 0.9
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(width: int, side: int, stride: int, name: str, *, bias: bool = False, **options: Any) -> nn.Conv:
    """A convolution with as much padding on both edges, whatever the stride; parameters in float32."""
    edge = side // 2
    return nn.Conv(width, (side, side), stride, padding=((edge, edge),) * 2, use_bias=bias, name=name, **options)


def norm(train: bool, name: str, dtype: Any = None) -> nn.BatchNorm:
    """Batch norm. Its running variance is that of the batch, where PyTorch's is n / (n - 1) times as large."""
    return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, dtype=dtype, name=name)
