"""The one training loop: what a plain loop does, sparse by its optimiser alone, and it survives being killed."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

import nm_jax as nm
from experiments.train import Task, Training, classification, fit, make_step, start
from experiments.train.folder import BOARD

STEPS, BATCH = 13, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(STEPS, BATCH, 16)).astype(np.float32)
LABELS = RNG.integers(0, 4, (STEPS, BATCH))
RULES = [("Dense_0", "2:4-T")]


class Small(nn.Module):
    """With batch norm, and with dropout, so that running statistics and random numbers matter."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(4)(nn.Dropout(0.25, deterministic=not train)(nn.relu(x)))


def task():
    return classification(Small(), lambda key: Small().init(key, IMAGES[0]), lambda k: (IMAGES[k], LABELS[k]), judge)


def judge(params, extra):
    logits = Small().apply({"params": params, **extra}, IMAGES[0])
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == LABELS[0]))}


def sparse_adam():
    return nm.sparse_training(optax.adam(0.01), RULES, refresh_every=4)


def equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("tx", [optax.adam(0.01), sparse_adam()], ids=["dense", "sparse"])
def test_a_plain_loop_ends_at_the_same_bits(tx):
    """Written out, without the trainer."""
    module, key = Small(), jax.random.key(3)
    variables = module.init(key, IMAGES[0])
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, stats, opt_state, images, labels, key):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            rngs = {"dropout": key}
            logits, new = module.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        grads, stats_ = jax.grad(loss, has_aux=True)(params)
        updates, opt_state_ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state_

    for k in range(STEPS):
        key_ = jax.random.fold_in(key, k)
        params, stats, opt_state = step(params, stats, opt_state, IMAGES[k], LABELS[k], key_)
    state = fit(task(), tx, STEPS, seed=3)
    equal((state.params, state.extra["batch_stats"], state.opt_state), (params, stats, opt_state))


def test_the_optimiser_alone_makes_it_sparse():
    state = fit(task(), sparse_adam(), STEPS)
    kernel = np.asarray(state.params["Dense_0"]["kernel"])
    assert all((np.count_nonzero(kernel[k : k + 4], axis=0) <= 2).all() for k in range(0, 16, 4))
    assert all((np.count_nonzero(kernel[:, k : k + 4], axis=1) <= 2).all() for k in range(0, 8, 4))
    assert np.count_nonzero(fit(task(), optax.adam(0.01), 2).params["Dense_0"]["kernel"]) == 128


def test_variables_that_are_given_are_not_overwritten():
    variables = Small().init(jax.random.key(0), IMAGES[0])
    before = jax.tree.map(np.array, variables)
    fit(classification(Small(), variables, lambda k: (IMAGES[k], LABELS[k])), optax.sgd(0.1), 2)
    equal(variables, before)


def test_a_step_can_leave_its_state_alone():
    step = make_step(task().loss, optax.sgd(0.1), donate=False)
    state = start(task(), optax.sgd(0.1))
    equal(step(state, (IMAGES[0], LABELS[0])), step(state, (IMAGES[0], LABELS[0])))


OPTIONS = {"save_every": 5, "log_every": 2, "evaluate_every": 3}


def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_metrics_are_the_losses_of_the_steps(tmp_path):
    run = Training(task(), optax.sgd(0.1), STEPS, folder=tmp_path, **OPTIONS)
    losses = [float(run.step()) for _ in range(STEPS)]
    run.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 5, 6, 8, 9, 10, 12, 13]
    edges = [0, *(line["step"] for line in lines)]
    means = [np.mean(np.float32(losses[a:b])) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-6)
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 6, 9, 12, 13]


def board(folder):
    """The curves that TensorBoard draws: step -> value by name, without what a later start makes void."""
    curves = {}
    for path in sorted((folder / BOARD).iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # a length, its checksum, an event, its checksum
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                curves = {name: {k: x for k, x in seen.items() if k < event.step} for name, seen in curves.items()}
            for value in event.summary.value:
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


def test_tensorboard_draws_the_metrics(tmp_path):
    """Also of a run whose first start ended after its last checkpoint, at step 5."""
    run = Training(task(), optax.sgd(0.1), STEPS, folder=tmp_path, **OPTIONS)
    for _ in range(9):
        run.step()
    run.close()
    assert max(board(tmp_path)["loss"]) == 9
    run = Training(task(), optax.sgd(0.1), STEPS, folder=tmp_path, **OPTIONS)
    assert run.number == 5
    run.step()
    run.close()
    curves, lines = board(tmp_path), read_metrics(tmp_path)
    assert set(curves) == {"loss", "accuracy", "seconds"} and list(curves["loss"]) == [2, 3, 4, 5, 6]
    for line in lines:
        assert curves["loss"][line["step"]] == np.float32(line["loss"])


KILLED = textwrap.dedent("""
    import os, pathlib, signal, sys
    from tests.experiments.test_train import OPTIONS, STEPS, sparse_adam, task
    from experiments.train import Training

    run = Training(task(), sparse_adam(), STEPS, folder=pathlib.Path(sys.argv[1]), **OPTIONS)
    while run.number < int(sys.argv[2]):
        run.step()
    os.kill(os.getpid(), signal.SIGKILL)
""")


@pytest.mark.slow
def test_a_run_that_was_killed_ends_where_it_would_have(tmp_path):
    """At a checkpoint whose writing has just begun, between two, and again on the second try."""
    whole = fit(task(), sparse_adam(), STEPS, folder=tmp_path / "whole", **OPTIONS)
    killed = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    for number in (8, 10):
        done = subprocess.run([sys.executable, "-c", KILLED, str(killed), str(number)], env=environment)
        assert done.returncode == -signal.SIGKILL
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # a line that was being written
    state = fit(task(), sparse_adam(), STEPS, folder=killed, **OPTIONS)
    equal(state, whole)
    assert read_metrics(killed) == read_metrics(tmp_path / "whole")
    equal(fit(task(), sparse_adam(), STEPS, folder=killed, **OPTIONS), whole)  # nothing is left to do


@pytest.mark.parametrize(
    ("tx", "options", "message"),
    [
        (optax.adam(0.01), {"seed": 1}, "seed is 0 there and 1 here"),
        (optax.adam(0.01), {"settings": {"data": "digits"}}, "data is None there and digits here"),
        (optax.sgd(0.1), {}, r"opt_state.* is .* there and None here"),
    ],
    ids=["seed", "settings", "optimiser"],
)
def test_the_folder_of_another_run_is_refused(tmp_path, tx, options, message):
    fit(task(), optax.adam(0.01), 2, folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(task(), tx, 2, folder=tmp_path, **options)


def test_a_task_is_not_only_images():
    """Any loss, and a state that has nothing but parameters."""
    target = jnp.arange(4.0)
    quadratic = Task(
        lambda key: (jnp.zeros(4), {}), lambda p, extra, b, key: (jnp.sum((p - b) ** 2), extra), lambda k: target
    )
    np.testing.assert_allclose(fit(quadratic, optax.sgd(0.1), 60).params, target, atol=1e-4)
