"""Solvers of transposable N:M masks side by side: speed, loss and feasibility.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
(NeurIPS 2021): their Tables 2 and A.3 are the overhead of a refresh every 40 steps (`paper/table_2`).

Everything is timed in one process, as the median of several runs after a first one; ratios between rows mean more
than the rows. Expected on 2 cores: `Exact` at 30 times OR-tools' blocks per second or more, `MeetInTheMiddle` (2:4) at
several times that, no loss, every gap 0; 8192 x 8192 at 8:16 in less than a second; greedy with completion loses 0.1 to
0.2 % of the kept weight, entropic transport less than 0.1 %. Real weights are read from $NM_JAX_DATA/weights when that
is there.

Paper: Tables 2 and A.3
Time: 15 minutes on 2 cores
Data: none
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import nm_jax as nm
from experiments.bench import baselines
from experiments.bench.blocks import DISTRIBUTIONS, blocks_of
from experiments.bench.models import MODELS, TINY, Shapes
from experiments.harness import Experiment, Run, Table
from experiments.train import Task, make_step, start
from nm_jax.solvers import Exact, Greedy, IntegerProgram, MeetInTheMiddle, MinCostFlow, default_solver

PATTERNS = ("2:4-T", "4:8-T", "8:16-T", "16:32-T")
# Blocks per second on 2 cores that were measured before, for comparison with this run's.
ORTOOLS_BEFORE = {"2:4-T": 240_000, "4:8-T": 62_800, "8:16-T": 14_400, "16:32-T": 3_360}
REFRESH_EVERY = 40


# ------------------------------------------------------------------------------------------------------------- methods


def transposable(pattern: str) -> nm.TransposableNM:
    """A pattern that is transposable."""
    parsed = nm.parse_pattern(pattern)
    assert isinstance(parsed, nm.TransposableNM)
    return parsed


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to masks.

    Attributes:
      function: of tiles (m, m, blocks) and the pattern, to their mask.
      title: in the documentation.
      on_device: whether it runs under jit; else on the host.
      supports: whether it can do a pattern.
    """

    function: Callable
    title: str
    on_device: bool = True
    supports: Callable[[nm.Pattern], bool] = lambda pattern: True


def _library(solver: nm.solvers.Solver, title: str, on_device: bool = True) -> Method:
    return Method(lambda scores, pattern: solver(scores, pattern).mask, title, on_device, solver.supports)


OPTIMAL = {"Exact": Exact(), "MeetInTheMiddle": MeetInTheMiddle()}  # on the device, with a proof
ORTOOLS = "OR-tools min-cost flow"
METHODS: dict[str, Method] = {
    **{name: _library(solver, f"**`{name}`**") for name, solver in OPTIMAL.items()},
    "Greedy (2-approximation, completed)": _library(Greedy(), "`Greedy()`"),
    "Greedy (Algorithm 1 to the letter)": _library(
        Greedy(complete=False), "`Greedy(complete=False)`: Algorithm 1, keeps fewer"
    ),
    "entropic transport, TSENOR's style": Method(baselines.entropic, "entropic transport in TSENOR's style"),
    ORTOOLS: Method(baselines.ortools, "OR-tools' min-cost flow, 64 blocks per network", on_device=False),
    "MinCostFlow (assignment gadget)": _library(MinCostFlow(), "`MinCostFlow`: SciPy's assignment", on_device=False),
    "HiGHS LP": Method(baselines.highs, "HiGHS' linear programme", on_device=False),
    "IntegerProgram": _library(IntegerProgram(), "`IntegerProgram`", on_device=False),
}


# -------------------------------------------------------------------------------------------------------------- timing


