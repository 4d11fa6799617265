"""Sparse products against dense ones on the GPU at hand: are they right, and where do they pay?

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021): with a transposable mask the forward product and the input gradient both run on 2:4 sparse tensor cores.

First every kernel that runs on the device is held against float64 on fresh random data: all pairs of 2:4 patterns,
sizes that fit no tile, memory full of NaN, gradients through `nm.dot_general`. With `--check` that is all. Then
products of bfloat16 are timed, forward and input gradient, packing apart and included, against `jnp.dot` and, where
torch has it, cuSPARSELt; and a training step of a transformer's MLP. Besides the results, it saves the profile that
`implementation=None` consults (`nm.matmul.profile_path()`): a kernel becomes the default only where it was measured to
be faster, packing included.

The target is 1.3 times dense from 4096^3 on, then cuSPARSELt, then 1.6. Without a GPU, the checks run through
`reference`, and what is timed is that the default costs no more than a plain product. Exits with status 1 if a kernel
is wrong.

Paper: none
Time: a few minutes on a GPU or 2 cores
Data: none
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import nm_jax as nm
from experiments.harness import Experiment, Run, Table

# tokens, rows (outputs), k (inputs)
SHAPES = [
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
]
CPU_SHAPES = [(512, 1024, 1024), (2048, 1024, 1024)]
QUICK_SHAPES = [(64, 64, 64)]
CHECKS = [(512, 512, 1024), (384, 264, 528), (129, 300, 76)]  # tokens, rows, k
MLP = (8192, 4096, 14336)  # tokens, width, hidden
TARGET = 1.3
Side = Literal["forward", "backward"]
REFERENCE = next(i for i in nm.matmul.IMPLEMENTATIONS if i.name == "reference")


def kernels(device: jax.Device) -> tuple[list[nm.matmul.Implementation], dict[str, str]]:
    """The GPU kernels that run on a device, and why the others do not."""
    sparse = [i for i in nm.matmul.IMPLEMENTATIONS if i.is_kernel]
    product = nm.matmul.Product(jnp.bfloat16, 4096, 4096, 4096)
    reasons = {kernel.name: kernel.supports(product, device) for kernel in sparse}
    able = [kernel for kernel in sparse if reasons[kernel.name] is None]
    return able, {name: reason for name, reason in reasons.items() if reason is not None}


# -------------------------------------------------------------------------------------------------------------- checks


def transposable(rng: np.random.Generator, k: int, rows: int) -> np.ndarray:
    """A random 2:4-T mask: permuted circulant blocks."""
    circulant = np.array([[(j - i) % 4 < 2 for j in range(4)] for i in range(4)])
    permutation = rng.random((k // 4, rows // 4, 2, 4)).argsort(axis=-1)
    blocks = circulant[permutation[:, :, 0, :, None], permutation[:, :, 1, None, :]]
    return blocks.swapaxes(1, 2).reshape(k, rows)


def all_pairs(rng: np.random.Generator, k: int, rows: int) -> np.ndarray:
    """A 2:4 mask along k in which neighbouring groups have each of the 36 pairs of patterns, at random."""
    patterns = np.array([[i in kept for i in range(4)] for kept in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))])
    first, second = np.divmod(rng.permuted(np.arange(-(-k // 8) * rows) % 36), 6)
    pairs = np.stack([patterns[first], patterns[second]], axis=1).reshape(rows, -1)
    return pairs[:, :k].T


def poison(shape: tuple[int, ...], dtype) -> None:
    """Leaves NaN in the memory that the next output of this size is likely to get."""
    blocks = [jnp.full(shape, jnp.nan, dtype) for _ in range(4)]
    jax.block_until_ready(blocks)


def error(found: jax.Array, truth: np.ndarray, terms: int) -> float:
    """Largest error in units of what rounding explains: 1 or less is right, NaN is wrong."""
    eps, single = float(jnp.finfo(found.dtype).eps), float(jnp.finfo(jnp.float32).eps)
    allowed = eps * np.abs(truth) + terms * single * max(1.0, float(np.abs(truth).max()))
    worst = float(np.max(np.abs(np.asarray(found, np.float64) - truth) / allowed))
    return worst if worst == worst else float("inf")


def check(
    kernel: nm.matmul.Implementation, seed: int, shapes: Sequence[tuple[int, int, int]] = CHECKS
) -> dict[str, float]:
    """Errors of one implementation, in units of what rounding explains."""
    rng = np.random.default_rng(seed)
    errors = {}
    dense_layer = functools.partial(
        nm.dot_general("2:4-T", implementation=kernel), dimension_numbers=(((1,), (0,)), ((), ()))
    )
    for tokens, rows, k in shapes:
        x, w, dy = (rng.normal(size=shape) for shape in ((tokens, k), (k, rows), (tokens, rows)))
        for dtype in (jnp.bfloat16, jnp.float16):
            cast = functools.partial(jnp.asarray, dtype=dtype)
            name = f"{tokens} x {rows} x {k} {jnp.dtype(dtype).name}"
            wide = [np.asarray(cast(a), np.float64) for a in (x, w, dy)]

            mask = all_pairs(rng, k, rows)
            packed = nm.pack(cast(np.where(mask, w, np.nan)), jnp.asarray(mask), orientation="forward")
            poison((tokens, rows), dtype)
            y = nm.nm_matmul(cast(x), packed, "2:4", implementation=kernel)
            errors[f"all pairs, {name}"] = error(y, wide[0] @ np.where(mask, wide[1], 0), k)

            mask = transposable(rng, k, rows)
            sparse = np.where(mask, wide[1], 0)
            poison((tokens, k), dtype)
            y, pull = jax.vjp(dense_layer, cast(x), cast(np.where(mask, w, 0)))
            to_x, to_w = pull(cast(dy))
            for part, found, truth, terms in (
                ("dot_general", y, wide[0] @ sparse, k),
                ("input gradient", to_x, wide[2] @ sparse.T, rows),
                ("weight gradient", to_w, wide[0].T @ wide[2], tokens),
            ):
                errors[f"{part}, {name}"] = error(found, truth, terms)
    return errors


def wrong(errors: dict[str, float]) -> dict[str, float]:
    """The checks that failed; NaN and infinity count as failed."""
    return {name: value for name, value in errors.items() if not value <= 1}


# --------------------------------------------------------------------------------------------------------------- speed


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that the clock of the device hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    inner = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        start = time.perf_counter()
        jax.block_until_ready(function())
        inner[name] = max(1, min(20, int(5e-3 / (time.perf_counter() - start))))  # about 5 ms in a row
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                result = function()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / inner[name])
    return {name: float(np.median(values)) for name, values in seconds.items()}


def cusparselt(w: np.ndarray, x: np.ndarray, repeats: int) -> float | None:
    """Median seconds of torch's cuSPARSELt for w x^T, after its own search for an algorithm; `None` without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()):
        return None
    packed = torch._cslt_compress(torch.from_numpy(w).cuda().bfloat16())
    right = torch.from_numpy(x).cuda().bfloat16().t()
    algorithm = torch._cslt_sparse_mm_search(packed, right)
    seconds = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            torch._cslt_sparse_mm(packed, right, alg_id=algorithm)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 10)
    return float(np.median(seconds[3:]))


