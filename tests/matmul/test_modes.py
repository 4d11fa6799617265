"""Sparse products under the modes of jax that change what programs may do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from tests.matmul.cases import transposable

pytestmark = pytest.mark.slow
MODES = {
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "64 bits": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
    "debug nans": lambda: jax.debug_nans(True),
    "debug infs": lambda: jax.debug_infs(True),
}
MASK = transposable(8, 4)
X, W = np.random.default_rng(0).normal(size=(3, 8)), np.random.default_rng(1).normal(size=(8, 4)) * MASK


def products(implementation):
    """name -> (x, w) -> x w in another way."""
    options = {"implementation": implementation}
    dimensions = (((1,), (0,)), ((), ()))
    convolution = nm.conv_general_dilated("2:4-T", **options)

    def convolve(x, w):
        numbers = ("NWC", "WIO", "NWC")
        return convolution(x[None], w[None], (1,), "VALID", dimension_numbers=numbers)[0]

    return {
        "nm_matmul": functools.partial(nm.nm_matmul, **options),
        "dot_general": functools.partial(nm.dot_general("2:4-T", **options), dimension_numbers=dimensions),
        "einsum": functools.partial(nm.einsum("2:4-T", **options), "tk,ko->to"),
        "conv_general_dilated": convolve,
        "packed": lambda x, w: nm.nm_matmul(x, nm.pack(w, jnp.asarray(MASK)), **options),
        "repacked": lambda x, w: nm.nm_matmul(x, nm.repack(nm.pack(jnp.asarray(MASK, w.dtype)), w), **options),
        "unpacked": lambda x, w: x @ nm.unpack(nm.pack(w)),
    }


@pytest.mark.parametrize("implementation, dtype", [(None, "float32"), ("reference", "bfloat16")])
@pytest.mark.parametrize("mode", MODES)
def test_products_and_gradients(mode, dtype, implementation):
    def steps(x, w):
        found = {}
        for name, product in products(implementation).items():
            found[name] = jax.value_and_grad(lambda x, w, f=product: jnp.sum(f(x, w) ** 2), (0, 1))(x, w)
        return found

    with MODES[mode]():
        x, w = jnp.asarray(X, dtype), jnp.asarray(W, dtype)
        nm.nm_matmul(x, nm.pack(w), implementation=implementation)  # outside of jit, and checked on the host
        found = jax.jit(steps)(x, w)
    truth = X @ W
    expected = (truth**2).sum(), (2 * truth @ W.T, 2 * X.T @ truth)
    close = functools.partial(np.testing.assert_allclose, rtol=0.05 if dtype == "bfloat16" else 1e-4, atol=0.3)
    for value, (to_x, to_w) in found.values():
        close(np.asarray(value, np.float64), expected[0])
        assert to_x.dtype == to_w.dtype == dtype
        close(np.asarray(to_x, np.float64), expected[1][0])
        close(np.asarray(to_w, np.float64)[MASK], expected[1][1][MASK])


def test_products_of_64_bits():
    with jax.enable_x64(True):
        for product in [products("reference")[name] for name in ("nm_matmul", "packed")]:
            np.testing.assert_allclose(product(jnp.asarray(X), jnp.asarray(W)), X @ W, rtol=1e-13)
