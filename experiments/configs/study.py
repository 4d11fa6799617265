"""Trained results: the same training for every mask, several seeds each, kept and continued over several starts.

A file of this folder states one `Study` and makes an experiment of it. The folder of the runs (`--runs`) has one folder
for each variant and seed; a start goes on where the last one was left, and the result says how far each run is.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import TextColumn

import nm_jax as nm
from experiments.configs.comparison import curves, tables
from experiments.harness import Experiment, Run
from experiments.train import Recipe, Task, Training, classification, evaluated
from experiments.train.folder import metrics
from experiments.train.task import cross_entropy

TEST_BATCH = 500
QUICK = 64  # examples
BEFORE = "before"  # folder of the run that the others go on from
TRAINING = {"step", "loss", "flip_rate", "seconds"}  # figures of a line of metrics that are no evaluation's


class Data(Protocol):
    """What is learned from; an epoch goes through `count` examples. `source` tells it from other data."""

    @property
    def source(self) -> str: ...
    @property
    def count(self) -> int: ...
    def head(self, count: int, /) -> "Data": ...


class Images(Data, Protocol):
    """Images and their classes, as `experiments.data.images` and `experiments.data.folders` have them."""

    def batches(self, size: int, seed: int, /) -> Callable[[int], Any]: ...
    def tests(self, size: int, /) -> Iterator[Any]: ...


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
      name: in tables.
      pattern: of all layers but the first and the last; `None`: dense.
      refresh_every: as in `nm.sparse_training`.
      decay: as in `nm.sparse_training`.
      solver: as in `nm.sparse_training`.
    """

    name: str
    pattern: str | None = None
    refresh_every: int | None = 40
    decay: float = 2e-4
    solver: nm.solvers.Solver | None = None

    def sparse(self, tx: optax.GradientTransformation, dense: list) -> optax.GradientTransformation:
        """The optimiser, sparse where there is a pattern, in all layers but those that stay dense."""
        return self.by(tx, [*dense, ("kernel", self.pattern)])

    def by(self, tx: optax.GradientTransformation, rules: Any) -> optax.GradientTransformation:
        """The optimiser, sparse by rules or by a plan if there is a pattern."""
        if self.pattern is None:
            return tx
        settings = {"refresh_every": self.refresh_every, "decay": self.decay, "solver": self.solver}
        return nm.recipes.paper(tx, rules, **settings)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is trained, and of what.

    Attributes:
      recipe: schedule and optimiser.
      module: the network.
      data: reads the data, of the folder that `--data` names, or of none.
      weights: reads what to start from, of the file that `--weights` names, or of none; `None`: from scratch.
      seeds: of each variant.
      network: name of the network, for tables.
      before: the dense network is trained by this first, once, and every variant goes on from there.
    """

    recipe: Recipe
    module: nn.Module
    data: Callable[[Path | None], Any]
    weights: Callable[[Path | None], Any] | None = None
    seeds: int = 3
    network: str = ""
    before: Recipe | None = None

    @property
    def start(self) -> str:
        """What the variants go on from, for tables."""
        return "scratch" if self.weights is None and self.before is None else "pretrained"


def task(preset: Preset, data: Images, start: Any, seed: int) -> Task:
    """Images into classes, by the recipe; from the variables `start`, or from scratch."""
    module, recipe = preset.module, preset.recipe
    batches = data.batches(recipe.batch, seed)

    @jax.jit
    def judge(variables, images, labels):
        logits = module.apply(variables, images)
        return jnp.sum(logits.argmax(axis=-1) == labels) / labels[0].size, cross_entropy(logits, labels) * len(labels)

    def evaluate(params, extra):
        count, sums = 0, np.zeros(2)
        for images, labels in data.tests(TEST_BATCH):
            sums += [float(x) for x in judge({"params": params, **extra}, images, labels)]
            count += len(labels)
        return {"accuracy": 100 * sums[0] / count, "test_loss": sums[1] / count}

    if start is None:
        one = jnp.zeros_like(next(data.tests(1))[0])

        def start(key):
            return module.init(key, one)

    compute = None if recipe.compute is None else jnp.dtype(recipe.compute)
    return classification(module, start, batches, evaluate, smoothing=recipe.smoothing, compute=compute)


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants that are trained alike.

    Attributes:
      name: of its file.
      variants: what is compared; the first one is what the others are compared with.
      presets: how much, by name.
      dense: rules of the layers that stay dense: the first and the last.
      learned: what is learned; preset, data, what the weights are or `None`, seed -> task.
      planned: preset, pattern -> the plan that patterns go by, instead of rules; the result says what it leaves dense.
      figures: what evaluation gives and tables show; variants are compared by the first one, and more of it is better.
    """

    name: str
    variants: tuple[Variant, ...]
    presets: Mapping[str, Preset]
    dense: tuple[tuple[str, None], ...] = (("^(conv1|features_0)/", None), ("^(linear|fc|classifier_6)/", None))
    learned: Callable[[Preset, Any, Any, int], Task] = task
    planned: Callable[[Preset, str], nm.Plan] | None = None
    figures: tuple[str, ...] = ("accuracy",)

    def experiment(self) -> Experiment:
        """What the file of the study is listed as."""
        return Experiment(self._measure, tables, curves, options=_options, presets=tuple(self.presets))

    def _measure(self, run: Run) -> dict:
        preset = self.presets[run.part]
        if run.quick:
            preset = quick(preset)
        data = preset.data(run.args.data)
        data = data.head(QUICK) if run.quick else data
        start = preset.weights and preset.weights(run.args.weights)
        runs = [(seed, variant) for seed in range(preset.seeds) for variant in self.variants]
        now = [(seed, variant) for seed, variant in runs if seed < (run.args.seeds or preset.seeds)]
        until = time.monotonic() + 60 * run.args.minutes if run.args.minutes else None
        base = (run.path.parent if run.quick else run.args.runs) / self.name / run.part
        steps = data.count // preset.recipe.batch
        patterns = dict.fromkeys(variant.pattern for variant in self.variants if variant.pattern is not None)
        plans = {pattern: self.planned(preset, pattern) for pattern in patterns} if self.planned else {}

        def result():
            rows = [progress(base / folder(v, s), v, s, preset.recipe.epochs) for s, v in runs]
            found = {
                "preset": run.part,
                "network": preset.network,
                "data": data.source,
                "start": preset.start,
                "recipe": dataclasses.asdict(preset.recipe),
                "steps_per_epoch": steps,
                "figures": list(self.figures),
                "rows": rows,
            }
            if preset.before is not None:
                dense = progress(base / BEFORE, Variant("dense"), 0, preset.before.epochs)
                found["before"] = dense | {"recipe": dataclasses.asdict(preset.before)}
            if plans:
                found["dense"] = {pattern: left_dense(plan) for pattern, plan in plans.items()}
            return found

        def advance(display, preset, variant, seed, path) -> Training | None:
            """A run that has been brought to its end; `None` if there was no time for it."""
            training = self._run(preset, data, start, variant, seed, path, plans)
            name = f"{variant.name}, seed {seed}" if path.name != BEFORE else "dense, before"
            per_epoch = data.count // preset.recipe.batch
            bar = display.add_task(name, total=training.steps, completed=training.number, seen="")
            try:
                while training.number < training.steps:
                    if until is not None and time.monotonic() > until:
                        return None
                    training.step()
                    display.advance(bar)
                    if training.number % per_epoch == 0:
                        run.record(result())
                        first = self.figures[0]
                        display.update(bar, seen=f"{first.replace('_', ' ')} {metrics(path)[-1][first]:.2f}")
                return training
            finally:
                training.close()

        with run.progress(TextColumn("{task.fields[seen]}")) as display:
            if preset.before is not None:
                first = dataclasses.replace(preset, recipe=preset.before, before=None)
                if (training := advance(display, first, Variant("dense"), 0, base / BEFORE)) is None:
                    return result()
                params, extra = evaluated(training.state)
                start = {"params": params, **extra}
            for seed, variant in now:
                if advance(display, preset, variant, seed, base / folder(variant, seed)) is None:
                    break
        return result()

    def _run(
        self, preset: Preset, data: Data, start: Any, variant: Variant, seed: int, path: Path, plans: dict
    ) -> Training:
        recipe, steps = preset.recipe, data.count // preset.recipe.batch
        tx = recipe.optimiser(steps)
        tx = (
            variant.by(tx, plans[variant.pattern]) if variant.pattern in plans else variant.sparse(tx, list(self.dense))
        )
        settings = {
            "variant": dataclasses.asdict(variant) | {"solver": repr(variant.solver)},
            "recipe": dataclasses.asdict(recipe),
            "data": data.source,
            "from": preset.start,
        }
        return Training(
            self.learned(preset, data, start, seed),
            tx,
            steps * recipe.epochs,
            seed=seed,
            folder=path,
            save_every=max(10, steps // 4),
            evaluate_every=steps,
            log_every=50,
            settings=settings,
            accumulate=recipe.accumulate,
            average=recipe.average,
        )


def quick(preset: Preset) -> Preset:
    """Everything, but tiny."""

    def of(recipe):
        return dataclasses.replace(recipe, epochs=1, warmup=0, drops=(), batch=QUICK // 2)

    return dataclasses.replace(preset, recipe=of(preset.recipe), seeds=1, before=preset.before and of(preset.before))


def left_dense(plan: nm.Plan) -> dict[str, str]:
    """The matrices and kernels that stay dense, and why."""
    return {leaf.path: leaf.reason for leaf in plan.leaves if leaf.pattern is None and len(leaf.shape) > 1}


def folder(variant: Variant, seed: int) -> str:
    """Name of the folder of a run."""
    return f"{variant.name.replace(' ', '_').replace(':', '-').replace('/', '-')}_{seed}"


def progress(path: Path, variant: Variant, seed: int, epochs: int) -> dict:
    """How far a run is, and what it has come to, by its metrics."""
    lines = metrics(path)
    tested = [line for line in lines if line.keys() - TRAINING]
    names = [name for name in tested[-1] if name not in TRAINING] if tested else []
    row: dict[str, Any] = {
        "name": variant.name,
        "pattern": variant.pattern,
        "refresh_every": variant.refresh_every,
        "solver": repr(variant.solver) if variant.solver is not None else None,
        "seed": seed,
        "epochs": epochs,
        "epochs_done": len(tested),
        "evaluations": {name: [round(line[name], 4) for line in tested] for name in names},
        "losses": [round(line["loss"], 4) for line in tested],
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }
    if lines and "flip_rate" in lines[-1]:
        row["flip_rates"] = [float(f"{line['flip_rate']:.3g}") for line in tested]
    return row


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--data", type=Path, help="folder of the images: ImageNet's, or CIFAR's official files")
    parser.add_argument("--weights", type=Path, help="file of the pretrained weights, where the preset needs one")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next start goes on")
    parser.add_argument("--seeds", type=int, help="train the first seeds alone; the others are left for another start")
