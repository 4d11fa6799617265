"""The MiniLM sentence encoder: a BERT of 6 layers, mean pooling, and its tokenizer.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers"
(2020); Reimers and Gurevych, "Sentence-BERT" (2019).
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each normalised after its residual sum."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, attended):
        width = x.shape[-1]
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (nn.Dense(width, name=name)(x).reshape(split) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=attended[:, None, None, :])
        x = _norm("attention_norm")(x + nn.Dense(width, name="attention_out")(mixed.reshape(x.shape)))
        inner = nn.gelu(nn.Dense(self.hidden, name="ffn1")(x), approximate=False)
        return _norm("ffn_norm")(x + nn.Dense(width, name="ffn2")(inner))


class MiniLM(nn.Module):
    """Token numbers `[batch, length]` and which of them are no padding -> embeddings `[batch, width]` of length 1."""

    vocabulary: int = 30522
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12
    positions: int = 512

    @nn.compact
    def __call__(self, tokens, attended):
        x = nn.Embed(self.vocabulary, self.width, name="word_embedding")(tokens)
        x = x + nn.Embed(self.positions, self.width, name="position_embedding")(jnp.arange(tokens.shape[1]))[None]
        x = x + self.param("token_type", nn.initializers.normal(0.02), (1, 1, self.width))
        x = _norm("embedding_norm")(x)
        for k in range(self.layers):
            x = Layer(self.heads, self.hidden, name=f"layer{k}")(x, attended)
        weight = attended[..., None].astype(x.dtype)
        mean = jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _norm(name):
    return nn.LayerNorm(epsilon=1e-12, name=name)


def from_torch(weights: Mapping[str, np.ndarray]) -> dict:
    """Variables of a `MiniLM` from the arrays of the original, in float32; its pooling layer is not used."""
    params: dict = {"token_type": weights["embeddings.token_type_embeddings.weight"][:1, None]}
    for key, value in weights.items():
        found = re.fullmatch(r"(?:embeddings|encoder\.layer\.(\d+))\.(.+)\.(weight|bias)", key)
        if not found or found[2] == "token_type_embeddings":
            continue
        number, name, kind = found.groups()
        node = params if number is None else params.setdefault(f"layer{number}", {})
        name = _NAMES[name]
        if kind == "bias":
            leaf = "bias"
        elif "norm" in name:
            leaf = "scale"
        elif "embedding" in name:
            leaf = "embedding"
        else:
            leaf, value = "kernel", value.T
        node.setdefault(name, {})[leaf] = value
    return {"params": jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)}


_NAMES = {
    "word_embeddings": "word_embedding",
    "position_embeddings": "position_embedding",
    "LayerNorm": "embedding_norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn1",
    "output.dense": "ffn2",
    "output.LayerNorm": "ffn_norm",
}


class Tokenizer:
    """BERT's tokenizer: words in lower case without accents, then the longest pieces of the vocabulary.

    Args:
      vocabulary: the pieces, in the order of their numbers.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self._numbers = {piece: number for number, piece in enumerate(vocabulary)}

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """From a file with one piece a line."""
        return cls(path.read_text().splitlines())

    def __call__(self, sentences: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers `[sentences, length]`, and True where they are no padding. Longer sentences are cut."""
        tokens = np.full((len(sentences), length), self._numbers["[PAD]"], np.int32)
        attended = np.zeros((len(sentences), length), bool)
        for row, sentence in enumerate(sentences):
            numbers = self.encode(sentence)[: length - 2]
            numbers = [self._numbers["[CLS]"], *numbers, self._numbers["[SEP]"]]
            tokens[row, : len(numbers)] = numbers
            attended[row, : len(numbers)] = True
        return tokens, attended

    def encode(self, sentence: str) -> list[int]:
        """Numbers of the pieces of a sentence."""
        plain = unicodedata.normalize("NFD", sentence.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        words = re.findall(r"[^\W_]+|[^\w\s]|_", plain)
        return [number for word in words for number in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        numbers, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1)
            pieces = (("##" if start else "") + word[start:end] for end in ends)
            found = next((p for p in pieces if p in self._numbers), None)
            if found is None:
                return [self._numbers["[UNK]"]]
            numbers.append(self._numbers[found])
            start += len(found) - (2 if start else 0)
        return numbers
