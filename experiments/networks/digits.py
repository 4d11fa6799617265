"""A small convolutional network for the handwritten digits."""

import flax.linen as nn


class DigitsNet(nn.Module):
    """Images `[batch, 8, 8, 1]` -> logits `[batch, 10]`: three convolutions and two dense layers, 73,000 weights."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        del train  # nothing in it is different
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)
