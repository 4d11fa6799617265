"""A layer of a transformer, as encoders and language models have them.

Vaswani et al., "Attention Is All You Need" (2017).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual sum and a norm.

    Attributes:
      heads: attention heads.
      hidden: width of the feed-forward network.
      pre_norm: the norms are before both parts (GPT-2), not after the sums (BERT).
      epsilon: of the norms.
      exact_gelu: the exact activation (BERT), not its approximation by tanh (GPT-2).
      dropout: of the attention weights and before each sum, in training.
      dot_general: of the six projections; `nm.dot_general("2:4-T")` lets them run on sparse kernels.
    """

    heads: int
    hidden: int
    pre_norm: bool = False
    epsilon: float = 1e-12
    exact_gelu: bool = True
    dropout: float = 0.0
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Activations `[batch, length, width]`, True where a position `[batch, 1, query, key]` may look."""
        for part, name in ((self._attention, "attention_norm"), (self._feed_forward, "ffn_norm")):
            norm = nn.LayerNorm(epsilon=self.epsilon, name=name)
            change = part(norm(x) if self.pre_norm else x, mask, train)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(change)
            x = x if self.pre_norm else norm(x)
        return x

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dot_general=self.dot_general, name=name)

    def _attention(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (self._dense(width, name)(x).reshape(split) for name in ("query", "key", "value"))
        dropped: dict[str, Any] = {}
        if train and self.dropout:
            dropped = {"dropout_rng": self.make_rng("dropout"), "dropout_rate": self.dropout, "deterministic": False}
        mixed = nn.dot_product_attention(query, key, value, mask=mask, broadcast_dropout=False, **dropped)
        return self._dense(width, "attention_out")(mixed.reshape(x.shape))

    def _feed_forward(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        del mask, train
        inner = nn.gelu(self._dense(self.hidden, "ffn1")(x), approximate=not self.exact_gelu)
        return self._dense(x.shape[-1], "ffn2")(inner)
