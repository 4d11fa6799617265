"""One path for one parameter, in every container."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, struct

import nm_jax as nm
from nm_jax._core.paths import empty, located, map_located, words

W = jnp.ones((2, 3))


class Named(eqx.Module):
    """A module of the user, with an attribute called `value`."""

    value: jax.Array


class Node(struct.PyTreeNode):
    value: jax.Array


class Boxes(nnx.Module):
    def __init__(self):
        self.value = nnx.Param(W)
        self.kernel = nnx.Param(W)


def boxed():
    return nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("x", "y"))).init(jax.random.key(0), W)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"params": {"Dense_0": {"kernel": W}}}, ["Dense_0/kernel"]),
        ({"value": W}, ["value"]),
        ({"value": {"kernel": W}}, ["value/kernel"]),
        (Named(W), ["value"]),
        ({"a": [Named(W), (Node(W),)]}, ["a/0/value", "a/1/0/value"]),
        (nnx.state(Boxes()), ["kernel", "value"]),
        (Boxes(), ["kernel", "value"]),
        (boxed(), ["bias", "kernel"]),
        ({"l0.weight": W, "none": None, "masked": optax.MaskedNode()}, ["l0.weight"]),
        (W, [""]),
        ({}, []),
    ],
)
def test_paths_in_every_container(tree, paths):
    found = located(tree)
    assert [leaf.path for leaf in found] == paths
    assert all(a.value is b for a, b in zip(found, jax.tree.leaves(tree), strict=True))
    assert jax.tree.leaves(map_located(lambda path, _: path, tree)) == paths


def test_nodes_that_stand_for_no_leaf_can_be_asked_for():
    tree = {"a": None, "b": [optax.MaskedNode(), W]}
    assert [leaf.path for leaf in located(tree, is_leaf=empty)] == ["a", "b/0", "b/1"]


def test_the_owner_is_the_container_that_names_the_leaf():
    model = Boxes()
    assert all(leaf.owner is model for leaf in located(model))
    module = Named(W)
    assert located([module])[0].owner is module


@pytest.mark.parametrize("tree", [{"params": {"x": W}, "x": W}, {"a/b": W, "a": {"b": W}}])
def test_two_leaves_with_one_path_are_an_error(tree):
    with pytest.raises(ValueError, match=r"two leaves have the path '(x|a/b)'"):
        located(tree)


def test_flat_names_are_dotted():
    assert words("layers.0.weight") == words("layers/0/weight") == ["layers", "0", "weight"]


def test_an_attribute_called_value_keeps_its_name_in_training():
    """Its masks and its dense weights are found under the path that the rules see."""
    params = {"a": Named(jax.random.normal(jax.random.key(0), (8, 8))), "b": jnp.ones(3)}
    tx = nm.sparse_training(optax.sgd(0.1), [("a/value$", "2:4")])
    state = tx.init(params)
    sparse = nm.sparse_params(state, params)
    assert nm.verify(sparse, [("^a/value$", "2:4")]).ok
    assert nm.dense_params(state, params)["a"].value.tolist() == params["a"].value.tolist()
    plan = nm.plan(lambda p, x: x @ p["a"].value, params, jnp.ones((1, 8)), pattern="2:4", first="2:4", last="2:4")
    assert nm.verify(sparse, plan).ok
