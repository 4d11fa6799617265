"""Solvers of transposable N:M masks side by side: speed, loss and feasibility.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021): their Tables 2 and A.3 are the last table here, the overhead of a refresh every 40 steps.

    python -m experiments.bench.solvers [--quick]

Everything is timed in one process, as the median of several runs after a first one; ratios between rows mean more
than the rows. Expected on 2 cores: `Exact` at 30 times OR-tools' blocks per second or more, no loss, every gap 0; 8192
x 8192 at 8:16 in less than a second; greedy with completion loses 0.4 to 1.1 % of the kept weight, entropic transport
less than 0.1 %. About 12 minutes, 4 with `--quick`. Writes `experiments/results/bench_solvers_<device>.json` and
`.png`. Real weights are read from $NM_JAX_DATA/weights when that is there.
"""

import argparse
import functools
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy
from rich.console import Console
from rich.table import Table

import nm_jax as nm
from experiments.bench import baselines
from experiments.harness import RESULTS, device_name, results_stem
from nm_jax import TransposableNM, parse_pattern
from nm_jax.solvers import Exact, Greedy, IntegerProgram, MinCostFlow

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
# Blocks per second on 2 cores that were measured before, for comparison with this run's.
ORTOOLS_BEFORE = {"2:4-T": 240_000, "4:8-T": 62_800, "8:16-T": 14_400, "16:32-T": 3_360}
PAPER_OVERHEAD = {  # Tables 2 and A.3: time that a refresh every 40 steps adds, per cent
    "integer program": (180, 160),
    "min-cost flow": (70, 65),
    "2-approximation": (14, 13),
}
REFRESH_EVERY = 40
console = Console(width=120)


# --------------------------------------------------------------------------------------------------------------- scores


def blocks_of(kind: str, m: int, count: int, seed: int = 0) -> np.ndarray | None:
    """float32 scores (m, m, count); `None` where the data are absent."""
    rng = np.random.default_rng(seed)
    shape = (m, m, count)
    if kind == "real weights":
        matrices = [a for a in _real_matrices() if min(a.shape) >= m]
        tiles = [_tiles(np.abs(a), m) for a in matrices]
        if not tiles:
            return None
        tiles = np.concatenate(tiles, axis=2)
        return tiles[:, :, rng.permutation(tiles.shape[2])[:count] if count < tiles.shape[2] else slice(None)]
    return DISTRIBUTIONS[kind](rng, shape).astype(np.float32)


def _tiles(matrix: np.ndarray, m: int) -> np.ndarray:
    """The m x m tiles of a matrix, (m, m, tiles)."""
    tall, wide = (size // m for size in matrix.shape)
    tiles = matrix[: tall * m, : wide * m].reshape(tall, m, wide, m)
    return tiles.transpose(1, 3, 0, 2).reshape(m, m, -1)


@functools.cache
def _real_matrices() -> list[np.ndarray]:
    folder = Path(os.environ.get("NM_JAX_DATA", "")) / "weights"
    matrices = []
    for path in sorted(folder.glob("*.npz")) if "NM_JAX_DATA" in os.environ else ():
        arrays = np.load(path)
        matrices += [
            arrays[key].reshape(len(arrays[key]), -1).astype(np.float32)
            for key in arrays.files
            if arrays[key].ndim >= 2 and arrays[key].dtype.kind == "f" and len(arrays[key]) < 10_000
        ]
    return matrices


def _bfloat16(rng, shape):
    return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float32)


DISTRIBUTIONS = {
    "Gaussian": lambda rng, shape: np.abs(rng.normal(size=shape)),
    "heavy-tailed": lambda rng, shape: np.abs(rng.standard_cauchy(shape)),
    "uniform": lambda rng, shape: rng.random(shape),
    "signed": lambda rng, shape: rng.normal(size=shape),
    "four levels": lambda rng, shape: rng.integers(1, 5, shape) / 4,
    "thirds": lambda rng, shape: rng.integers(0, 4, shape) / 3,
    "binary": lambda rng, shape: rng.integers(0, 2, shape),
    "ternary, signed": lambda rng, shape: rng.integers(-1, 2, shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, 0.3),
    "90 % zeros": lambda rng, shape: np.abs(rng.normal(size=shape)) * (rng.random(shape) < 0.1),
    "subnormal": lambda rng, shape: rng.integers(1, 100, shape) * 1e-45,
    "60 decades": lambda rng, shape: 10.0 ** rng.uniform(-30, 30, shape),
    "bfloat16": lambda rng, shape: np.abs(_bfloat16(rng, shape)),
    "bfloat16, signed": _bfloat16,
    "powers of two": lambda rng, shape: 2.0 ** rng.integers(-20, 20, shape),
    "rank one": lambda rng, shape: rng.random((shape[0], 1, shape[2])) * rng.random((1, *shape[1:])),
}


