"""What Gram matrices cost: `nm.gram` over batches against plain forward passes of the same network.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5, fit every layer to its dense outputs on calibration data. All that a layer needs of the data
is the Gram matrix of its inputs. A convolution's inputs are its patches, nine times the activations for a 3 x 3
kernel.

The target is 5 times a plain forward pass for a ResNet; a wide stem comes close to it, because its 3 x 3 layer from 64
to 16 features needs about seven times its own FLOPs. Networks have random weights and inputs.

Paper: Section 5
Time: 1 minute on 2 cores
Data: none
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nm_jax as nm
from experiments.harness import Experiment, Run, Table
from experiments.networks import ResNet, SentenceEmbedding

TARGET = 5.0
BATCH = 128  # images
SENTENCES, LENGTH = 16, 64
TURNS = 6  # batches of a turn
ROUNDS = 2
Case = tuple[Callable, dict, tuple[jax.Array, ...]]  # apply, params, inputs


def resnet(batch: int = BATCH, **options: Any) -> Case:
    """A ResNet and images."""
    model = ResNet(**options)
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    variables = model.init(jax.random.key(1), x[:1])
    stats = {"batch_stats": variables["batch_stats"]}
    return lambda params, x: model.apply({"params": params, **stats}, x), variables["params"], (x,)


def minilm() -> Case:
    """The sentence encoder, at its real size, and sentences."""
    model = SentenceEmbedding()
    tokens = jax.random.randint(jax.random.key(0), (SENTENCES, LENGTH), 0, 1000)
    attended = jnp.ones((SENTENCES, LENGTH), bool)
    params = model.init(jax.random.key(1), tokens[:1], attended[:1])["params"]
    return lambda params, *inputs: model.apply({"params": params}, *inputs), params, (tokens, attended)


NETWORKS: dict[str, Callable[[], Case]] = {
    "ResNet-20, CIFAR-100 shapes (stem of 64)": resnet,
    "ResNet-20, CIFAR-10 shapes (stem of 16)": lambda: resnet(
        stem=16, classes=10, projection=False, relu_every_block=True, pool=None
    ),
    "MiniLM encoder, 6 layers of 384": minilm,
}
QUICK: dict[str, Callable[[], Case]] = {
    "ResNet-2": lambda: resnet(batch=8, blocks=(1,), widths=(8,), stem=8, pool=None),
}


def capture_seconds(apply: Callable, params: dict, inputs: tuple) -> tuple[float, float, Any]:
    """Seconds a batch, seconds to trace and compile, and the records."""
    asked = []

    def batches():
        for _ in range(TURNS):
            asked.append(time.perf_counter())
            yield inputs

    records = jax.block_until_ready(nm.gram(apply, params, batches()))
    # The second batch is asked for once the first is compiled and, without waiting for it, started.
    return (time.perf_counter() - asked[1]) / TURNS, asked[1] - asked[0], records


def forward_seconds(forward: Callable, params: dict, inputs: tuple) -> float:
    """Seconds a batch of the plain network."""
    start = time.perf_counter()
    for _ in range(TURNS):
        out = forward(params, *inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / TURNS


def bench(build: Callable[[], Case], rounds: int) -> dict:
    """Times of one network. Both take turns, so that whatever else the machine does hits both alike."""
    apply, params, inputs = build()
    forward = jax.jit(apply)
    jax.block_until_ready(forward(params, *inputs))
    plain, capture, compilation = [], [], []
    for _ in range(rounds):
        plain.append(forward_seconds(forward, params, inputs))
        seconds, first, records = capture_seconds(apply, params, inputs)
        capture.append(seconds)
        compilation.append(first)
    grams = jax.tree.leaves(records, is_leaf=lambda node: isinstance(node, nm.Gram))
    distinct = {id(record.h): record.h.nbytes for record in grams}
    ratios = np.array(capture) / np.array(plain)
    return {
        "leaves": len(grams),
        "matrices_bytes": sum(distinct.values()),
        "forward_ms": 1e3 * float(np.median(plain)),
        "capture_ms": 1e3 * float(np.median(capture)),
        "ratio": float(np.median(ratios)),
        "ratios": ratios.tolist(),
        "compile_s": float(np.median(compilation)),
    }


def measure(run: Run) -> dict:
    """All networks."""
    networks = {}
    with run.progress() as progress:
        for name, build in progress.track((QUICK if run.quick else NETWORKS).items(), description="networks"):
            networks[name] = bench(build, 1 if run.quick else ROUNDS)
    return {"batch": BATCH, "networks": networks}


def tables(result: dict) -> list[Table]:
    """Times and sizes of each network."""
    header = ("network", "layers", "matrices, MB", "forward, ms", "capture, ms", "ratio", "trace and compile, s")
    rows = [
        (
            name,
            row["leaves"],
            f"{row['matrices_bytes'] / 1e6:.1f}",
            f"{row['forward_ms']:.1f}",
            f"{row['capture_ms']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['compile_s']:.1f}",
        )
        for name, row in result["networks"].items()
    ]
    notes = (
        f"A batch is {BATCH} images or {SENTENCES} sentences of {LENGTH} tokens. ratio: median over turns, each "
        f"against the plain forward passes just before (target for the ResNet: {TARGET:.0f})."
    )
    return [Table("cost", header, rows, "Gram matrices against plain forward passes", notes)]


EXPERIMENT = Experiment(measure, tables)
