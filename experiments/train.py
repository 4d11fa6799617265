"""The one training loop: dense or sparse, in one process, resumable.

What is learned is a `Task`; how, an optax transformation, which is all that makes training sparse:

    tx = nm.sparse_training(optax.adam(1e-3), "2:4-T")  # was: tx = optax.adam(1e-3)
    state = fit(task, tx, steps=1000, folder=Path("runs/first"))

Batches are read by number and the random numbers of a step are derived from its number, so that a run is a function of
its seed. With a folder it is saved now and then; after `kill -9` at any moment the same call goes on from the last
checkpoint and ends bit for bit where it would have ended. The folder has

    run.json        what the run is; another run is refused
    checkpoints/    orbax's: state, which has position and key; complete or not there at all
    metrics.jsonl   one line per logged step
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from experiments.harness import write_text

Params = Any
Extra = Any  # what the model changes in passing: running statistics


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      init: key -> parameters, and what else the model has.
      loss: parameters, the rest, batch, key -> loss, and the rest anew.
      batch: number of the step, from 0 -> its batch. A function of the number alone.
      evaluate: parameters, the rest -> figures by name.
    """

    init: Callable[[jax.Array], tuple[Params, Extra]]
    loss: Callable[[Params, Extra, Any, jax.Array], tuple[jax.Array, Extra]]
    batch: Callable[[int], Any]
    evaluate: Callable[[Params, Extra], dict[str, float]] | None = None


def classification(module: nn.Module, start: Any, batch: Callable[[int], Any], evaluate: Any = None) -> Task:
    """Images into classes: `module(images, train)` gives logits, a batch is images and labels.

    Args:
      module: a Flax module.
      start: a function from a key to variables, or variables, which are copied.
      batch: as in `Task`.
      evaluate: as in `Task`.
    """

    def init(key):
        variables = dict(start(key) if callable(start) else jax.tree.map(jnp.array, start))
        return variables.pop("params"), variables

    def loss(params, extra, batch, key):
        images, labels = batch
        variables = {"params": params, **extra}
        logits, extra = module.apply(variables, images, train=True, mutable=list(extra), rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), extra

    return Task(init, loss, batch, evaluate)