def bench_product(kernel: nm.matmul.Implementation, shape: tuple[int, int, int], side: Side, repeats: int) -> dict:
    """Times of x A^T: A is W^T of a weight W (k, rows) forward, and the weight (rows, k) itself in the gradient."""
    tokens, rows, k = shape
    rng = np.random.default_rng(0)
    forward = side == "forward"
    w = rng.normal(size=(k, rows) if forward else (rows, k)).astype(np.float32)
    w *= transposable(rng, *w.shape)
    x = rng.normal(size=(tokens, k)).astype(np.float32)
    weight, inputs = jnp.asarray(w, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)
    pack = jax.jit(lambda w: getattr(nm.pack(w, orientation=side), side).matrix)
    packed = pack(weight)
    product = jax.jit(kernel.product)
    both = jax.jit(lambda w, x: kernel.product(getattr(nm.pack(w, orientation=side), side).matrix, x))
    dot = jax.jit(lambda w, x: jnp.dot(x, w if forward else w.T))
    seconds: dict[str, float | None] = dict(
        medians(
            {
                "dense": lambda: dot(weight, inputs),
                "sparse": lambda: product(packed, inputs),
                "packing": lambda: pack(weight),
                "sparse and packing": lambda: both(weight, inputs),
            },
            repeats,
        )
    )
    seconds["cusparselt"] = cusparselt(w.T if forward else w, x, repeats)
    return {"implementation": kernel.name, "side": side, "tokens": tokens, "rows": rows, "k": k, "seconds": seconds}


