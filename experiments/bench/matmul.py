"""Sparse products against dense ones on the GPU at hand: are they right, and where do they pay?

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021): with a transposable mask the forward product and the input gradient both run on 2:4 sparse tensor cores.

On a GPU, in this order, each row on its own and saved at once, until the budget of time is spent:

1. every kernel that runs there is held against float64 on fresh random data: all pairs of 2:4 patterns, sizes that fit
   no tile, memory full of NaN, gradients through `nm.dot_general`; with `--check` that is all;
2. products of bfloat16 are timed, forward and input gradient, packing apart and included, against `jnp.dot` and, where
   torch has it, cuSPARSELt;
3. configurations of each kernel are compared, the most promising first;
4. a training step of a transformer's MLP; products of float16; the configurations at a larger shape.

Besides the results, it saves the profile that `implementation=None` consults (`nm.matmul.profile_path()`): a kernel
becomes the default only where it was measured to be faster, packing included. The target is 1.3 times dense from 4096^3
on, then cuSPARSELt, then 1.6.

Without a GPU, the checks run through `reference`, and what is timed is that the default costs no more than a plain
product; `--dry` goes through all that a GPU would do, tiny, with `reference` in the place of a kernel. Exits with
status 1 if a kernel is wrong.

Paper: none
Time: at most 8 minutes on a GPU, a few on 2 cores
Data: none
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import nm_jax as nm
from experiments.bench.kernels import (
    Shape,
    Side,
    bench_configuration,
    bench_cusparselt,
    bench_default,
    bench_product,
    bench_training_step,
    check,
    described,
    wrong,
)
from experiments.harness import Experiment, Run, Table

TARGET = 1.3
REFERENCE = next(i for i in nm.matmul.IMPLEMENTATIONS if i.name == "reference")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much to do. Shapes are (tokens, rows, k).

    Attributes:
      checks: what is checked. They fit no tile, and yet within the quarter of padding that kernels allow.
      products: what is timed.
      sweeps: where configurations are compared.
      mlp: (tokens, width, hidden) of the training step.
      default: what is timed where no kernel runs.
      repeats: of each timing.
    """

    checks: Sequence[Shape]
    products: Sequence[Shape]
    sweeps: Sequence[Shape]
    mlp: Shape
    default: Sequence[Shape]
    repeats: int


CHECKS = [(512, 512, 1024), (371, 500, 1000), (250, 252, 500)]
FULL = Sizes(
    checks=CHECKS,
    products=[
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (16384, 4096, 4096),
        (8192, 14336, 4096),
        (8192, 4096, 14336),
    ],
    sweeps=[(4096, 4096, 4096), (8192, 8192, 8192)],
    mlp=(8192, 4096, 14336),
    default=[(512, 1024, 1024), (2048, 1024, 1024)],
    repeats=30,
)
QUICK = dataclasses.replace(
    FULL, checks=CHECKS[-1:], products=FULL.products[:1], sweeps=FULL.sweeps[:1], default=[(64, 64, 64)], repeats=7
)
DRY = Sizes([(24, 16, 32)], [(16, 16, 32)], [(16, 16, 32)], (16, 16, 32), [(64, 64, 64)], repeats=1)


# ------------------------------------------------------------------------------------------------------------- kernels


def kernels(device: jax.Device) -> tuple[list[nm.matmul.Implementation], dict[str, str]]:
    """The GPU kernels that run on a device, and why the others do not."""
    sparse = [i for i in nm.matmul.IMPLEMENTATIONS if i.is_kernel]
    product = nm.matmul.Product(jnp.bfloat16, 4096, 4096, 4096)
    reasons = {kernel.name: kernel.supports(product, device) for kernel in sparse}
    able = [kernel for kernel in sparse if reasons[kernel.name] is None]
    return able, {name: reason for name, reason in reasons.items() if reason is not None}


def configurations(kernel: nm.matmul.Implementation) -> list[dict[str, int]]:
    """Configurations of a kernel, the most promising first; one that is empty for a kernel that has none."""
    return {"hopper": HOPPER, "ampere": AMPERE}.get(kernel.name, [{}])


HOPPER_TILES = [  # tokens, groups, columns of a stage, stages
    (192, 3, 64, 5),
    (256, 2, 64, 5),
    (256, 2, 64, 4),
    (256, 2, 64, 3),
    (256, 2, 128, 2),
    (192, 2, 64, 5),
    (128, 2, 64, 5),
]
HOPPER = [
    {**dict(zip(("tile_tokens", "groups", "tile_k", "stages"), tile, strict=True)), **rest}
    for raster, flight, cluster in itertools.product((8, 16), (0, 1), (2, 1))
    for rest in [{"cluster": cluster, "in_flight": flight, "raster": raster}]
    for tile in HOPPER_TILES
]
AMPERE = [
    {"tile_k": k, "stages": stages, "raster": raster}
    for raster, (k, stages) in itertools.product((8, 16), [(64, 3), (64, 4), (64, 2), (128, 2)])
]


# -------------------------------------------------------------------------------------------------------------- stages


