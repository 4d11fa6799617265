"""One layer: the exact minimiser in double precision is the oracle; then whole models."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nm_jax as nm

# name -> (shape, contraction, groups): every way in which weights meet their inputs.
LAYERS = {
    "dense": ((16, 12), "io", 1),
    "torch": ((12, 16), "oi", 1),
    "convolution": ((3, 3, 4, 8), "iiio", 1),
    "grouped convolution": ((3, 1, 4, 8), "iiio", 2),
    "query": ((16, 2, 4), "ioo", 1),
    "attention out": ((2, 8, 5), "iio", 1),
    "experts": ((3, 8, 6), "bio", 1),
    "experts, one input": ((3, 8, 6), "oio", 1),
    "scanned attention out": ((2, 2, 4, 6), "biio", 1),
}


def matrices(leaf, contraction, groups=1):
    """(matrices, K, outputs) of a leaf, in float64 by numpy alone."""
    leaf = np.asarray(leaf, np.float64)
    order = [k for letter in "bio" for k, c in enumerate(contraction) if c == letter]
    sizes = [int(np.prod([leaf.shape[k] for k, c in enumerate(contraction) if c == letter])) for letter in "bio"]
    whole = leaf.transpose(order).reshape(sizes)
    return np.concatenate([np.stack(np.split(one, groups, axis=1)) for one in whole])


def minimiser(x, w, kept, ridge, centred=False):
    """Output by output: argmin ||X w - X v||^2 + ridge mean(diag X^T X) ||w - v||^2 on the support, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    pull = np.sqrt(ridge * np.mean(np.sum(x**2, axis=0)))
    x = x - x.mean(axis=0) if centred else x
    rows = np.concatenate([x, pull * np.eye(len(w))])
    new = np.zeros_like(w)
    for k in range(w.shape[1]):
        support = np.flatnonzero(kept[:, k])
        new[support, k] = np.linalg.lstsq(rows[:, support], rows @ w[:, k], rcond=None)[0]
    return new


def error(x, w, new):
    x, w, new = (np.asarray(a, np.float64) for a in (x, w, new))
    return np.sum((x @ (new - w)) ** 2) / np.sum((x @ w) ** 2)


def make_layer(name, rows=200, seed=0):
    """Weights, correlated inputs with a mean, their record, and a random mask."""
    shape, contraction, groups = LAYERS[name]
    draw = np.random.default_rng(seed)
    w = draw.normal(size=shape).astype(np.float32)
    count, size, _ = matrices(w, contraction, groups).shape
    mixing = draw.normal(size=(count, size, size)) * draw.gamma(1.0, size=(count, 1, size))
    x = (draw.normal(size=(count, rows, size)) @ mixing + draw.normal(size=(count, 1, size))).astype(np.float32)
    mask = draw.random(shape) < 0.5
    gram = dataclasses.replace(nm.Gram.from_inputs(jnp.asarray(x)), contraction=contraction, groups=groups)
    return jnp.asarray(w), x, gram, jnp.asarray(mask)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_it_finds_the_exact_minimiser(name, ridge):
    w, x, gram, mask = make_layer(name)
    found = nm.reconstruct(w, gram, mask, ridge=ridge)
    as_matrices = functools.partial(matrices, contraction=gram.contraction, groups=gram.groups)
    old, new, kept = as_matrices(w), as_matrices(found.weight), as_matrices(mask)
    best = np.stack([minimiser(*parts, ridge) for parts in zip(x, old, kept, strict=True)])
    energy = np.sum((x.astype(np.float64) @ old) ** 2)
    mine, optimum, start = (np.sum((x.astype(np.float64) @ (v - old)) ** 2) / energy for v in (new, best, kept * old))
    assert mine == pytest.approx(optimum, rel=1e-2)
    assert float(found.after) == pytest.approx(mine, rel=1e-2)
    assert float(found.before) == pytest.approx(start, rel=1e-3)
    assert mine < start
    np.testing.assert_array_equal(np.asarray(found.weight)[~np.asarray(mask)], 0)
    assert found.weight.shape == w.shape and found.weight.dtype == w.dtype


