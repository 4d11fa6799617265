"""A small network of inverted bottlenecks for the handwritten digits.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Bottleneck(nn.Module):
    """A 1 x 1 convolution to many channels, a depthwise 3 x 3 one, and a 1 x 1 one back; with a shortcut if it fits."""

    width: int
    stride: int
    wider: int
    folded: bool

    @nn.compact
    def __call__(self, x, train):
        def layer(y, width, side, stride, name, groups=1):
            options = {"feature_group_count": groups, "use_bias": self.folded, "name": name}
            y = nn.Conv(width, (side, side), stride, **options)(y)
            return y if self.folded else nn.BatchNorm(not train, momentum=0.9, name=f"{name}_bn")(y)

        many = self.wider * x.shape[-1]
        y = nn.relu6(layer(x, many, 1, 1, "expand"))
        y = nn.relu6(layer(y, many, 3, self.stride, "depthwise", many))
        y = layer(y, self.width, 1, 1, "project")
        return x + y if x.shape == y.shape else y


class Bottlenecks(nn.Module):
    """Images `[batch, 8, 8, 1]` -> logits `[batch, 10]`.

    Args:
      stem: channels of the first convolution.
      blocks: (channels, stride) of each bottleneck.
      wider: how many times as many channels it has inside.
      last: channels of the last 1 x 1 convolution.
      folded: convolutions have biases, and no batch norm follows; `fold` makes its parameters.
    """

    stem: int = 16
    blocks: tuple[tuple[int, int], ...] = ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1))
    wider: int = 4
    last: int = 64
    folded: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        def layer(x, width, side, name):
            x = nn.Conv(width, (side, side), use_bias=self.folded, name=name)(x)
            return nn.relu6(x if self.folded else nn.BatchNorm(not train, momentum=0.9, name=f"{name}_bn")(x))

        x = layer(x, self.stem, 3, "stem")
        for k, (width, stride) in enumerate(self.blocks):
            x = Bottleneck(width, stride, self.wider, self.folded, name=f"block{k}")(x, train)
        x = jnp.mean(layer(x, self.last, 1, "last"), axis=(1, 2))
        return nn.Dense(10, name="head")(x)


def fold(variables: dict) -> dict:
    """Variables without batch norm: every convolution has what followed it in its weights and its bias."""

    def below(params, stats):
        folded = {}
        for name, node in params.items():
            if f"{name}_bn" in params:
                norm, seen = params[f"{name}_bn"], stats[f"{name}_bn"]
                scale = norm["scale"] * jax.lax.rsqrt(seen["var"] + 1e-5)
                folded[name] = {
                    "kernel": node["kernel"] * scale[None, None, None],
                    "bias": norm["bias"] - seen["mean"] * scale,
                }
            elif name.startswith("block"):
                folded[name] = below(node, stats[name])
            elif not name.endswith("_bn"):
                folded[name] = node
        return folded

    return {"params": below(variables["params"], variables["batch_stats"])}
