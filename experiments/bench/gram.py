"""What Gram matrices cost: `nm.gram` over batches against plain forward passes of the same network.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), Section 5, fit every layer to its dense outputs on calibration data. All that a layer needs of the data
is the Gram matrix of its inputs. A convolution's inputs are its patches, nine times the activations for a 3 x 3
kernel.

    python -m experiments.bench.gram [--quick]

The target is 5 times a plain forward pass for a ResNet; a wide stem comes close to it, because its 3 x 3 layer from 64
to 16 features needs about seven times its own FLOPs. Networks have random weights and inputs: no data is needed.
Writes `results/bench/gram/<device>.json` beside this file. About 1 minute on 2 cores, half of it with `--quick`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import nm_jax as nm
from experiments.harness import RESULTS, core_count, device_name, results_stem
from experiments.networks import MiniLM, ResNet

TARGET = 5.0
BATCH = 128  # images
SENTENCES, LENGTH = 16, 64
TURNS = 6  # batches of a turn


def resnet(**options: Any) -> tuple[Callable, dict, tuple[jax.Array, ...]]:
    """(apply, params, inputs) of a ResNet."""
    model = ResNet(**options)
    x = jax.random.normal(jax.random.key(0), (BATCH, 32, 32, 3))
    variables = model.init(jax.random.key(1), x[:1])
    stats = {"batch_stats": variables["batch_stats"]}
    return lambda params, x: model.apply({"params": params, **stats}, x), variables["params"], (x,)


def minilm() -> tuple[Callable, dict, tuple[jax.Array, ...]]:
    """(apply, params, inputs) of the sentence encoder, at its real size."""
    model = MiniLM()
    tokens = jax.random.randint(jax.random.key(0), (SENTENCES, LENGTH), 0, 1000)
    attended = jnp.ones((SENTENCES, LENGTH), bool)
    params = model.init(jax.random.key(1), tokens[:1], attended[:1])["params"]
    return lambda params, *inputs: model.apply({"params": params}, *inputs), params, (tokens, attended)


NETWORKS = {
    "ResNet-20, CIFAR-100 shapes (stem of 64)": resnet,
    "ResNet-20, CIFAR-10 shapes (stem of 16)": lambda: resnet(
        stem=16, classes=10, projection=False, relu_every_block=True, pool=None
    ),
    "MiniLM encoder, 6 layers of 384": minilm,
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


def bench(build: Callable, rounds: int) -> dict:
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
    return {
        "leaves": len(grams),
        "matrices_bytes": sum(distinct.values()),
        "forward_ms": 1e3 * float(np.median(plain)),
        "capture_ms": 1e3 * float(np.median(capture)),
        "ratio": float(np.median(np.array(capture) / np.array(plain))),
        "ratios": [float(ratio) for ratio in np.array(capture) / np.array(plain)],
        "compile_s": float(np.median(compilation)),
    }


def print_table(console: Console, networks: dict) -> None:
    """All results as one table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("network")
    for column in ("layers", "matrices, MB", "forward, ms", "capture, ms", "ratio", "trace and compile, s"):
        table.add_column(column, justify="right")
    for name, row in networks.items():
        colour = "green" if row["ratio"] <= TARGET else "red"
        table.add_row(
            name,
            str(row["leaves"]),
            f"{row['matrices_bytes'] / 1e6:.1f}",
            f"{row['forward_ms']:.1f}",
            f"{row['capture_ms']:.1f}",
            f"[{colour}]{row['ratio']:.2f}x[/{colour}]",
            f"{row['compile_s']:.1f}",
        )
    console.print(table)
    console.print(
        f"A batch is {BATCH} images or {SENTENCES} sentences of {LENGTH} tokens. ratio: median over turns, each\n"
        f"against the plain forward passes just before (target for the ResNet {TARGET:.0f}x).",
        style="dim",
        highlight=False,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round: noisier")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    console = Console()
    networks = {}
    for name, build in NETWORKS.items():
        with console.status(name):
            networks[name] = bench(build, 1 if args.quick else 2)
    print_table(console, networks)

    record = {
        "device": device_name(),
        "cores": core_count(),
        "jax": jax.__version__,
        "quick": args.quick,
        "batch": BATCH,
        "networks": networks,
    }
    path = results_stem(args.out, "bench/gram").with_suffix(".json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
