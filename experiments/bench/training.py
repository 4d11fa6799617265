"""What sparse training costs: `nm.sparse_training(adamw, pattern)` against plain `adamw`, step by step.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021), refresh masks every 40 updates; their Table 2 gives the overhead of that for ResNet-50: 13 to 14 % with
the 2-approximation, 65 to 180 % with exact solvers. Here both optimisers train the same network in one process, a few
steps each in turn, so that whatever else the machine does hits both alike.

    python -m experiments.bench.training [--quick]

The target is 1.10 times the plain step without a refresh. What a sparse step adds is elementwise work bound by memory,
so its share falls with the batch. The state takes 5 bytes a weight more than the inner optimiser's (a float32 dense
copy and a mask of one byte). Writes `results/bench/training/<device>.json`
beside this file. About 6 minutes on 2 cores, 3 with `--quick`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import nm_jax as nm
from experiments.harness import RESULTS, core_count, device_name, results_stem

PATTERNS = ("2:4", "2:4-T", "4:8-T")
REFRESH_EVERY = 40
NEVER = 10**9  # the refresh is compiled into the step, and never due
TARGET = 1.10
BURST = 8  # steps a variant takes in turn; divides REFRESH_EVERY, so that every turn of a period is alike
MODELS = {
    # name: (layer sizes, batch, refresh periods measured, with --quick)
    "small": ((512, 384, 256, 16), 1024, 10, 3),
    "small, small batch": ((512, 384, 256, 16), 256, 10, 3),
    "large": ((1024,) * 7, 1024, 2, 1),
}
BLOCKS = 1 << 16


def make_params(sizes: tuple[int, ...], seed: int = 0):
    """A multilayer perceptron as a plain dict; He initialisation."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"layer{k}": {
            "kernel": jax.random.normal(key, (fan_in, fan_out)) * (2 / fan_in) ** 0.5,
            "bias": jnp.zeros(fan_out),
        }
        for k, (key, fan_in, fan_out) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def apply(params, x):
    """The network's output."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


class Variant:
    """One optimiser training its own copy of the network."""

    def __init__(self, tx: optax.GradientTransformation, sizes: tuple[int, ...], batch: tuple[jax.Array, jax.Array]):
        self.params = make_params(sizes)
        self.opt_state = tx.init(self.params)
        self.batch = batch
        self.seconds: list[float] = []

        def step(params, opt_state, batch):
            x, y = batch
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        # Donated, as real loops do: the optimiser works in place.
        self._step = jax.jit(step, donate_argnums=(0, 1))

    def run(self, steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.params, self.opt_state, loss = self._step(self.params, self.opt_state, self.batch)
            jax.block_until_ready((self.params, self.opt_state, loss))
            seconds.append(time.perf_counter() - start)
        return seconds


def bench_model(name: str, periods: int, advance: Callable[[], None]) -> dict:
    """Times of all variants of one model, and the bytes of their states."""
    sizes, batch_size, *_ = MODELS[name]
    keys = jax.random.split(jax.random.key(1), 2)
    batch = jax.random.normal(keys[0], (batch_size, sizes[0])), jax.random.normal(keys[1], (batch_size, sizes[-1]))
    inner = optax.adamw(1e-4)
    variants = {("dense", 0): Variant(inner, sizes, batch)}
    for pattern in PATTERNS:
        for every in (NEVER, REFRESH_EVERY):
            tx = nm.sparse_training(inner, pattern, refresh_every=every)
            variants[pattern, every] = Variant(tx, sizes, batch)
    for variant in variants.values():
        variant.run(REFRESH_EVERY)  # compiles, warms up, and ends a period
    for _ in range(periods * REFRESH_EVERY // BURST):
        for variant in variants.values():
            variant.seconds += variant.run(BURST)
        advance()

    dense = np.array(variants["dense", 0].seconds)
    result = {
        "sizes": sizes,
        "batch": batch_size,
        "parameters": sum(p.size for p in jax.tree.leaves(variants["dense", 0].params)),
        "steps": len(dense),
        "dense_ms": 1e3 * float(np.median(dense)),
        "dense_state": nbytes(variants["dense", 0].opt_state) / nbytes(variants["dense", 0].params) * 4,
        "patterns": {},
    }
    for pattern in PATTERNS:
        never = np.array(variants[pattern, NEVER].seconds)
        periodic = np.array(variants[pattern, REFRESH_EVERY].seconds)
        refreshes = np.arange(1, len(periodic) + 1) % REFRESH_EVERY == 0
        result["patterns"][pattern] = {
            "never_ms": 1e3 * float(np.median(never)),
            "never_ratio": float(np.median(never) / np.median(dense)),
            # Turn by turn, against the turn of the plain optimiser just before: a busy machine slows both.
            "never_ratio_paired": float(np.median(medians(never) / medians(dense))),
            "between_ratio": float(np.median(periodic[~refreshes]) / np.median(dense)),
            "refresh_ms": 1e3 * float(np.median(periodic[refreshes])),
            "refresh_ratio": float(np.median(periodic[refreshes]) / np.median(dense)),
            "period_ratio": float(np.mean(periodic) / np.mean(dense)),
            "state": state_bytes(variants[pattern, REFRESH_EVERY]),
        }
    return result


def medians(seconds: np.ndarray) -> np.ndarray:
    """Median of every turn."""
    return np.median(seconds.reshape(-1, BURST), axis=1)


def nbytes(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def state_bytes(variant: Variant) -> dict[str, float]:
    """Bytes of the optimiser's state for each parameter, part by part."""
    state, size = variant.opt_state, sum(p.size for p in jax.tree.leaves(variant.params))
    parts = {"dense copy": state.dense, "mask": state.masks, "inner": state.inner, "all": state}
    return {part: nbytes(tree) / size for part, tree in parts.items()}


