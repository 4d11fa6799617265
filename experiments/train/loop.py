"""The steps of a run: made, logged, saved."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.train import mesh as meshes
from experiments.train.folder import MODEL, Folder, save_model
from experiments.train.state import State, averaged_of, evaluated, flips, start
from experiments.train.task import Task


def make_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    donate: bool = True,
    *,
    accumulate: int = 1,
    average: float | None = None,
    shardings: Any = None,
) -> Callable:
    """One step, compiled: state, batch -> state, loss. It does not know about sparsity.

    Args:
      loss: as in `Task`.
      tx: the optimiser.
      donate: the step overwrites the state that it is given, as real loops do.
      accumulate: parts that the batch is gone through in; the gradient is their mean.
      average: decay of the moving average; the state has one then.
      shardings: where the new state goes, if not by itself.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of_parts(state: State, batch: Any, key: jax.Array):
        """Loss, the rest anew, gradient."""
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(carry, part):
            extra, value, grads = carry
            batch, number = part
            (more, extra), new = gradient(state.params, extra, batch, jax.random.fold_in(key, number))
            return (extra, value + more / accumulate, jax.tree.map(lambda a, b: a + b / accumulate, grads, new)), None

        zeros = (state.extra, jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (extra, value, grads), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accumulate)))
        return (value, extra), grads

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            (value, extra), grads = gradient(state.params, state.extra, batch, key)
        else:
            (value, extra), grads = of_parts(state, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(state.step + 1, state.key, params, extra, opt_state, state.average)
        if average is not None:
            new = new._replace(average=optax.incremental_update(averaged_of(new), state.average, 1 - average))
        return new, value

    return jax.jit(step, donate_argnums=0 if donate else (), out_shardings=shardings and (shardings, None))


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
      accumulate: as in `make_step`.
      average: as in `make_step`; what is evaluated then is the average.
      mesh: devices along one axis that share each batch; `None`: one device.
      sharded: the devices of the mesh share the state, too; otherwise each has all of it.

    Raises:
      DataError: the folder has another run.
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
        accumulate: int = 1,
        average: float | None = None,
        mesh: Mesh | None = None,
        sharded: bool = False,
    ):
        self.task, self.steps = task, steps
        self.state = start(task, tx, seed, average is not None)
        self.number = 0  # steps made
        self._every = {"save": save_every, "evaluate": evaluate_every, "log": log_every}
        self._mesh, shardings = mesh, None
        if mesh is not None:
            shardings = meshes.placed(self.state, mesh, sharded)
            self.state = jax.device_put(self.state, shardings)
        self._step = make_step(task.loss, tx, accumulate=accumulate, average=average, shardings=shardings)
        self._losses: list[jax.Array] = []
        self._since = time.perf_counter()
        self._folder = None
        if folder is not None:
            more = {"accumulate": accumulate, "average": average}
            settings = {"steps": steps, "seed": seed, "every": self._every} | more | (settings or {})
            self._folder = Folder(folder, settings, self.state)
            self.state = self._folder.restore(self.state)
            self.number = int(self.state.step)

    def step(self) -> jax.Array:
        """Makes the next step; returns its loss. The state of before is gone."""
        batch = self.task.batch(self.number)
        if self._mesh is not None:
            batch = meshes.split(batch, self._mesh)
        self.state, loss = self._step(self.state, batch)
        self.number += 1
        if self._folder is not None:
            self._losses.append(loss)
            self._record(self._folder)
        return loss

    def _due(self, what: str) -> bool:
        every = self._every[what]
        return self.number == self.steps or (every > 0 and self.number % every == 0)

    def _record(self, folder: Folder) -> None:
        save, evaluate = self._due("save"), self._due("evaluate") and self.task.evaluate is not None
        if save or evaluate or self._due("log"):
            line = {"step": self.number, "loss": float(np.mean(self._losses))}  # mean since the last line
            line |= flips(self.state.opt_state)
            if evaluate and self.task.evaluate is not None:
                line |= self.task.evaluate(*evaluated(self.state))
            now = time.perf_counter()
            folder.log(line | {"seconds": round(now - self._since, 3)})
            self._losses, self._since = [], now
        if self.number == self.steps:
            save_model(folder.path / MODEL, *evaluated(self.state))
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
