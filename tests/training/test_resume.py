"""A run that was killed continues bit for bit from its saved parameters and optimiser state."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import nm_jax as nm
from tests.training.test_training import make_params, make_step

KILLED_AT, STEPS = 13, 30


def transformation(name):
    pattern = "2:4-T" if name == "transposable" else "2:4"
    sparse = nm.sparse_training(optax.adamw(optax.cosine_decay_schedule(0.02, STEPS)), pattern, refresh_every=4)
    return optax.MultiSteps(sparse, 2).gradient_transformation() if name == "MultiSteps" else sparse


def start(name="transposable", dtype=jnp.float32):
    params, tx = make_params(dtype), transformation(name)
    return params, tx.init(params), make_step(tx)


def equal(tree, other):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, other)


@pytest.mark.parametrize("name", ["plain", "MultiSteps"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orbax(tmp_path, name, dtype):
    params, state, step = start(name, dtype)
    for _ in range(KILLED_AT):
        params, state = step(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"params": params, "opt_state": state})
    for _ in range(STEPS - KILLED_AT):
        params, state = step(params, state)

    fresh_params, fresh_state, fresh_step = start(name, dtype)
    target = jax.eval_shape(lambda: {"params": fresh_params, "opt_state": fresh_state})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    again, again_state = restored["params"], restored["opt_state"]
    for _ in range(STEPS - KILLED_AT):
        again, again_state = fresh_step(again, again_state)
    equal((again, again_state), (params, state))


SCRIPT = """
import os, pathlib, signal, sys
import flax.serialization
from tests.training.test_resume import KILLED_AT, start

params, state, step = start()
for k in range(KILLED_AT):
    params, state = step(params, state)
    pathlib.Path(sys.argv[1]).write_bytes(flax.serialization.to_bytes((params, state)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_process(tmp_path):
    """A process that saves after every step and is killed; this one takes over."""
    saved = tmp_path / "state.msgpack"
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(saved)], cwd=root, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    params, state, step = start()
    restored, restored_state = flax.serialization.from_bytes((params, state), saved.read_bytes())
    for k in range(STEPS):
        params, state = step(params, state)
        if k >= KILLED_AT:
            restored, restored_state = step(restored, restored_state)
        elif k == KILLED_AT - 1:
            equal((restored, restored_state), (params, state))
    equal((restored, restored_state), (params, state))
