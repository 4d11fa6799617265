"""Scores against brute force: prune one weight, and see what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nm_jax as nm
from nm_jax._reconstruct.scores import SCORES
from tests.helpers import check_mask
from tests.reconstruct.layers import LAYERS, make_layer, matrices


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
        nm.score_tree(nm.wanda, {"a": jnp.asarray(w), "b": jnp.asarray(w)}, {"a": gram})


# ------------------------------------------------------------------------------------------ the contract of a score

scores = pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)


@scores
@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_finite_whatever_the_inputs(score, layer, rows, dtype):
    w, x = layer
    for inputs in (x[:rows], 0 * x, x * (np.arange(8) < 3), np.ones_like(x)):
        found = score(jnp.asarray(w, dtype), nm.Gram.from_inputs(jnp.asarray(inputs)))
        assert found.dtype == jnp.float32 and np.isfinite(found).all() and (np.asarray(found) >= 0).all()


@scores
@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_like_the_weights_in_every_layout(score, name):
    w, x, gram, _ = make_layer(name)
    found = score(w, gram)
    assert found.shape == w.shape
    for leaf, rows, expected in zip(
        matrices(w, gram.contraction, gram.groups), x, matrices(found, gram.contraction, gram.groups), strict=True
    ):
        alone = score(jnp.asarray(leaf, jnp.float32), nm.Gram.from_inputs(jnp.asarray(rows)))
        np.testing.assert_allclose(alone / jnp.mean(alone), expected / np.mean(expected), rtol=1e-3, atol=1e-6)


@scores
def test_scores_under_jit_and_vmap(score):
    w, _, gram, _ = make_layer("dense")
    plain = score(w, gram)
    np.testing.assert_allclose(jax.jit(score)(w, gram), plain, rtol=1e-4)
    stacked = jax.vmap(score, in_axes=(0, None))(jnp.stack([w, 2 * w]), gram)
    np.testing.assert_allclose(stacked[0], plain, rtol=1e-4)
    assert np.all(np.asarray(stacked[1]) >= np.asarray(plain))  # twice the weights are no less worth


@scores
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sharding", [("data", None), (None, "data")], ids=["rows", "outputs"])
def test_scores_of_sharded_weights(score, axis_type, sharding):
    w, _, gram, _ = make_layer("dense")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*sharding)))
    np.testing.assert_allclose(score(sharded, gram), score(w, gram), rtol=1e-4)


@scores
@pytest.mark.parametrize("pattern", ["2:4", "2:4-T"])
def test_scores_go_where_scores_go(score, pattern):
    """On inputs of which four in eight carry nothing, masks keep what is contracted with the others."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(100, 8)) * ([1, 0] * 4), jnp.float32)
    params = {"a": {"kernel": jnp.asarray(draw.normal(size=(8, 4)), jnp.float32)}, "scale": jnp.ones(3)}
    grams = nm.gram(lambda p, x: x @ p["a"]["kernel"] * p["scale"].sum(), params, [x], ["a/kernel"])
    tree = nm.score_tree(score, params, grams)
    masks = nm.compute_masks(params, [("kernel", pattern)], scores=tree)
    assert check_mask(masks["a"]["kernel"], nm.parse_pattern(pattern))
    np.testing.assert_array_equal(tree["scale"], params["scale"])
    plain = nm.compute_masks(params, [("kernel", pattern)])
    kept, without = (float(jnp.sum(jnp.where(mask["a"]["kernel"], tree["a"]["kernel"], 0))) for mask in (masks, plain))
    assert kept >= without
    assert bool(jnp.any(masks["a"]["kernel"] != plain["a"]["kernel"]))


@scores
def test_scores_refuse_what_does_not_fit(score):
    w, _, gram, _ = make_layer("dense")
    with pytest.raises(ValueError, match="need Gram matrices"):
        score(w[:6], gram)
