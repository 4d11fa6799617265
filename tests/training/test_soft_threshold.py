"""S-STE against its formula in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm


def formula(weight, n, m):
    """Of a weight (contraction, output), group by group."""
    left = np.zeros_like(weight)
    for start in range(0, weight.shape[0], m):
        for column in range(weight.shape[1]):
            group = weight[start : start + m, column]
            threshold = np.sort(np.abs(group))[::-1][n]
            left[start : start + m, column] = np.sign(group) * np.maximum(np.abs(group) - threshold, 0)
    return left


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_s_ste_is_its_formula(n, m):
    weight = np.random.default_rng(n + m).normal(size=(16, 6))
    left = formula(weight, n, m)
    scale = np.sum(weight * left) / np.sum(left**2)
    np.testing.assert_allclose(nm.s_ste_scale(jnp.float32(weight), f"{n}:{m}"), scale, rtol=1e-5)
    found = nm.s_ste(jnp.float32(weight), 1.7, f"{n}:{m}")
    np.testing.assert_allclose(found, 1.7 * left, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found != 0, left != 0)
    assert nm.verify({"kernel": found}, f"{n}:{m}").ok


@pytest.mark.parametrize(("axes", "order"), [("boi", (0, 2, 1)), ("bio", (0, 1, 2)), ("iob", (1, 2, 0))])
def test_groups_run_along_the_contraction(axes, order):
    """`order`: which of batch, contraction and output comes where."""
    batches = np.random.default_rng(0).normal(size=(3, 8, 4))
    expected = np.stack([formula(weight, 2, 4) for weight in batches]).transpose(order)
    weights = batches.transpose(order)
    np.testing.assert_allclose(nm.s_ste(jnp.float32(weights), 1.0, axes=axes), expected, rtol=1e-5, atol=1e-6)


def test_it_is_continuous_where_a_mask_jumps():
    """Where two weights change places a masked one jumps by their size, a soft one by what they move."""
    below, above = (jnp.array([[1.0], [3.0], [2.0], [2.0 + change]]) for change in (-1e-3, 1e-3))
    assert jnp.abs(nm.s_ste(above) - nm.s_ste(below)).max() < 3e-3
    hard = [weight * nm.solve(jnp.abs(weight), "2:4") for weight in (below, above)]
    assert jnp.abs(hard[1] - hard[0]).max() > 1.9


def test_the_gradient_is_straight_through_and_the_scale_has_none():
    weight = jax.random.normal(jax.random.key(0), (8, 4))
    outer = jax.random.normal(jax.random.key(1), (8, 4))
    by_weight, by_scale = jax.jit(jax.grad(lambda w, s: jnp.sum(outer * nm.s_ste(w, s)), (0, 1)))(weight, 2.0)
    np.testing.assert_array_equal(by_weight, outer)
    assert by_scale == 0
    _, forward = jax.jvp(lambda w: nm.s_ste(w, 2.0), (weight,), (outer,))
    np.testing.assert_array_equal(forward, outer)


def test_ties_zeros_and_dtypes():
    assert not nm.s_ste(jnp.ones((4, 4))).any()
    assert nm.s_ste_scale(jnp.zeros((4, 4))) == 1
    weight = jax.random.normal(jax.random.key(0), (3, 8, 4), jnp.bfloat16)
    found = jax.vmap(nm.s_ste)(weight)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, nm.s_ste(weight, axes="bio"))
    assert nm.s_ste_scale(weight, axes="bio").dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "pattern", "message"),
    [((8, 8), "2:4-T", "none for 2:4-T; use nm.ste"), ((6, 8), "2:4", "size 6, which 4 does not divide")],
)
def test_what_it_is_not_for(shape, pattern, message):
    for function in (lambda w: nm.s_ste(w, 1.0, pattern), lambda w: nm.s_ste_scale(w, pattern)):
        with pytest.raises(ValueError, match=message):
            function(jnp.ones(shape))
