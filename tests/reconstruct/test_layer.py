"""One layer: the exact minimiser in double precision is the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from tests.reconstruct.layers import LAYERS, error, make_layer, matrices, minimiser


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


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1e3, 1e4])
@pytest.mark.parametrize("ridge", [None, 0.0])
def test_an_offset_of_the_inputs_does_not_matter_beside_a_bias(offset, ridge):
    draw = np.random.default_rng(0)
    base = draw.normal(size=(2000, 16)) @ (draw.normal(size=(16, 16)) / 4 + np.eye(16) / 3)
    x, w = (base / base.std() + offset).astype(np.float32), draw.normal(size=(16, 8)).astype(np.float32)
    mask = np.asarray(nm.solve(jnp.abs(jnp.asarray(w)), "2:4"))
    gram = nm.Gram.from_inputs(jnp.asarray(x))
    found = nm.reconstruct(jnp.asarray(w), gram, jnp.asarray(mask), bias=jnp.zeros(8), ridge=ridge)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    best, masked = error(centred, w, minimiser(centred, w, mask, 1e-9)), error(centred, w, mask * w)
    lost = error(centred, w, found.weight)
    if offset <= 100:
        assert lost == pytest.approx(best, rel=2e-2) and lost < 0.7 * masked
    else:  # rounding hides the spread of the inputs: nothing can be gained, and no harm is done
        assert lost < 1.05 * masked
