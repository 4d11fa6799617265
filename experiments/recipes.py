"""Which recipe of sparse training keeps up with dense, on small tasks: ways to decay and to refresh, and larger steps.

The paper's recipe is SR-STE: a decay of 2e-4 on the gradient of pruned weights, a refresh every 40 updates until the
end (Hubara et al., NeurIPS 2021, Section 4). Here four networks are trained from scratch with every layer sparse, in
the same number of steps and at the learning rate of the dense one: an autoencoder of digits, with its loss averaged and
summed over pixels; a noisy teacher network; digits into classes.

Expected: in regression the paper's recipe ends behind a mask that never changes, the more so the smaller the gradients
are. The default does not, whatever the scale of the loss: pruned weights decay as fast as the optimiser moves, and
larger steps of sparse weights close most of the rest. Steps 1 / density times as large can diverge.

Paper: Section 4
Time: 1 hour on 2 cores
Data: none
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nm_jax as nm
from experiments.data import batches, digits
from experiments.harness import Experiment, Run, Table
from experiments.train import Task, Training
from experiments.train.task import cross_entropy

STEPS, BATCH, SEEDS = 1200, 64, 3
S_STE = "S-STE"  # a way to compute with weights, for n:m alone; the optimiser stays as it is
PATTERNS = ("2:4-T", "2:4", "4:8-T")
EVERY = 40


class Layers(nn.Module):
    """Dense layers of these sizes, GELU between them."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.gelu(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


# --------------------------------------------------------------------------------------------------------------- tasks


def task(module: nn.Module, data: tuple, loss: Callable, error: Callable, steps: int) -> Task:
    """Train inputs, test inputs, train targets, test targets; loss and test error of outputs and targets."""
    inputs, tests, targets, wanted = (jnp.asarray(values) for values in data)
    chosen = batches.drawn(len(inputs), BATCH, steps, seed=0)

    def of_batch(params, extra, batch, key):
        del key
        return loss(module.apply({"params": params}, inputs[batch]), targets[batch]), extra

    @jax.jit
    def tested(params):
        return error(module.apply({"params": params}, tests), wanted)

    return Task(
        lambda key: (module.init(key, inputs[:1])["params"], {}),
        of_batch,
        lambda number: jnp.asarray(chosen[number]),
        lambda params, extra: {"error": float(tested(params))},
    )


def thousand_mse(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """1000 x the mean squared error."""
    return 1e3 * jnp.mean((outputs - targets) ** 2)


def autoencoder(reduce: Callable, steps: int) -> Task:
    """64-128-32-128-64 on digits; the squared errors of a batch are reduced so."""
    train, test, _, _ = (part.reshape(len(part), -1) for part in digits.load())
    module = Layers((128, 32, 128, train.shape[1]))
    return task(module, (train, test, train, test), lambda y, x: reduce((y - x) ** 2), thousand_mse, steps)


def teacher(steps: int) -> Task:
    """A network of 32-128-128-16 learns a smaller one's outputs with noise, and is tested without."""
    size, hidden, outputs, noise = 8000, 24, 16, 0.1
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (size + 1000, 32))
    known = Layers((hidden, outputs))
    y = 2 * jnp.asarray(known.apply(known.init(keys[1], x), x))
    seen = y + noise * jax.random.normal(keys[2], y.shape)
    module = Layers((128, 128, outputs))
    return task(module, (x[:size], x[size:], seen[:size], y[size:]), mean_square, thousand_mse, steps)


def mean_square(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean squared error."""
    return jnp.mean((outputs - targets) ** 2)


def classes(steps: int) -> Task:
    """64-128-128-12 sorts digits; two outputs are of no digit, so that 4 divides them."""
    train, test, labels, wanted = digits.load()
    data = (train.reshape(len(train), -1), test.reshape(len(test), -1), labels, wanted)
    return task(Layers((128, 128, 12)), data, cross_entropy, lambda y, k: 100 * jnp.mean(y.argmax(-1) != k), steps)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task, its optimiser, and what is measured."""

    make: Callable[[int], Task]
    inner: Callable[[int], optax.GradientTransformation]
    metric: str


def adamw(steps: int) -> optax.GradientTransformation:
    """With a cosine schedule to 0."""
    return optax.adamw(optax.cosine_decay_schedule(3e-3, steps))


def momentum(steps: int, rate: float) -> optax.GradientTransformation:
    """SGD with momentum, with a cosine schedule to 0."""
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)


