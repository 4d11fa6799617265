"""BERT, its heads, and public weights for it.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019); Wang et al.,
"MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers" (2020); Reimers and
Gurevych, "Sentence-BERT" (2019).

Every module takes token numbers `[batch, length]`, True where they are no padding, which sentence each is of (`None`:
all of the first), and whether dropout is at work.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.transformer import Layer


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT; the defaults are those of bert-base-uncased.

    Attributes:
      vocabulary: token numbers.
      width: of the activations.
      hidden: of the feed-forward networks.
      layers: how many.
      heads: attention heads of each.
      positions: the longest input.
      segments: sentences that an input can have.
      dropout: in training.
      dot_general: of the projections of the layers.
    """

    vocabulary: int = 30522
    width: int = 768
    hidden: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 512
    segments: int = 2
    dropout: float = 0.1
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general

    @classmethod
    def read(cls, path: Path) -> "Config":
        """From the `config.json` next to public weights.

        Raises:
          ValueError: it lacks a size, or is of another network.
        """
        found = json.loads(path.read_text())
        for name, wanted in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if found.get(name, wanted) != wanted:
                raise ValueError(f"{path}: {name} is {found[name]!r}; only {wanted!r} is implemented")
        if missing := [name for name in _CONFIG.values() if name not in found]:
            raise ValueError(f"{path}: no {', '.join(missing)}")
        return cls(**{ours: found[theirs] for ours, theirs in _CONFIG.items()})


_CONFIG = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
}
BASE = Config()
LARGE = Config(width=1024, hidden=4096, layers=24, heads=16)
MINILM = Config(width=384, hidden=1536, layers=6)


class Bert(nn.Module):
    """The encoder: activations of the last layer `[batch, length, width]`."""

    config: Config = BASE

    @nn.compact
    def __call__(self, tokens, attended, segments=None, train=False):
        c = self.config
        if tokens.shape[1] > c.positions:
            raise ValueError(f"an input of {tokens.shape[1]} tokens, and there are {c.positions} positions; cut it")
        x = nn.Embed(c.vocabulary, c.width, name="word_embedding")(tokens)
        x = x + nn.Embed(c.positions, c.width, name="position_embedding")(jnp.arange(tokens.shape[1]))[None]
        segments = jnp.zeros_like(tokens) if segments is None else segments
        x = x + nn.Embed(c.segments, c.width, name="segment_embedding")(segments)
        x = nn.LayerNorm(epsilon=1e-12, name="embedding_norm")(x)
        x = nn.Dropout(c.dropout, deterministic=not train)(x)
        for k in range(c.layers):
            layer = Layer(c.heads, c.hidden, dropout=c.dropout, dot_general=c.dot_general, name=f"layer{k}")
            x = layer(x, attended[:, None, None, :], train)
        return x


class Pooled(nn.Module):
    """The first token's activation through one more layer `[batch, width]`: the encoder as it was pretrained."""

    config: Config = BASE

    @nn.compact
    def __call__(self, tokens, attended, segments=None, train=False):
        x = Bert(self.config, name="bert")(tokens, attended, segments, train)
        return nn.tanh(nn.Dense(self.config.width, name="pooler")(x[:, 0]))


class Classification(nn.Module):
    """Logits `[batch, classes]` of a sentence, or of a pair."""

    config: Config = BASE
    classes: int = 2

    @nn.compact
    def __call__(self, tokens, attended, segments=None, train=False):
        x = Bert(self.config, name="bert")(tokens, attended, segments, train)
        x = nn.tanh(nn.Dense(self.config.width, name="pooler")(x[:, 0]))
        x = nn.Dropout(self.config.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="classifier")(x)


class SpanExtraction(nn.Module):
    """Logits `[batch, length, 2]` that an answer starts, and that it ends, at a token."""

    config: Config = BASE

    @nn.compact
    def __call__(self, tokens, attended, segments=None, train=False):
        return nn.Dense(2, name="span")(Bert(self.config, name="bert")(tokens, attended, segments, train))


class SentenceEmbedding(nn.Module):
    """Embeddings `[batch, width]` of length 1: the mean over the tokens."""

    config: Config = MINILM

    @nn.compact
    def __call__(self, tokens, attended, segments=None, train=False):
        x = Bert(self.config, name="bert")(tokens, attended, segments, train)
        weight = attended[..., None].astype(x.dtype)
        mean = jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def shapes(module: nn.Module, length: int = 8) -> Any:
    """Parameters as shapes and dtypes: nothing is computed."""
    inputs = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
