"""A real PyTorch checkpoint through `nm-jax`: the MiniLM sentence encoder, dense, 2:4-T and 4:8-T, without retraining.

    pip install torch && NM_JAX_DATA=... python -m experiments.minilm_checkpoint

The weights are written as a PyTorch-layout safetensors file, pruned by the command line, and checked by plain numpy
along both axes. A torch model loads each file, unchanged and strictly, and embeds the sentence pairs of STS-B (dev);
the figure is the Spearman correlation of the cosines with the human scores. About 3 minutes on 2 cores. Writes
`experiments/results/minilm_checkpoint.json`.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr
from torch import nn

from experiments.data import packed
from experiments.harness import RESULTS, results_stem
from experiments.networks import Tokenizer
from nm_jax.cli import main as nm_jax_command

PATTERNS = ("2:4-T", "4:8-T")
WIDTH, HIDDEN, HEADS, LAYERS = 384, 1536, 12, 6
LENGTH, BATCH = 64, 250


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
def spearman(path: Path, pairs) -> float:
    """Spearman correlation, in percent, of a checkpoint that torch loads."""
    model = Encoder()
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    model.eval()
    (first, second), scores = pairs

    def embed(tokens, attended):
        parts = [
            model(torch.from_numpy(tokens[k : k + BATCH]).long(), torch.from_numpy(attended[k : k + BATCH]))
            for k in range(0, len(tokens), BATCH)
        ]
        return torch.cat(parts)

    cosines = (embed(*first) * embed(*second)).sum(1)
    return 100 * float(spearmanr(cosines.numpy(), scores).statistic)


def fullest_groups(path: Path, pruned: list[str], m: int) -> tuple[int, int]:
    """The most entries that any group of m keeps, along the inputs and along the outputs of a layer: plain numpy."""
    fullest = [0, 0]
    for name, weight in load_file(path).items():
        if name in pruned:
            out, into = weight.shape
            kept = weight != 0
            fullest[0] = max(fullest[0], int(kept.reshape(out, into // m, m).sum(2).max()))
            fullest[1] = max(fullest[1], int(kept.reshape(out // m, m, into).sum(1).max()))
    return fullest[0], fullest[1]


def unchanged(path: Path, dense: Path) -> bool:
    """Whether every tensor is what it was, bit for bit, or zero where it was pruned."""
    after, before = load_file(path), load_file(dense)
    return list(after) == list(before) and all(
        after[name].dtype == before[name].dtype and np.all((after[name] == before[name]) | (after[name] == 0))
        for name in before
    )


def read_pairs():
    """The sentence pairs as tokens, and their scores."""
    tokenizer = Tokenizer.read(packed.folder() / "weights" / "minilm_vocab.txt")
    *sentences, scores = packed.sentence_pairs("stsb-en-dev")
    return [tokenizer(texts, LENGTH) for texts in sentences], scores


def run(*arguments: str | Path) -> None:
    """Runs the command line without its tables, and stops if it does not succeed."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = nm_jax_command([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    console = Console()
    pairs = read_pairs()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        weights = {name: np.ascontiguousarray(w) for name, w in packed.weights("all_minilm_l6_v2_fp16").items()}
        save_file(weights, dense, metadata={"format": "pt"})
        rows.append({"pattern": "dense", "spearman": spearman(dense, pairs)})
        for pattern in PATTERNS:
            path = Path(folder) / f"{pattern.replace(':', 'of')}.safetensors"
            run("prune", dense, path, "--pattern", pattern)
            run("verify", path)
            pruned = [
                name for name in weights if name.endswith("dense.weight") or (".self." in name and "weight" in name)
            ]
            n, m = map(int, pattern.removesuffix("-T").split(":"))
            along = fullest_groups(path, pruned, m)
            rows.append(
                {
                    "pattern": pattern,
                    "spearman": spearman(path, pairs),
                    "tensors": len(pruned),
                    "fullest_group": along,
                    "ok": along == (n, n) and unchanged(path, dense),
                }
            )
    table = Table(title="MiniLM, STS-B dev, without retraining")
    for column in ("pattern", "Spearman", "fullest group, W / W^T", "checked by numpy"):
        table.add_column(column)
    for row in rows:
        full = " / ".join(map(str, row.get("fullest_group", ())))
        table.add_row(
            row["pattern"], f"{row['spearman']:.2f} %", full, {True: "yes", False: "NO"}.get(row.get("ok"), "")
        )
    console.print(table)
    if not all(row.get("ok", True) for row in rows):
        raise SystemExit("a checkpoint does not have its pattern")
    path = results_stem(args.out, "minilm_checkpoint").with_suffix(".json")
    path.write_text(json.dumps({"torch": torch.__version__, "runs": rows}, indent=2) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
