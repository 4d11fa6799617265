"""Everything without training under the modes of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm

pytestmark = pytest.mark.slow
MODES = {
    "x64": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
}


def apply(params, x, image):
    h = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(image, params["conv"], (1, 1), "SAME", dimension_numbers=dims)
    return h + y.mean(axis=(1, 2))


RULES = [("dense/kernel", "2:4", "io"), ("stack", "2:4", "bio"), ("conv", "1:2", "bbio")]


@pytest.mark.parametrize(("mode", "dtype"), [*((mode, np.float32) for mode in MODES), ("x64", np.float64)])
def test_modes_change_nothing(mode, dtype):
    draw = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (8, 4), "bias": (4,)}, "stack": (1, 4, 4), "conv": (2, 2, 2, 4)}
    numpy = jax.tree.map(lambda s: draw.normal(size=s).astype(dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))
    inputs = [(draw.normal(size=(k, 8)).astype(dtype), draw.normal(size=(k, 2, 2, 2)).astype(dtype)) for k in (5, 8)]

    def everything():
        params = jax.tree.map(jnp.asarray, numpy)
        batches = [tuple(map(jnp.asarray, batch)) for batch in inputs]
        keep = [np.arange(len(x)) > 0 for x, _ in inputs]
        grams = nm.gram(apply, params, batches, row_mask=keep)
        scores = nm.score_tree(nm.obc, params, grams)
        new, conversion = nm.convert(apply, params, RULES, batches, scores=scores, iterations=8)
        assert conversion.check.ok and "verification passed" in str(conversion)
        w, mask = params["dense"]["kernel"], conversion.masks["dense"]["kernel"]
        slow = nm.reconstruct(w, grams["dense"]["kernel"], mask, method="adam", iterations=4)
        plain = nm.wanda(w, grams["dense"]["kernel"]), nm.absorb_mean(w, mask, "2:4"), slow.weight
        stats = {"mean": jnp.zeros(8, dtype), "var": jnp.ones(8, dtype)}
        tuned = nm.tune_batch_norm(
            lambda s, x, _: {"mean": 0.9 * s["mean"] + 0.1 * x.mean(0), "var": 0.9 * s["var"] + 0.1 * x.var(0)},
            stats,
            batches,
        )
        assert jax.tree.all(jax.tree.map(lambda a: a.dtype == dtype, (new, plain[1:], tuned)))
        assert all(a.dtype == np.float32 for a in jax.tree.leaves((grams, scores["stack"], plain[0])))
        assert nm.choose_patterns(params, RULES, 50) and nm.pattern_violations(new, RULES)[0].tiles == 0
        return jax.tree.map(np.asarray, (new, plain, tuned))

    with MODES[mode]():
        found = everything()
    if dtype == np.float32:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, everything())