@pytest.mark.parametrize("name", ["dense", "grouped convolution", "scanned attention out"])
def test_a_bias_takes_up_the_mean(name):
    w, x, gram, mask = make_layer(name)
    as_matrices = functools.partial(matrices, contraction=gram.contraction, groups=gram.groups)
    old, kept = as_matrices(w), as_matrices(mask)
    bias = jnp.arange(old.shape[0] * old.shape[2], dtype=jnp.float32)
    found = nm.reconstruct(w, gram, mask, bias=bias, ridge=1e-3)
    shift = (np.asarray(found.bias) - np.asarray(bias)).reshape(old.shape[0], 1, -1)
    new = as_matrices(found.weight)
    change = x.astype(np.float64) @ (new - old) + shift
    np.testing.assert_allclose(change.mean(axis=1), 0, atol=1e-3)
    best = np.stack([minimiser(*parts, 1e-3, centred=True) for parts in zip(x, old, kept, strict=True)])
    optimum = x.astype(np.float64) @ (best - old)
    optimum -= optimum.mean(axis=1, keepdims=True)
    assert np.sum(change**2) == pytest.approx(np.sum(optimum**2), rel=1e-2)
    assert float(found.after) == pytest.approx(np.sum(change**2) / np.sum((x @ old) ** 2), rel=1e-2)
    assert float(found.after) < float(nm.reconstruct(w, gram, mask, ridge=1e-3).after)


def test_centred_leaves_the_mean_out():
    w, x, gram, mask = make_layer("dense")
    found = nm.reconstruct(w, gram, mask, ridge=1e-3, centred=True)
    best = minimiser(x[0], w, np.asarray(mask), 1e-3, centred=True)
    centred = x[0].astype(np.float64) - x[0].mean(axis=0)
    assert error(centred, w, found.weight) == pytest.approx(error(centred, w, best), rel=1e-2)
    assert float(found.after) == pytest.approx(error(centred, w, found.weight), rel=1e-2)
    assert found.bias is None


def test_few_rows_get_a_larger_ridge():
    w, _, gram, mask = make_layer("dense", rows=40)
    found, expected = (nm.reconstruct(w, gram, mask, ridge=ridge).weight for ridge in (None, 0.3 * 16 / 40))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def degenerate_inputs():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(100, 16)).astype(np.float32)
    few = np.concatenate([x[:, :4]] * 4, axis=1)
    return {
        "one row": x[:1],
        "rank 4": few,
        "fewer rows than weights": x[:9],
        "constant": np.ones_like(x),
        "a constant vector": np.broadcast_to(x[:1], x.shape),
        "zero columns": x * (np.arange(16) % 3 > 0),
        "all zero": 0 * x,
        "one column": x * (np.arange(16) == 5),
        "tiny": 1e-12 * x,
        "huge": 1e12 * x,
        "large mean": x + 100,
        "scales apart": x * 10.0 ** np.linspace(-6, 6, 16, dtype=np.float32),
    }


@pytest.mark.parametrize("kind", degenerate_inputs())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_degenerate_inputs_never_do_harm(kind, dtype, with_bias):
    x = jnp.asarray(degenerate_inputs()[kind])
    draw = np.random.default_rng(1)
    w = jnp.asarray(draw.normal(size=(16, 8)), dtype)
    mask = nm.solve(jnp.abs(w).astype(jnp.float32), "2:4-T")
    bias = jnp.zeros(8, dtype) if with_bias else None
    for method, iterations in (("pcg", None), ("adam", 50)):
        found = nm.reconstruct(w, nm.Gram.from_inputs(x), mask, bias=bias, method=method, iterations=iterations)
        assert found.weight.dtype == dtype
        assert np.isfinite(np.asarray(found.weight, np.float32)).all()
        assert float(found.after) <= float(found.before)
        shift = 0 if bias is None else np.asarray(found.bias, np.float64)
        old, new = np.asarray(w, np.float64), np.asarray(found.weight, np.float64)
        masked = np.where(mask, old, 0)
        rows = np.asarray(x, np.float64)
        before, after = np.sum((rows @ (masked - old)) ** 2), np.sum((rows @ (new - old) + shift) ** 2)
        assert after <= before * (1 + 1e-3)


def test_a_full_mask_changes_nothing_and_an_empty_one_leaves_zeros():
    w, _, gram, mask = make_layer("dense")
    np.testing.assert_array_equal(nm.reconstruct(w, gram, jnp.ones_like(mask)).weight, w)
    assert not np.any(nm.reconstruct(w, gram, jnp.zeros_like(mask)).weight)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_adam_comes_close(name):
    w, x, _, mask = make_layer(name, rows=400)
    parts = [nm.Gram.from_inputs(jnp.asarray(part), LAYERS[name][1]) for part in np.split(x, 4, axis=1)]
    slow, fast = (nm.reconstruct(w, parts, mask, ridge=1e-6, method=method) for method in ("adam", "pcg"))
    assert int(slow.iterations) == 1000
    assert float(fast.after) <= float(slow.after) <= 1.3 * float(fast.after) + 0.1 * float(fast.before)
    np.testing.assert_allclose(fast.weight, nm.reconstruct(w, sum(parts[1:], parts[0]), mask, ridge=1e-6).weight)