@dataclasses.dataclass
class Session:
    """A run on a device whose time is short: what there is so far is kept after every row."""

    run: Run
    result: dict
    deadline: float

    def row(self, table: str, key: dict, function: Callable, *arguments: Any) -> None:
        """Adds what a function gives to a table, or the exception that it raises; nothing once time is up."""
        if time.monotonic() > self.deadline:
            self.result["skipped"] = self.result.get("skipped", 0) + 1
            return
        try:
            found = function(*arguments)
        except Exception as error:  # whatever a compiler or a device may throw
            found = {"failed": described(error)}
        self.result.setdefault(table, []).append({**key, **found})
        self.run.keep(self.result)
        self.run.console.print(table, self.result[table][-1], highlight=False)


def time_kernels(session: Session, able: Sequence[nm.matmul.Implementation], sizes: Sizes) -> None:
    """All that is timed of kernels, the most valuable first."""

    def products(dtype):
        for kernel, shape, side in itertools.product(able, sizes.products, get_args(Side)):
            key: dict[str, Any] = {
                "implementation": kernel.name,
                "version": kernel.version,
                "side": side,
                "dtype": dtype,
            }
            key |= _named(shape)
            session.row("products", key, bench_product, kernel, shape, side, dtype, sizes.repeats)

    def sweep(shape):
        for kernel in able:
            for settings in configurations(kernel):
                product = kernel.product
                if settings and kernel.config is not None:
                    product = functools.partial(product, config=kernel.config(**settings))
                key: dict[str, Any] = {"implementation": kernel.name, "configuration": settings}
                key |= _named(shape)
                session.row("configurations", key, bench_configuration, product, shape, "bfloat16", sizes.repeats)

    products("bfloat16")
    sweep(sizes.sweeps[0])
    for kernel in able:
        key = {"implementation": kernel.name}
        session.row("training_steps", key, bench_training_step, kernel, sizes.mlp, sizes.repeats)
    for shape, side in itertools.product(sizes.products, get_args(Side)):
        key = {"side": side, "dtype": "bfloat16", **_named(shape)}
        session.row("cusparselt", key, bench_cusparselt, shape, side, "bfloat16", sizes.repeats)
    products("float16")
    for shape in sizes.sweeps[1:]:
        sweep(shape)


def _named(shape: Shape) -> dict[str, Any]:
    return dict(zip(("tokens", "rows", "k"), shape, strict=True))


def measurements(result: dict, device: jax.Device) -> list[nm.matmul.Measurement]:
    """What the default choice consults: all products, and the best configuration of each kernel at each shape. Packing
    is what it adds when it is part of the same program, in whatever configuration."""
    found = []
    best = {(row["implementation"], _sizes(row)): row for row in best_configurations(result.get("configurations", []))}
    for row in result.get("products", []):
        if (seconds := row.get("seconds")) is None:
            continue
        packing = max(seconds["sparse and packing"] - seconds["sparse"], 0.0)
        origin = (device.device_kind, row["implementation"], row["version"], jax.__version__, row["dtype"])
        shape = (row["tokens"], row["rows"], row["k"])
        found.append(nm.matmul.Measurement(*origin, *shape, seconds["dense"], seconds["sparse"], packing))
        fastest = best.get((row["implementation"], _sizes(row)))
        if fastest is not None and fastest["configuration"] and (row["side"], row["dtype"]) == ("backward", "bfloat16"):
            times = fastest["dense"], fastest["sparse"], packing
            found.append(nm.matmul.Measurement(*origin, *shape, *times, tuple(fastest["configuration"].items())))
    return found


