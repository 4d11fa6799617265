"""What the results of language models share: a text and the optimiser."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax

from experiments.configs.study import Preset
from experiments.data import packed, text
from experiments.data.errors import DataError, reading
from experiments.harness import Experiment, Table
from experiments.networks import LanguageModel
from experiments.train import Recipe
from experiments.train.recipe import decayed

VOCABULARY = 65  # characters of tinyshakespeare
DENSE = (("^head/", None),)  # the first layer is the embedding, which no rule takes
FIGURES = ("test_loss",)  # the less the better


@dataclasses.dataclass(frozen=True)
class AdamW(Recipe):
    """Adam with decoupled weight decay, and gradients clipped to a norm of 1, as language models are trained.

    Attributes:
      b2: decay of the second moment.
    """

    b2: float = 0.99

    def optimiser(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The dense optimiser."""
        adam = optax.adamw(self.schedule(steps_per_epoch), b2=self.b2, weight_decay=self.weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A text in pieces of one length, as examples: the class of every token is the one that follows.

    Attributes:
      source: what the text is.
      tokens: of the part that is learned.
      held_out: of the rest.
      length: of a piece.
    """

    source: str
    tokens: np.ndarray
    held_out: np.ndarray
    length: int

    @property
    def count(self) -> int:
        """Pieces of the part that is learned; an epoch draws as many."""
        return len(text.in_order(self.tokens, self.length))

    @property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of the rest, and what follows each token."""
        return _examples(text.in_order(self.held_out, self.length))

    def tests(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of the rest, each token once."""
        inputs, targets = self.test
        for k in range(0, len(inputs), size):
            yield inputs[k : k + size], targets[k : k + size]

    def batches(self, size: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Number of the step -> its batch: random pieces of the part that is learned."""
        return lambda step: _examples(text.drawn(self.tokens, size, self.length, step, seed))

    def head(self, count: int) -> "Pieces":
        """The first pieces of both parts."""
        most = count * self.length + 1
        return dataclasses.replace(self, tokens=self.tokens[:most], held_out=self.held_out[:most])


def _examples(pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pieces[:, :-1], pieces[:, 1:]


def read(path: Path | None, length: int) -> Pieces:
    """A text of one's own, or that of Karpathy's char-rnn; the last tenth is held out."""
    source = path or packed.folder() / "text" / "tinyshakespeare.txt"
    with reading():
        found = text.Characters.read(source)
    if len(found.alphabet) > VOCABULARY:
        raise DataError(f"{source}: {len(found.alphabet)} different characters; the network has {VOCABULARY} tokens")
    return Pieces(source.stem, found.train, found.valid, length)


def preset(recipe: Recipe, length: int, seeds: int = 3, **sizes: Any) -> Preset:
    """A language model on the characters of a text, from scratch."""
    module = LanguageModel(vocabulary=VOCABULARY, positions=length, **sizes)
    name = f"language model, {module.layers} layers of {module.width}"
    return Preset(recipe, module, lambda path: read(path, length), seeds=seeds, network=name)


PRESETS = {
    "cpu": preset(AdamW(epochs=4, batch=32, rate=2e-3, weight_decay=0.1), length=64, layers=4, width=128, hidden=512),
    "gpu": preset(AdamW(epochs=10, batch=64, rate=1e-3, weight_decay=0.1), 256, layers=6, width=384, hidden=1536),
    # The paper trains no language model from scratch; its regime of 40 steps on a network of GPT-2's shape.
    "paper": preset(
        AdamW(epochs=10, batch=64, rate=6e-4, weight_decay=0.1), 256, layers=12, width=768, hidden=3072, heads=12
    ),
}


def experiment(study: Any) -> Experiment:
    """As of images, but judged by the loss on what is held out, with the flip rates and the time of a step."""
    return dataclasses.replace(study.experiment(), tables=tables)


def tables(result: dict) -> list[Table]:
    """Loss of every variant, what it differs from the first by, seed by seed, and how far its runs are."""
    rows, first = [], None
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["name"] == name]
        done = [row for row in mine if row["epochs_done"] == row["epochs"]]
        losses = {row["seed"]: row["evaluations"]["test_loss"][-1] for row in done}
        first = losses if first is None else first
        paired = [losses[seed] - first[seed] for seed in losses if seed in first]
        flips = [row["flip_rates"][-1] for row in done if row.get("flip_rates")]
        steps = result["steps_per_epoch"] * sum(row["epochs_done"] for row in mine)
        rows.append(
            (
                name,
                _mean(list(losses.values()), ".4f"),
                _mean(paired, "+.4f") if first is not losses else None,
                f"{100 * np.mean(flips):.2f} %" if flips else None,
                f"{1e3 * sum(row['seconds'] for row in mine) / steps:.0f}" if steps else None,
                len(losses),
                f"{sum(row['epochs_done'] for row in mine)} of {sum(row['epochs'] for row in mine)}",
            )
        )
    baseline = rows[0][0]
    header = ("", "held-out loss", f"to {baseline}, paired", "last flips", "step, ms", "seeds", "epochs")
    title = f"{result['network']}, {result['data']}, from {result['start']}, preset {result['preset']}"
    notes = "nats a token; mean and standard deviation of the seeds that are through. step: with evaluations."
    return [Table("loss", header, rows, title, notes)]


def _mean(values: list[float], form: str) -> str | None:
    if not values:
        return None
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"
