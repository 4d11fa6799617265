"""The pretrained networks: module, weights, calibration samples, and a figure of merit on test data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from experiments.data import glue, lengths, packed
from experiments.data.wordpiece import Tokenizer
from experiments.networks import bert, bert_weights, resnet, squeezenet

BATCH = 250


@dataclasses.dataclass(frozen=True)
class Network:
    """A pretrained network and what is needed to calibrate and to judge it.

    Attributes:
      name: short name.
      title: name for tables.
      metric: what `evaluate` returns, in percent.
      expected: its value with the dense weights.
      module: the Flax module; `module.clone(...)` makes small ones.
      variables: reads the pretrained weights, `{"params": ...}` and `"batch_stats"` where there is batch norm.
    """

    name: str
    title: str
    metric: str
    expected: float
    module: nn.Module
    variables: Callable[[], dict]

    def apply(self, variables: dict) -> Callable[..., jax.Array]:
        """`apply(params, *inputs)` with everything but the parameters from `variables`."""
        others = {name: tree for name, tree in variables.items() if name != "params"}

        def apply(params: Any, *inputs: jax.Array) -> Any:
            return self.module.apply({"params": params, **others}, *inputs)

        return apply

    def calibration(self, count: int, seed: int) -> list[tuple[jax.Array, ...]]:
        """Batches of inputs: `count` random training examples."""
        raise NotImplementedError

    def evaluate(self, variables: dict, limit: int | None = None) -> float:
        """The metric on the test data, or on the first `limit` of it."""
        raise NotImplementedError

    @property
    def tests(self) -> int:
        """How many test examples there are."""
        return len(self._test_data[-1])

    @property
    def _test_data(self) -> tuple:
        raise NotImplementedError

    @functools.cached_property
    def _forward(self):
        return jax.jit(self.module.apply)


@dataclasses.dataclass(frozen=True)
class Classifier(Network):
    """Images into classes; the metric is the accuracy.

    Attributes:
      train: file of the calibration images.
      test: file of the test images.
      inputs: from a list of RGB images to the network's input.
      held_out: images of the file that are for testing only, when both are the same file.
    """

    train: str
    test: str
    inputs: Callable[[list[np.ndarray]], np.ndarray]
    held_out: int | None = None

    def calibration(self, count, seed):
        total = len(packed.labels(self.train)) - (self.held_out or 0)
        chosen = np.random.default_rng(seed).choice(total, count, replace=False)
        images = self.inputs(packed.images(self.train, _order(self.train)[chosen]))
        return [(jnp.asarray(images[start : start + BATCH]),) for start in range(0, count, BATCH)]

    def evaluate(self, variables, limit=None):
        images, labels = self._test_data
        hits = []
        count = min(limit or len(images), len(images))
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            logits = self._forward(variables, jnp.asarray(images[part]))
            hits.append(np.asarray(jnp.argmax(logits, axis=-1)) == labels[part])
        return 100 * float(np.concatenate(hits).mean())

    @functools.cached_property
    def _test_data(self):
        labels = packed.labels(self.test)
        chosen = _order(self.test)[-(self.held_out or len(labels)) :]  # files are sorted by class
        return self.inputs(packed.images(self.test, chosen)), labels[chosen]


def _order(file: str) -> np.ndarray:
    """A fixed order of the images of a file: the last ones are those held out."""
    return np.random.default_rng(0).permutation(len(packed.labels(file)))


@dataclasses.dataclass(frozen=True)
class SentenceEncoder(Network):
    """Sentences into vectors; the metric is Spearman's correlation of their cosine with human judgement (STS-B)."""

    length: int = 64

    def calibration(self, count, seed):
        pairs = _sts("train")
        sentences = pairs.first + (pairs.second or [])
        chosen = np.random.default_rng(seed).choice(len(sentences), count, replace=False)
        sentences = [sentences[k] for k in chosen]
        batches = (sentences[start : start + BATCH] for start in range(0, count, BATCH))
        return [tuple(map(jnp.asarray, self._tokenizer(batch, self.length))) for batch in batches]

    def evaluate(self, variables, limit=None):
        tokens, attended, scores = self._test_data
        scores = scores[:limit]
        tokens, attended = tokens[: 2 * len(scores)], attended[: 2 * len(scores)]
        return similarity(functools.partial(self._forward, variables), tokens, attended, scores)

    @functools.cached_property
    def _tokenizer(self):
        tokenizer = Tokenizer.read(packed.folder() / "weights" / "minilm_vocab.txt")
        return tokenizer.fits(self.module.config.vocabulary)

    @functools.cached_property
    def _test_data(self):
        pairs = _sts("dev")
        sentences = [sentence for pair in zip(pairs.first, pairs.second or [], strict=True) for sentence in pair]
        return *self._tokenizer(sentences, self.length), pairs.labels


