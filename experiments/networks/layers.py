"""Layers as PyTorch has them: paddings, initial weights and batch norm's constants."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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


class FrozenNorm(nn.Module):
    """Batch norm of which nothing is trained: its four arrays are in the collection `frozen`, not among parameters."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        shape, make = (x.shape[-1],), {"scale": jnp.ones, "bias": jnp.zeros, "mean": jnp.zeros, "var": jnp.ones}
        v = {name: self.variable("frozen", name, f, shape).value for name, f in make.items()}
        scale = v["scale"] * jax.lax.rsqrt(v["var"] + self.epsilon)
        shift = v["bias"] - v["mean"] * scale
        scale, shift = (y.reshape((1,) * (x.ndim - 1) + shape) for y in (scale, shift))
        return x * scale + shift
