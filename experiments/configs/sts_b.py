"""A sentence encoder, retrained with a mask that stays: similarity of sentences, 4:8-T, 2:4-T and ASP's 2:4.

Hubara et al., Section 4.2, by MiniLM on STS-B. The cosine of two embeddings is drawn to their score (Reimers and
Gurevych, "Sentence-BERT", 2019); the figure is Spearman's correlation on the dev set, 86.72 of the encoder as it is.
What masks cost before any training, and after AdaPrune: `adaprune/from_dense`.

    NM_JAX_DATA=... python -m experiments configs/sts_b
    python -m experiments configs/sts_b --preset paper --data STS-B --weights bert-base-uncased/model.safetensors

Paper: Section 4.2
Time: not measured yet; continues where it was left
Data: MiniLM and STS-B (NM_JAX_DATA)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import fine_tuning
from experiments.configs.fine_tuning import Encoder, Examples, FineTuning, preset
from experiments.configs.study import Preset, Study
from experiments.data import glue, lengths, packed
from experiments.data.errors import reading
from experiments.networks import bert, pretrained
from experiments.train import Task

LENGTH = 64  # pieces of a sentence that are kept


def read(path: Path | None) -> Examples:
    """A folder with `stsb-en-train.csv` and `stsb-en-dev.csv`, or that of the data folder."""
    folder = path or packed.folder() / "text"
    with reading():
        return Examples("STS-B", *(glue.similarity(folder / f"stsb-en-{split}.csv") for split in ("train", "dev")))


def similarity(preset: Preset, data: Examples, start: Encoder, seed: int) -> Task:
    """The cosine of the embeddings of a pair is its score, from 0 to 1."""
    module, variables = preset.module, start.variables(preset.module, seed)
    first, second = (start.tokenizer(sentences, LENGTH) for sentences in (data.learned.first, data.learned.second))
    longest = np.maximum(first[1].sum(axis=1), second[1].sum(axis=1))
    scores = (data.learned.labels / 5).astype(np.float32)
    held_out = start.tokenizer(
        [text for pair in zip(data.held_out.first, data.held_out.second, strict=True) for text in pair], LENGTH
    )
    embed = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rows, length = lengths.drawn(longest, preset.recipe.batch, step, seed)
        return *(each[rows, :length] for each in (*first, *second)), scores[rows]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        tokens, attended, more_tokens, more_attended, wanted = batch
        inputs = jnp.concatenate([tokens, more_tokens]), jnp.concatenate([attended, more_attended])
        vectors: Any = module.apply({"params": params}, *inputs, train=True, rngs={"dropout": key})
        one, other = jnp.split(vectors, 2)
        return jnp.mean((jnp.sum(one * other, axis=-1) - wanted) ** 2), extra

    def evaluate(params: Any, extra: Any) -> dict[str, float]:
        def of(*inputs: np.ndarray) -> jax.Array:
            return embed(params, *inputs)

        return {"spearman": pretrained.similarity(of, *held_out, data.held_out.labels)}

    return Task(lambda key: (variables["params"], {}), loss, batch, evaluate)


STUDY = Study(
    "sts_b",
    fine_tuning.FIXED,
    {
        "cpu": preset(FineTuning(epochs=1, rate=2e-5), bert.SentenceEmbedding, read),
        "gpu": preset(FineTuning(epochs=4, rate=2e-5), bert.SentenceEmbedding, read),
        "paper": preset(
            FineTuning(epochs=4, rate=2e-5), bert.SentenceEmbedding, read, bert.BASE, fine_tuning.public, "BERT-base"
        ),
    },
    dense=(),  # there is no head
    learned=similarity,
    figures=("spearman",),
)
EXPERIMENT = STUDY.experiment()
