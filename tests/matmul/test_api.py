"""`nm_matmul`: derivatives, batches, the choice of implementation, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nm_jax import NM, SequentialNM, TransposableNM
from nm_jax.matmul import nm_matmul, pack, repack, unpack
from nm_jax.matmul._compress import to_dense
from tests.matmul.cases import refused, transposable

K, ROWS = 24, 16
MASK = transposable(K, ROWS)


def operands(*batch, seed=0):
    generator = np.random.default_rng(seed)
    w = np.where(MASK, generator.normal(size=(K, ROWS)), 0)
    return jnp.asarray(generator.normal(size=(*batch, K)), jnp.float32), jnp.asarray(w, jnp.float32)


def calls(jaxpr):
    """(sparse products, dense products) anywhere in a jaxpr; what is inside a sparse product does not count."""
    sparse = dense = 0
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "nm_sparse_product":
            sparse += 1
            continue
        dense += equation.primitive.name in ("dot_general", "conv_general_dilated")
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                more = calls(inner)
                sparse, dense = sparse + more[0], dense + more[1]
    return sparse, dense


def traced(function, *arguments):
    return calls(jax.make_jaxpr(function)(*arguments).jaxpr)


def loss(product):
    return lambda x, w: jnp.sum(jnp.sin(product(x, w)))


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("pattern", ["2:4-T", "2:4"])
def test_values_and_gradients_are_those_of_the_dense_product(batch, pattern):
    x, w = operands(*batch)
    product = functools.partial(nm_matmul, pattern=pattern, implementation="reference")
    np.testing.assert_allclose(product(x, w), x @ w, rtol=1e-5, atol=1e-5)
    found = jax.jit(jax.grad(loss(product), (0, 1)))(x, w)
    for mine, truth in zip(found, jax.grad(loss(jnp.matmul), (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(found[1]))[~MASK].min() > 0  # straight-through: pruned entries get a gradient


@pytest.mark.parametrize(
    "pattern, forward, both",
    [("2:4-T", (1, 0), (2, 1)), ("2:4", (1, 0), (1, 2)), (TransposableNM(2, 4, at_most=True), (1, 0), (2, 1))],
)
def test_which_products_run_sparse(pattern, forward, both):
    x, w = operands(5)
    product = functools.partial(nm_matmul, pattern=pattern, implementation="reference")
    assert traced(product, x, w) == forward
    assert traced(jax.grad(loss(product), (0, 1)), x, w) == both


def test_by_default_a_cpu_does_the_dense_product_and_nothing_else():
    x, w = operands(5)
    assert traced(nm_matmul, x, w) == (0, 1)
    assert traced(jax.grad(loss(nm_matmul), (0, 1)), x, w) == (0, 3)
    names = {equation.primitive.name for equation in jax.make_jaxpr(nm_matmul)(x, w).eqns}
    assert names == {"dot_general"}
    tangent = jax.jvp(lambda x: nm_matmul(x, w), (x,), (x,))[1]  # forward mode too
    np.testing.assert_allclose(tangent, x @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4-T", "2:4"])
def test_second_derivatives(pattern):
    x, w = operands(2)
    product = functools.partial(nm_matmul, pattern=pattern, implementation="reference")

    def second(product):
        gradients = jax.grad(loss(product), (0, 1))
        return jax.grad(lambda x, w: sum(jnp.sum(jnp.cos(g)) for g in gradients(x, w)), (0, 1))

    for mine, truth in zip(second(product)(x, w), second(jnp.matmul)(x, w), strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=1e-4)


def test_forward_mode_through_a_sparse_product_is_refused():
    x, w = operands(2)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: nm_matmul(x, w, implementation="reference"), (x,), (x,))


def test_a_packed_weight_gets_the_gradient_of_its_values():
    x, w = operands(5)
    packed = pack(w)

    def product(x, w):
        return nm_matmul(x, repack(packed, w), implementation="reference")

    truth = jax.grad(loss(jnp.matmul), (0, 1))(x, w)
    found = jax.jit(jax.grad(loss(product), (0, 1)))(x, w)
    np.testing.assert_allclose(found[0], truth[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], np.where(MASK, truth[1], 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_jax_grad_takes_a_packed_weight_and_both_of_its_sides_get_the_gradient(implementation):
    x, w = operands(5)
    packed = pack(w)
    product = functools.partial(nm_matmul, implementation=implementation)
    gradient = jax.jit(jax.grad(lambda p: loss(product)(x, p)))(packed)
    truth = np.where(MASK, jax.grad(loss(jnp.matmul), 1)(x, w), 0)
    np.testing.assert_allclose(
        to_dense(dataclasses.replace(packed.forward.matrix, values=gradient.forward.values)).T,
        truth,
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        to_dense(dataclasses.replace(packed.backward.matrix, values=gradient.backward.values)),
        truth,
        rtol=1e-5,
        atol=1e-5,
    )
    assert not any(np.asarray(side.metadata).any() for side in (gradient.forward, gradient.backward))


@pytest.mark.parametrize("at_most", [pytest.param(False, marks=pytest.mark.slow), True])
def test_optax_trains_a_packed_weight_as_it_trains_the_weight_itself(at_most):
    x, w = operands(5)
    mask = MASK & (np.random.default_rng(1).random(MASK.shape) < 0.7) if at_most else MASK
    w = jnp.where(mask, w, 0)
    tx = optax.adam(0.1)

    def train(weight, product, project):
        state = tx.init(weight)
        for _ in range(3):
            gradient = jax.grad(lambda w: loss(product)(x, w))(weight)
            updates, state = tx.update(project(gradient), state, weight)
            weight = optax.apply_updates(weight, updates)
        return weight

    packed = train(pack(w, jnp.asarray(mask)), functools.partial(nm_matmul, implementation="reference"), lambda g: g)
    dense = train(w, jnp.matmul, lambda g: jnp.where(mask, g, 0))
    np.testing.assert_allclose(unpack(packed), dense, rtol=1e-4, atol=1e-5)
    backward = dataclasses.replace(packed, forward=None)
    np.testing.assert_allclose(unpack(backward), unpack(packed), rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("factor", [1.001, 0.5, -1.0, np.nan])
def test_a_packed_weight_whose_positions_were_changed_gives_nan(implementation, factor):
    x, w = operands(5)
    packed = pack(w)
    changed = jax.tree.map(lambda leaf: leaf * factor, packed)
    assert np.isnan(nm_matmul(x, changed, implementation=implementation)).all()
    assert np.isnan(unpack(changed)).all()
    averaged = jax.tree.map(lambda leaf: 0.999 * leaf + 0.001 * leaf, packed)  # of one mask: rounding does no harm
    np.testing.assert_allclose(nm_matmul(x, averaged, implementation=implementation), x @ w, rtol=1e-4, atol=1e-4)


def test_a_cast_of_a_packed_weight():
    x, w = operands(5)
    packed = pack(w)
    half = packed.astype(jnp.bfloat16)
    assert nm_matmul(x.astype(jnp.bfloat16), half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(unpack(half), w.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"cast with packed\.astype\(dtype\)"):
        nm_matmul(x, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), packed))


def test_second_derivatives_through_a_packed_weight():
    x, w = operands(2)
    packed = pack(w)

    def twice(product):
        return jax.grad(lambda w: jnp.sum(jnp.cos(jax.grad(loss(product))(x, w))))

    found = twice(lambda x, w: nm_matmul(x, repack(packed, w), implementation="reference"))(w)
    np.testing.assert_allclose(found, np.where(MASK, twice(jnp.matmul)(w), 0), rtol=1e-4, atol=1e-4)


def test_a_weight_packed_forward_only_has_a_dense_input_gradient():
    x, w = operands(5)
    packed = pack(w, orientation="forward")
    gradient = jax.grad(loss(functools.partial(nm_matmul, implementation="reference")))
    assert traced(gradient, x, packed)[0] == 1
    np.testing.assert_allclose(gradient(x, packed), jax.grad(loss(jnp.matmul))(x, w), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ batches, dtypes, jit


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_vmap_and_jit_agree_with_one_at_a_time(implementation):
    x, w = operands(3, 5)
    weights = jnp.stack([w, 2 * w, -w])
    product = functools.partial(nm_matmul, implementation=implementation)
    gradients = jax.grad(loss(product), (0, 1))
    for function in (jax.jit(lambda *a: (product(*a),)), jax.jit(gradients)):
        for axes in ((0, None), (None, 0), (0, 0)):
            arguments = (x if axes[0] == 0 else x[0], weights if axes[1] == 0 else w)
            together = jax.jit(jax.vmap(function, axes))(*arguments)
            for i in range(3):
                alone = function(*(a[i] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)))
                for many, one in zip(together, alone, strict=True):
                    np.testing.assert_allclose(many[i], one, rtol=1e-5, atol=1e-5)


def test_a_batch_of_x_is_one_product_and_a_batch_of_weights_a_loop():
    x, w = operands(3, 5)
    product = functools.partial(nm_matmul, implementation="reference")
    text = str(jax.make_jaxpr(jax.vmap(product, (0, None)))(x, w))
    assert "scan" not in text and "15,16" in text.replace(" ", "")
    assert "scan" in str(jax.make_jaxpr(jax.vmap(product, (None, 0)))(x[0], jnp.stack([w, w])))


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    "x_dtype, w_dtype, out", [("bfloat16",) * 3, ("float16",) * 3, ("bfloat16", "float32", "float32")]
)
def test_dtypes(implementation, x_dtype, w_dtype, out):
    x, w = operands(5)
    x, w = x.astype(x_dtype), w.astype(w_dtype)
    y = nm_matmul(x, w, implementation=implementation)
    assert y.dtype == out
    truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), truth, rtol=float(jnp.finfo(out).eps), atol=1e-5)
    np.testing.assert_array_equal(nm_matmul(x, pack(w), implementation=implementation), y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_half_precision_is_accumulated_in_float32(dtype, implementation):
    """1 + 4096 times a thousandth of an epsilon is lost in half precision."""
    k, small = 8192, float(jnp.finfo(dtype).eps) / 64
    x = jnp.full((1, k), small, dtype).at[0, 0].set(1)
    w = jnp.tile(jnp.asarray([1, 0, 0, 1], dtype), k // 4)[:, None]
    y = nm_matmul(x, w, "2:4", implementation=implementation)
    np.testing.assert_allclose(float(y[0, 0]), 1 + (k / 2 - 1) * small, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_empty_batches(shape):
    _, w = operands(1)
    for weight in (w, pack(w)):
        y = nm_matmul(jnp.zeros(shape), weight, implementation="reference")
        assert y.shape == (*shape[:-1], ROWS)


@pytest.mark.parametrize("k, rows", [(7, 5), (1, 3), (18, 33)])
def test_sizes_that_four_does_not_divide(k, rows):
    w = np.where(transposable(36, 36)[:k, :rows], np.random.default_rng(0).normal(size=(k, rows)), 0)
    w, x = jnp.asarray(w, jnp.float32), jnp.ones((3, k))
    product = functools.partial(nm_matmul, implementation="reference")
    np.testing.assert_allclose(jax.jit(product)(x, w), x @ w, rtol=1e-5, atol=1e-6)
    found, truth = (jax.jit(jax.grad(loss(f)))(x, w) for f in (product, jnp.matmul))
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("pattern", ["4:8", "4:8-T", "3:4", "US-0.5", "2:3"])
def test_patterns_that_sparse_tensor_cores_do_not_read(pattern):
    with pytest.raises(ValueError, match=r"two kept of every four.*2:4-T"):
        nm_matmul(*operands(5), pattern)


@pytest.mark.parametrize("pattern", ["1:4", NM(1, 2), SequentialNM(2, 4), "1:4-T"])
def test_patterns_whose_masks_are_2_4_masks(pattern):
    x = jnp.ones((3, 8))
    w = jnp.zeros((8, 4)).at[0, 0].set(1.0).at[5, 1].set(2.0)
    np.testing.assert_array_equal(nm_matmul(x, w, pattern, implementation="reference"), x @ w)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": jnp.ones((3, K), jnp.float8_e4m3fn)}, "16, 32 and 64 bits, and x is float8_e4m3fn; convert it"),
        ({"w": jnp.zeros((K, ROWS), jnp.float8_e5m2)}, "and the weight is float8_e5m2; convert it"),
        ({"x": jnp.ones((3, 8))}, "takes 24 inputs"),
        ({"x": jnp.ones(())}, "takes 24 inputs"),
        ({"w": jnp.ones((2, 3, 4))}, "reshape it, or use dot_general"),
        ({"w": jnp.ones((K, ROWS))}, "keep 4 of 4"),
        ({"x": jnp.ones((3, K), int), "w": jnp.zeros((K, ROWS), int)}, "floating point"),
        ({"w": pack(jnp.zeros((K, ROWS)), orientation="backward")}, "orientation='backward'"),
        ({"implementation": "tensor"}, "choose one of 'hopper', 'ampere', 'reference'"),
        ({"implementation": "hopper"}, "'hopper' cannot run this product"),
        ({"implementation": "ampere"}, "'ampere' cannot run this product"),
    ],
)
def test_errors_say_what_to_do(change, words):
    x, w = operands(3)
    with refused(words):
        nm_matmul(**{"x": x, "w": w, **change})


def test_while_tracing_a_dense_weight_is_cut_to_the_two_largest():
    x = jnp.eye(4)
    w = jnp.asarray([[1.0], [-4.0], [3.0], [2.0]])
    y = jax.jit(functools.partial(nm_matmul, pattern="2:4", implementation="reference"))(x, w)
    np.testing.assert_array_equal(y, [[0.0], [-4.0], [3.0], [0.0]])
