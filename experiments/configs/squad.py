"""Answers found in a text: an encoder fine-tuned with a mask that stays, and with one that is refreshed every 40 steps.

Hubara et al., Tables 3, 4 and A.4: BERT-large on SQuAD 1.1, F1 91.1 dense, 91.5 ASP 2:4, 91.67 4:8-T fixed, and with
masks of Algorithm 1 every 40 steps 90.65 4:8-T and 90.18 2:4-T; BERT-base so 88.38 4:8-T, dense 88.52. Here (`cpu`,
`gpu`) MiniLM learns from the 4,285 questions of the data folder, which are of SQuAD's train set, and is judged on
XQuAD's, which are of its dev set.

    NM_JAX_DATA=... python -m experiments configs/squad
    python -m experiments configs/squad --preset paper --data SQUAD --weights bert-large-uncased/model.safetensors

Paper: Tables 3, 4 and A.4
Time: not measured yet; continues where it was left
Data: MiniLM, SQuAD lines and XQuAD (NM_JAX_DATA)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs import fine_tuning
from experiments.configs.fine_tuning import Encoder, Examples, FineTuning, preset
from experiments.configs.study import Preset, Study, Variant
from experiments.data import lengths, packed, squad, squad_score, squad_windows
from experiments.data.errors import DataError, reading
from experiments.data.squad_windows import Window
from experiments.data.wordpiece import attended, padded
from experiments.networks import bert
from experiments.train import Task
from nm_jax.solvers import Greedy

MULTIPLE = 64  # windows are padded to a multiple of it, so that few shapes are compiled
TEST_BATCH = 64
BROKEN = (3623,)  # the line of the data folder whose span ends before it begins

VARIANTS = (
    *fine_tuning.FIXED,
    Variant("4:8-T, every 40", "4:8-T"),
    Variant("4:8-T, every 40, Algorithm 1", "4:8-T", solver=Greedy(complete=False)),
    Variant("2:4-T, every 40, Algorithm 1", "2:4-T", solver=Greedy(complete=False)),
)


def read(path: Path | None) -> Examples:
    """Questions of the data folder: lines of SQuAD to learn from, XQuAD to be judged on."""
    if path is not None:
        return official(path)
    texts = packed.folder() / "text"
    with reading():
        learned = squad.read_lines(texts / "squad_val" / "val", without=BROKEN)
        return Examples("SQuAD 1.1 (val lines), XQuAD", learned, squad.read(texts / "xquad.en.json"))


def official(path: Path | None) -> Examples:
    """SQuAD 1.1 whole: a folder with `train-v1.1.json` and `dev-v1.1.json`.

    Raises:
      DataError: none was named, or it is none.
    """
    if path is None:
        raise DataError("this preset learns SQuAD 1.1: name the folder of train-v1.1.json and dev-v1.1.json, --data")
    with reading():
        return Examples("SQuAD 1.1", *(squad.read(path / f"{split}-v1.1.json") for split in ("train", "dev")))


class Inputs:
    """Windows as inputs of a network, padded to one length.

    Args:
      windows: in their order.
      pad: number of the piece that pads.
    """

    def __init__(self, windows: list[Window], pad: int):
        rows = [window.tokens for window in windows]
        self.sizes = np.array([len(row) for row in rows])
        most = lengths.bucket(int(self.sizes.max()), MULTIPLE)
        segments = padded([window.segments for window in windows], most, 0)
        self._arrays = padded(rows, most, pad), attended(rows, most), segments

    def __call__(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
        """Tokens, where they are no padding, and segments, of some windows."""
        return tuple(each[rows, :length] for each in self._arrays)


def spans(preset: Preset, data: Examples, start: Encoder, seed: int) -> Task:
    """Where the answer starts and ends; an epoch draws as many windows as there are questions."""
    module, variables = preset.module, start.variables(preset.module, seed, fresh=("span",))
    length = min(squad_windows.LENGTH, module.config.positions)
    with reading():
        learned, asked = (
            squad_windows.windows(each, start.tokenizer, length=length) for each in (data.learned, data.held_out)
        )
    inputs, held_out = (Inputs(each, start.tokenizer.pad) for each in (learned, asked))
    answers = np.array([window.answer for window in learned], np.int32)
    forward = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rows, length = lengths.drawn(inputs.sizes, preset.recipe.batch, step, seed, MULTIPLE)
        return *inputs(rows, length), answers[rows]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        *texts, answer = batch
        logits: Any = module.apply({"params": params}, *texts, train=True, rngs={"dropout": key})
        return span_loss(logits, texts[1], answer), extra

    def evaluate(params: Any, extra: Any) -> dict[str, float]:
        def of(rows: np.ndarray, length: int) -> jax.Array:
            return forward(params, *held_out(rows, length))

        logits = lengths.mapped(of, held_out.sizes, TEST_BATCH, MULTIPLE)
        return squad_score.score(data.held_out, squad_windows.answers(data.held_out, asked, logits))

    return Task(lambda key: (variables["params"], {}), loss, batch, evaluate)


def span_loss(logits: jax.Array, attended: jax.Array, answer: jax.Array) -> jax.Array:
    """Mean cross-entropy of the first and of the last position, padding left out.

    Args:
      logits: `[batch, length, 2]`.
      attended: where there is no padding `[batch, length]`.
      answer: first and last position `[batch, 2]`.
    """
    possible = jnp.where(attended[..., None], logits, -jnp.inf).swapaxes(1, 2)
    return optax.softmax_cross_entropy_with_integer_labels(possible, answer).mean()


STUDY = Study(
    "squad",
    VARIANTS,
    {
        "cpu": preset(FineTuning(epochs=2), bert.SpanExtraction, read, seeds=2),
        "gpu": preset(FineTuning(epochs=4), bert.SpanExtraction, read),
        "paper": preset(
            FineTuning(epochs=2, rate=3e-5), bert.SpanExtraction, official, bert.LARGE, fine_tuning.public, "BERT-large"
        ),
    },
    fine_tuning.DENSE,
    learned=spans,
    figures=("f1", "exact_match"),
)
EXPERIMENT = STUDY.experiment()