# -------------------------------------------------------------------------------------------------------------- methods


def _library(solver):
    return lambda scores, pattern: solver(scores, pattern).mask


# name -> (function of tiles and pattern, whether it runs under jit on the device)
METHODS = {
    "Exact": (_library(Exact()), True),
    "Greedy (2-approximation, completed)": (_library(Greedy()), True),
    "Greedy (Algorithm 1 to the letter)": (_library(Greedy(complete=False)), True),
    "entropic transport, TSENOR's style": (baselines.entropic, True),
    "OR-tools min-cost flow": (baselines.ortools, False),
    "MinCostFlow (assignment gadget)": (_library(MinCostFlow()), False),
    "HiGHS LP": (baselines.highs, False),
    "IntegerProgram": (_library(IntegerProgram()), False),
}


# --------------------------------------------------------------------------------------------------------------- timing


def median_time(call, runs: int) -> float:
    """Seconds, after a first call that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matrix_time(shape: tuple[int, int], pattern: str, runs: int) -> float:
    """From a float32 matrix to its boolean mask."""
    scores = jnp.asarray(np.abs(np.random.default_rng(0).standard_normal(shape, np.float32)))
    return median_time(lambda: nm.solve(scores, pattern), runs)


def compare(quick: bool) -> list[dict]:
    """Every method on every pattern and kind of weights."""
    rows = []
    kinds = ("Gaussian", "heavy-tailed", "real weights")
    for kind in kinds[: 1 if quick else None]:
        for name in PATTERNS:
            pattern = parse_pattern(name)
            m = pattern.m
            scores = blocks_of(kind, m, (1 << (20 if quick else 22)) // m**2)
            if scores is None:
                console.print("real weights: absent (set NM_JAX_DATA to a folder that has weights/*.npz); left out")
                break
            # The optimum, proved: what the others lose is measured against it.
            solution = jax.jit(lambda s, pattern=pattern: Exact()(s, pattern))(jnp.asarray(scores))
            if jnp.any(solution.proof.gap):
                raise RuntimeError(f"Exact left a gap at {name} on {kind}")
            best = np.where(np.asarray(solution.mask), scores, 0).sum((0, 1), dtype=np.float64)
            for method, (function, on_device) in METHODS.items():
                if on_device:
                    # The slower ones see fewer blocks.
                    part = scores if method == "Exact" else scores[:, :, : scores.shape[2] // 16]
                    call = jax.jit(lambda s, f=function, pattern=pattern: f(s, pattern))
                    tiles = jnp.asarray(part)
                else:
                    call = functools.partial(function, pattern=pattern)
                    unit = 64 if method in ("OR-tools min-cost flow", "HiGHS LP") else 4
                    pilot = median_time(lambda call=call, few=scores[:, :, :unit]: call(few), 1)
                    count = int(np.clip((0.2 if quick else 0.5) / pilot, 1, 512)) * unit
                    part = tiles = scores[:, :, :count]
                seconds = median_time(lambda call=call, tiles=tiles: call(tiles), 3 if quick else 5)
                mask = np.asarray(call(tiles))
                kept = np.where(mask, part, 0).sum((0, 1), dtype=np.float64)
                rows.append(
                    {
                        "weights": kind,
                        "pattern": name,
                        "method": method,
                        "blocks": part.shape[2],
                        "blocks_per_s": part.shape[2] / seconds,
                        "loss_percent": 100 * float(1 - kept.sum() / best[: len(kept)].sum()),
                        "exactly_n": bool(jnp.all(pattern.full(jnp.asarray(mask)))),
                        "at_most_n": bool(jnp.all(pattern.allows(jnp.asarray(mask)))),
                    }
                )
    return rows


def check_exactness(quick: bool) -> dict:
    """Against OR-tools on the solver's own grid: integer optima must be equal, and every gap 0."""
    counts = {4: 3200, 8: 2400, 16: 500, 32: 120} if not quick else {4: 320, 8: 240, 16: 50, 32: 12}
    blocks = wrong = unproved = infeasible = 0
    for name in PATTERNS:
        for at_most in (False, True):
            base = parse_pattern(name)
            pattern = TransposableNM(base.n, base.m, at_most)
            run = jax.jit(lambda s, pattern=pattern: Exact()(s, pattern))
            for kind in DISTRIBUTIONS:
                scores = blocks_of(kind, pattern.m, counts[pattern.m] // (2 if at_most else 1), seed=1)
                solution = run(jnp.asarray(scores))
                rounding = np.asarray(solution.proof.rounding, np.float64)
                unit = np.where(rounding > 0, rounding / (pattern.n * pattern.m), 2.0**-149)  # the finest grid there is
                wanted = np.maximum(scores, 0) if at_most else scores
                ratio = wanted.astype(np.float64) / unit
                grid = (np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)).astype(np.int64)
                found = (grid * np.asarray(solution.mask)).sum((0, 1))
                optimum = (grid * baselines.ortools_integer(grid, pattern)).sum((0, 1))
                blocks += scores.shape[2]
                wrong += int((found != optimum).sum())
                unproved += int(jnp.sum(~solution.proof.proved | (solution.proof.gap > 0)))
                infeasible += int(jnp.sum(~pattern.full(solution.mask)))
    return {
        "blocks": blocks,
        "distributions": len(DISTRIBUTIONS),
        "wrong": wrong,
        "unproved": unproved,
        "infeasible": infeasible,
    }


