"""A model in blocks: where it is cut, and that the blocks together are the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax._core.paths import located
from nm_jax._model._compiled import Skeleton
from nm_jax._model.blocks import Program

KEYS = jax.random.split(jax.random.key(0), 16)
X = jax.random.normal(KEYS[-1], (3, 8))


def weights(*names, size=8):
    return {name: jax.random.normal(key, (size, size)) / 3 for name, key in zip(names, KEYS, strict=False)}


@jax.jit
def residual(p, x):
    x = jax.nn.relu(x @ p["stem"])
    for up, down in (("a", "b"), ("c", "d")):
        x = x + jax.nn.relu(x @ p[up]) @ p[down]
    return x @ p["head"]


def chain(p, x):
    for name in ("stem", "a", "b", "c", "head"):
        x = jnp.tanh(x @ p[name])
    return x


def skips(p, x):
    """Two arms: what the first keeps is needed at the end."""
    x = jnp.tanh(x @ p["stem"])
    low = jnp.tanh(x @ p["a"])
    lower = jnp.tanh(low @ p["b"])
    return (jnp.tanh(lower @ p["c"]) + low) @ p["d"] + x


def concatenated(p, x):
    x = x @ p["stem"]
    x = jnp.concatenate([x, jax.nn.relu(x @ p["a"])], axis=1)
    x = jnp.concatenate([x, jax.nn.relu(x @ jnp.tile(p["b"], (2, 1)))], axis=1)
    return x @ jnp.tile(p["head"], (3, 1))


def masked_attention(p, x):
    """What is made of inputs alone, and of parameters alone, is made again in every block."""
    allowed = jnp.tril(jnp.ones((len(x), len(x)))) * (x[:, :1] < 10)
    shared = p["stem"].astype(jnp.bfloat16).astype(jnp.float32)
    x = x @ p["a"]
    x = x + jax.nn.softmax(jnp.where(allowed > 0, (x @ p["b"]) @ (x @ p["c"]).T, -1e9)) @ x
    x = x + jnp.tanh(x @ shared)
    return jax.checkpoint(lambda x: x + jax.nn.softmax(allowed) @ jnp.tanh(x @ p["d"]))(x)


CASES = {
    "residual": (residual, "abcd", [{"a", "b"}, {"c", "d"}]),
    "chain": (chain, "abc", [{"a"}, {"b"}, {"c"}]),
    "skips": (skips, "abcd", [{"a", "b", "c", "d"}]),
    "concatenated": (concatenated, "ab", [{"a"}, {"b"}]),
    "masked attention": (masked_attention, "bcd", [{"b", "c"}, {"d"}]),
}


def cut(apply, params, masked, boundaries=None, layers=1):
    program = Program.of(apply, params, (X,))
    numbers = {k for k, leaf in enumerate(located(params)) if leaf.path in masked}
    if boundaries is None:
        return program, program.blocks(numbers, numbers, layers)
    return program, program.blocks_from(boundaries, numbers)


def names(params, blocks, masked):
    paths = [leaf.path for leaf in located(params)]
    return [{paths[k] for k in block.leaves} & set(masked) for block in blocks]


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_read_off_the_model(case):
    apply, masked, expected = CASES[case]
    params = weights("stem", "a", "b", "c", "d", "head")
    _, blocks = cut(apply, params, masked)
    assert [found for found in names(params, blocks, masked) if found] == expected


@pytest.mark.parametrize("case", CASES)
def test_blocks_one_after_another_are_the_model(case):
    apply, masked, _ = CASES[case]
    params = weights("stem", "a", "b", "c", "d", "head")
    program, blocks = cut(apply, params, masked, boundaries=[masked[1]] if case != "skips" else ["c"])
    arrays, passed = Skeleton.of(params)[1], ()
    for block in blocks:
        passed = program.run(block, arrays, (X,), passed)
    np.testing.assert_allclose(passed[0], apply(params, X), rtol=1e-6)


def test_a_block_ends_before_the_next_weight_and_has_nothing_of_the_stem_and_the_head():
    params = weights("stem", "a", "b", "c", "d", "head")
    program, blocks = cut(residual, params, "abcd")
    assert names(params, blocks, params) == [{"stem"}, {"a", "b"}, {"c", "d"}]
    x = jax.nn.relu(X @ params["stem"])
    (passed,) = program.run(blocks[0], Skeleton.of(params)[1], (X,), ())
    np.testing.assert_allclose(passed, x, rtol=1e-6)


def test_larger_blocks():
    params = weights("stem", "a", "b", "c", "d", "head")
    _, blocks = cut(chain, params, "abc", layers=2)
    assert names(params, blocks, "abc") == [set(), {"a", "b"}, {"c"}]
    assert names(params, blocks, params) == [{"stem"}, {"a", "b"}, {"c"}]  # not the head, for all that c is one layer


def test_a_parameter_that_several_blocks_share_joins_them():
    def tied(p, x):
        for name in ("stem", "a", "b", "a", "c", "head"):
            x = jnp.tanh(x @ p[name])
        return x

    params = weights("stem", "a", "b", "c", "head")
    _, blocks = cut(tied, params, "abc")
    assert names(params, blocks, "abc") == [set(), {"a", "b"}, {"c"}]


def test_boundaries_that_are_given():
    params = weights("stem", "a", "b", "c", "d", "head")
    _, blocks = cut(skips, params, "abcd", boundaries=["b", "d"])
    assert names(params, blocks, "abcd") == [{"a"}, {"b", "c"}, {"d"}]
    _, blocks = cut(residual, params, "abcd", boundaries=[])
    assert names(params, blocks, "abcd") == [set("abcd")]


@pytest.mark.parametrize(
    "boundaries, message", [(["elsewhere"], "no parameter"), (["c", "a"], "in the order of the model")]
)
def test_boundaries_that_do_not_fit_are_an_error(boundaries, message):
    with pytest.raises(ValueError, match=message):
        cut(residual, weights("stem", "a", "b", "c", "d", "head"), "abcd", boundaries)
