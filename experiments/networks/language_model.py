"""A language model: a decoder of transformer layers with their norms in front.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.transformer import Layer


class LanguageModel(nn.Module):
    """Token numbers `[batch, length]` -> logits of the token after each `[batch, length, vocabulary]`.

    Attributes:
      vocabulary: token numbers.
      width: of the activations.
      hidden: of the feed-forward networks.
      layers: how many.
      heads: attention heads of each.
      positions: the longest input.
      dropout: in training.
      dot_general: of the projections of the layers; `nm.dot_general("2:4-T")` lets them run on sparse kernels.
    """

    vocabulary: int = 65
    width: int = 128
    hidden: int = 512
    layers: int = 4
    heads: int = 4
    positions: int = 128
    dropout: float = 0.0
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general

    @nn.compact
    def __call__(self, tokens, train=False):
        length = tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"an input of {length} tokens, and there are {self.positions} positions; cut it")
        x = nn.Embed(self.vocabulary, self.width, name="word_embedding")(tokens)
        x = x + nn.Embed(self.positions, self.width, name="position_embedding")(jnp.arange(length))[None]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        past = jnp.tril(jnp.ones((length, length), bool))[None, None]
        for k in range(self.layers):
            layer = Layer(
                self.heads,
                self.hidden,
                pre_norm=True,
                epsilon=1e-5,
                exact_gelu=False,
                dropout=self.dropout,
                dot_general=self.dot_general,
                name=f"layer{k}",
            )
            x = layer(x, past, train)
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(x)
