"""A sentence encoder, fine-tuned to a classifier with a mask that stays: SST-2, 4:8-T, 2:4-T and ASP's 2:4.

Hubara et al., Section 4.2, on a further task: films that are liked or not (Socher et al., 2013; GLUE). The head starts
from random numbers; `cpu` learns from every eighth sentence. BERT-base reaches 93.5 % on the test set (Devlin et al.).

    NM_JAX_DATA=... python -m experiments configs/sst_2
    python -m experiments configs/sst_2 --preset paper --data SST-2 --weights bert-base-uncased/model.safetensors

Paper: Section 4.2
Time: not measured yet; continues where it was left
Data: MiniLM and SST-2 (NM_JAX_DATA)
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.configs import fine_tuning
from experiments.configs.fine_tuning import Encoder, Examples, FineTuning, preset
from experiments.configs.study import Preset, Study
from experiments.data import glue, lengths, packed
from experiments.data.errors import reading
from experiments.networks import bert
from experiments.train import Task
from experiments.train.task import cross_entropy

LENGTH = 64  # pieces of a sentence that are kept
TEST_BATCH = 250


def read(path: Path | None, every: int = 1) -> Examples:
    """GLUE's folder with `train.tsv` and `dev.tsv`, or that of the data folder; of what is learned each so-many-th."""
    train, dev = (
        path / f"{split}.tsv" if path else packed.folder() / "text" / "glue" / f"SST-2.{split}.tsv"
        for split in ("train", "dev")
    )
    with reading():
        learned, held_out = glue.read(train, "SST-2"), glue.read(dev, "SST-2")
    source = "SST-2" if every == 1 else f"SST-2, 1 of {every} sentences"
    return Examples(source, learned[::every], held_out)


def classes(preset: Preset, data: Examples, start: Encoder, seed: int) -> Task:
    """Sentences into classes."""
    module, variables = preset.module, start.variables(preset.module, seed, fresh=("pooler", "classifier"))
    inputs, held_out = (start.tokenizer(each.first, LENGTH) for each in (data.learned, data.held_out))
    sizes = inputs[1].sum(axis=1)
    forward = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rows, length = lengths.drawn(sizes, preset.recipe.batch, step, seed)
        return *(each[rows, :length] for each in inputs), data.learned.labels[rows]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        *texts, labels = batch
        logits: Any = module.apply({"params": params}, *texts, train=True, rngs={"dropout": key})
        return cross_entropy(logits, labels), extra

    def evaluate(params: Any, extra: Any) -> dict[str, float]:
        def of(rows: np.ndarray, length: int) -> jax.Array:
            return forward(params, *(each[rows, :length] for each in held_out))

        logits = np.stack(lengths.mapped(of, held_out[1].sum(axis=1), TEST_BATCH))
        return {"accuracy": 100 * float(np.mean(logits.argmax(axis=-1) == data.held_out.labels))}

    return Task(lambda key: (variables["params"], {}), loss, batch, evaluate)


STUDY = Study(
    "sst_2",
    fine_tuning.FIXED,
    {
        "cpu": preset(FineTuning(epochs=1), bert.Classification, lambda path: read(path, every=8)),
        "gpu": preset(FineTuning(epochs=3), bert.Classification, read),
        "paper": preset(
            FineTuning(epochs=3, rate=2e-5), bert.Classification, read, bert.BASE, fine_tuning.public, "BERT-base"
        ),
    },
    fine_tuning.DENSE,
    learned=classes,
)
EXPERIMENT = STUDY.experiment()
