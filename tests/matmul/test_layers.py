"""Sparse products inside the layers of Flax Linen and NNX: nothing changes but how they are computed."""

import functools
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nm_jax as nm
from nm_jax.matmul import _choice, conv_general_dilated, dot_general, einsum
from tests.matmul.cases import leaf_mask, transposable
from tests.matmul.implementations import AMPERE
from tests.matmul.test_api import calls

REFERENCE = {"implementation": "reference"}
DOT = dot_general("2:4-T", **REFERENCE)
CONV = conv_general_dilated("2:4-T", **REFERENCE)


def sparse_kernels(tree):
    """Parameters whose kernels have 2:4-T zeros."""

    def cut(path, leaf):
        name = jax.tree_util.keystr(path)
        if "kernel" not in name:
            return leaf
        inputs = {4: 3, 3: 2 if "out" in name else 1, 2: 1}[leaf.ndim]  # of convolutions all but one are, of size 1
        return leaf * leaf_mask(leaf.shape, "i" * inputs + "o" * (leaf.ndim - inputs))

    return jax.tree_util.tree_map_with_path(cut, tree)


def same_products(mine, plain, params, x, expected_calls):
    """Value and gradients of two ways to apply parameters agree; one has so many (sparse, dense) products."""

    def loss(apply):
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x))), (0, 1))

    found, truth = jax.jit(loss(mine))(params, x), jax.jit(loss(plain))(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert calls(jax.make_jaxpr(loss(mine))(params, x).jaxpr) == expected_calls


LINEN = {
    "dense": (lambda **k: nn.Dense(8, **k), {"dot_general": DOT}, (3, 5, 16), (2, 1)),
    "class": (
        lambda **k: nn.Dense(8, **k),
        {"dot_general_cls": functools.partial(dot_general, **REFERENCE)},
        (3, 16),
        (2, 1),
    ),
    "several outputs": (lambda **k: nn.DenseGeneral((2, 4), **k), {"dot_general": DOT}, (3, 16), (2, 1)),
    "attention": (
        lambda **k: nn.MultiHeadDotProductAttention(4, **k),
        {"qkv_dot_general": DOT, "out_dot_general": DOT},
        (2, 5, 16),
        (8, 4 + 6),  # four projections; scores and values have two dense products, with two gradients each
    ),
    "conv 1x1": (lambda **k: nn.Conv(8, (1, 1), **k), {"conv_general_dilated": CONV}, (2, 3, 3, 16), (2, 1)),
    "strided conv": (
        lambda **k: nn.Conv(8, (1, 1), strides=2, **k),
        {"conv_general_dilated": CONV},
        (2, 5, 4, 16),
        (2, 1),
    ),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    make, sparse, shape, expected = LINEN[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    plain, mine = make(), make(**sparse)
    params = sparse_kernels(plain.init(jax.random.key(0), x))
    assert jax.tree.structure(mine.init(jax.random.key(0), x)) == jax.tree.structure(params)
    same_products(mine.apply, plain.apply, params, x, expected)


NNX = {
    "linear": (lambda r, **k: nnx.Linear(16, 8, rngs=r, **k), {"dot_general": DOT}, (3, 5, 16), (2, 1)),
    "general": (lambda r, **k: nnx.LinearGeneral(16, (2, 4), rngs=r, **k), {"dot_general": DOT}, (3, 16), (2, 1)),
    "attention": (
        lambda r, **k: nnx.MultiHeadAttention(4, 16, decode=False, rngs=r, **k),
        {"qkv_dot_general": DOT, "out_dot_general": DOT},
        (2, 5, 16),
        (8, 4 + 6),
    ),
    "einsum": (
        lambda r, **k: nnx.Einsum("bti,ihd->bthd", (16, 2, 4), rngs=r, **k),
        {"einsum_op": einsum("2:4-T", **REFERENCE)},
        (2, 3, 16),
        (2, 1),
    ),
    "conv": (
        lambda r, **k: nnx.Conv(16, 8, (1, 1), rngs=r, **k),
        {"conv_general_dilated": CONV},
        (2, 3, 3, 16),
        (2, 1),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "attention" else ()) for n in NNX])
def test_nnx(name):
    make, sparse, shape, expected = NNX[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    mine = nnx.split(make(nnx.Rngs(0), **sparse), nnx.Param, ...)[0]
    params = sparse_kernels(params)
    same_products(
        lambda params, x: nnx.merge(mine, params, rest)(x),
        lambda params, x: nnx.merge(graph, params, rest)(x),
        params,
        x,
        expected,
    )


# ----------------------------------------------------------------------------------- the signature of lax.dot_general


@pytest.mark.parametrize(
    "x_shape, w_shape, numbers",
    [
        ((3, 16), (16, 8), (((1,), (0,)), ((), ()))),
        ((16, 3), (8, 16), (((0,), (1,)), ((), ()))),
        ((4, 3, 2), (2, 4, 8), (((0, 2), (1, 0)), ((), ()))),  # named in another order than the weight's
        ((5, 3, 16), (5, 16, 8), (((2,), (1,)), ((0,), (0,)))),  # experts
        ((3, 2, 5, 16), (5, 2, 16, 8), (((3,), (2,)), ((1, 2), (1, 0)))),
    ],
)
def test_any_dimension_numbers(x_shape, w_shape, numbers):
    x, w = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in (x_shape, w_shape))
    (_, over), (_, batch) = numbers
    letters = "".join("b" if d in batch else "i" if d in over else "o" for d in range(w.ndim))
    w = jnp.where(leaf_mask(w_shape, letters), w, 0)
    y = DOT(x, w, numbers)
    truth = jax.lax.dot_general(x, w, numbers)
    assert y.shape == truth.shape
    np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, sparse",
    [
        ({"precision": jax.lax.Precision.HIGHEST}, True),
        ({"precision": "highest", "preferred_element_type": jnp.bfloat16}, True),
        ({"out_sharding": None}, True),
        ({"preferred_element_type": jnp.float32}, False),
    ],
)
def test_the_arguments_of_dot_general(kwargs, sparse):
    _choice.warn_once.cache_clear()
    x, w = jnp.ones((3, 8), jnp.bfloat16), jnp.asarray(transposable(8, 4), jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    call = functools.partial(DOT, dimension_numbers=numbers, **kwargs)
    if sparse:
        y = call(x, w)
    else:
        with pytest.warns(UserWarning, match="runs dense: its result is to be float32"):
            y = call(x, w)
    assert calls(jax.make_jaxpr(call)(x, w).jaxpr) == ((1, 0) if sparse else (0, 1))
    assert y.dtype == kwargs.get("preferred_element_type", jnp.bfloat16)
    np.testing.assert_array_equal(y, jax.lax.dot_general(x, w, numbers, preferred_element_type=y.dtype))


def test_an_out_sharding_is_obeyed_by_a_dense_product():
    _choice.warn_once.cache_clear()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 8)), jax.P("data", None))
        w = jnp.asarray(transposable(8, 4), jnp.float32)
        with pytest.warns(UserWarning, match="it has an out_sharding"):
            y = DOT(x, w, (((1,), (0,)), ((), ())), out_sharding=jax.P("data", None))
    assert jax.typeof(y).sharding.spec == jax.P("data", None)
    np.testing.assert_array_equal(y, np.full((4, 4), 4.0))


