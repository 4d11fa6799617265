"""Which dimensions of parameters go together: all that are said to move are permuted, and the outputs stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nm_jax._model.channels import wiring
from nm_jax._model.channels.parts import Part, cut, fix, joined, order, places, product, reshaped, unify, wholes
from tests.model.architectures import ARCHITECTURES, X, normal


def movable(found):
    """(whole: the dimensions of parameters that have it)."""
    groups = {}
    for path, dims in zip(found.paths, found.dims, strict=True):
        for dim, part in enumerate(dims):
            for whole in wholes(part):
                if whole.size > 1 and not whole.reason:
                    groups.setdefault(whole, set()).add((path, dim))
    return groups


def permuted(params, found, seed=0):
    rng = np.random.default_rng(seed)
    orders = {whole: np.roll(rng.permutation(whole.size), 1) for whole in movable(found)}
    leaves, treedef = jax.tree.flatten(params)
    for k, dims in enumerate(found.dims):
        for dim, part in enumerate(dims):
            leaves[k] = jnp.take(leaves[k], order(part, orders), axis=dim)
    return jax.tree.unflatten(treedef, leaves)


@pytest.fixture(autouse=True)
def _biases_are_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


def check_outputs(apply, params, inputs, found):
    new, run = permuted(params, found), jax.jit(apply)
    for was, now in zip(jax.tree.leaves(run(params, *inputs)), jax.tree.leaves(run(new, *inputs)), strict=True):
        assert np.linalg.norm(was) > 0
        assert np.linalg.norm(now - was) <= 1e-5 * np.linalg.norm(was)
    return new


LARGE = ("resnet", "inverted bottleneck", "squeeze and excite", "dense net", "u-net", "grouped convolutions")
LARGE += ("pre-norm transformer", "post-norm transformer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in ARCHITECTURES]
)
def test_outputs_stay_when_everything_that_moves_is_permuted(name):
    apply, params, inputs, expected = ARCHITECTURES[name]()
    found = wiring(apply, params, inputs)
    new = check_outputs(apply, params, inputs, found)
    groups = list(movable(found).values())
    for flat in expected:
        wanted = set(zip(flat[::2], flat[1::2], strict=True))
        assert any(wanted <= group for group in groups), f"{wanted} not in {groups}"
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True))


SCALES = np.arange(12, dtype=np.float32)
STAYS = {
    "a constant": (lambda h: h * SCALES, "constant"),
    "positions": (lambda h: h + jnp.arange(12.0), "indices"),
    "argmax": (lambda h: h + jnp.argmax(h, -1, keepdims=True), "index"),
    "cumsum": (lambda h: jnp.cumsum(h, -1), "in order"),
    "sort": (lambda h: jnp.sort(h, -1), "in order"),
    "reverse": (lambda h: h + h[..., ::-1], "rev"),
    "every other": (lambda h: h[..., ::2].repeat(2, -1), "every so many"),
    "half": (lambda h: jnp.concatenate([h[..., 6:], h[..., :6]], -1) + h, None),
    "look-up": (lambda h: h[..., np.array([3, 1, 1, 0, 5, 6, 7, 8, 9, 2, 11, 10])], "looked up"),
    "dynamic slice": (lambda h: lax.dynamic_slice_in_dim(h, jnp.int32(h[0, 0, 0] > 0), 6, 2).repeat(2, -1), "chooses"),
    "top k": (lambda h: lax.top_k(h, 12)[0], "top_k"),
    "convolved": (lambda h: jnp.convolve(h.reshape(-1), jnp.ones(3), "same").reshape(h.shape), "position"),
    "window": (lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 1, 3), (1, 1, 1), "SAME"), "window"),
    "while": (lambda h: lax.while_loop(lambda h: h.sum() < 0, lambda h: h + 1, h), "while"),
    "random": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), "bitcast"),
    "scatter": (lambda h: h.at[..., 3].set(0), "scatter"),
    "padded": (lambda h: jnp.pad(h, ((0, 0), (0, 0), (1, 0)))[..., :12] + h, ""),  # all channels are one
}


@pytest.mark.parametrize("name", STAYS)
def test_what_depends_on_the_order_of_channels_stays(name):
    between, reason = STAYS[name]
    params = {"up": normal(8, 12), "down": normal(12, 4)}

    def apply(p, x):
        return between(x @ p["up"]) @ p["down"]

    found = wiring(apply, params, (X,))
    check_outputs(apply, params, (X,), found)
    groups = movable(found)
    if reason is None:  # both halves alike
        assert [(whole.size, group) for whole, group in groups.items()] == [(6, {("up", 1), ("down", 0)})]
    else:
        assert all(("up", 1) not in group for group in groups.values())
        assert any(reason in whole.reason for dim in found.dims[1] for whole in wholes(dim)), found.dims[1][1]


def test_two_ways_of_cutting_a_dimension():
    def apply(p, x):  # heads of 4 and heads of 6, and a third of all
        h = x @ p["up"]
        four, six = h.reshape(2, 3, 3, 4).max(2), h.reshape(2, 3, 2, 6).max(2)
        return jnp.concatenate([four, six, h[..., :5]], -1) @ p["down"]

    params = {"up": normal(8, 12), "down": normal(15, 4)}
    found = wiring(apply, params, (X,))
    check_outputs(apply, params, (X,), found)


def brute_force(part, orders):
    """Where each index comes from, by permuting an array of the shape that the part has."""
    part = part.found
    if part.pieces:
        start, out = 0, []
        for piece in part.pieces:
            out += [start + k for k in brute_force(piece, orders)]
            start += piece.size
        return out
    if part.factors:
        index = np.arange(part.size).reshape([f.size for f in part.factors])
        return index[np.ix_(*(brute_force(f, orders) for f in part.factors))].reshape(-1).tolist()
    return list(orders.get(part, range(part.size)))


def test_orders_and_places_of_products_and_concatenations():
    heads, size, more = Part(3), Part(4), Part(5)
    whole = joined([product([heads, size]), more, product([Part(2), size])])
    orders = {size: np.array([2, 0, 3, 1]), more: np.array([4, 3, 2, 1, 0]), heads: np.array([1, 2, 0])}
    np.testing.assert_array_equal(order(whole, orders), brute_force(whole, orders))
    moved = order(whole, {size: orders[size]})
    at = places(whole, size)
    assert at.shape == (4, 5)
    np.testing.assert_array_equal(moved[at], at[orders[size]])
    np.testing.assert_array_equal(places(whole, more)[:, 0], np.arange(12, 17))
    assert places(product([size, size]), size) is None


def test_unified_parts_have_one_structure():
    plain, merged, concatenated = Part(24), product([Part(6), Part(4)]), joined([Part(8), Part(16)])
    unify(plain, merged, "")
    unify(plain, concatenated, "two ways")
    assert [part.size for part in wholes(concatenated)] == [2, 4, 4, 4]  # 2 x 4 and 4 x 4, the 4 the same
    inner = wholes(merged)[1]
    assert wholes(concatenated)[1] is inner and wholes(concatenated)[3] is inner and not inner.reason
    assert wholes(merged)[0].reason == "two ways"
    (outer, five), eight = reshaped([Part(10)], (2, 5)), Part(8)
    assert (outer.size, five.size) == (2, 5) and reshaped([Part(10)], (4, 2)) is None
    fix(eight, "why")
    assert [part.reason for part in cut(eight, 3)] == ["why", "why"]