def bench_training_step(kernel: nm.matmul.Implementation, sizes: tuple[int, int, int], repeats: int) -> dict:
    """Value and gradients of a transformer's MLP, dense and sparse, in the same run."""
    tokens, width, hidden = sizes
    rng = np.random.default_rng(0)
    params = {}
    for name, (k, rows) in {"up": (width, hidden), "down": (hidden, width)}.items():
        w = rng.normal(size=(k, rows)).astype(np.float32) * transposable(rng, k, rows) * (2 / k) ** 0.5
        params[name] = jnp.asarray(w, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)

    def step(dot_general):
        dimensions = (((1,), (0,)), ((), ()))

        def loss(params, x):
            y = x + dot_general(jax.nn.gelu(dot_general(x, params["up"], dimensions)), params["down"], dimensions)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    dense, sparse = step(jax.lax.dot_general), step(nm.dot_general("2:4-T", implementation=kernel))
    seconds = medians({"dense": lambda: dense(params, x), "sparse": lambda: sparse(params, x)}, repeats)
    return {"implementation": kernel.name, "tokens": tokens, "width": width, "hidden": hidden, "seconds": seconds}


def bench_default(shape: tuple[int, int, int], repeats: int) -> dict:
    """Where no kernel runs: the default against a plain product, and what `reference` and packing cost."""
    tokens, rows, k = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(k, rows)) * transposable(rng, k, rows), jnp.float32)

    def step(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.square(product(x, w))), (0, 1)))

    plain, default = step(jnp.dot), step(nm.nm_matmul)
    reference = step(functools.partial(nm.nm_matmul, implementation="reference"))
    pack = jax.jit(nm.pack)
    seconds = medians(
        {
            "plain": lambda: plain(x, w),
            "default": lambda: default(x, w),
            "reference": lambda: reference(x, w),
            "packing": lambda: pack(w),
        },
        repeats,
    )
    return {"tokens": tokens, "rows": rows, "k": k, "seconds": seconds}


# ------------------------------------------------------------------------------------------------------------- reports


def tables(result: dict) -> list[Table]:
    """Correctness; speed relative to the dense product in the same run; where no kernel runs, the default."""
    checks = [
        (name, "WRONG" if wrong(errors) else "right", len(errors), f"{max(errors.values()):.2f}")
        for name, errors in result["checks"].items()
    ]
    found = [Table("checks", ("implementation", "", "checks", "worst error / allowed"), checks, "Against float64")]
    if "products" in result:
        header = ("kernel", "product", "tokens x rows x k", "dense, TFLOP/s", "packed", "with packing", "cuSPARSELt")
        found.append(Table("products", header, [*map(_product, result["products"])], "Times the speed of dense"))
        steps = [
            (row["implementation"], _sizes(row, "tokens", "width", "hidden"), _times(row["seconds"], "sparse"))
            for row in result["training_steps"]
        ]
        notes = "Two of three products sparse, packing included."
        found.append(Table("steps", ("kernel", "MLP", "speed / dense"), steps, "A training step", notes))
    if "default" in result:
        default = [
            (
                _sizes(row, "tokens", "rows", "k"),
                *(f"{row['seconds'][name] / row['seconds']['plain']:.2f}" for name in ("default", "reference")),
                f"{1e3 * row['seconds']['packing']:.1f}",
            )
            for row in result["default"]
        ]
        columns = ("tokens x rows x k", "default / jnp.dot", "reference / jnp.dot", "packing both sides, ms")
        notes = "float32, with both gradients. No sparse kernel runs here, so nothing says how fast one is."
        found.append(Table("default", columns, default, "Time where no kernel runs", notes))
    return found


