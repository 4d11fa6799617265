"""What is compiled for a model is used again, and goes when the model goes."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._model._compiled import Skeleton, evaluation, kept_with_function


def counted():
    """A model and how often it was traced."""
    calls = []

    def apply(params, x):
        calls.append(x.shape)
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    params = {name: {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)} for name in "ab"}
    return apply, params, calls


def test_gram_compiles_once_for_equal_shapes():
    apply, params, calls = counted()
    first = nm.gram(apply, params, [jnp.ones((4, 8)), jnp.ones((2, 8))], "kernel")
    traced = len(calls)
    twice = jax.tree.map(lambda w: 2 * w, params)
    second = nm.gram(apply, twice, (x for x in [jnp.ones((4, 8)), jnp.ones((2, 8))]), "kernel")
    assert len(calls) == traced
    np.testing.assert_allclose(first["a"]["kernel"].h, 6 * np.ones((1, 8, 8)))
    expected = nm.Gram.from_inputs(jnp.tanh(jnp.ones((6, 8)) @ twice["a"]["kernel"]))
    np.testing.assert_allclose(second["b"]["kernel"].h, expected.h, rtol=1e-5)
    only = nm.gram(apply, params, [jnp.ones((4, 8))], "a/kernel")
    assert only["b"]["kernel"] is None
    nm.gram(apply, params, [jnp.ones((5, 8))], "kernel")
    assert len(calls) > traced


def test_nothing_keeps_a_model_alive():
    apply, params, _ = counted()
    nm.gram(apply, params, [jnp.ones((4, 8))])
    evaluation(apply, Skeleton.of(params)[0])(Skeleton.of(params)[1], jnp.ones((4, 8)))
    gone = weakref.ref(apply)
    del apply
    gc.collect()
    assert gone() is None


class Changing:
    scale = 1.0

    def apply(self, params, x):
        return self.scale * x @ params


def test_what_may_change_is_not_kept():
    made = kept_with_function(lambda function, *more: object())
    model = Changing()
    assert made(model.apply) is not made(model.apply)
    assert made(jnp.sum, [1]) is not made(jnp.sum, [1])
    with jax.disable_jit():
        assert made(test_what_may_change_is_not_kept) is not made(test_what_may_change_is_not_kept)


@pytest.mark.parametrize(
    "function",
    [nn.Dense(3).apply, functools.partial(jnp.dot, precision="highest"), jax.jit(lambda x: x), lambda x: x],
    ids=["linen", "partial", "jit", "lambda"],
)
def test_what_cannot_change_is_kept(function):
    made = kept_with_function(lambda function, *more: [function, *more])
    assert made(function) is made(function)
    assert made(function, "a") is made(function, "a") is not made(function, "b")
    assert made(function, "a")[1:] == ["a"]


def test_a_tree_without_its_arrays():
    tree = {"w": jnp.ones(3), "activation": jnp.tanh, "none": None, "sizes": (np.ones(2), 7)}
    skeleton, arrays = Skeleton.of(tree)
    assert skeleton == Skeleton.of(tree)[0] and hash(skeleton) == hash(Skeleton.of(tree)[0])
    assert len(arrays) == 2
    again = skeleton.filled({k: 2 * array for k, array in arrays.items()})
    assert again["activation"] is jnp.tanh and again["none"] is None and again["sizes"][1] == 7
    np.testing.assert_array_equal(again["w"], 2 * np.ones(3))
