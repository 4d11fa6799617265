"""The bias fix of the paper."""

import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from tests.reconstruct.layers import matrices


def test_the_bias_fix_keeps_the_sum_of_every_group():
    w = jnp.array([[1.0], [-2.0], [3.0], [4.0], [1.0], [1.0], [5.0], [5.0]])
    mask = jnp.array([0, 0, 1, 1, 0, 0, 1, 1], bool)[:, None]
    np.testing.assert_allclose(nm.absorb_mean(w, mask, "2:4")[:, 0], [0, 0, 2.5, 3.5, 0, 0, 6, 6])
    empty = nm.absorb_mean(w, jnp.zeros_like(mask), "2:4")
    assert not np.any(empty)


@pytest.mark.parametrize("axes, shape", [("io", (8, 6)), ("oi", (6, 8)), ("bbio", (3, 3, 8, 4)), ("iio", (2, 6, 4))])
def test_the_bias_fix_runs_along_the_groups(axes, shape):
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    masks = nm.compute_masks({"w": w}, [("w", "2:4", axes)])
    fixed = nm.absorb_mean(w, masks["w"], "2:4", axes)
    sums = [matrices(leaf, axes).reshape(-1, 4, shape[axes.index("o")]).sum(axis=1) for leaf in (w, fixed)]
    np.testing.assert_allclose(sums[1], sums[0], atol=1e-5)
    assert nm.verify({"w": fixed}, [("w", "2:4", axes)]).ok


def test_the_bias_fix_refuses_what_has_no_groups():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="no groups"):
        nm.absorb_mean(w, w > 0, "US-0.5")
    with pytest.raises(ValueError, match="mask has shape"):
        nm.absorb_mean(w, jnp.ones((4, 2), bool), "2:4")
