"""Public weights of BERT, as PyTorch names and stores them, into the modules here."""

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from experiments.networks import bert

_PLACES = {
    "embeddings.word_embeddings": "word_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "embeddings.token_type_embeddings": "segment_embedding",
    "embeddings.LayerNorm": "embedding_norm",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn1",
    "output.dense": "ffn2",
    "output.LayerNorm": "ffn_norm",
    "pooler.dense": "pooler",
    "classifier": "classifier",
    "qa_outputs": "span",
}
_HEADS = ("pooler", "classifier", "span")


def read(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, of a safetensors or an npz file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path) as file:
        return dict(file)


def from_torch(
    module: nn.Module, weights: Mapping[str, np.ndarray], *, fresh: tuple[str, ...] = (), seed: int = 0
) -> dict:
    """Variables of a module from the arrays of a public checkpoint, in float32.

    Args:
      module: one of `experiments.networks.bert`.
      weights: arrays by their names, with or without `bert.` in front. Heads that the module lacks are left out.
      fresh: heads that the checkpoint lacks, and that start from random numbers.
      seed: of these.

    Raises:
      ValueError: a tensor is missing, has another shape, or is of a layer that the module lacks.
    """
    wanted = flatten_dict(bert.shapes(module))
    found = {}
    for name, value in weights.items():
        if (place := _place(name)) is None:
            continue
        head = place[0] in _HEADS
        # An encoder alone has no folder of its own.
        place = place if head or ("bert", "word_embedding", "embedding") not in wanted else ("bert", *place)
        if place not in wanted:
            if head:
                continue
            raise ValueError(f"{name}: the network has no such layer; do its sizes fit the weights?")
        value = value.T if place[-1] == "kernel" else value
        if value.shape != wanted[place].shape:
            what = " (the vocabulary)" if place[-2] == "word_embedding" else ""
            raise ValueError(f"{name} is {value.shape}, and the network wants {wanted[place].shape}{what}")
        found[place] = jnp.asarray(value, jnp.float32)
    missing = {place: shape for place, shape in wanted.items() if place not in found}
    if refused := [place for place in missing if place[0] not in fresh]:
        raise ValueError(f"the weights have nothing for {'/'.join(refused[0])}; fresh=({refused[0][0]!r},) starts anew")
    draw = np.random.default_rng(seed)
    for place, leaf in missing.items():
        value = np.zeros(leaf.shape) if place[-1] == "bias" else 0.02 * draw.normal(size=leaf.shape)
        found[place] = jnp.asarray(value, jnp.float32)
    return {"params": unflatten_dict({place: found[place] for place in wanted})}


def _place(name: str) -> tuple[str, ...] | None:
    """Where a tensor goes; `None` for what is no part of the encoder or of a head here."""
    name = name.removeprefix("bert.")
    match = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.+)\.(weight|bias|gamma|beta)", name)
    if match is None or match[2] not in _PLACES:
        if name.startswith(("encoder.", "embeddings.")) and name != "embeddings.position_ids":
            raise ValueError(f"{name}: BERT has no such tensor")
        return None
    place, kind = _PLACES[match[2]], match[3]
    if kind in ("bias", "beta"):
        leaf = "bias"
    elif "norm" in place:
        leaf = "scale"
    else:
        leaf = "embedding" if "embedding" in place else "kernel"
    layer = () if match[1] is None else (f"layer{match[1]}",)
    return (*layer, place, leaf)
