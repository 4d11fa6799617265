"""Parameters on two meshes over the same devices, as layers and experts have them."""

import contextlib
import warnings

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nm_jax as nm

DEVICES = np.array(jax.devices()[:4])
LAYERS, EXPERTS = Mesh(DEVICES, ("fsdp",)), Mesh(DEVICES.reshape(2, 2), ("ep", "tp"))


def make_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layer": {"kernel": jax.random.normal(keys[0], (16, 32))},
        "expert": {"w": jax.random.normal(keys[1], (16, 16))},
    }


def on_two_meshes(params):
    return {
        "layer": {"kernel": jax.device_put(params["layer"]["kernel"], NamedSharding(LAYERS, P(None, "fsdp")))},
        "expert": {"w": jax.device_put(params["expert"]["w"], NamedSharding(EXPERTS, P("ep", "tp")))},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        [("kernel|w", "2:4-T", "io")],
        [("kernel|w", "US-0.5", "io")],
        [("kernel", "2:4-T"), ("w", None)],
    ],
)
def test_training_on_two_meshes_is_training_on_one_device(rules):
    params = make_params()
    tx = nm.sparse_training(optax.adam(0.1), rules, refresh_every=2)
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(lambda x: 0.1 * x + 0.01, p), s, p))
    expected, expected_state = params, tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded = on_two_meshes(params)
        state = tx.init(sharded)  # a program for each mesh: no leaf is gathered, and nobody is warned
        masks = nm.compute_masks(sharded, rules)
    jax.tree.map(np.testing.assert_array_equal, masks, nm.masks(expected_state))
    jax.tree.map(np.testing.assert_array_equal, nm.masks(state), nm.masks(expected_state))
    assert state.masks["layer"]["kernel"].sharding.is_equivalent_to(sharded["layer"]["kernel"].sharding, 2)
    np.testing.assert_allclose(state.stats.retained, expected_state.stats.retained, rtol=1e-6)
    for _ in range(4):
        updates, expected_state = step(expected, expected_state)
        expected = optax.apply_updates(expected, updates)
    told = pytest.warns(UserWarning, match=r"on 2 meshes, .*'ep', 'tp'.*one mesh that has all")
    with contextlib.nullcontext() if rules[0][1] == "US-0.5" else told:
        for _ in range(4):
            updates, state = step(sharded, state)
            sharded = optax.apply_updates(sharded, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sharded, expected)
    assert sharded["expert"]["w"].sharding.is_equivalent_to(NamedSharding(EXPERTS, P("ep", "tp")), 2)
