"""Whole models, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._reconstruct import _adaprune


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


@pytest.mark.parametrize("order", [pytest.param("parallel", marks=pytest.mark.slow), "sequential"])
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


@pytest.mark.slow
@pytest.mark.parametrize(("order", "passes"), [("parallel", 1), ("sequential", 2)])
def test_a_pass_over_the_inputs_for_all_layers_or_for_each(order, passes, monkeypatch):
    params, x = network()
    seen = []
    monkeypatch.setattr(_adaprune, "gram", lambda *args, **kwargs: seen.append(args) or nm.gram(*args, **kwargs))
    nm.adaprune(apply, params, nm.compute_masks(params, RULES), [x], order=order)
    assert len(seen) == passes


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


def flat(params, names):
    """The same parameters under flat names."""
    return {names[name].format(layer): leaf for layer, own in params.items() for name, leaf in own.items()}


NAMES = {
    "dotted": {"kernel": "{}.weight", "bias": "{}.bias"},
    "slashed": {"kernel": "{}/kernel", "bias": "{}/bias"},
    "prefixed": {"kernel": "{}.in_proj_weight", "bias": "{}.in_proj_bias"},
    "short": {"kernel": "{}/w", "bias": "{}/b"},
}


@pytest.mark.parametrize("names", NAMES)
def test_a_bias_is_found_beside_its_kernel_whatever_the_names(names):
    params, x = network()
    names = NAMES[names]
    masks = nm.compute_masks(params, RULES)
    expected, _ = nm.adaprune(apply, params, masks, [x])
    flat_masks = flat({layer: {"kernel": own["kernel"]} for layer, own in masks.items()}, names)
    renamed = flat(params, names)

    def apply_flat(renamed, x):
        return apply({f"layer{k}": {n: renamed[names[n].format(f"layer{k}")] for n in names} for k in range(3)}, x)

    new, report = nm.adaprune(apply_flat, renamed, dict.fromkeys(renamed) | flat_masks, [x])
    assert all(row.bias and "bias moved" in str(report) for row in report.layers)
    for path, leaf in flat(expected, names).items():
        np.testing.assert_allclose(new[path], leaf, rtol=1e-5, atol=1e-6)


def test_a_layer_without_a_bias_is_told_from_one_whose_bias_moved():
    params, x = network()
    masks = nm.compute_masks(params, RULES)
    renamed = {layer: {"kernel": own["kernel"], "offset": own["bias"]} for layer, own in params.items()}

    def apply_renamed(renamed, x):
        return apply({layer: {"kernel": own["kernel"], "bias": own["offset"]} for layer, own in renamed.items()}, x)

    no_bias = {layer: {"kernel": own["kernel"], "offset": None} for layer, own in masks.items()}
    _, report = nm.adaprune(apply_renamed, renamed, no_bias, [x])
    assert not report.layers[0].bias and "no bias of it is known" in str(report)
    _, report = nm.adaprune(apply_renamed, renamed, no_bias, [x], biases=False)
    assert "no bias" not in str(report)


def test_two_kernels_may_share_a_bias():
    draw = np.random.default_rng(0)
    sizes = {"kernel": (8, 4), "recurrent_kernel": (12, 4), "bias": (4,)}
    params = {name: jnp.asarray(draw.normal(size=size), jnp.float32) for name, size in sizes.items()}
    x, h = (jnp.asarray(draw.normal(size=(50, size)) + 1, jnp.float32) for size in (8, 12))

    def both(params, x, h):
        return x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"][None]

    masks = nm.compute_masks(params, [("kernel", "2:4", "io")])
    new, report = nm.adaprune(both, params, masks, [(x, h)])
    assert all(row.bias for row in report.layers)
    np.testing.assert_allclose(jnp.mean(both(new, x, h) - both(params, x, h), axis=0), 0, atol=1e-4)