def _sizes(row: dict, *names: str) -> str:
    return " x ".join(str(row[name]) for name in names)


def _times(seconds: dict, name: str) -> str:
    return f"{seconds['dense'] / seconds[name]:.2f}" if seconds[name] else "-"


def _product(row: dict) -> tuple[str, ...]:
    seconds = row["seconds"]
    rate = 2 * np.prod([float(row[name]) for name in ("tokens", "rows", "k")]) / seconds["dense"] / 1e12
    speeds = (_times(seconds, name) for name in ("sparse", "sparse and packing", "cusparselt"))
    return row["implementation"], row["side"], _sizes(row, "tokens", "rows", "k"), f"{rate:.0f}", *speeds


def problems(result: dict) -> list[str]:
    """Checks that failed."""
    return [
        f"{kernel} is wrong: {name}, {value:.3g} times the error that rounding allows"
        for kernel, errors in result["checks"].items()
        for name, value in wrong(errors).items()
    ]


def draw(result: dict) -> Figure | None:
    """Speed relative to dense at each shape; nothing where no kernel ran."""
    products = result.get("products", [])
    if not products:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{p['side']}\n{p['tokens']} x {p['rows']}\nx {p['k']}\n{p['implementation']}" for p in products]
    for offset, name in enumerate(("sparse", "sparse and packing", "cusparselt")):
        speed = [p["seconds"]["dense"] / p["seconds"][name] if p["seconds"][name] else 0 for p in products]
        axes.bar(np.arange(len(products)) + 0.25 * (offset - 1), speed, 0.25, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(products)), labels, fontsize=6)
    axes.set_ylabel("times the speed of the dense product")
    axes.legend()
    return figure


def measurements(products: list[dict], device: jax.Device) -> list[nm.matmul.Measurement]:
    """What the default choice consults. Packing is what it adds when it is part of the same program."""
    found = []
    for row in products:
        seconds = row["seconds"]
        packing = max(seconds["sparse and packing"] - seconds["sparse"], 0.0)
        sizes = (row["tokens"], row["rows"], row["k"])
        times = (seconds["dense"], seconds["sparse"], packing)
        kernel = next(i for i in nm.matmul.IMPLEMENTATIONS if i.name == row["implementation"])
        origin = (device.device_kind, kernel.name, kernel.version, jax.__version__, "bfloat16")
        found.append(nm.matmul.Measurement(*origin, *sizes, *times))
    return found


def measure(run: Run) -> dict:
    """Checks, then times what runs here."""
    device = jax.devices()[0]
    able, reasons = kernels(device)
    given = run.args.seed
    seed = given if given is not None else int(np.random.SeedSequence().generate_state(1)[0])
    run.console.print(f"{device.device_kind}, jax {jax.__version__}, seed {seed}", highlight=False)
    if not able:
        run.console.print("No sparse kernel runs here:")
        for name, reason in reasons.items():
            run.console.print(f"  {name}: {reason}", highlight=False)
    shapes = CHECKS[-1:] if run.quick else CHECKS
    checks = {kernel.name: check(kernel, seed, shapes) for kernel in able or [REFERENCE]}
    result: dict = {"seed": seed, "checks": checks}
    if run.args.check:
        return result
    repeats = 7 if run.quick else 30
    if right := [kernel for kernel in able if not wrong(checks[kernel.name])]:
        result["products"] = [
            bench_product(kernel, shape, side, repeats)
            for kernel in right
            for shape in (SHAPES[:1] if run.quick else SHAPES)
            for side in get_args(Side)
        ]
        result["training_steps"] = [bench_training_step(kernel, MLP, repeats) for kernel in right]
        profile = nm.matmul.save_profile(measurements(result["products"], device), run.args.profile)
        run.console.print(f"wrote {profile}, which implementation=None now consults")
    elif not able:
        result["default"] = [bench_default(shape, repeats) for shape in (QUICK_SHAPES if run.quick else CPU_SHAPES)]
    return result


def options(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which numbers."""
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--seed", type=int, help="of the random data; a fresh one unless given")
    parser.add_argument("--profile", type=Path, help="where to save the profile, instead of the default place")


EXPERIMENT = Experiment(measure, tables, draw, problems, options)
