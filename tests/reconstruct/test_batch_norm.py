"""Statistics of batch norm against those of all rows, by numpy in double precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nm_jax as nm


class Normed(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)
        return nn.Dense(3)(x)


def updater(model, params):
    def update(stats, *inputs):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, *inputs, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return update


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_batch_norm_gets_the_moments_of_all_batches(momentum):
    draw = np.random.default_rng(0)
    batches = [jnp.asarray(draw.normal(k, 1 + k, size=(size, 4)), jnp.float32) for k, size in enumerate((40, 40, 10))]
    model = Normed(momentum)
    variables = model.init(jax.random.key(0), batches[0])
    tuned = nm.tune_batch_norm(updater(model, variables["params"]), variables["batch_stats"], batches)
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(tuned["norm"]["mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tuned["norm"]["var"], rows.var(axis=0), rtol=1e-3)


def test_batch_norm_of_an_nnx_model():
    draw = np.random.default_rng(0)
    batches = [jnp.asarray(draw.normal(k, 1 + k, size=(20, 4)), jnp.float32) for k in range(3)]
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    graph, stats, others = nnx.split(model, nnx.BatchStat, ...)

    def update(stats, x):
        copy = nnx.merge(graph, stats, others)
        copy.train()
        copy(x)
        return nnx.state(copy, nnx.BatchStat)

    nnx.update(model, nm.tune_batch_norm(update, stats, batches))
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(model.layers[0].mean[...], rows.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.layers[0].var[...], rows.var(axis=0), rtol=1e-3)


def test_batch_norm_tuning_says_what_is_wrong():
    model = Normed()
    x = jnp.ones((4, 4))
    variables = model.init(jax.random.key(0), x)
    update, stats = updater(model, variables["params"]), variables["batch_stats"]
    with pytest.raises(ValueError, match="batches is empty"):
        nm.tune_batch_norm(update, stats, [])
    with pytest.raises(ValueError, match="does not move"):
        nm.tune_batch_norm(lambda stats, x: stats, stats, [x])
    assert nm.tune_batch_norm(update, stats | {"steps": 7}, [x])["steps"] == 7
    with pytest.raises(ValueError, match="'mean' and 'var'"):
        nm.tune_batch_norm(lambda stats, x: stats, {"norm": {"scale": x}}, [x])


def moving(momentum, toward):
    """An update in the way of a framework."""

    def update(stats, x):
        found = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
        return {name: toward(momentum, stats[name], found[name]) for name in stats}

    return jax.jit(update)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("scale, mean", [(1e-4, 0), (1, 0), (1e3, 0), (1e6, 0), (1, 100), (1, 1e4), (1e-4, 1)])
@pytest.mark.parametrize(
    "toward",
    [lambda m, old, new: m * old + (1 - m) * new, lambda m, old, new: old + (1 - m) * (new - old)],
    ids=["shares", "difference"],
)
def test_batch_norm_is_exact_at_any_scale(momentum, scale, mean, toward):
    draw = np.random.default_rng(0)
    batches = [(mean + scale * draw.normal(size=(64, 3))).astype(np.float32) for _ in range(3)]
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    tuned = nm.tune_batch_norm(moving(momentum, toward), stats, [jnp.asarray(x) for x in batches])
    rows = np.concatenate(batches).astype(np.float64)
    rounding = 1e-6 * (1 + abs(mean) / scale)  # of a float32 that holds the mean
    np.testing.assert_allclose(tuned["mean"], rows.mean(axis=0), rtol=0, atol=rounding * scale)
    np.testing.assert_allclose(tuned["var"], rows.var(axis=0), rtol=max(rounding, 1e-5))


def test_batch_norm_compiles_nothing_of_its_own():
    calls = []

    @jax.jit
    def update(stats, x):
        calls.append(x.shape)
        return {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0), "var": 0.9 * stats["var"] + 0.1 * x.var(0)}

    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    for _ in range(2):
        nm.tune_batch_norm(update, stats, (jnp.ones((4, 3)) for _ in range(2)))
    assert len(calls) == 1


def test_batch_norm_of_other_names_says_what_to_do():
    stats = {"bn.running_mean": jnp.zeros(3), "bn.running_var": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"rename bn.running_mean, bn.running_var in what `update` takes and returns"):
        nm.tune_batch_norm(lambda stats, x: stats, stats, [jnp.ones((4, 3))])
    with pytest.raises(ValueError, match="batches is one array"):
        nm.tune_batch_norm(lambda stats, x: stats, stats, jnp.ones((4, 3)))
    tuned = nm.tune_batch_norm(
        lambda stats, x: {"bn.mean": x.mean(0), "bn.var": x.var(0)},
        {"bn.mean": jnp.zeros(1), "bn.var": jnp.ones(1)},
        [jnp.array([[1.0], [3.0]])],
    )
    np.testing.assert_allclose(tuned["bn.var"], 1)


def test_batch_norm_runs_the_network_once_for_each_batch_and_once_more():
    calls = []

    def update(stats, x):
        calls.append(x)
        return {"mean": 0.9 * stats["mean"] + 0.1 * x.mean(0), "var": 0.9 * stats["var"] + 0.1 * x.var(0)}

    nm.tune_batch_norm(update, {"mean": jnp.zeros(3), "var": jnp.ones(3)}, [jnp.ones((4, 3))] * 5)
    assert len(calls) == 6
