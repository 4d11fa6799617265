"""Weights packed once per step: the same numbers as packing in every product."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nm_jax as nm
from nm_jax.matmul import PackedParameter, promote_dtype
from tests.matmul.cases import transposable
from tests.matmul.implementations import REFERENCE
from tests.matmul.packing_cost import packing

DOT = nm.dot_general("2:4-T", implementation=REFERENCE)
RULES = [("head", None), ("kernel", "2:4-T")]


class Network(nn.Module):
    """Two sparse layers, of which the second is computed again going backward, and a head without."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, 16, dot_general=DOT, promote_dtype=promote_dtype, dtype=self.dtype)
        x = nn.relu(dense(name="first")(x))
        x = nn.relu(
            nn.remat(nn.Dense)(16, dot_general=DOT, promote_dtype=promote_dtype, dtype=self.dtype, name="second")(x)
        )
        return nn.Dense(3, name="head")(x)


def train(use_packed, inner, refresh_every, dtype, steps=3):
    """Parameters after a few steps of two batches each."""
    model = Network(dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
    params = model.init(jax.random.key(0), x[0])
    tx = nm.sparse_training(
        inner,
        RULES,
        solver=nm.solvers.Greedy(),
        refresh_every=refresh_every,
        packed=use_packed,
        decay=nm.StepDecay(1.0),
    )
    opt_state = tx.init(params)
    params = nm.sparse_params(opt_state, params)

    @jax.jit
    def step(params, opt_state):
        packed = nm.pack_params(opt_state, params, dtype) if use_packed else None

        def loss(params, x):
            given = nm.attach(params, packed) if use_packed else params
            return jnp.mean(jnp.square(model.apply(given, x) - 1))

        def more(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None

        gradients, _ = jax.lax.scan(more, jax.tree.map(jnp.zeros_like, params), x)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    masks = []
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        masks.append(np.asarray(nm.masks(opt_state)["params"]["first"]["kernel"]))
    return params, masks


@pytest.mark.parametrize(
    "inner, refresh_every, dtype",
    [
        pytest.param(optax.sgd(0.3), 2, jnp.float32, id="sgd", marks=pytest.mark.slow),
        pytest.param(optax.adam(0.1), 2, jnp.bfloat16, id="adam, bfloat16", marks=pytest.mark.slow),
        pytest.param(optax.sgd(0.3), None, jnp.float32, id="fixed mask", marks=pytest.mark.slow),
    ],
)
def test_training_has_the_same_bits_as_with_weights_that_are_packed_in_every_product(inner, refresh_every, dtype):
    (ours, masks), (theirs, _) = (train(packed, inner, refresh_every, dtype) for packed in (True, False))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (refresh_every is None) == all((mask == masks[0]).all() for mask in masks)  # positions followed the masks


def packed_weight(axes="io", shape=(16, 8), dtype=jnp.float32):
    core = axes.lstrip("b")
    before = len(axes) - len(core)
    batch = shape[:before]
    members = [transposable(16, 8, seed) for seed in range(int(np.prod(batch)))]
    masks = [mask.T if core == "oi" else mask.reshape(shape[before:]) for mask in members]
    mask = np.stack(masks).reshape(shape)
    w = np.where(mask, np.random.default_rng(0).normal(size=shape), 0)
    params = {"w": jnp.asarray(w, dtype)}
    tx = nm.sparse_training(optax.sgd(0.1), [("w", "2:4-T", axes)], packed=True, refresh_every=None)
    return params, tx.init(params)


@pytest.mark.parametrize(
    "axes, shape, x_shape, dims",
    [
        ("io", (16, 8), (5, 16), (((1,), (0,)), ((), ()))),
        ("oi", (8, 16), (5, 16), (((1,), (1,)), ((), ()))),
        ("ioo", (16, 2, 4), (5, 16), (((1,), (0,)), ((), ()))),
        ("iio", (4, 4, 8), (5, 4, 4), (((1, 2), (0, 1)), ((), ()))),
        ("bio", (3, 16, 8), (3, 5, 16), (((2,), (1,)), ((0,), (0,)))),
    ],
)
def test_values_and_gradients_of_every_layout(axes, shape, x_shape, dims):
    params, opt_state = packed_weight(axes, shape)
    x = jnp.asarray(np.random.default_rng(1).normal(size=x_shape), jnp.float32)
    packed = nm.pack_params(opt_state, params)
    assert isinstance(packed["w"], PackedParameter)

    def loss(params, x, dot):
        return jnp.sum(jnp.sin(dot(x, nm.attach(params, packed)["w"], dims)))

    gradients = jax.jit(jax.value_and_grad(functools.partial(loss, dot=DOT), (0, 1)))(params, x)
    plain = jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(jax.lax.dot_general(x, p["w"], dims))), (0, 1))(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients, plain)
    text = str(jax.make_jaxpr(functools.partial(loss, dot=DOT))(params, x))
    assert "nm_sparse_product" in text and "name=compress" not in text


