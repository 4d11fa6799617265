"""The MiniLM sentence encoder in PyTorch: what reads a checkpoint is not what wrote it. Needs `torch`."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

WIDTH, HIDDEN, HEADS, LAYERS = 384, 1536, 12, 6
BATCH = 250


class Attention(nn.Module):
    """Self-attention; the names of its parts, here and below, are those of the checkpoint."""

    def __init__(self):
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
        self.output = _after(WIDTH)

    def forward(self, x, attended):
        heads = (self.self[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=attended[:, None, None, :])
        return self.output["LayerNorm"](x + self.output["dense"](mixed.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """Self-attention and a feed-forward network."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.output = _after(HIDDEN)

    def forward(self, x, attended):
        x = self.attention(x, attended)
        inner = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


def _after(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})


class Encoder(nn.Module):
    """Token numbers and which of them are no padding -> embeddings of length 1: the mean over the tokens."""

    def __init__(self):
        super().__init__()
        sizes = {"word_embeddings": 30522, "position_embeddings": 512, "token_type_embeddings": 2}
        tables = {name: nn.Embedding(size, WIDTH) for name, size in sizes.items()}
        self.embeddings = nn.ModuleDict({**tables, "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(LAYERS))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})  # in the checkpoint, and not used

    def forward(self, tokens, attended):
        positions = torch.arange(tokens.shape[1])[None]
        x = self.embeddings["word_embeddings"](tokens) + self.embeddings["position_embeddings"](positions)
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, attended)
        mean = (x * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


@torch.inference_mode()
def embed(path: Path, texts: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Embeddings by a checkpoint that torch loads, unchanged and strictly.

    Args:
      path: a safetensors file.
      texts: token numbers, and which of them are no padding, of several lists of sentences.
    """
    model = Encoder()
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    model.eval()

    def one(tokens, attended):
        parts = [
            model(torch.from_numpy(tokens[k : k + BATCH]).long(), torch.from_numpy(attended[k : k + BATCH]))
            for k in range(0, len(tokens), BATCH)
        ]
        return torch.cat(parts).numpy()

    return [one(*text) for text in texts]
