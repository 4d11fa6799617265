"""Retained magnitude, tile by tile, is what the library keeps of whole weights."""

import types

import numpy as np
import pytest

import nm_jax as nm
from experiments import retained


@pytest.mark.parametrize("pattern", ["US-0.5", "4:8", "2:4-T", "4:8-S"])
def test_tiles_keep_what_whole_weights_do(pattern, monkeypatch):
    monkeypatch.setattr(retained, "CHUNK", 16)
    random = np.random.default_rng(0)
    params = {"conv": random.normal(size=(3, 3, 8, 16)), "dense": random.normal(size=(16, 24))}
    params = {name: w.astype(np.float32) for name, w in params.items()}
    axes = {"conv": "bbio", "dense": "io"}
    layers = [types.SimpleNamespace(path=name, axes=letters) for name, letters in axes.items()]
    masks = nm.compute_masks(params, [(name, pattern, letters) for name, letters in axes.items()])
    wanted = {name: np.abs(w[np.asarray(masks[name])]).sum() for name, w in params.items()}
    found = retained._kept(params, layers, pattern)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[name] for name in axes], [wanted[name] for name in axes], rtol=1e-5)
