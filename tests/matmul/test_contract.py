"""What every implementation of a sparse product must do, held against dense products in 64 bits.

A new implementation is covered once `nm_jax/matmul/menu.py` lists it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax.matmul import Product, nm_matmul, pack
from nm_jax.matmul._compress import compress
from tests.matmul.cases import all_pairs, transposable
from tests.matmul.implementations import HOPPER, REFERENCE, RUNNABLE

# (tokens, k, rows): none fits a tile, and one is too small for a single word of metadata.
SHAPES = [(5, 40, 24), (1, 8, 4)]
LARGE = [(130, 272, 200), (64, 128, 128), (257, 64, 132)]  # several tiles in every direction


def cases():
    for implementation in RUNNABLE:
        for shape in SHAPES + LARGE:
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
                tokens, k, rows = shape
                if implementation.supports(Product(dtype, tokens, rows, k), jax.devices()[0]) is not None:
                    continue
                # The interpreter takes seconds for a product.
                first = shape == SHAPES[0] and dtype == jnp.bfloat16
                few = first or (implementation is REFERENCE and shape in (SHAPES[1], LARGE[0]))
                name = f"{implementation.name}-{'x'.join(map(str, shape))}-{jnp.dtype(dtype).name}"
                marks = () if few else pytest.mark.slow
                yield pytest.param(implementation, shape, dtype, marks=marks, id=name)


def operands(shape, dtype, seed=0):
    tokens, k, rows = shape
    generator = np.random.default_rng(seed)
    x, w, dy = (generator.normal(size=s) for s in ((tokens, k), (k, rows), (tokens, rows)))
    return tuple(jnp.asarray(a, dtype) for a in (x, np.where(transposable(k, rows, seed), w, 0), dy))


def close(found, expected, dtype, terms):
    """Sums of `terms` products accumulated in float32, rounded once to the dtype."""
    assert found.dtype == dtype
    rounding, accumulated = float(jnp.finfo(dtype).eps), 4 * terms * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rounding, atol=accumulated)


@pytest.mark.parametrize("implementation, shape, dtype", list(cases()))
def test_forward_input_gradient_and_weight_gradient(implementation, shape, dtype):
    x, w, dy = operands(shape, dtype)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(functools.partial(nm_matmul, pattern="2:4-T", implementation=implementation), x, w)
        return y, *pull(dy)

    found = run(x, w, dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    tokens, k, rows = shape
    for mine, truth, terms in zip(found, (x @ w, dy @ w.T, x.T @ dy), (k, rows, tokens), strict=True):
        close(mine, truth, dtype, terms)


def some():
    """The Hopper kernel in the interpreter takes seconds for a product."""
    return [pytest.param(i, id=i.name, marks=pytest.mark.slow if i is HOPPER else ()) for i in RUNNABLE]


@pytest.mark.parametrize("implementation", some())
def test_all_36_pairs_of_patterns(implementation):
    weight, mask = all_pairs(9, 64)
    a, overfull = compress(jnp.asarray(weight, jnp.bfloat16), jnp.asarray(mask))
    assert not overfull.any()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 64)), jnp.bfloat16)
    expected = (
        np.asarray(x, np.float64) @ np.where(mask, np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float64), 0).T
    )
    close(implementation.product(a, x), expected, jnp.bfloat16, 64)


@pytest.mark.parametrize("implementation", some())
def test_poison_stays_where_it_is(implementation):
    """NaN in what the mask prunes is never read, and NaN in one token reaches that token alone."""
    generator = np.random.default_rng(0)
    mask = transposable(40, 24)
    weight = np.where(mask, generator.normal(size=mask.shape), np.nan)
    x = generator.normal(size=(5, 40))
    x[3] = np.nan
    packed = pack(jnp.asarray(weight, jnp.bfloat16), jnp.asarray(mask))
    y = nm_matmul(jnp.asarray(x, jnp.bfloat16), packed, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)).all(axis=1), [False, False, False, True, False])
    assert np.isfinite(np.asarray(y, np.float32)[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("implementation", [None, *some()])
def test_an_infinity_is_never_lost_and_reaches_its_token_alone(implementation):
    """An output whose weight keeps it is not finite; one whose weight prunes it may be NaN, if zeros are multiplied."""
    _, w, _ = operands((5, 40, 24), jnp.bfloat16)
    x = jnp.ones((5, 40), jnp.bfloat16).at[3, 7].set(jnp.inf)
    y, w = (np.asarray(a, np.float64) for a in (nm_matmul(x, w, implementation=implementation), w))
    plain = w.sum(axis=0)  # the tokens of ones
    np.testing.assert_allclose(y[[0, 1, 2, 4]], np.tile(plain, (4, 1)), rtol=0.01, atol=0.01)
    np.testing.assert_array_equal(np.isfinite(y[3][w[7] != 0]), False)
    rest = y[3][w[7] == 0]
    assert (np.isnan(rest) | np.isclose(rest, plain[w[7] == 0], rtol=0.01, atol=0.01)).all()


@pytest.mark.parametrize("implementation", some())
def test_packed_plain_and_vmapped_agree(implementation):
    x, w, _ = operands((6, 40, 24), jnp.bfloat16)
    product = functools.partial(nm_matmul, implementation=implementation)
    y = product(x, w)
    np.testing.assert_array_equal(product(x, pack(w)), y)
    np.testing.assert_array_equal(product(x.reshape(2, 3, 40), w), y.reshape(2, 3, 24))
    np.testing.assert_array_equal(jax.vmap(product, (0, None))(x.reshape(2, 3, 40), w), y.reshape(2, 3, 24))
    np.testing.assert_array_equal(jax.vmap(product, (None, 0))(x, jnp.stack([w, -w])), jnp.stack([y, -y]))
