"""Scores against brute force: prune one weight, and see what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm


@pytest.fixture
def layer():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 8)) @ draw.normal(size=(8, 8)) + 0.3
    return draw.normal(size=(8, 4)).astype(np.float32), x.astype(np.float32)


def test_wanda_squared_is_the_error_of_pruning_one_weight(layer):
    w, x = layer
    scores = np.asarray(nm.wanda(jnp.asarray(w), nm.Gram.from_inputs(jnp.asarray(x))), np.float64) ** 2
    unit = np.mean(np.sum(x.astype(np.float64) ** 2, axis=0))
    for i in range(8):
        for o in range(4):
            cost = np.sum((x[:, i].astype(np.float64) * w[i, o]) ** 2)
            assert scores[i, o] * unit == pytest.approx(cost, rel=1e-3)


def test_obc_is_the_error_after_the_others_have_adapted(layer):
    w, x = layer
    damping = 0.05
    scores = np.asarray(nm.obc(jnp.asarray(w), nm.Gram.from_inputs(jnp.asarray(x)), damping), np.float64)
    unit = np.mean(np.sum(x.astype(np.float64) ** 2, axis=0))
    rows = np.concatenate([x.astype(np.float64), np.sqrt(damping * unit) * np.eye(8)])
    for i in range(8):
        others = np.delete(np.arange(8), i)
        for o in range(4):
            target = rows @ w[:, o].astype(np.float64)
            left = target - rows[:, others] @ np.linalg.lstsq(rows[:, others], target, rcond=None)[0]
            assert scores[i, o] * unit == pytest.approx(np.sum(left**2), rel=1e-3)


@pytest.mark.parametrize("score", [nm.wanda, nm.obc])
@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_finite_whatever_the_inputs(layer, score, rows, dtype):
    w, x = layer
    for inputs in (x[:rows], 0 * x, x * (np.arange(8) < 3), np.ones_like(x)):
        scores = score(jnp.asarray(w, dtype), nm.Gram.from_inputs(jnp.asarray(inputs)))
        assert scores.dtype == jnp.float32 and np.isfinite(scores).all() and (np.asarray(scores) >= 0).all()


@pytest.mark.parametrize("score", [nm.wanda, nm.obc])
def test_scores_of_every_layout(score):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(2, 30, 8)).astype(np.float32)
    w = draw.normal(size=(2, 8, 4)).astype(np.float32)
    single = [score(jnp.asarray(a), nm.Gram.from_inputs(jnp.asarray(b))) for a, b in zip(w, x, strict=True)]
    experts = score(jnp.asarray(w), nm.Gram.from_inputs(jnp.asarray(x), "bio"))
    np.testing.assert_allclose(experts, np.stack(single), rtol=1e-4)
    turned = score(jnp.asarray(w[0].T), nm.Gram.from_inputs(jnp.asarray(x[0]), "oi"))
    np.testing.assert_allclose(turned.T, single[0], rtol=1e-4)
    jitted = jax.jit(score)(jnp.asarray(w[0]), nm.Gram.from_inputs(jnp.asarray(x[0])))
    np.testing.assert_allclose(jitted, single[0], rtol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T"])
def test_masks_of_these_scores_have_their_pattern_and_cost_less(pattern):
    draw = np.random.default_rng(2)
    mixing = draw.normal(size=(32, 32)) * 10.0 ** draw.uniform(-2, 1, (1, 32))
    x = jnp.asarray(draw.normal(size=(400, 32)) @ mixing, jnp.float32)
    params = {"a": {"kernel": jnp.asarray(draw.normal(size=(32, 16)), jnp.float32)}, "scale": jnp.ones(3)}
    grams = nm.gram(lambda p, x: x @ p["a"]["kernel"] * p["scale"].sum(), params, [x], ["a/kernel"])
    errors = {}
    for name, score in (("magnitude", None), ("wanda", nm.wanda), ("obc", nm.obc)):
        scores = None if score is None else nm.score_tree(score, params, grams)
        masks = nm.compute_masks(params, [("kernel", pattern)], scores=scores)
        new, report = nm.reconstruct_layers(params, masks, grams)
        assert nm.verify(new, [("kernel", pattern)]).ok
        errors[name] = report["a/kernel"].before, report["a/kernel"].after
    assert errors["wanda"][0] < errors["magnitude"][0]
    assert errors["obc"][1] < errors["magnitude"][1]


def test_what_does_not_fit_is_an_error(layer):
    w, x = layer
    gram = nm.Gram.from_inputs(jnp.asarray(x))
    with pytest.raises(ValueError, match="damping must be positive"):
        nm.obc(jnp.asarray(w), gram, 0.0)
    with pytest.raises(ValueError, match="need Gram matrices"):
        nm.wanda(jnp.ones((6, 4)), gram)
    with pytest.raises(ValueError, match="1 entries for 2 parameters"):
        nm.score_tree(nm.wanda, {"a": w, "b": w}, {"a": gram})
