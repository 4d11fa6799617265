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
from experiments.configs.comparison import tables
from experiments.harness import Experiment, Run
from experiments.train import Recipe, Task, Training, classification
from experiments.train.folder import metrics
from experiments.train.task import cross_entropy

TEST_BATCH = 500
QUICK = 64  # images


class Data(Protocol):
    """Images and their classes, as `experiments.data.images` and `experiments.data.folders` have them."""

    @property
    def source(self) -> str: ...
    @property
    def count(self) -> int: ...
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

    def sparse(self, tx: optax.GradientTransformation, rules: list) -> optax.GradientTransformation:
        """The optimiser, sparse where there is a pattern."""
        if self.pattern is None:
            return tx
        rules = [*rules, ("kernel", self.pattern)]
        return nm.sparse_training(tx, rules, refresh_every=self.refresh_every, decay=self.decay, solver=self.solver)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is trained, and of what.

    Attributes:
      recipe: schedule and optimiser.
      module: the network.
      data: reads the images, of the folder that `--data` names, or of none.
      weights: reads pretrained variables, of the file that `--weights` names, or of none; `None`: from scratch.
      seeds: of each variant.
      network: name of the network, for tables.
    """

    recipe: Recipe
    module: nn.Module
    data: Callable[[Path | None], Any]
    weights: Callable[[Path | None], dict] | None = None
    seeds: int = 3
    network: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants that are trained alike.

    Attributes:
      name: of its file.
      variants: what is compared; the first one is what the others are compared with.
      presets: how much, by name.
      dense: rules of the layers that stay dense: the first and the last.
    """

    name: str
    variants: tuple[Variant, ...]
    presets: Mapping[str, Preset]
    dense: tuple[tuple[str, None], ...] = (("^(conv1|features_0)/", None), ("^(linear|fc|classifier_6)/", None))

    def experiment(self) -> Experiment:
        """What the file of the study is listed as."""
        return Experiment(self._measure, tables, options=_options, presets=tuple(self.presets))

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

        def result():
            rows = [progress(base / folder(v, s), v, s, steps, preset.recipe.epochs) for s, v in runs]
            return {
                "preset": run.part,
                "network": preset.network,
                "data": data.source,
                "start": "scratch" if preset.weights is None else "pretrained",
                "recipe": dataclasses.asdict(preset.recipe),
                "steps_per_epoch": steps,
                "rows": rows,
            }

        with run.progress(TextColumn("{task.fields[seen]}")) as display:
            for seed, variant in now:
                bar = display.add_task(f"{variant.name}, seed {seed}", total=steps * preset.recipe.epochs, seen="")
                training = self._run(preset, data, start, variant, seed, base)
                display.update(bar, completed=training.number)
                try:
                    while training.number < training.steps:
                        if until is not None and time.monotonic() > until:
                            return result()
                        training.step()
                        display.advance(bar)
                        if training.number % steps == 0:
                            done = result()
                            run.record(done)
                            row = next(r for r in done["rows"] if (r["name"], r["seed"]) == (variant.name, seed))
                            display.update(bar, seen=f"test accuracy {row['accuracies'][-1]:.1f} %")
                finally:
                    training.close()
        return result()

    def _run(self, preset: Preset, data: Data, start: Any, variant: Variant, seed: int, base: Path) -> Training:
        recipe, steps = preset.recipe, data.count // preset.recipe.batch
        tx = variant.sparse(recipe.optimiser(steps), list(self.dense))
        settings = {
            "variant": dataclasses.asdict(variant) | {"solver": repr(variant.solver)},
            "recipe": dataclasses.asdict(recipe),
            "data": data.source,
            "from": "scratch" if preset.weights is None else "pretrained",
        }
        return Training(
            task(preset, data, start, seed),
            tx,
            steps * recipe.epochs,
            seed=seed,
            folder=base / folder(variant, seed),
            save_every=max(10, steps // 4),
            evaluate_every=steps,
            log_every=50,
            settings=settings,
            accumulate=recipe.accumulate,
            average=recipe.average,
        )


def quick(preset: Preset) -> Preset:
    """Everything, but tiny."""
    recipe = dataclasses.replace(preset.recipe, epochs=1, batch=QUICK // 2)
    return dataclasses.replace(preset, recipe=recipe, seeds=1)


def task(preset: Preset, data: Data, start: Any, seed: int) -> Task:
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


def folder(variant: Variant, seed: int) -> str:
    """Name of the folder of a run."""
    return f"{variant.name.replace(' ', '_').replace(':', '-').replace('/', '-')}_{seed}"


def progress(path: Path, variant: Variant, seed: int, steps: int, epochs: int) -> dict:
    """How far a run is, and what it has come to, by its metrics."""
    lines = metrics(path)
    tested = [line for line in lines if "accuracy" in line]
    row: dict[str, Any] = {
        "name": variant.name,
        "pattern": variant.pattern,
        "refresh_every": variant.refresh_every,
        "solver": repr(variant.solver) if variant.solver is not None else None,
        "seed": seed,
        "epochs": epochs,
        "epochs_done": len(tested),
        "accuracies": [round(line["accuracy"], 2) for line in tested],
        "test_losses": [round(line["test_loss"], 4) for line in tested],
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
