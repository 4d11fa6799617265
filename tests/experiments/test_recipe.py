"""What the recipes of the papers are made of, each against the same written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import nm_jax as nm
from experiments.train import Recipe, Task, Training, classification, evaluated, fit, mesh
from experiments.train.folder import MODEL, load_model
from tests.experiments.test_train import IMAGES, LABELS, RULES, STEPS, Small, equal, judge, sparse_adam, task

QUADRATIC = Task(
    lambda key: ({"w": jnp.ones((4, 4))}, {}),
    lambda p, extra, b, key: (jnp.mean((b @ p["w"] - 1) ** 2), extra),
    lambda k: IMAGES[k % STEPS][:, :4],
)


def tile(kernel, axis):
    """Most nonzeros in a group of four along an axis, by slices."""
    parts = np.split(np.asarray(kernel) != 0, kernel.shape[axis] // 4, axis)
    return max(int(part.sum(axis).max()) for part in parts)


def test_schedules():
    """In closed form: a cosine to 0, tenths at epochs, and a rise before either."""
    cosine = Recipe(epochs=10, rate=0.4, warmup=2).schedule(5)
    steps = np.arange(50)
    wanted = np.where(steps < 10, 0.4 * steps / 10, 0.2 * (1 + np.cos(np.pi * (steps - 10) / 40)))
    np.testing.assert_allclose([cosine(k) for k in steps], wanted, rtol=1e-5, atol=1e-7)
    for warmup in (0, 1):
        drops = Recipe(epochs=9, rate=0.1, drops=(3, 6), warmup=warmup).schedule(4)
        found = [float(drops(4 * epoch + k)) for epoch in range(warmup, 9) for k in (0, 3)]
        np.testing.assert_allclose(
            found, [0.1 * 0.1 ** (e // 3) for e in range(warmup, 9) for _ in range(2)], rtol=1e-5
        )


def test_fifty_steps_of_a_recipe_are_those_of_plain_flax_and_optax():
    """Smoothed labels, weight decay of kernels alone, momentum and a cosine, without a line of the trainer."""
    recipe = Recipe(epochs=5, rate=0.1, weight_decay=0.01, smoothing=0.1)
    module, key = Small(), jax.random.key(3)
    variables = module.init(key, IMAGES[0])
    params, stats, velocity = variables["params"], variables["batch_stats"], None

    @jax.jit
    def gradient(params, stats, images, labels, key):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = module.apply(variables, images, True, mutable=["batch_stats"], rngs={"dropout": key})
            targets = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4
            return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1).mean(), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    for k in range(50):
        batch = IMAGES[k % STEPS], LABELS[k % STEPS]
        grads, stats = gradient(params, stats, *batch, jax.random.fold_in(key, k))
        grads = jax.tree.map(lambda g, p: g + 0.01 * p if p.ndim > 1 else g, grads, params)
        velocity = grads if velocity is None else jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        rate = 0.05 * (1 + np.cos(np.pi * k / 50))
        params = jax.tree.map(lambda p, v, rate=rate: p - np.float32(rate) * v, params, velocity)
    mine = classification(
        module,
        lambda key: module.init(key, IMAGES[0]),
        lambda k: (IMAGES[k % STEPS], LABELS[k % STEPS]),
        smoothing=0.1,
    )
    state = fit(mine, recipe.optimiser(10), 50, seed=3)
    found, wanted = (state.params, state.extra["batch_stats"]), (params, stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    whole = fit(QUADRATIC, optax.sgd(0.1), 4)
    parts = fit(QUADRATIC, optax.sgd(0.1), 4, accumulate=4)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
    assert not np.allclose(whole.params["w"], 1)


def test_bfloat16_computes_and_float32_is_kept():
    half = dataclasses.replace(task(), loss=classification(Small(), None, lambda k: None, compute=jnp.bfloat16).loss)
    states = [fit(t, optax.sgd(0.1), 2) for t in (half, task())]
    assert {x.dtype for x in jax.tree.leaves((states[0].params, states[0].extra))} == {np.dtype(np.float32)}
    kernels = [np.asarray(state.params["Dense_1"]["kernel"]) for state in states]
    assert 0 < abs(kernels[0] - kernels[1]).max() < 0.05
    example = (states[0].params, states[0].extra, (IMAGES[0], LABELS[0]), jax.random.key(0))
    products = [line for line in str(jax.make_jaxpr(half.loss)(*example)).splitlines() if "dot_general" in line]
    assert products and all("bf16" in line for line in products)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_averages_are_those_of_every_step_and_sparse(sparse):
    """Of the dense weights, by NumPy in float64, masked at the end."""
    tx = nm.sparse_training(optax.adam(0.05), RULES, refresh_every=4) if sparse else optax.adam(0.05)
    run = Training(task(), tx, STEPS, average=0.8)

    def kept():
        params = nm.dense_params(run.state.opt_state, run.state.params) if sparse else run.state.params
        return jax.tree.map(lambda x: np.array(x, np.float64), (params, run.state.extra))

    average = kept()
    for _ in range(STEPS):
        run.step()
        average = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, average, kept())
    params, extra = evaluated(run.state)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    if sparse:
        assert tile(kernel, 0) <= 2 and tile(kernel, 1) <= 2
        average[0]["Dense_0"]["kernel"] *= np.asarray(run.state.params["Dense_0"]["kernel"]) != 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (params, extra), average)


def test_averages_of_a_mask_that_stays_have_it(tmp_path):
    tx = nm.sparse_training(optax.adam(0.05), RULES, refresh_every=None)
    state = fit(task(), tx, 3, average=0.5, folder=tmp_path)
    kernel = evaluated(state)[0]["Dense_0"]["kernel"]
    # The first parameters are dense, and an average keeps a trace of them, which masks take away.
    assert tile(kernel, 0) <= 2 and tile(kernel, 1) <= 2


def wide():
    """A layer that eight devices can have a part of each."""

    def loss(params, extra, batch, key):
        return jnp.mean((jnp.tanh(batch @ params["kernel"])[:, :16] - batch) ** 2), extra

    return Task(
        lambda key: ({"kernel": jax.random.normal(key, (16, 64))}, {}), loss, lambda k: np.tile(IMAGES[k], (2, 1))
    )


@pytest.mark.parametrize(
    ("sharded", "pattern"),
    [(False, "2:4"), (True, "2:4"), pytest.param(True, "4:8-T", marks=pytest.mark.slow)],
    ids=["copies", "sharded", "transposable"],
)
def test_eight_devices_come_to_the_same_as_one(sharded, pattern):
    tx = nm.sparse_training(optax.sgd(0.5, momentum=0.9), [("kernel", pattern)], refresh_every=2)
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = Training(wide(), tx, 4, mesh=devices, sharded=sharded)
    for _ in range(4):
        run.step()
    kernel, dense = run.state.params["kernel"], nm.dense_params(run.state.opt_state)["kernel"]
    for leaf in (kernel, dense, nm.masks(run.state.opt_state)["kernel"]):
        assert leaf.sharding.spec == (PartitionSpec(None, "data") if sharded else PartitionSpec(None, None))
    alone = fit(wide(), tx, 4)
    np.testing.assert_allclose(dense, nm.dense_params(alone.opt_state)["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(kernel == 0, np.asarray(alone.params["kernel"]) == 0)


def test_devices_that_cannot_share_a_batch_say_so():
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="a batch of 6 examples on 8 devices; make it a multiple of 8"):
        mesh.split(np.ones((6, 2)), devices)


def test_what_is_written_out_is_sparse_and_evaluates_without_an_optimiser(tmp_path):
    state = fit(task(), sparse_adam(), STEPS, folder=tmp_path)
    like = Small().init(jax.random.key(9), IMAGES[0])
    params, extra = load_model(tmp_path / MODEL, like["params"], {"batch_stats": like["batch_stats"]})
    equal((params, extra), (state.params, state.extra))
    assert tile(params["Dense_0"]["kernel"], 0) == tile(params["Dense_0"]["kernel"], 1) == 2
    assert judge(params, extra) == judge(state.params, state.extra)


def test_a_model_of_another_network_is_refused(tmp_path):
    fit(task(), sparse_adam(), 1, folder=tmp_path)
    like = Small().init(jax.random.key(9), np.ones((1, 32), np.float32))
    with pytest.raises(
        ValueError, match=r"another network: params/Dense_0/kernel is \(16, 8\) there and \(32, 8\) here"
    ):
        load_model(tmp_path / MODEL, like["params"], {"batch_stats": like["batch_stats"]})