def median_time(call: Callable, runs: int) -> float:
    """Seconds, after a first call that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matrix_time(shape: tuple[int, ...], pattern: str, runs: int) -> float:
    """From a float32 matrix to its boolean mask."""
    scores = jnp.asarray(np.abs(np.random.default_rng(0).standard_normal(shape, np.float32)))
    return median_time(lambda: nm.solve(scores, pattern), runs)


def optimal_mask(pattern: nm.TransposableNM) -> Callable[[jax.Array], jax.Array]:
    """The default solver of the pattern, compiled."""
    solver = default_solver(pattern)
    return jax.jit(lambda scores: solver(scores, pattern).mask)


def compare(run: Run) -> list[dict]:
    """Every method on every pattern and kind of weights."""
    rows = []
    kinds = ("Gaussian", "heavy-tailed", "real weights")
    for kind in kinds[: 1 if run.quick else None]:
        for name in ("4:8-T",) if run.quick else PATTERNS:
            pattern = transposable(name)
            m = pattern.m
            scores = blocks_of(kind, m, (1 << (14 if run.quick else 22)) // m**2)
            if scores is None:
                run.console.print("no real weights: set NM_JAX_DATA to a folder that has weights/*.npz")
                break
            # The optimum, proved: what the others lose is measured against it.
            solution = jax.jit(lambda s, pattern=pattern: Exact()(s, pattern))(jnp.asarray(scores))
            if jnp.any(solution.proof.gap):
                raise RuntimeError(f"Exact left a gap at {name} on {kind}")
            best = np.where(np.asarray(solution.mask), scores, 0).sum((0, 1), dtype=np.float64)
            for method in (name for name, method in METHODS.items() if method.supports(pattern)):
                rows.append({"weights": kind, "pattern": name} | time_method(method, pattern, scores, best, run.quick))
    return rows


def time_method(method: str, pattern: nm.TransposableNM, scores: np.ndarray, best: np.ndarray, quick: bool) -> dict:
    """Speed and loss of one method; the slower ones see fewer blocks. `best` is what the optimum keeps."""
    function = METHODS[method].function
    if METHODS[method].on_device:
        part = scores if method in OPTIMAL else scores[:, :, : scores.shape[2] // 16]
        compiled, tiles = jax.jit(lambda s: function(s, pattern)), jnp.asarray(part)
        call = functools.partial(compiled, tiles)
    else:
        unit = 64 if method in (ORTOOLS, "HiGHS LP") else 4
        count = unit
        if not quick:
            pilot = median_time(functools.partial(function, scores[:, :, :unit], pattern), 1)
            count = int(np.clip(0.5 / pilot, 1, 512)) * unit
        part = scores[:, :, :count]
        call = functools.partial(function, part, pattern)
    seconds = median_time(call, 1 if quick else 5)
    mask = np.asarray(call())
    kept = np.where(mask, part, 0).sum((0, 1), dtype=np.float64)
    return {
        "method": method,
        "blocks": part.shape[2],
        "blocks_per_s": part.shape[2] / seconds,
        "loss_percent": 100 * float(1 - kept.sum() / best[: len(kept)].sum()),
        "exactly_n": bool(jnp.all(pattern.full(jnp.asarray(mask)))),
        "at_most_n": bool(jnp.all(pattern.allows(jnp.asarray(mask)))),
    }


def check_exactness(quick: bool) -> dict:
    """Against OR-tools on the solvers' own grids: integer optima must be equal, and every gap 0."""
    counts = {4: 3200, 8: 2400, 16: 500, 32: 120} if not quick else {4: 16}
    cases = [
        (nm.TransposableNM(base.n, base.m, at_most), solver)
        for base in map(transposable, PATTERNS[: len(counts)])
        for at_most in ((True,) if quick else (False, True))
        for solver in OPTIMAL.values()
        if solver.supports(base)
    ]
    blocks = wrong = unproved = infeasible = 0
    for pattern, solver in cases:
        solve = jax.jit(lambda s, pattern=pattern, solver=solver: solver(s, pattern))
        for kind in DISTRIBUTIONS:
            scores = blocks_of(kind, pattern.m, counts[pattern.m] // (2 if pattern.at_most else 1), seed=1)
            assert scores is not None
            solution = solve(jnp.asarray(scores))
            grid = on_grid(scores, solution.proof, pattern, solver)
            found = (grid * np.asarray(solution.mask)).sum((0, 1))
            optimum = (grid * baselines.ortools_integer(grid, pattern)).sum((0, 1))
            blocks += scores.shape[2]
            wrong += int((found != optimum).sum())
            unproved += int(jnp.sum(~solution.proof.proved | (solution.proof.gap > 0)))
            infeasible += int(jnp.sum(~pattern.full(solution.mask)))
    counted = {"wrong": wrong, "unproved": unproved, "infeasible": infeasible}
    return {"blocks": blocks, "distributions": len(DISTRIBUTIONS), **counted}


def on_grid(
    scores: np.ndarray, proof: nm.solvers.Proof, pattern: nm.TransposableNM, solver: nm.solvers.Solver
) -> np.ndarray:
    """The integers (m, m, blocks) that a solver maximises, in NumPy float64."""
    wanted = np.maximum(scores, 0) if pattern.at_most else scores
    rounding = np.asarray(proof.rounding, np.float64)
    unit = np.where(rounding > 0, rounding / (pattern.n * pattern.m), 2.0**-149)  # the finest grid there is
    ratio = wanted.astype(np.float64) / unit
    away = np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)
    # Halves go to the even neighbour where a block need not be scaled before.
    largest = np.abs(scores).max((0, 1)).astype(np.float64)
    even = isinstance(solver, MeetInTheMiddle) & (largest >= 2.0**-100) & (largest < 2.0**101)
    return np.where(even, np.rint(ratio), away).astype(np.int64)