def similarity(
    embed: Callable[[np.ndarray, np.ndarray], jax.Array], tokens: np.ndarray, attended: np.ndarray, scores: np.ndarray
) -> float:
    """Spearman's correlation, in percent, of the cosine of pairs with scores of them.

    Args:
      embed: tokens and where they are no padding -> vectors of length 1.
      tokens: `[2 pairs, length]`, the sentences of a pair one after the other.
      attended: where they are no padding.
      scores: of the pairs.
    """

    def of(rows, length):
        return embed(tokens[rows, :length], attended[rows, :length])

    vectors = np.stack(lengths.mapped(of, attended.sum(axis=1), BATCH))
    cosine = np.sum(vectors[0::2] * vectors[1::2], axis=1)
    return 100 * float(spearmanr(cosine, scores).statistic)


def _sts(split: str) -> glue.Sentences:
    return glue.similarity(packed.folder() / "text" / f"stsb-en-{split}.csv")


def row_mask(*inputs: jax.Array) -> Any:
    """Which positions of the activations are no padding: for sentences the second input, for images all (`None`)."""
    return inputs[1] if len(inputs) > 1 else None


def _normalise(mean, std):
    def inputs(images):
        return ((np.stack(images) / 255 - mean) / std).astype(np.float32)

    return inputs


def _caffe_inputs(images):
    crops = np.stack([packed.centre_crop(image, 227) for image in images])
    return crops[..., ::-1].astype(np.float32) - np.array((104, 117, 123), np.float32)


_CIFAR100 = {
    "metric": "accuracy",
    "train": "cifar100_jpeg_train",
    "test": "cifar100_jpeg_test",
    "inputs": _normalise((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}

# The accuracy of networks that were trained on clean pixels is lower on the lossy images here.
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Classifier(
            name="resnet20-cifar100",
            title="ResNet-20, CIFAR-100",
            expected=50.1,
            module=resnet.ResNet(),
            variables=lambda: resnet.from_torch(packed.weights("cifar100_resnet20_distiller"), side=2),
            **_CIFAR100,
        ),
        Classifier(
            name="resnet14-cifar100",
            title="ResNet-14, CIFAR-100",
            expected=49.9,
            module=resnet.ResNet(blocks=(2, 2, 2)),
            variables=lambda: resnet.from_torch(packed.weights("cifar100_resnet14_distiller"), side=2),
            **_CIFAR100,
        ),
        Classifier(
            name="resnet20-cifar10",
            title="ResNet-20, CIFAR-10",
            metric="accuracy",
            expected=81.0,
            module=resnet.ResNet(stem=16, classes=10, projection=False, relu_every_block=True, pool=None),
            variables=lambda: resnet.from_torch(packed.weights("cifar10_resnet20_akamaster"), side=1),
            train="cifar10_jpeg_train",
            test="cifar10_jpeg_test",
            inputs=_normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ),
        Classifier(
            name="squeezenet",
            title="SqueezeNet 1.1, ImageNet sample",
            metric="accuracy",
            expected=62.6,  # of all 1000 images; here only half of them are for testing
            module=squeezenet.SqueezeNet(),
            variables=lambda: squeezenet.from_torch(packed.weights("squeezenet1_1_imagenet_fp16")),
            train="imagenet_sample1000",
            test="imagenet_sample1000",
            inputs=_caffe_inputs,
            held_out=500,
        ),
        SentenceEncoder(
            name="minilm",
            title="MiniLM, STS-B",
            metric="Spearman",
            expected=86.72,
            module=bert.SentenceEmbedding(bert.MINILM),
            variables=lambda: bert_weights.from_torch(
                bert.SentenceEmbedding(bert.MINILM), packed.weights("all_minilm_l6_v2_fp16")
            ),
        ),
    )
}