@pytest.mark.parametrize("k, rows, because", [(6, 8, "4 does not divide"), (8, 10, "4 does not divide")])
def test_sizes_that_training_skips_stay_dense_and_that_is_said_once(k, rows, because, recwarn):
    _choice.warn_once.cache_clear()
    x, w = jnp.ones((3, k)), jnp.ones((k, rows))  # a dense head, for instance
    call = functools.partial(DOT, dimension_numbers=(((1,), (0,)), ((), ())))
    np.testing.assert_array_equal(call(x, w), x @ w)
    call(2 * x, w)
    assert [str(w.message) for w in recwarn if because in str(w.message)] == [
        f"a product with a weight of shape ({k}, {rows}) runs dense: 4 does not divide its sizes"
    ]


def test_other_convolutions_stay_dense_and_that_is_said():
    x, w = jnp.ones((1, 6, 6, 8)), jnp.ones((3, 3, 8, 4))
    _choice.warn_once.cache_clear()
    call = functools.partial(CONV, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    with pytest.warns(UserWarning, match=r"kernel of shape \(3, 3, 8, 4\) runs dense: it is not 1 x 1"):
        y = call(x, w, (1, 1), "SAME")
    truth = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(y, truth)
    one = jnp.ones((1, 1, 8, 4))
    for change in (
        {"padding": [(1, 1), (0, 0)]},
        {"padding": [(0, 0), (0, 0)], "lhs_dilation": (2, 1)},
        {"rhs": jnp.ones((1, 1, 2, 4)), "feature_group_count": 4},
    ):
        _choice.warn_once.cache_clear()
        arguments = {"rhs": one, "window_strides": (1, 1), "padding": "VALID", **change}
        with pytest.warns(UserWarning, match="runs dense"):
            y = call(x, **arguments)
        plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        np.testing.assert_array_equal(y, plain(x, **arguments))


def test_channels_first_convolutions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 5)), jnp.float32)
    w = jnp.asarray(transposable(8, 16)[..., None] * np.random.default_rng(1).normal(size=(8, 16, 1)), jnp.float32)
    y = CONV(x, w, (2,), "SAME")
    np.testing.assert_allclose(y, jax.lax.conv_general_dilated(x, w, (2,), "SAME"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "subscripts, x_shape, w_shape, expected",
    [
        ("bti,ihd->bthd", (2, 3, 8), (8, 2, 4), (1, 0)),
        ("bti,ihd->bhtd", (2, 3, 8), (8, 2, 4), (1, 0)),
        ("bthd,hdo->bto", (2, 3, 2, 4), (2, 4, 8), (1, 0)),
        ("etk,eko->teo", (3, 2, 8), (3, 8, 4), (1, 0)),
        ("tk,ko->o", (3, 8), (8, 4), (0, 1)),
        ("...k,ko->...o", (3, 8), (8, 4), (0, 1)),
    ],
)
def test_einsum(subscripts, x_shape, w_shape, expected, recwarn):
    x, w = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in (x_shape, w_shape))
    inputs, outputs = subscripts.split("->")
    left, right = inputs.split(",")
    letters = "".join("o" if c not in left else "b" if c in outputs else "i" for c in right)
    w = jnp.where(leaf_mask(w_shape, letters), w, 0)
    call = functools.partial(einsum("2:4-T", **REFERENCE), subscripts)
    np.testing.assert_allclose(call(x, w), jnp.einsum(subscripts, x, w), rtol=1e-5, atol=1e-5)
    assert calls(jax.make_jaxpr(call)(x, w).jaxpr) == expected
    assert bool(recwarn) == (expected == (0, 1))


