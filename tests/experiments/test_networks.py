"""The pretrained networks of the experiments, small and with random weights; and whole, where the data is."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks import NETWORKS, ResNet, SqueezeNet
from experiments.networks import resnet as resnets

SMALL = {
    "resnet, projections": (ResNet(blocks=(1, 2), widths=(4, 8), stem=8, classes=5), (2, 16, 16, 3)),
    "resnet, padded": (ResNet((1, 1), (4, 8), 4, 5, projection=False, relu_every_block=True, pool=None), (2, 8, 8, 3)),
    "squeezenet": (SqueezeNet(classes=5, stem=4, fires=((2, 4), (2, 4))), (2, 35, 35, 3)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_of_random_weights(name):
    module, shape = SMALL[name]
    x = jax.random.normal(jax.random.key(0), shape)
    variables = module.init(jax.random.key(1), x)
    logits = module.apply(variables, x)
    assert logits.shape == (2, 5) and np.isfinite(logits).all()


def test_windows_of_the_pooling_reach_over_the_edge():
    module = SqueezeNet(classes=5, stem=4, fires=((2, 4),))
    x = jnp.zeros((1, 13, 13, 3))  # 6 x 6 after the stem; whole windows alone would leave 2 x 2
    variables = module.init(jax.random.key(0), x)
    convolutions = {"capture_intermediates": lambda layer, _: isinstance(layer, nn.Conv), "mutable": "intermediates"}
    _, found = module.apply(variables, x, **convolutions)
    assert found["intermediates"]["fire2"]["squeeze1x1"]["__call__"][0].shape == (1, 3, 3, 2)


def test_weights_of_pytorch_go_where_they_belong():
    module = ResNet(blocks=(1, 1), widths=(4, 8), stem=8, classes=5, pool=8)
    x = jnp.zeros((1, 16, 16, 3))
    wanted = jax.eval_shape(module.init, jax.random.key(0), x)
    arrays = {}

    def conv(name, out, into, side):
        arrays[f"{name}.weight"] = np.zeros((out, into, side, side), np.float32)

    def norm(name, width):
        arrays.update({f"{name}.{k}": np.zeros(width) for k in ("weight", "bias", "running_mean", "running_var")})

    conv("conv1", 8, 3, 3)
    norm("bn1", 8)
    for stage, into, out in ((1, 8, 4), (2, 4, 8)):
        conv(f"layer{stage}.0.conv1", out, into, 3)
        conv(f"layer{stage}.0.conv2", out, out, 3)
        conv(f"layer{stage}.0.shortcut.0", out, into, 1)
        for name in ("bn1", "bn2", "shortcut.1"):
            norm(f"layer{stage}.0.{name}", out)
    arrays["linear.weight"], arrays["linear.bias"] = np.zeros((5, 8)), np.zeros(5)
    loaded = resnets.from_torch(arrays, side=1)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.slow
@pytest.mark.skipif("NM_JAX_DATA" not in os.environ, reason="pretrained weights: set NM_JAX_DATA to their folder")
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_figures_of_the_pretrained_networks(name):
    network = NETWORKS[name]
    # SqueezeNet is judged on half of the images that the recorded accuracy is of.
    tolerance = 3.0 if name == "squeezenet" else 0.1
    assert network.evaluate(network.variables()) == pytest.approx(network.expected, abs=tolerance)