def test_under_jit_and_vmap():
    w, _, gram, mask = make_layer("dense")
    plain = nm.reconstruct(w, gram, mask)
    np.testing.assert_allclose(jax.jit(nm.reconstruct)(w, gram, mask).weight, plain.weight, rtol=1e-4, atol=1e-5)
    stacked = jax.vmap(nm.reconstruct, in_axes=(0, None, None))(jnp.stack([w, 2 * w]), gram, mask)
    np.testing.assert_allclose(stacked.weight[0], plain.weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(stacked.weight[1], 2 * plain.weight, rtol=1e-3, atol=1e-4)


def test_the_scale_of_inputs_and_the_order_of_outputs_do_not_matter():
    w, x, gram, mask = make_layer("dense")
    plain = nm.reconstruct(w, gram, mask).weight
    scaled = nm.reconstruct(w, nm.Gram.from_inputs(jnp.asarray(1000 * x)), mask).weight
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-4)
    turned = nm.reconstruct(w[:, ::-1], gram, mask[:, ::-1]).weight
    np.testing.assert_allclose(turned[:, ::-1], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gram": nm.Gram.from_inputs(jnp.ones((5, 8)))}, r"need Gram matrices of shape \(1, 16, 16\)"),
        ({"gram": nm.Gram.from_inputs(jnp.ones((5, 16)), "iio")}, "one letter per dimension"),
        ({"gram": []}, "at least one batch"),
        ({"gram": nm.Gram.from_inputs(jnp.full((5, 16), jnp.nan))}, "not finite"),
        ({"mask": jnp.ones((12, 16), bool)}, r"mask has shape \(12, 16\)"),
        ({"bias": jnp.ones(16)}, "12 outputs"),
        ({"method": "obs"}, "'pcg' or 'adam'"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    w, _, gram, mask = make_layer("dense")
    arguments = {"gram": gram, "mask": mask} | change
    with pytest.raises(ValueError, match=message):
        nm.reconstruct(w, arguments.pop("gram"), arguments.pop("mask"), **arguments)


# ------------------------------------------------------------------------------------------------ bias fix, error


def test_the_bias_fix_keeps_the_sum_of_every_group():
    w = jnp.array([[1.0], [-2.0], [3.0], [4.0], [1.0], [1.0], [5.0], [5.0]])
    mask = jnp.array([0, 0, 1, 1, 0, 0, 1, 1], bool)[:, None]
    np.testing.assert_allclose(nm.absorb_mean(w, mask, "2:4")[:, 0], [0, 0, 2.5, 3.5, 0, 0, 6, 6])
    empty = nm.absorb_mean(w, jnp.zeros_like(mask), "2:4")
    assert not np.any(empty)


@pytest.mark.parametrize("axes, shape", [("io", (8, 6)), ("oi", (6, 8)), ("bbio", (3, 3, 8, 4)), ("iio", (2, 6, 4))])
def test_the_bias_fix_runs_along_the_groups(axes, shape):
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    masks = nm.compute_masks({"w": w}, [("w", "2:4", axes)])
    fixed = nm.absorb_mean(w, masks["w"], "2:4", axes)
    sums = [matrices(leaf, axes).reshape(-1, 4, shape[axes.index("o")]).sum(axis=1) for leaf in (w, fixed)]
    np.testing.assert_allclose(sums[1], sums[0], atol=1e-5)
    assert nm.verify({"w": fixed}, [("w", "2:4", axes)]).ok


def test_the_bias_fix_refuses_what_has_no_groups():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="no groups"):
        nm.absorb_mean(w, w > 0, "US-0.5")
    with pytest.raises(ValueError, match="mask has shape"):
        nm.absorb_mean(w, jnp.ones((4, 2), bool), "2:4")


def test_the_error_is_that_of_the_outputs():
    w, x, gram, mask = make_layer("dense")
    new, shift = jnp.where(mask, w, 0), jnp.linspace(-1, 1, 12)
    x, w64 = x[0].astype(np.float64), np.asarray(w, np.float64)
    change, out = x @ (np.asarray(new, np.float64) - w64), x @ w64
    moved = np.sum((change + np.asarray(shift)) ** 2) / np.sum(out**2)
    free = np.sum((change - change.mean(axis=0)) ** 2) / np.sum((out - out.mean(axis=0)) ** 2)
    assert float(nm.output_error(w, new, gram)) == pytest.approx(np.sum(change**2) / np.sum(out**2), rel=1e-4)
    assert float(nm.output_error(w, new, gram, bias_change=shift)) == pytest.approx(moved, rel=1e-4)
    assert float(nm.output_error(w, new, gram, centred=True)) == pytest.approx(free, rel=1e-4)
    assert float(nm.output_error(0 * w, new, gram)) > 0


# ------------------------------------------------------------------------------------------------- batch norm


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


# -------------------------------------------------------------------------------------------------- whole models


def network():
    """Two hidden layers with biases on plain dicts, and inputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (12, 16, 16, 4)
    params = {
        f"layer{k}": {"kernel": jax.random.normal(keys[k], sizes[k : k + 2]) / 4, "bias": jnp.full(sizes[k + 1], 0.1)}
        for k in range(3)
    }
    return params, jax.random.normal(keys[3], (5, 40, 12)) + 0.5


def hidden(layer, x):
    return jax.nn.relu(x @ layer["kernel"] + jnp.broadcast_to(layer["bias"], (*x.shape[:-1], layer["bias"].size)))


def apply(params, x):
    for layer in params.values():
        x = hidden(layer, x)
    return x


def inputs_of(params, path, x):
    """The rows that a layer sees."""
    for name, layer in params.items():
        if name == path:
            return np.asarray(x.reshape(-1, x.shape[-1]))
        x = hidden(layer, x)


RULES = [("layer[01]/kernel", "2:4-T")]


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_a_model_is_pruned_layer_by_layer(order):
    params, x = network()
    masks = nm.compute_masks(params, RULES)
    seen = []
    new, report = nm.adaprune(apply, params, masks, list(x), order=order, held_out=list(x), on_layer=seen.append)
    assert seen == list(report.layers) and [row.path for row in seen] == ["layer0/kernel", "layer1/kernel"]
    assert nm.verify(new, RULES).ok
    for leaf in ("kernel", "bias"):
        assert new["layer2"][leaf] is params["layer2"][leaf]
    for row in report.layers:
        name = row.path.split("/")[0]
        rows = inputs_of(params if order == "parallel" else new, name, x)
        target = rows @ np.asarray(params[name]["kernel"])
        change = rows @ np.asarray(new[name]["kernel"]) - target
        change += np.asarray(new[name]["bias"] - params[name]["bias"])
        assert row.after == pytest.approx(float(np.sum(change**2) / np.sum(target**2)), rel=1e-2)
        assert row.after < row.before and row.rows == 200 and row.bias
        if order == "parallel":
            assert row.held_out_after == pytest.approx(row.after, rel=1e-3)
            assert row.held_out_before == pytest.approx(row.before, rel=1e-3)
    assert "layer1/kernel" in str(report) and report["layer0/kernel"] is report.layers[0]


def test_a_model_without_its_biases_and_some_of_its_layers():
    params, x = network()
    masks = nm.compute_masks(params, RULES)
    for order in ("parallel", "sequential"):
        new, report = nm.adaprune(apply, params, masks, [x], leaves="layer1", biases=False, order=order)
        np.testing.assert_array_equal(new["layer0"]["kernel"], params["layer0"]["kernel"] * masks["layer0"]["kernel"])
        assert new["layer1"]["bias"] is params["layer1"]["bias"]
        assert report["layer0/kernel"].after is None and "masked only" in str(report)


def test_adam_on_a_model():
    params, x = network()
    new, report = nm.adaprune(apply, params, nm.compute_masks(params, RULES), list(x), method="adam", iterations=200)
    assert nm.verify(new, RULES).ok
    assert all(row.after < row.before and row.iterations == 200 for row in report.layers)


def test_a_model_with_padded_rows():
    params, x = network()
    masks = nm.compute_masks(params, RULES)
    keep = jnp.arange(40)[None] < jnp.array([40, 3, 20, 5, 1])[:, None]
    poisoned = jnp.where(keep[..., None], x, 1e4)
    _, report = nm.adaprune(apply, params, masks, [poisoned], row_mask=lambda _: keep)
    assert report.layers[0].rows == int(keep.sum())
    rows = np.asarray(x)[np.asarray(keep)]
    target = rows @ params["layer0"]["kernel"]
    before = rows @ (params["layer0"]["kernel"] * masks["layer0"]["kernel"]) - target
    assert report.layers[0].before == pytest.approx(float(np.sum(before**2) / np.sum(target**2)), rel=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "batches is empty"),
        ({"order": "backwards"}, "'parallel' or 'sequential'"),
        ({"leaves": "elsewhere"}, "nothing to reconstruct"),
        ({"batches": [jnp.full((40, 12), jnp.nan)]}, "layer0/kernel: the Gram matrices are not finite"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_an_error(change, message):
    params, x = network()
    options = {"batches": [x]} | change
    with pytest.raises(ValueError, match=message):
        nm.adaprune(apply, params, nm.compute_masks(params, RULES), options.pop("batches"), **options)