def scaling(quick: bool) -> dict:
    """Blocks per second by the number of blocks, and by m at n = m / 2 (rounded down)."""
    by_blocks = []
    for name in ("4:8-T", "16:32-T"):
        pattern = parse_pattern(name)
        run = jax.jit(lambda s, pattern=pattern: Exact()(s, pattern).mask)
        for exponent in range(0, 15 if quick else 21, 4):
            count = 1 << exponent
            if count * pattern.m**2 > 1 << 26:
                break
            seconds = median_time(functools.partial(run, jnp.asarray(blocks_of("Gaussian", pattern.m, count))), 3)
            by_blocks.append({"pattern": name, "blocks": count, "blocks_per_s": count / seconds})
    by_m = []
    for m in (2, 4, 8, 16, 32) if quick else (2, 3, 4, 6, 8, 12, 16, 24, 32):
        for at_most in (False, True):
            pattern = TransposableNM(m // 2, m, at_most)
            count = (1 << 20) // m**2
            run = jax.jit(lambda s, pattern=pattern: Exact()(s, pattern).mask)
            seconds = median_time(functools.partial(run, jnp.asarray(blocks_of("Gaussian", m, count))), 3)
            by_m.append({"m": m, "at_most": at_most, "blocks_per_s": count / seconds})
    return {"by_blocks": by_blocks, "by_m": by_m}


def hard_cases(quick: bool) -> dict:
    """Heavy ties at 16:32, and one large matrix at 8:16."""
    rows = {}
    run = jax.jit(lambda s: Exact()(s, TransposableNM(16, 32)).mask)
    for kind in ("four levels", "thirds", "binary"):
        scores = jnp.asarray(blocks_of(kind, 32, 512 if quick else 2048))
        rows[f"{kind}, 16:32, blocks/s"] = scores.shape[2] / median_time(functools.partial(run, scores), 5)
    size = 2048 if quick else 8192
    rows[f"{size} x {size} at 8:16, s"] = matrix_time((size, size), "8:16-T", 3)
    return rows


# --------------------------------------------------------------------------------------------------------- whole models


def _resnet50() -> dict[tuple[int, ...], int]:
    """Convolution kernels (height, width, in, out) of ResNet-50 without the first; the classifier."""
    shapes: dict[tuple[int, ...], int] = {}
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for k in range(blocks):
            for shape in ((1, 1, width_in, width), (3, 3, width, width), (1, 1, width, 4 * width)):
                shapes[shape] = shapes.get(shape, 0) + 1
            if k == 0:
                shapes[(1, 1, width_in, 4 * width)] = shapes.get((1, 1, width_in, 4 * width), 0) + 1
            width_in = 4 * width
    shapes[(2048, 1000)] = 1
    return shapes


MODELS = {
    "ResNet-50": _resnet50(),
    "BERT-large": {(1024, 1024): 96, (1024, 4096): 24, (4096, 1024): 24},
    "7B LLM": {(4096, 4096): 128, (4096, 11008): 64, (11008, 4096): 32},
}


def whole_models(quick: bool) -> list[dict]:
    """Times of all weights of a model: ResNet-50 as one compiled call, blocks of all layers together; the others by
    timing each distinct matrix shape and multiplying by its count."""
    rows = []
    for name in PATTERNS:
        pattern = parse_pattern(name)
        for model, shapes in MODELS.items():
            if quick and model != "ResNet-50":
                continue
            # The classifier's 1000 outputs are left out where m does not divide them.
            fits = {s: count for s, count in shapes.items() if s[-1] % pattern.m == 0}
            weights = sum(int(np.prod(s)) * count for s, count in fits.items())
            if model == "ResNet-50":
                seconds, compile_seconds = _tree_time(fits, name)
            else:
                seconds = sum(matrix_time(s, name, 2) * count for s, count in fits.items())
                compile_seconds = None
            rows.append(
                {"model": model, "pattern": name, "weights": weights, "seconds": seconds, "compile_s": compile_seconds}
            )
    return rows


def _tree_time(shapes: dict[tuple[int, ...], int], pattern: str) -> tuple[float, float]:
    """Seconds of `compute_masks` on all layers, and of its compilation."""
    rng = np.random.default_rng(0)
    layers = [shape for shape, count in shapes.items() for _ in range(count)]
    weights = {
        f"{'conv' if len(shape) == 4 else 'dense'}{k}": jnp.asarray(rng.standard_normal(shape, np.float32))
        for k, shape in enumerate(layers)
    }
    rules = [("conv", pattern, "bbio"), ("dense", pattern, "io")]
    rules = [rule for rule in rules if any(rule[0] in name for name in weights)]
    run = jax.jit(lambda weights: nm.compute_masks(weights, rules))
    start = time.perf_counter()
    compiled = run.lower(weights).compile()
    compile_seconds = time.perf_counter() - start
    return median_time(lambda: compiled(weights), 3), compile_seconds


def overhead(comparison: list[dict], quick: bool) -> list[dict]:
    """What a refresh every 40 steps adds to a training step of six 1024 x 1024 layers, 4:8-T, batch 512."""
    size, layers, batch = 1024, 6, 512
    rng = np.random.default_rng(0)
    params = {f"layer{k}": jnp.asarray(rng.standard_normal((size, size), np.float32) / 32) for k in range(layers)}
    x = jnp.asarray(rng.standard_normal((batch, size), np.float32))

    def loss(params):
        y = x
        for w in params.values():
            y = jax.nn.relu(y @ w)
        return jnp.mean(y**2)

    def stepper(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return step

    runs = 5 if quick else 15
    plain = optax.adamw(1e-3)
    plain_step, plain_state = stepper(plain), plain.init(params)
    rates = {
        r["method"]: r["blocks_per_s"] for r in comparison if (r["weights"], r["pattern"]) == ("Gaussian", "4:8-T")
    }
    rows = []
    for label, method, solver in (
        ("integer program", "IntegerProgram", None),
        ("min-cost flow", "MinCostFlow (assignment gadget)", None),
        ("min-cost flow", "OR-tools min-cost flow", None),
        ("2-approximation", "Greedy (Algorithm 1 to the letter)", Greedy(complete=False)),
        ("2-approximation", "Greedy (2-approximation, completed)", Greedy()),
        ("exact on the device", "Exact", Exact()),
    ):
        plain_seconds = median_time(lambda: plain_step(params, plain_state), runs)
        if solver is None:
            refresh_seconds, how = layers * (size // 8) ** 2 / rates[method], "from its rate"
        else:
            tx = nm.sparse_training(plain, [("layer", "4:8-T")], refresh_every=REFRESH_EVERY, solver=solver)
            step, state = stepper(tx), tx.init(params)
            due = state._replace(step=jnp.int32(REFRESH_EVERY - 1))
            seconds = [median_time(lambda s=s, step=step: step(params, s), runs) for s in (state, due)]
            refresh_seconds, how = seconds[1] - seconds[0], "measured"
        paper = PAPER_OVERHEAD.get(label, (None, None))
        rows.append(
            {
                "method": method,
                "plain_step_s": plain_seconds,
                "refresh_s": refresh_seconds,
                "how": how,
                "overhead_percent": 100 * refresh_seconds / REFRESH_EVERY / plain_seconds,
                "paper_4:8-T_percent": paper[0],
                "paper_2:4-T_percent": paper[1],
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------------------- output


def show(title: str, rows: list[dict]):
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def figure(result: dict, path: Path):
    fig, axes = plt.subplots(1, 3, figsize=(15, 5.5), layout="constrained")
    gaussian = [r for r in result["comparison"] if r["weights"] == "Gaussian"]
    for method in METHODS:
        rates = [r["blocks_per_s"] for r in gaussian if r["method"] == method]
        axes[0].plot(PATTERNS, rates, marker="o", label=method, linewidth=2.5 if method == "Exact" else 1)
    axes[0].set(yscale="log", ylabel="blocks / s", title="Gaussian blocks")
    axes[0].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2, frameon=False)
    for name in dict.fromkeys(r["pattern"] for r in result["scaling"]["by_blocks"]):
        rows = [r for r in result["scaling"]["by_blocks"] if r["pattern"] == name]
        axes[1].plot([r["blocks"] for r in rows], [r["blocks_per_s"] for r in rows], marker="o", label=name)
    axes[1].set(xscale="log", yscale="log", xlabel="blocks", ylabel="blocks / s", title="Exact: number of blocks")
    axes[1].legend()
    for at_most in (False, True):
        rows = [r for r in result["scaling"]["by_m"] if r["at_most"] == at_most]
        label = "at most n" if at_most else "exactly n"
        axes[2].plot([r["m"] for r in rows], [r["blocks_per_s"] * r["m"] ** 2 for r in rows], marker="o", label=label)
    axes[2].set(xscale="log", yscale="log", xlabel="m (n = m / 2)", ylabel="weights / s", title="Exact: block size")
    axes[2].minorticks_off()
    sizes = sorted({r["m"] for r in result["scaling"]["by_m"]})
    axes[2].set_xticks(sizes, map(str, sizes))
    axes[2].legend()
    fig.suptitle(result["device"])
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer blocks, Gaussian only, about 3 minutes")
    quick = parser.parse_args().quick
    result = {
        "device": device_name(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (jax, np, scipy)},
        },
        "quick": quick,
    }
    console.print(result)
    result["comparison"] = compare(quick)
    show("Every method", result["comparison"])
    result["against_ortools"] = against_ortools(result["comparison"])
    show("Exact against OR-tools", result["against_ortools"])
    result["exactness"] = check_exactness(quick)
    show("Integer optima against OR-tools, exactly n and at most n", [result["exactness"]])
    result["hard_cases"] = hard_cases(quick)
    show("Heavy ties and a large matrix", [result["hard_cases"]])
    result["scaling"] = scaling(quick)
    result["overhead"] = overhead(result["comparison"], quick)
    show("Overhead of a refresh every 40 steps, six 1024 x 1024 layers, 4:8-T (paper: ResNet-50)", result["overhead"])
    result["models"] = whole_models(quick)
    show("Whole models (BERT-large and the LLM: each shape timed, times its count)", result["models"])
    stem = results_stem(RESULTS, "bench/solvers" + ("_quick" if quick else ""))
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    figure(result, stem.with_suffix(".png"))
    console.print(f"wrote {stem.name}.json and .png")


def against_ortools(comparison: list[dict]) -> list[dict]:
    rows = []
    for kind in dict.fromkeys(r["weights"] for r in comparison):
        for name in PATTERNS:
            rates = {r["method"]: r["blocks_per_s"] for r in comparison if (r["weights"], r["pattern"]) == (kind, name)}
            ours, theirs = rates["Exact"], rates["OR-tools min-cost flow"]
            rows.append(
                {
                    "weights": kind,
                    "pattern": name,
                    "exact_blocks_per_s": ours,
                    "ortools_blocks_per_s": theirs,
                    "ortools_measured_before": ORTOOLS_BEFORE[name],
                    "ratio": ours / theirs,
                }
            )
    return rows


if __name__ == "__main__":
    main()