def test_layers_compare_equal_hash_and_pickle():
    for make in (dot_general, conv_general_dilated, einsum):
        assert make("2:4-T") == make("2:4-T") != make("2:4")
        assert hash(make("2:4-T")) == hash(make("2:4-T"))
        assert pickle.loads(pickle.dumps(make("2:4-T"))) == make("2:4-T")
    with pytest.raises(ValueError, match="two kept of every four"):
        dot_general("4:8-T")
    with pytest.raises(ValueError, match="'hopper' cannot run this product"):
        dot_general("2:4-T", implementation="hopper")(jnp.ones((4, 4)), jnp.ones((4, 4)), (((1,), (0,)), ((), ())))


def test_on_a_cpu_the_default_is_lax_itself_and_says_nothing(recwarn):
    x = jnp.ones((2, 6, 6, 8))
    dot = jax.make_jaxpr(functools.partial(dot_general(), dimension_numbers=(((3,), (0,)), ((), ()))))(
        x, jnp.ones((8, 4))
    )
    assert [e.primitive.name for e in dot.eqns] == ["dot_general"]
    conv = functools.partial(
        conv_general_dilated(), window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for size in (1, 3):
        jaxpr = jax.make_jaxpr(conv)(x, jnp.ones((size, size, 8, 4)))
        assert jaxpr.eqns[-1].primitive.name == "conv_general_dilated"
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------- a train step


GREEDY = nm.solvers.Greedy()  # it compiles fast


class Network(nn.Module):
    """Two hidden layers with sparse products, and a head without."""

    dot_general: object = None
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(16, dot_general=self.dot_general, dtype=self.dtype)(x))
        return nn.Dense(3, name="head")(x)


def training(function, dtype=jnp.float32):
    model = Network(function, dtype)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16)), jnp.float32)
    tx = nm.sparse_training(optax.sgd(0.1), [("head", None), ("kernel", "2:4-T")], solver=GREEDY, refresh_every=2)
    params = model.init(jax.random.key(0), x)
    opt_state = tx.init(params)

    def step(params, opt_state, x):
        def loss(params, x):
            return jnp.mean(jnp.square(model.apply(params, x) - 1))

        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
        updates, opt_state = tx.update(gradients[0], opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, gradients[1]

    return step, nm.sparse_params(opt_state, params), opt_state, x


@pytest.mark.slow
def test_training_is_the_same_with_sparse_products():
    results = []
    for function in (None, DOT):
        step, params, opt_state, x = training(function)
        step = jax.jit(step)
        for _ in range(5):
            params, opt_state, value, _ = step(params, opt_state, x)
        results.append((value, params))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function, dtype",
    [(DOT, jnp.float32), pytest.param(dot_general(implementation=AMPERE), jnp.bfloat16, marks=pytest.mark.slow)],
)
def test_a_train_step_has_two_sparse_and_one_dense_product_a_layer(function, dtype):
    step, *arguments = training(function, dtype)
    assert calls(jax.make_jaxpr(step)(*arguments).jaxpr) == (2 * 2, 2 * 1 + 3)  # and the head's three


def test_the_compiled_train_step_has_them_too():
    step, *arguments = training(DOT)
    program = jax.jit(step).lower(*arguments).compile().as_text()
    products = [line for line in program.splitlines() if re.search(r" dot\(", line)]
    sparse = [line for line in products if "nm_sparse_product" in line]
    assert (len(sparse), len(products) - len(sparse)) == (4, 5)