def bench_solver(pattern: str, repeats: int) -> dict:
    """Throughput of the default solver on Gaussian tiles, under `jit`."""
    parsed = nm.parse_pattern(pattern)
    scores = jnp.abs(jax.random.normal(jax.random.key(2), (*parsed.tile, BLOCKS)))
    solver = nm.solvers.default_solver(parsed)
    solve = jax.jit(lambda s: solver(s, parsed).mask)
    jax.block_until_ready(solve(scores))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(solve(scores))
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    return {
        "solver": str(nm.solvers.default_solver(parsed)),
        "tile": parsed.tile,
        "tiles_per_second": BLOCKS / median,
        "weights_per_second": scores.size / median,
    }


def print_table(console: Console, models: dict, solvers: dict) -> None:
    """All results as one table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("model")
    table.add_column("pattern")
    for column in (
        "no\nrefresh",
        "no refresh,\npaired",
        "between\nrefreshes",
        "refresh\nstep",
        f"mean\nof {REFRESH_EVERY}",
        "state,\nB/param",
        "solver,\nM tiles/s",
    ):
        table.add_column(column, justify="right")
    for name, model in models.items():
        notes = (
            f"{name}: {model['parameters'] / 1e6:.1f} M",
            f"batch {model['batch']}",
            f"adamw {model['dense_ms']:.1f} ms",
        )
        for note, (pattern, row) in zip(notes, model["patterns"].items(), strict=True):
            colour = "green" if row["never_ratio_paired"] <= TARGET else "red"
            table.add_row(
                note,
                pattern,
                f"{row['never_ratio']:.3f}x",
                f"[{colour}]{row['never_ratio_paired']:.3f}x[/{colour}]",
                f"{row['between_ratio']:.3f}x",
                f"{row['refresh_ratio']:.2f}x",
                f"{row['period_ratio']:.3f}x",
                f"{row['state']['all']:.1f}",
                f"{solvers[pattern]['tiles_per_second'] / 1e6:.2f}",
                end_section=note == notes[-1],
            )
    console.print(table)
    state = next(iter(models.values()))["patterns"][PATTERNS[-1]]["state"]
    console.print(
        "Step times relative to plain adamw in the same process.\n"
        f"no refresh: compiled in but never due (target {TARGET:.2f}x). paired: median over turns, each against\n"
        "        the plain turn of the same round; the more robust one on a busy machine.\n"
        f"between refreshes, refresh step, mean: one run with refresh_every={REFRESH_EVERY}.\n"
        f"state: {state['dense copy']:.1f} (dense copy) + {state['mask']:.1f} (mask) + {state['inner']:.1f} (inner) "
        "bytes a parameter.\n"
        "solver: the default one, on Gaussian tiles.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps: noisier")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    console = Console()
    periods = {name: quick if args.quick else full for name, (_, _, full, quick) in MODELS.items()}
    models = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        for name in MODELS:
            task = progress.add_task(f"{name} model", total=periods[name] * REFRESH_EVERY // BURST)
            models[name] = bench_model(name, periods[name], lambda task=task: progress.advance(task))
        task = progress.add_task("solvers", total=len(PATTERNS))
        solvers = {}
        for pattern in PATTERNS:
            solvers[pattern] = bench_solver(pattern, 3 if args.quick else 10)
            progress.advance(task)
    print_table(console, models, solvers)

    record = {
        "device": device_name(),
        "cores": core_count(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "quick": args.quick,
        "refresh_every": REFRESH_EVERY,
        "models": models,
        "solvers": solvers,
    }
    path = results_stem(args.out, "bench/training").with_suffix(".json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
