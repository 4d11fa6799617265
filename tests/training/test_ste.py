import chex
import jax
import jax.numpy as jnp
import numpy as np

import nm_jax as nm

W = jax.random.normal(jax.random.key(0), (8, 8))
MASK = nm.solve(jnp.abs(W), "2:4-T")
X = jax.random.normal(jax.random.key(1), (5, 8))


def test_ste_masks_forward_and_passes_every_gradient():
    np.testing.assert_array_equal(nm.ste(W, MASK), W * MASK)
    loss = lambda w: jnp.sum(jnp.tanh(X @ nm.ste(w, MASK)))  # noqa: E731
    gradient = jax.grad(loss)(W)
    at_masked = jax.grad(lambda w: jnp.sum(jnp.tanh(X @ w)))(W * MASK)
    np.testing.assert_allclose(gradient, at_masked, rtol=1e-6)
    assert (gradient[~MASK] != 0).all()
    chex.assert_trees_all_close(jax.jacfwd(loss)(W), gradient, rtol=1e-5)


def test_ste_is_exact_for_infinities():
    weight = W.at[0, 0].set(jnp.inf)
    masked = nm.ste(weight, MASK.at[0, 0].set(False))
    assert masked[0, 0] == 0
    assert jnp.isfinite(masked).all()


def test_sr_ste_adds_its_term_once():
    loss = lambda w: jnp.sum(jnp.tanh(X @ nm.sr_ste(w, MASK, 0.1)))  # noqa: E731
    expected = jax.grad(lambda w: jnp.sum(jnp.tanh(X @ w)))(W * MASK) + 0.1 * np.where(MASK, 0, W)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(W), expected, rtol=1e-5)
    np.testing.assert_array_equal(nm.sr_ste(W, MASK), W * MASK)
    np.testing.assert_allclose(nm.sr_ste_term(W, MASK, 0.1), 0.1 * np.where(MASK, 0, W), rtol=1e-6)


def test_dtypes_are_kept():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        w = W.astype(dtype)
        for rule in (nm.ste, nm.sr_ste):
            assert rule(w, MASK).dtype == dtype
            assert jax.grad(lambda w, rule=rule: jnp.sum(rule(w, MASK)))(w).dtype == dtype


def test_vmap():
    ws, masks = jnp.stack([W, -W]), jnp.stack([MASK, ~MASK])
    np.testing.assert_array_equal(jax.vmap(nm.ste)(ws, masks), jnp.where(masks, ws, 0))
    gradients = jax.vmap(jax.grad(lambda w, m: jnp.sum(nm.sr_ste(w, m, 0.5) ** 2)))(ws, masks)
    np.testing.assert_allclose(gradients, np.where(masks, 2 * ws, 0.5 * ws), rtol=1e-6)