def test_weights_that_changed_after_they_were_packed_give_nan_and_no_former_products():
    params, opt_state = packed_weight()
    packed = nm.pack_params(opt_state, params)
    x = jnp.ones((2, 16))
    assert not np.isnan(DOT(x, nm.attach(params, packed)["w"], (((1,), (0,)), ((), ())))).any()
    moved = {"w": 1.001 * params["w"]}
    assert np.isnan(DOT(x, nm.attach(moved, packed)["w"], (((1,), (0,)), ((), ())))).all()


def test_first_gradient_at_dense_weights_sees_what_the_masks_keep():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    tx = nm.sparse_training(optax.sgd(0.1), [("w", nm.TransposableNM(2, 4, at_most=True))], packed=True)
    opt_state = tx.init({"w": w})
    packed = nm.pack_params(opt_state, {"w": w})["w"]
    y = nm.nm_matmul(jnp.eye(16), packed, implementation=REFERENCE)
    np.testing.assert_array_equal(y, nm.sparse_params(opt_state, {"w": w})["w"])


def test_layers_of_a_stack_are_cut_with_their_weights():
    params, opt_state = packed_weight("bio", (3, 16, 8))
    packed = nm.pack_params(opt_state, params)["w"]
    x = jnp.ones((2, 16))
    _, y = jax.lax.scan(lambda carry, w: (carry, nm.nm_matmul(x, w, implementation=REFERENCE)), None, packed)
    np.testing.assert_allclose(y, jnp.einsum("ti,bio->bto", x, params["w"]), rtol=1e-5, atol=1e-5)


def test_nnx_layers_take_it():
    layer = nnx.Linear(16, 8, dot_general=DOT, promote_dtype=promote_dtype, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer, nnx.Param)
    tx = nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True)
    opt_state = tx.init(params)
    params = nm.sparse_params(opt_state, params)
    x = jnp.ones((2, 16))
    packed = nm.pack_params(opt_state, params)
    np.testing.assert_array_equal(nnx.merge(graph, packed)(x), nnx.merge(graph, params)(x))
    gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graph, nm.attach(p, packed))(x)))(params)
    np.testing.assert_array_equal(gradient["kernel"][...], np.full((16, 8), 2.0))


def test_a_layer_with_its_own_promotion_packs_in_the_call_and_computes_the_same():
    params, opt_state = packed_weight()
    params = {"kernel": params["w"], "bias": jnp.zeros(8)}
    opt_state = nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True, refresh_every=None).init(params)
    packed = nm.pack_params(opt_state, params)
    x = jnp.ones((2, 16))
    outputs = [nn.Dense(8, dot_general=DOT).apply({"params": p}, x) for p in (params, packed)]
    np.testing.assert_array_equal(*outputs)


def test_refusals():
    params, opt_state = packed_weight()
    with pytest.raises(ValueError, match="begin_step=3; use packed=False"):
        nm.sparse_training(optax.sgd(0.1), "2:4-T", packed=True, begin_step=3)
    with pytest.raises(ValueError, match="no leaf can be packed"):
        nm.sparse_training(optax.sgd(0.1), [("w", "4:8")], packed=True).init(params)
    with pytest.raises(ValueError, match=r"use sparse_training\(..., packed=True\)"):
        nm.pack_params(nm.sparse_training(optax.sgd(0.1), [("w", "2:4-T")]).init(params), params)
    with pytest.raises(ValueError, match="which is not among params"):
        nm.pack_params(opt_state, {"v": params["w"]})
    with pytest.raises(ValueError, match="pack it anew"):
        nm.attach({"w": jnp.ones((8, 8))}, nm.pack_params(opt_state, params))


def test_the_documented_cost_of_packing_is_what_the_code_counts():
    """A weight of the MLP is packed for forward and backward of each batch, once more where forward runs again."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "sparse-products.md"
    entries = 2 * 4096 * 16384
    number = r"([\d.]+)"
    row = rf"\| (\d+) \| (yes|no) \| {number} \| {number} GB \| {number} \| {number} GB \|"
    rows = re.findall(row, page.read_text())
    assert len(rows) == 4
    for batches, again, *figures in rows:
        cost = packing(int(batches), again == "yes")
        expected = cost.in_products, cost.in_products * entries / 1e9, cost.once, cost.once * entries / 1e9
        np.testing.assert_allclose([float(figure) for figure in figures], expected, rtol=0.05)
    assert packing(1).in_products < packing(1).once < packing(1, remat=True).in_products < packing(2).in_products