def scaling(quick: bool) -> dict:
    """Blocks per second by the number of blocks, and by m at n = m / 2 (rounded down)."""
    by_blocks = []
    for name in ("4:8-T",) if quick else PATTERNS:
        pattern = transposable(name)
        for exponent in range(0, 5 if quick else 25, 4):
            count = 1 << exponent
            if count * pattern.m**2 > 1 << 28:
                break
            call = functools.partial(optimal_mask(pattern), jnp.asarray(blocks_of("Gaussian", pattern.m, count)))
            by_blocks.append({"pattern": name, "blocks": count, "blocks_per_s": count / median_time(call, 3)})
    by_m = []
    for m in (8,) if quick else (2, 3, 4, 6, 8, 12, 16, 24, 32):
        for at_most in (False,) if quick else (False, True):
            pattern = nm.TransposableNM(m // 2, m, at_most)
            count = (1 << (10 if quick else 20)) // m**2
            call = functools.partial(optimal_mask(pattern), jnp.asarray(blocks_of("Gaussian", m, count)))
            by_m.append({"m": m, "at_most": at_most, "blocks_per_s": count / median_time(call, 3)})
    return {"by_blocks": by_blocks, "by_m": by_m}


def hard_cases(quick: bool) -> dict:
    """Heavy ties at 16:32, and one large matrix at 8:16."""
    rows = {}
    n, m = (4, 8) if quick else (16, 32)
    for kind in ("binary",) if quick else ("four levels", "thirds", "binary"):
        scores = jnp.asarray(blocks_of(kind, m, 16 if quick else 2048))
        seconds = median_time(functools.partial(optimal_mask(nm.TransposableNM(n, m)), scores), 5)
        rows[f"{kind}, {n}:{m}, blocks/s"] = scores.shape[2] / seconds
    size, pattern = (64, "4:8") if quick else (8192, "8:16")
    rows[f"{size} x {size} at {pattern}, s"] = matrix_time((size, size), f"{pattern}-T", 3)
    return rows


# -------------------------------------------------------------------------------------------------------- whole models


def whole_models(quick: bool) -> list[dict]:
    """Times of all weights of a model: ResNet-50 as one compiled call, blocks of all layers together; the others by
    timing each distinct matrix shape and multiplying by its count."""
    rows = []
    for name in ("4:8-T",) if quick else PATTERNS:
        for model, shapes in (TINY if quick else MODELS).items():
            # The classifier's 1000 outputs are left out where m does not divide them.
            fits = {s: count for s, count in shapes.items() if s[-1] % transposable(name).m == 0}
            weights = sum(int(np.prod(s)) * count for s, count in fits.items())
            row = {"model": model, "pattern": name, "weights": weights}
            if model == "ResNet-50":
                seconds, compile_seconds = _tree_time(fits, name)
                rows.append(row | {"seconds": seconds, "compile_s": compile_seconds})
            else:
                seconds = sum(matrix_time(s, name, 2) * count for s, count in fits.items())
                rows.append(row | {"seconds": seconds, "compile_s": None})
    return rows


def _tree_time(shapes: Shapes, pattern: str) -> tuple[float, float]:
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
    """What a refresh every 40 steps adds to a training step of some square layers, 4:8-T."""
    size, layers, batch = (64, 2, 8) if quick else (1024, 6, 512)
    runs = 3 if quick else 15
    rng = np.random.default_rng(0)
    params = {f"layer{k}": jnp.asarray(rng.standard_normal((size, size), np.float32) / 32) for k in range(layers)}
    x = jnp.asarray(rng.standard_normal((batch, size), np.float32))

    def loss(params, extra, batch, key):
        del key
        y = batch
        for w in params.values():
            y = jax.nn.relu(y @ w)
        return jnp.mean(y**2), extra

    task = Task(lambda key: (params, {}), loss, lambda number: x)

    def steps(tx: optax.GradientTransformation) -> tuple[Callable, Callable]:
        """A step that refreshes nothing, and one that does."""
        state, step = start(task, tx), make_step(task.loss, tx, donate=False)
        if not isinstance(state.opt_state, nm.SparseTrainingState):
            return lambda: step(state, x), lambda: step(state, x)
        due = state._replace(opt_state=state.opt_state._replace(step=jnp.int32(REFRESH_EVERY - 1)))
        return lambda: step(state, x), lambda: step(due, x)

    plain = optax.adamw(1e-3)
    plain_step, _ = steps(plain)
    of = ("Gaussian", "4:8-T")
    rates = {row["method"]: row["blocks_per_s"] for row in comparison if (row["weights"], row["pattern"]) == of}
    rows = []
    for method, solver in (
        ("IntegerProgram", None),
        ("MinCostFlow (assignment gadget)", None),
        (ORTOOLS, None),
        ("Greedy (Algorithm 1 to the letter)", Greedy(complete=False)),
        ("Greedy (2-approximation, completed)", Greedy()),
        ("Exact", Exact()),
    ):
        plain_seconds = median_time(plain_step, runs)
        if solver is None:
            refresh_seconds, how = layers * (size // 8) ** 2 / rates[method], "from its rate"
        else:
            tx = nm.sparse_training(plain, [("layer", "4:8-T")], refresh_every=REFRESH_EVERY, solver=solver)
            resting, refreshing = (median_time(step, runs) for step in steps(tx))
            refresh_seconds, how = refreshing - resting, "measured"
        rows.append(
            {
                "method": method,
                "plain_step_s": plain_seconds,
                "refresh_s": refresh_seconds,
                "how": how,
                "overhead_percent": 100 * refresh_seconds / REFRESH_EVERY / plain_seconds,
            }
        )
    return rows


# -------------------------------------------------------------------------------------------------------------- output


def measure(run: Run) -> dict:
    """Everything, the quick parts last."""
    result: dict = {}
    with run.progress() as progress:
        task = progress.add_task("", total=6)
        for name, part in {
            "comparison": lambda: compare(run),
            "exactness": lambda: check_exactness(run.quick),
            "hard_cases": lambda: hard_cases(run.quick),
            "scaling": lambda: scaling(run.quick),
            "overhead": lambda: overhead(result["comparison"], run.quick),
            "models": lambda: whole_models(run.quick),
        }.items():
            progress.update(task, description=name)
            result[name] = part()
            progress.advance(task)
    return result


def tables(result: dict) -> list[Table]:
    """Speed and loss of every method; exactness; hard cases; scaling; whole models."""
    comparison = result["comparison"]
    patterns = list(dict.fromkeys(row["pattern"] for row in comparison))
    gaussian = [row for row in comparison if row["weights"] == "Gaussian"]
    fastest = (*OPTIMAL, ORTOOLS, "MinCostFlow (assignment gadget)", "HiGHS LP", "IntegerProgram")
    speed = []
    measured = [method for method in METHODS if any(row["method"] == method for row in gaussian)]
    for method in sorted(measured, key=lambda method: fastest.index(method) if method in fastest else len(fastest)):
        rows = [row for row in gaussian if row["method"] == method]
        rates = {row["pattern"]: _two_digits(row["blocks_per_s"]) for row in rows}
        lost = _lost([row["loss_percent"] for row in rows])
        speed.append((METHODS[method].title, *map(rates.get, patterns), lost))
    every = [
        (
            *(r["weights"], r["pattern"], r["method"], f"{r['blocks_per_s']:,.0f}", f"{r['loss_percent']:.3f}"),
            *("yes" if r[name] else "no" for name in ("exactly_n", "at_most_n")),
        )
        for r in comparison
    ]
    exactness = result["exactness"]
    hard = [(name, _two_digits(x) if x > 10 else f"{x:.2f}") for name, x in result["hard_cases"].items()]
    models = [
        (
            *(r["model"], r["pattern"], f"{r['weights'] / 1e6:,.1f} M", f"{r['seconds']:.2f}"),
            f"{r['compile_s']:.1f}" if r["compile_s"] else None,
        )
        for r in result["models"]
    ]
    by_blocks = [(r["pattern"], r["blocks"], f"{r['blocks_per_s']:,.0f}") for r in result["scaling"]["by_blocks"]]
    by_m = [
        (r["m"], "at most n" if r["at_most"] else "exactly n", f"{r['blocks_per_s']:,.0f}")
        for r in result["scaling"]["by_m"]
    ]
    columns = ("weights", "pattern", "method", "blocks/s", "lost, %", "exactly n", "at most n")
    return [
        Table("speed", ("", *patterns, "lost"), speed, "Blocks per second, Gaussian weights"),
        Table("every", columns, every, "Every method"),
        Table("ortools", ("weights", "pattern", "solver", "/ OR-tools"), _ratios(comparison), "Blocks per second"),
        Table("exactness", tuple(exactness), [tuple(exactness.values())], "Integer optima against OR-tools"),
        Table("hard", ("case", ""), hard, "Heavy ties and a large matrix"),
        Table("blocks", ("pattern", "blocks", "blocks/s"), by_blocks, "The default solver: number of blocks"),
        Table("sizes", ("m (n = m / 2)", "", "blocks/s"), by_m, "The default solver: block size"),
        Table("models", ("model", "pattern", "weights", "s", "to compile, s"), models, "All weights of a model"),
    ]


def _two_digits(value: float) -> str:
    """12046153 -> 12,000,000."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _lost(percents: list[float]) -> str:
    if max(percents) < 1e-3:
        return "0"
    digits = 2 if max(percents) < 0.1 else 1
    least, most = (f"{value:.{digits}f}" for value in (min(percents), max(percents)))
    return f"{least} to {most} %" if least != most else f"{most} %"


def _ratios(comparison: list[dict]) -> list[tuple[str, str, str, str]]:
    rates = {(row["weights"], row["pattern"], row["method"]): row["blocks_per_s"] for row in comparison}
    return [
        (weights, pattern, method, f"{rate / rates[weights, pattern, ORTOOLS]:.0f}")
        for (weights, pattern, method), rate in rates.items()
        if method in OPTIMAL
    ]


def problems(result: dict) -> list[str]:
    """Optima that are none."""
    exactness = result["exactness"]
    names = ("wrong", "unproved", "infeasible")
    return [f"{exactness[name]} of {exactness['blocks']} blocks are {name}" for name in names if exactness[name]]


def draw(result: dict) -> Figure:
    """Every method by pattern; the exact solver by number of blocks and by m."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    methods, numbers, sizes = figure.subplots(1, 3)
    gaussian = [row for row in result["comparison"] if row["weights"] == "Gaussian"]
    for method in METHODS:
        rates = {row["pattern"]: row["blocks_per_s"] for row in gaussian if row["method"] == method}
        methods.plot(*zip(*rates.items(), strict=True), marker="o", label=method, lw=2.5 if method in OPTIMAL else 1)
    methods.set(yscale="log", ylabel="blocks / s", title="Gaussian blocks")
    methods.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2, frameon=False)
    by_blocks, by_m = result["scaling"]["by_blocks"], result["scaling"]["by_m"]
    for name in dict.fromkeys(row["pattern"] for row in by_blocks):
        points = [(row["blocks"], row["blocks_per_s"]) for row in by_blocks if row["pattern"] == name]
        numbers.plot(*zip(*points, strict=True), marker="o", label=name)
    numbers.set(
        xscale="log", yscale="log", xlabel="blocks", ylabel="blocks / s", title="Default solver: number of blocks"
    )
    numbers.legend()
    for at_most in (False, True):
        rows = [row for row in by_m if row["at_most"] == at_most]
        weights = [row["blocks_per_s"] * row["m"] ** 2 for row in rows]
        sizes.plot([row["m"] for row in rows], weights, marker="o", label="at most n" if at_most else "exactly n")
    sizes.set(
        xscale="log", yscale="log", xlabel="m (n = m / 2)", ylabel="weights / s", title="Default solver: block size"
    )
    sizes.minorticks_off()
    ticks = sorted({row["m"] for row in by_m})
    sizes.set_xticks(ticks, map(str, ticks))
    sizes.legend()
    return figure


EXPERIMENT = Experiment(measure, tables, draw, problems)