class State(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      step: steps made.
      key: data of the key of the run; folded with the number of a step it gives that step's.
      params: parameters.
      extra: what else the model has.
      opt_state: state of the optimiser.
    """

    step: jax.Array
    key: jax.Array
    params: Params
    extra: Extra
    opt_state: Any


def start(task: Task, tx: optax.GradientTransformation, seed: int = 0) -> State:
    """The state before the first step."""
    key = jax.random.key(seed)
    params, extra = task.init(key)
    return State(jnp.int32(0), jax.random.key_data(key), params, extra, tx.init(params))


def make_step(loss: Callable, tx: optax.GradientTransformation, donate: bool = True) -> Callable:
    """One step, compiled: state, batch -> state, loss. It does not know about sparsity.

    Args:
      loss: as in `Task`.
      tx: the optimiser.
      donate: the step overwrites the state that it is given, as real loops do.
    """

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.extra, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, state.key, params, extra, opt_state), value

    return jax.jit(step, donate_argnums=0 if donate else ())


class Training:
    """A run that is advanced step by step; `fit` advances one to its end.

    Args:
      task: what is learned.
      tx: the optimiser.
      steps: how long the run is.
      seed: of the first parameters and of every step's random numbers.
      folder: where the run is saved, and found again; `None`: nowhere.
      save_every: steps between checkpoints; there is one at the end in any case.
      evaluate_every: steps between evaluations; 0: at the end alone.
      log_every: steps between lines of metrics; checkpoints and evaluations have theirs.
      settings: what else tells this run from others, as JSON.

    Raises:
      ValueError: the folder has another run.
    """

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        steps: int,
        *,
        seed: int = 0,
        folder: Path | None = None,
        save_every: int = 200,
        evaluate_every: int = 0,
        log_every: int = 20,
        settings: dict | None = None,
    ):
        self.task, self.steps, self.state = task, steps, start(task, tx, seed)
        self.number = 0  # steps made
        self._every = {"save": save_every, "evaluate": evaluate_every, "log": log_every}
        self._step = make_step(task.loss, tx)
        self._losses: list[jax.Array] = []
        self._since = time.perf_counter()
        self._folder = None
        if folder is not None:
            settings = {"steps": steps, "seed": seed, "every": self._every} | (settings or {})
            self._folder = _Folder(folder, settings, self.state)
            self.state = self._folder.restore(self.state)
            self.number = int(self.state.step)

    def step(self) -> jax.Array:
        """Makes the next step; returns its loss. The state of before is gone."""
        self.state, loss = self._step(self.state, self.task.batch(self.number))
        self.number += 1
        if self._folder is not None:
            self._losses.append(loss)
            self._record(self._folder)
        return loss

    def _due(self, what: str) -> bool:
        every = self._every[what]
        return self.number == self.steps or (every > 0 and self.number % every == 0)

    def _record(self, folder: "_Folder") -> None:
        save, evaluate = self._due("save"), self._due("evaluate") and self.task.evaluate is not None
        if save or evaluate or self._due("log"):
            line = {"step": self.number, "loss": float(np.mean(self._losses))}  # mean since the last line
            if evaluate and self.task.evaluate is not None:
                line |= self.task.evaluate(self.state.params, self.state.extra)
            now = time.perf_counter()
            folder.log(line | {"seconds": round(now - self._since, 3)})
            self._losses, self._since = [], now
        if save:
            folder.save(self.state, self.number)

    def close(self) -> None:
        """Waits until what was saved is on disk."""
        if self._folder is not None:
            self._folder.close()


def fit(task: Task, tx: optax.GradientTransformation, steps: int, *, advance: Any = None, **options: Any) -> State:
    """Trains to the end, from where the run was left; `options` are those of `Training`.

    Args:
      task: what is learned.
      tx: the optimiser.
      steps: how long the run is.
      advance: called after every step, for a progress bar.
    """
    run = Training(task, tx, steps, **options)
    try:
        while run.number < steps:
            run.step()
            if advance is not None:
                advance()
    finally:
        run.close()
    return run.state


class _Folder:
    """What a run leaves on disk."""

    def __init__(self, path: Path, settings: dict, state: State):
        shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: state))
        leaves = {jax.tree_util.keystr(keys): f"{x.dtype}{list(x.shape)}" for keys, x in shapes}
        wanted = json.loads(json.dumps({**settings, "state": leaves}))
        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        identity, self._metrics = path / "run.json", path / "metrics.jsonl"
        if identity.exists():
            _same_run(json.loads(identity.read_text()), wanted, path)
        else:
            write_text(identity, json.dumps(wanted, indent=1) + "\n")
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(path / "checkpoints", options=options)

    def restore(self, state: State) -> State:
        """The last state that was saved, or the one given. Metrics after it are dropped: they will come again."""
        number = self._manager.latest_step() or 0
        lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        # A line that was cut off has no end, and is after every checkpoint.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= number]
        write_text(self._metrics, "".join(kept))
        if number == 0:
            return state
        return self._manager.restore(number, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))

    def log(self, line: dict) -> None:
        """Adds a line of metrics."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, state: State, number: int) -> None:
        """Writes a checkpoint, in the background."""
        self._manager.save(number, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self._manager.close()


def _same_run(found: dict, wanted: dict, path: Path) -> None:
    for name in [*wanted, *found]:
        there, here = found.get(name), wanted.get(name)
        if name == "state" and there != here and isinstance(there, dict) and isinstance(here, dict):
            name = next(leaf for leaf in [*here, *there] if there.get(leaf) != here.get(leaf))
            there, here = there.get(name), here.get(name)
        if there != here:
            raise ValueError(
                f"{path} has another run: {name} is {there} there and {here} here; choose another folder, or delete it"
            )
