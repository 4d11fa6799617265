"""What a run leaves on disk."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file
from tensorboardX import SummaryWriter

from experiments.data.errors import DataError
from experiments.harness import write_text
from experiments.train.state import State
from experiments.train.task import Extra, Params

MODEL = "model.safetensors"
BOARD = "tensorboard"


class Folder:
    """The folder of one run, which is found again by what it says about itself.

    Args:
      path: where it is, or shall be.
      settings: what tells the run from others, as JSON.
      state: a state of the run.

    Raises:
      DataError: it has another run.
    """

    def __init__(self, path: Path, settings: dict, state: State):
        wanted = json.loads(json.dumps({**settings, "state": _shapes(state)}))
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        identity, self._metrics = self.path / "run.json", self.path / "metrics.jsonl"
        if identity.exists():
            _same_run(json.loads(identity.read_text()), wanted, self.path)
        else:
            write_text(identity, json.dumps(wanted, indent=1) + "\n")
        self._board: SummaryWriter | None = None
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(self.path / "checkpoints", options=options)

    def restore(self, state: State) -> State:
        """The last state that was saved, spread over devices as the one given, or that one. Metrics after it are
        dropped, in TensorBoard, too: they will come again."""
        number = self._manager.latest_step() or 0
        write_text(self._metrics, "".join(json.dumps(line) + "\n" for line in metrics(self.path, number)))
        # Without the suffix, a start within the second of another one would overwrite its file.
        self._board = SummaryWriter(str(self.path / BOARD), purge_step=number + 1, filename_suffix=f".{number}")
        if number == 0:
            return state
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(number, args=ocp.args.StandardRestore(like))

    def log(self, line: dict) -> None:
        """Adds a line of metrics."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name in line.keys() - {"step"}:
                self._board.add_scalar(name, line[name], line["step"])

    def save(self, state: State, number: int) -> None:
        """Writes a checkpoint, in the background."""
        self._manager.save(number, args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits for the last checkpoint, and for the last metrics."""
        self._manager.close()
        if self._board is not None:
            self._board.close()


def metrics(path: Path, until: int | None = None) -> list[dict]:
    """The lines of metrics of a run, up to a step. A line that was cut off is left out."""
    file = path / "metrics.jsonl"
    text = file.read_text().splitlines(keepends=True) if file.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    return [line for line in lines if until is None or line["step"] <= until]


def save_model(path: Path, params: Params, extra: Extra) -> None:
    """Writes what is needed to evaluate: arrays by the names of their paths, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    save_file({name: np.ascontiguousarray(x) for name, x in _named({"params": params, **extra}).items()}, part)
    part.replace(path)


def load_model(path: Path, params: Params, extra: Extra) -> tuple[Params, Extra]:
    """Reads them into trees like the given ones.

    Raises:
      DataError: they are of another network.
    """
    found, tree = load_file(path), {"params": params, **extra}
    wanted = _named(jax.eval_shape(lambda: tree))
    for name in [*wanted, *found]:
        there, here = (x[name].shape if name in x else None for x in (found, wanted))
        if there != here:
            raise DataError(f"{path} is of another network: {name} is {there} there and {here} here")
    variables = jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in wanted])
    return variables.pop("params"), variables


def _named(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _shapes(state: State) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: state))
    return {jax.tree_util.keystr(keys): f"{x.dtype}{list(x.shape)}" for keys, x in leaves}


def _same_run(found: dict, wanted: dict, path: Path) -> None:
    for name in [*wanted, *found]:
        there, here = found.get(name), wanted.get(name)
        if name == "state" and there != here and isinstance(there, dict) and isinstance(here, dict):
            name = next(leaf for leaf in [*here, *there] if there.get(leaf) != here.get(leaf))
            there, here = there.get(name), here.get(name)
        if there != here:
            raise DataError(
                f"{path} has another run: {name} is {there} there and {here} here; choose another folder, or delete it"
            )
