"""Whole models with permuted channels: more is kept, no layer keeps less, the outputs stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._model import channels
from nm_jax._reconstruct import _permute
from tests.model.architectures import ARCHITECTURES, X, normal


@pytest.fixture(autouse=True)
def _biases_are_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


def forward(p, x):
    h = jnp.tanh(x @ p["in"]) + p["bias"]
    return (h + jnp.tanh(h @ p["up"]) @ p["down"]) @ p["out"]


PARAMS = {"in": normal(8, 16), "bias": normal(16), "up": normal(16, 24), "down": normal(24, 16), "out": normal(16, 2)}


def retained(params, plan):
    """The share of the magnitude that the best masks keep, by path."""
    masks = nm.compute_masks(params, plan)
    return {
        path: float((np.abs(np.asarray(params[path], np.float64)) * mask).sum() / np.abs(params[path]).sum())
        for path, mask in masks.items()
        if mask is not None
    }


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("2:4-T", marks=pytest.mark.slow)])
def test_a_model_keeps_more_and_computes_the_same(pattern):
    plan = nm.plan(forward, PARAMS, X, pattern=pattern)
    seen = []
    new, report = nm.permute(forward, PARAMS, X, pattern=pattern, on_channels=seen.append)
    before, after = forward(PARAMS, X), forward(new, X)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)
    was, now = retained(PARAMS, plan), retained(new, plan)
    assert set(was) == {"up", "down"} and all(now[path] > was[path] for path in was)
    for path in was:
        assert report[path].before == pytest.approx(was[path], rel=1e-5)
        assert report[path].after == pytest.approx(now[path], rel=1e-5)
    for name, leaf in PARAMS.items():
        assert sorted(np.ravel(leaf)) == sorted(np.ravel(new[name]))
    stream, inner, *others = sorted(report.channels, key=lambda group: -len(group.where))
    assert set(stream.where) == {("in", 1), ("bias", 0), ("up", 0), ("down", 1), ("out", 0)}
    assert set(inner.where) == {("up", 1), ("down", 0)}
    assert sorted(stream.order) == list(range(16)) and {group.size for group in seen} == {16, 24}
    assert all("of the model" in group.reason and group.order is None for group in others)
    assert "moved" in str(report) and "of the model" in str(report)


@pytest.mark.slow
def test_arrays_that_do_not_move_are_the_same_ones():
    params = {**PARAMS, "last": normal(2)}
    new, _ = nm.permute(lambda p, x: forward(p, x) + p["last"], params, X, pattern="2:4", rounds=1)
    assert new["last"] is params["last"] and new["up"] is not params["up"]


def test_the_orders_of_the_report_are_those_of_the_parameters():
    new, report = nm.permute(forward, PARAMS, X, pattern="2:4", seed=1)
    again, _ = nm.permute(forward, PARAMS, X, pattern="2:4", seed=1)
    expected = {name: np.asarray(leaf) for name, leaf in PARAMS.items()}
    for group in report.channels:
        for path, dim in group.where if group.order else ():
            expected[path] = np.take(expected[path], group.order, axis=dim)
    for name in PARAMS:
        np.testing.assert_array_equal(new[name], expected[name])
        np.testing.assert_array_equal(new[name], again[name])


def test_what_the_plan_leaves_dense_moves_along_but_does_not_count():
    plan = nm.plan(forward, PARAMS, X, pattern="2:4", rules=[("up", None)])
    new, report = nm.permute(forward, PARAMS, X, pattern=plan)
    assert [layer.path for layer in report.layers] == ["down"]
    assert new["in"] is PARAMS["in"] and (new["up"] != PARAMS["up"]).any()


def test_scores_decide():
    scores = {name: jnp.ones_like(leaf) for name, leaf in PARAMS.items()}
    new, report = nm.permute(forward, PARAMS, X, pattern="2:4", scores=scores)
    assert all(new[name] is PARAMS[name] for name in PARAMS)
    assert {layer.after for layer in report.layers} == {0.5}


@pytest.mark.parametrize("size", [6, 10])
def test_channels_whose_groups_would_be_torn_stay(size):
    """Heads whose size the groups do not divide: groups run from one head into the next."""

    def apply(p, x):
        h = (x @ p["v"]).reshape(2, 3, 4, size)
        return jnp.tanh(h * p["scale"]).reshape(2, 3, 4 * size) @ p["o"] @ p["out"]

    params = {"v": normal(8, 4 * size), "scale": normal(size), "o": normal(4 * size, 8), "out": normal(8, 2)}
    new, report = nm.permute(apply, params, X, pattern="2:4")
    torn = [group for group in report.channels if ("o", 0) in group.where]
    assert torn and all("groups of 2:4 of o would be torn" in group.reason for group in torn)
    assert new["o"] is params["o"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern"),
    [*((name, "1:2") for name in ARCHITECTURES), ("gated mlp", "1:2-T"), ("scan over layers", "1:2-T")],
)
def test_no_layer_of_any_architecture_keeps_less(name, pattern):
    apply, params, inputs, _ = ARCHITECTURES[name]()
    plan = nm.plan(apply, params, *inputs, pattern=pattern, first=pattern, last=pattern)
    new, report = nm.permute(apply, params, *inputs, pattern=plan, rounds=2)
    assert all(layer.after >= layer.before for layer in report.layers)
    assert any(layer.after > layer.before for layer in report.layers)
    for was, now in zip(jax.tree.leaves(apply(params, *inputs)), jax.tree.leaves(apply(new, *inputs)), strict=True):
        assert np.linalg.norm(now - was) <= 1e-5 * np.linalg.norm(was)


def test_outputs_that_change_are_an_error_that_names_the_parameters(monkeypatch):
    def torn(apply, params, inputs):
        """As if the bias were no part of the stream."""
        found = channels.wiring(apply, params, inputs)
        dims = [
            (channels.Part(16),) if path == "bias" else dims for path, dims in zip(found.paths, found.dims, strict=True)
        ]
        return found._replace(dims=tuple(dims))

    monkeypatch.setattr(_permute, "wiring", torn)
    with pytest.raises(ValueError, match=r"outputs change when the 16 channels of .*down \(dimension 1\)"):
        nm.permute(forward, PARAMS, X, pattern="2:4")


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match="must have values"):
        nm.permute(forward, PARAMS, jax.ShapeDtypeStruct(X.shape, X.dtype), pattern="2:4")
    with pytest.raises(ValueError, match="not finite"):
        nm.permute(forward, PARAMS, X * jnp.inf, pattern="2:4")
