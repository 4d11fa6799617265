"""One path names one leaf, in trees of parameters, masks and states alike."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nm_jax as nm

W = jax.random.normal(jax.random.key(0), (8, 8))

TWICE = {
    "params beside its content": {"params": {"a": {"kernel": W}}, "a": {"kernel": 2 * W}},
    "a key with a slash": {"a/kernel": W, "a": {"kernel": 2 * W}},
}


@pytest.mark.parametrize("case", TWICE)
def test_two_leaves_of_one_path_are_an_error(case):
    tree = TWICE[case]
    masks = jax.tree.map(lambda w: w > 0, tree)
    state = nm.sparse_training(optax.sgd(0.1), "2:4").init({"a": {"kernel": W}})
    calls = [
        lambda: nm.compute_masks(tree, "2:4"),
        lambda: nm.verify(tree, "2:4"),
        lambda: nm.apply_masks(tree, masks),
        lambda: nm.apply_masks({"a": {"kernel": W}}, masks),
        lambda: nm.sparse_training(optax.sgd(0.1), "2:4").init(tree),
        lambda: nm.sparse_params(state, tree),
        lambda: nm.with_params(state, tree),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="two leaves have the path 'a/kernel'"):
            call()


class Heads(eqx.Module):
    """Arrays in attributes, one of which is called as Flax's variables call what they hold."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def test_an_attribute_called_value_keeps_its_name():
    params = {"attention": Heads(W, 2 * W, jnp.flip(W)), "value": W.T}
    rules = [("attention/(key|value)$", "2:4-T", "io"), ("^value$", "2:4", "io")]
    masks = nm.compute_masks(params, rules)
    assert masks["attention"].query is None
    assert [row.leaf.path for row in nm.verify(masks, rules).rows] == ["attention/key", "attention/value", "value"]
    np.testing.assert_array_equal(masks["attention"].value, nm.solve(jnp.abs(jnp.flip(W)), "2:4-T"))
    tx = nm.sparse_training(optax.sgd(0.1), rules)
    state = tx.init(params)
    sparse = nm.sparse_params(state, params)
    jax.tree.map(np.testing.assert_array_equal, sparse, nm.apply_masks(params, masks))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, sparse)
    assert nm.verify(optax.apply_updates(sparse, updates), rules).ok


def test_the_box_of_a_variable_has_no_name():
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    masks = nm.compute_masks(nnx.state(layer, nnx.Param), [("^kernel$", "2:4-T")])
    assert nm.verify(masks, [("^kernel$", "2:4-T")]).rows[0].leaf.path == "kernel"