def best_configurations(rows: Sequence[dict]) -> list[dict]:
    """The fastest right configuration of each kernel at each shape."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row.get("error", 2.0) <= 1:
            key = row["implementation"], _sizes(row)
            if key not in best or row["sparse"] < best[key]["sparse"]:
                best[key] = row
    return list(best.values())


def measure(run: Run) -> dict:
    """Checks, then times what runs here."""
    begin, device, dry = time.monotonic(), jax.devices()[0], run.args.dry
    able, reasons = kernels(device)
    if dry:
        able = [dataclasses.replace(REFERENCE, name="dry")]
    sizes = DRY if dry else QUICK if run.quick else FULL
    given = run.args.seed
    seed = given if given is not None else int(np.random.SeedSequence().generate_state(1)[0])
    run.console.print(f"{device.device_kind}, jax {jax.__version__}, seed {seed}", highlight=False)
    if not able:
        run.console.print("No sparse kernel runs here:")
        for name, reason in reasons.items():
            run.console.print(f"  {name}: {reason}", highlight=False)
    result: dict = {"seed": seed, "checks": {}}
    for kernel in able or [REFERENCE]:
        result["checks"][kernel.name] = check(kernel, seed, sizes.checks)
        run.keep(result)
    if run.args.check:
        return result
    if right := [kernel for kernel in able if not wrong(result["checks"][kernel.name])]:
        time_kernels(Session(run, result, begin + run.args.budget), right, sizes)
        profile = run.args.profile or (run.path.with_suffix(".profile") if dry else None)
        profile = nm.matmul.save_profile(measurements(result, device), profile)
        run.console.print(f"wrote {profile}, which implementation=None now consults")
    elif not able:
        result["default"] = [bench_default(shape, sizes.repeats) for shape in sizes.default]
    return result


# ------------------------------------------------------------------------------------------------------------- reports


def tables(result: dict) -> list[Table]:
    """Correctness; speed relative to the dense product in the same run; where no kernel runs, the default."""
    checks = []
    for name, errors in result["checks"].items():
        worst = max((value for value in errors.values() if not isinstance(value, str)), default=float("nan"))
        checks.append((name, "WRONG" if wrong(errors) else "right", len(errors), f"{worst:.2f}"))
    found = [Table("checks", ("implementation", "", "checks", "worst error / allowed"), checks, "Against float64")]
    if "products" in result:
        header = ("kernel", "dtype", "product", "tokens x rows x k", "dense, TFLOP/s", "packed", "with packing")
        found.append(Table("products", header, [*map(_product, result["products"])], "Times the speed of dense"))
    if "configurations" in result:
        compared = [
            (row["implementation"], _settings(row), _sizes(row), *_configuration(row))
            for row in result["configurations"]
        ]
        columns: tuple[str, ...] = (
            "kernel",
            "configuration",
            "tokens x rows x k",
            "speed / dense",
            "error / allowed",
        )
        best = [
            f"{row['implementation']}, {_sizes(row)}: {_settings(row)}, {row['dense'] / row['sparse']:.2f} times dense"
            for row in best_configurations(result["configurations"])
        ]
        notes = f"Best of {'; of '.join(best)}." if best else ""
        found.append(Table("configurations", columns, compared, "Configurations", notes))
    if "training_steps" in result:
        steps = [
            (
                row["implementation"],
                row.get("failed") or _sizes(row, "tokens", "width", "hidden"),
                _times(row, "sparse"),
            )
            for row in result["training_steps"]
        ]
        notes = "Two of three products sparse, packing included."
        found.append(Table("steps", ("kernel", "MLP", "speed / dense"), steps, "A training step", notes))
    if rows := [row for row in result.get("cusparselt", []) if "seconds" in row]:
        cells = [(row["side"], _sizes(row), f"{1e3 * row['seconds']:.3f}") for row in rows]
        found.append(Table("cusparselt", ("product", "tokens x rows x k", "ms"), cells, "cuSPARSELt"))
    if "default" in result:
        default = [
            (
                _sizes(row),
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
    return " x ".join(str(row[name]) for name in names or ("tokens", "rows", "k"))


def _settings(row: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in row["configuration"].items()) or "the only one"


def _times(row: dict, name: str) -> str:
    seconds = row.get("seconds", {})
    return f"{seconds['dense'] / seconds[name]:.2f}" if name in seconds else "-"


def _product(row: dict) -> tuple[str, ...]:
    what = (row["implementation"], row["dtype"], row["side"], _sizes(row))
    if "failed" in row:
        return *what, row["failed"], "-", "-"
    rate = 2 * np.prod([float(row[name]) for name in ("tokens", "rows", "k")]) / row["seconds"]["dense"] / 1e12
    return *what, f"{rate:.0f}", _times(row, "sparse"), _times(row, "sparse and packing")


def _configuration(row: dict) -> tuple[str, str]:
    if "failed" in row:
        return row["failed"], "-"
    return f"{row['dense'] / row['sparse']:.2f}", f"{row['error']:.2f}"


def problems(result: dict) -> list[str]:
    """Checks that failed."""
    return [
        f"{kernel} is wrong: {name}, "
        + (value if isinstance(value, str) else f"{value:.3g} times what rounding allows")
        for kernel, errors in result["checks"].items()
        for name, value in wrong(errors).items()
    ]


def draw(result: dict) -> Figure | None:
    """Speed relative to dense at each shape; nothing where no kernel ran."""
    products = [row for row in result.get("products", []) if "seconds" in row]
    if not products:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{p['side']}, {p['dtype']}\n{_sizes(p)}\n{p['implementation']}" for p in products]
    for offset, name in enumerate(("sparse", "sparse and packing")):
        speed = [p["seconds"]["dense"] / p["seconds"][name] for p in products]
        axes.bar(np.arange(len(products)) + 0.35 * (offset - 0.5), speed, 0.35, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(products)), labels, fontsize=6)
    axes.set_ylabel("times the speed of the dense product")
    axes.legend()
    return figure


class _Dry(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        namespace.dry = namespace.quick = True  # tiny results go where those of --quick do


def options(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which numbers."""
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--dry", action=_Dry, nargs=0, default=False, help="all that a GPU would do, without one")
    parser.add_argument("--seed", type=int, help="of the random data; a fresh one unless given")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which no further row is begun")
    parser.add_argument("--profile", type=Path, help="where to save the profile, instead of the default place")


EXPERIMENT = Experiment(measure, tables, draw, problems, options)
