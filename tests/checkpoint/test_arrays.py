"""Parameters in memory to a checkpoint, and back."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.checkpoint.cases import LAYOUTS


@functools.cache
def trained():
    """A few sparse updates of a small model."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "params": {
            "Dense_0": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.zeros(16)},
            "Dense_1": {"kernel": jax.random.normal(keys[1], (16, 4)), "bias": jnp.zeros(4)},
        }
    }
    tx = nm.sparse_training(optax.adam(0.1), "2:4-T", solver=nm.solvers.Greedy())
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: p - 1, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=["dense", "packed", "masks"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trained_parameters_come_back(tmp_path, dtype, layout):
    params, state = trained()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    nm.save_checkpoint(tmp_path / "model", params, "2:4-T", masks=nm.masks(state), **layout)
    loaded, masks = nm.load_checkpoint(tmp_path / "model", like=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, np.asarray(b))
    kernel = masks["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(params["params"]["Dense_0"]["kernel"]) != 0)
    assert masks["params"]["Dense_0"]["bias"] is None
    assert nm.verify_checkpoint(tmp_path / "model").ok


def test_save_refuses_what_is_not_sparse(tmp_path):
    params, state = trained()
    dense = nm.dense_params(state, params)
    with pytest.raises(ValueError, match="Dense_0/kernel: it does not have the pattern 2:4-T"):
        nm.save_checkpoint(tmp_path / "model", dense, "2:4-T")
    with pytest.raises(ValueError, match="Dense_0/kernel: it is not zero where its mask prunes it"):
        nm.save_checkpoint(tmp_path / "model", dense, "2:4-T", masks=nm.masks(state))
    assert os.listdir(tmp_path) == []


def test_load_names_what_is_missing(tmp_path):
    params, _ = trained()
    nm.save_checkpoint(tmp_path / "model", params, "2:4-T")
    with pytest.raises(ValueError, match="no tensor for Dense_9/kernel; its paths are Dense_0/bias"):
        nm.load_checkpoint(tmp_path / "model", like={"Dense_9": {"kernel": 0}})


def test_load_checks_shapes(tmp_path):
    params, _ = trained()
    nm.save_checkpoint(tmp_path / "model", params, "2:4-T")
    like = {"Dense_0": {"kernel": jnp.zeros((8, 17))}}
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' has the shape \(8, 16\), and `like` wants \(8, 17\)"):
        nm.load_checkpoint(tmp_path / "model", like=like)
    loaded, _ = nm.load_checkpoint(tmp_path / "model", like=jax.eval_shape(lambda: params))
    np.testing.assert_array_equal(loaded["params"]["Dense_0"]["bias"], params["params"]["Dense_0"]["bias"])
