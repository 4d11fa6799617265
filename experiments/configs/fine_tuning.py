"""What the results of fine-tuned encoders share: public weights with their tokenizer, examples, and the optimiser."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import optax

from experiments.configs.language import AdamW
from experiments.configs.study import Preset, Variant
from experiments.data import packed
from experiments.data.errors import DataError, reading
from experiments.data.wordpiece import Tokenizer
from experiments.networks import bert, bert_weights

# The mask is the optimum of the pretrained weights, and stays.
FIXED = (
    Variant("dense"),
    Variant("ASP 2:4", "2:4", refresh_every=None),
    Variant("2:4-T", "2:4-T", refresh_every=None),
    Variant("4:8-T", "4:8-T", refresh_every=None),
)
DENSE = (("^(classifier|span)/", None),)  # the last layer; the embeddings have no kernel


@dataclasses.dataclass(frozen=True)
class FineTuning(AdamW):
    """The optimiser of Devlin et al. (2019), A.3: the rate rises for a tenth of the steps and falls linearly to 0."""

    batch: int = 32
    rate: float = 5e-5
    weight_decay: float = 0.01
    b2: float = 0.999

    def schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate of a step, by its number."""
        steps = self.epochs * steps_per_epoch
        warm = max(1, steps // 10)
        rise, fall = optax.linear_schedule(0.0, self.rate, warm), optax.linear_schedule(self.rate, 0.0, steps - warm)
        return optax.join_schedules([rise, fall], [warm])


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Public weights of a BERT, by their names there, and the tokenizer that belongs to them."""

    weights: Mapping[str, np.ndarray]
    tokenizer: Tokenizer

    def variables(self, module: Any, seed: int, fresh: tuple[str, ...] = ()) -> dict:
        """Those of a module of `experiments.networks.bert`; heads that the weights lack are drawn.

        Raises:
          DataError: they are of another network, or have another vocabulary.
        """
        with reading():
            self.tokenizer.fits(module.config.vocabulary)
            return bert_weights.from_torch(module, self.weights, fresh=fresh, seed=seed)


def minilm(path: Path | None) -> Encoder:
    """Six layers of width 384: of a file of their own, or of the data folder."""
    folder = packed.folder() / "weights"
    return _encoder(path or folder / "all_minilm_l6_v2_fp16.npz", folder / "minilm_vocab.txt")


def public(path: Path | None) -> Encoder:
    """A safetensors file with its `vocab.txt` beside it.

    Raises:
      DataError: none was named, or it is none.
    """
    if path is None:
        raise DataError("this preset starts from public weights: name their file, --weights FOLDER/model.safetensors")
    return _encoder(path, path.with_name("vocab.txt"))


def _encoder(weights: Path, vocabulary: Path) -> Encoder:
    with reading():
        return Encoder(bert_weights.read(weights), Tokenizer.read(vocabulary))


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is learned from, and what is held out.

    Attributes:
      source: what they are.
      learned: examples by number and by slice.
      held_out: like them.
    """

    source: str
    learned: Any
    held_out: Any

    @property
    def count(self) -> int:
        """Those that are learned from; an epoch draws as many."""
        return len(self.learned)

    def head(self, count: int) -> "Examples":
        """The first of both."""
        return Examples(self.source, self.learned[:count], self.held_out[:count])


def preset(
    recipe: FineTuning,
    module: Callable[[bert.Config], nn.Module],
    data: Callable[[Path | None], Examples],
    config: bert.Config = bert.MINILM,
    weights: Callable[[Path | None], Encoder] = minilm,
    network: str = "MiniLM",
    seeds: int = 3,
) -> Preset:
    """An encoder with the head that a task needs, from public weights."""
    return Preset(recipe, module(config), data, weights, seeds, network)