MSE = "1000 x test MSE"
SETTINGS = {
    "autoencoder": Setting(functools.partial(autoencoder, jnp.mean), adamw, MSE),
    "autoencoder-sum": Setting(functools.partial(autoencoder, lambda e: jnp.sum(e) / BATCH), adamw, MSE),
    "autoencoder-sgd": Setting(functools.partial(autoencoder, jnp.mean), functools.partial(momentum, rate=0.5), MSE),
    "teacher": Setting(teacher, adamw, MSE),
    "classes": Setting(classes, adamw, "test errors, %"),
    "classes-sgd": Setting(classes, functools.partial(momentum, rate=0.1), "test errors, %"),
    "classes-sgd-fast": Setting(classes, functools.partial(momentum, rate=0.3), "test errors, %"),
}


# -------------------------------------------------------------------------------------------------------------- recipes


def recipes(steps: int) -> dict[str, Callable[..., optax.GradientTransformation]]:
    """By name: what makes an optimiser sparse, given it, a pattern and a solver."""
    sparse, paper, fixed = nm.sparse_training, nm.recipes.paper, nm.recipes.fixed_mask
    unscaled = functools.partial(sparse, scale_steps=0.0)
    return {
        "fixed mask": fixed,
        "paper": paper,
        "default": sparse,
        "maximal update": nm.recipes.maximal_update,
        "fixed mask, maximal update": functools.partial(fixed, scale_steps=1.0),
        "paper, maximal update": functools.partial(paper, scale_steps=1.0),
        "paper, no refresh after half": functools.partial(paper, end_step=steps // 2),
        "GradientDecay(2e-2)": functools.partial(paper, decay=2e-2),
        "StepDecay(1)": functools.partial(unscaled, decay=nm.StepDecay(1.0)),
        "StepDecay(3)": unscaled,
        "StepDecay(10)": functools.partial(unscaled, decay=nm.StepDecay(10.0)),
        "StepDecay(3), dense for a tenth": functools.partial(unscaled, begin_step=steps // 10),
        "default, ever more rarely": functools.partial(sparse, refresh_every=optax.linear_schedule(10, 100, steps)),
        "default, until settled": functools.partial(sparse, end_when_settled=0.1),
        "default, 2:4 for a quarter": functools.partial(nm.recipes.gradual_transposable, until=steps // 4),
        "default, decaying for a quarter": functools.partial(nm.recipes.decaying, until=steps // 4),
        S_STE: lambda inner, pattern, solver: inner,
    }


def softened(task: Task, pattern: str) -> Task:
    """The task with S-STE's weights in place of the kernels, which train as if they were dense."""

    def init(key):
        params, _ = task.init(key)
        return params, {layer: nm.s_ste_scale(leaves["kernel"], pattern) for layer, leaves in params.items()}

    def soft(params, scales):
        return {
            layer: {**leaves, "kernel": nm.s_ste(leaves["kernel"], scales[layer], pattern)}
            for layer, leaves in params.items()
        }

    def loss(params, scales, batch, key):
        return task.loss(soft(params, scales), {}, batch, key)[0], scales

    assert task.evaluate is not None
    evaluate = task.evaluate
    return Task(init, loss, task.batch, lambda params, scales: evaluate(soft(params, scales), {}))


def train(task: Task, tx: optax.GradientTransformation, steps: int, seed: int, sparse: bool) -> dict:
    """Test error, mean flip rate of all refreshes and seconds of a step (the median) of one run."""
    training, seconds, flips = Training(task, tx, steps, seed=seed), [], []
    for number in range(1, steps + 1):
        start = time.perf_counter()
        jax.block_until_ready(training.step())
        seconds.append(time.perf_counter() - start)
        if sparse and number % EVERY == 0:
            flips.append(float(nm.refresh_stats(training.state.opt_state).flip_rate.mean()))
    assert task.evaluate is not None
    found = task.evaluate(training.state.params, training.state.extra)
    return found | {"flips": float(np.mean(flips)) if flips else 0.0, "seconds": float(np.median(seconds))}


def measure(run: Run) -> dict:
    """All recipes on one task; a run that was cut off goes on with the next row."""
    steps, seeds = (EVERY, 1) if run.quick else (STEPS, SEEDS)
    patterns = PATTERNS[:1] if run.quick else tuple(run.args.patterns.split(","))
    setting, known = SETTINGS[run.part], recipes(steps)
    names = run.args.recipes.split(";") if run.args.recipes else list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown recipes {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [(pattern, name) for pattern in patterns for name in names if name != S_STE or "-" not in pattern]
    wanted.insert(0, (None, "dense"))
    if run.quick:
        wanted = wanted[:4] if run.part == "autoencoder" else wanted[:1]
    facts = {"metric": setting.metric, "steps": steps, "seeds": seeds}
    rows = _kept(run, facts)
    learned, inner = setting.make(steps), setting.inner(steps)
    with run.progress() as progress:
        bar = progress.add_task(run.part, total=len(wanted))
        for pattern, name in wanted:
            if not any((row["pattern"], row["recipe"]) == (pattern, name) for row in rows):
                tx = inner if pattern is None else known[name](inner, pattern, solver=_solver(pattern))
                soft = name == S_STE
                trained = softened(learned, str(pattern)) if soft else learned
                found = [train(trained, tx, steps, seed, pattern is not None and not soft) for seed in range(seeds)]
                columns = {key: [one[key] for one in found] for key in found[0]}
                rows.append({"pattern": pattern, "recipe": name} | columns)
                run.keep(facts | {"rows": rows})
            progress.advance(bar)
    places = [(pattern, name) for pattern in (None, *PATTERNS) for name in ("dense", *known)]
    return facts | {"rows": sorted(rows, key=lambda row: places.index((row["pattern"], row["recipe"])))}


def _solver(pattern: str) -> nm.solvers.Solver | None:
    """Exact, and soon compiled where masks can be listed."""
    return nm.solvers.Enumeration() if pattern.startswith("2:4") else None


def _kept(run: Run, facts: dict) -> list[dict]:
    """The rows of a record of the same setting, cut off or with fewer patterns."""
    for path in (run.path.with_suffix(".part"), run.path):
        if path.exists():
            found = json.loads(path.read_text())
            found = found.get("result", found)
            if facts.items() <= found.items():
                return found["rows"]
    return []


# -------------------------------------------------------------------------------------------------------------- output


def tables(result: dict) -> list[Table]:
    """One line per recipe, by pattern."""
    [dense] = [row for row in result["rows"] if row["pattern"] is None]
    lines = []
    for row in result["rows"]:
        relative = np.mean(row["error"]) / np.mean(dense["error"])
        unknown = row["pattern"] is None or row["recipe"] == S_STE
        flips = None if unknown else f"{100 * np.mean(row['flips']):.2f} %"
        lines.append((row["recipe"], row["pattern"], summary(row["error"]), f"{relative:.2f}", flips))
    header = ("recipe", "pattern", result["metric"], "of dense", "flip rate")
    notes = (
        f"Mean and standard deviation over {result['seeds']} seeds, {result['steps']} steps. of dense: relative to the "
        "dense network. flip rate: mean over all refreshes. What a step costs: bench/training."
    )
    return [Table("recipes", header, lines, result["metric"], notes)]


def summary(values: list[Any]) -> str:
    """Mean and, of several, standard deviation."""
    return f"{np.mean(values):.2f}" + (f" ±{np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def options(parser: argparse.ArgumentParser) -> None:
    """Which patterns and recipes."""
    every = ",".join(PATTERNS)
    parser.add_argument("--patterns", default=every, help=f"comma-separated, of {every}; all unless given")
    parser.add_argument("--recipes", default="", help="separated by semicolons; all unless given")


EXPERIMENT = Experiment(measure, tables, options=options, parts=tuple(SETTINGS))
