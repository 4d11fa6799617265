"""What Gram matrices cost, as the documentation says: 2 K^2 FLOPs a row, a fifth of that for a 3 x 3 convolution."""

import jax
import jax.numpy as jnp
import pytest

import nm_jax as nm
from nm_jax._model.gram._moments import product_moments
from nm_jax._model.gram._patches import window_moments
from nm_jax._model.tracing.windows import Windows


def flops(moments, *shape):
    """Of the contractions of a program, loops counted."""
    return nm.trace(lambda _, x: moments(x).h, {"nothing": jnp.ones(1)}, jax.ShapeDtypeStruct(shape, jnp.float32)).flops


def test_rows_of_a_dense_layer():
    assert flops(lambda x: product_moments(x, (1,), (), None), 100, 48) == 2 * 48**2 * 100


@pytest.mark.parametrize(("stride", "least", "most"), [(1, 0.15, 0.25), (2, 0.9, 1.1)])
def test_patches_of_a_convolution(stride, least, most):
    windows = Windows((3, 3), (stride, stride), ((1, 1), (1, 1)), (1, 1), (1, 1), 1)
    rows, k = (48 // stride) ** 2, 9 * 8
    assert least < flops(lambda x: window_moments(x, windows), 1, 48, 48, 8) / (2 * k**2 * rows) < most
