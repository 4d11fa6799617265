"""First and last layers by the flow of data, against what was drawn by hand."""

import jax.numpy as jnp
import pytest
from jax import lax

import nm_jax as nm
from tests.model.models import X, shape


def square(*names):
    return {name: shape(8, 8) for name in names}


def recurrent(p, x):
    def step(h, t):
        h = jnp.tanh(t @ p["in"] + h @ p["state"])
        return h, h

    return lax.scan(step, jnp.zeros((6, 8)), x)[1] @ p["head"]


def unet(p, x, t):
    h = jnp.tanh(x @ p["in"]) + jnp.tanh(jnp.sin(t) @ p["time"]) @ p["time2"]
    return (h + jnp.tanh(h @ p["mid"])) @ p["out"]


_AB = ("ab", [X], "a", "b")
# model, inputs -> parameters that are contracted first and last, by the data flow drawn by hand.
ENDS = {
    "a chain, written backwards": (lambda p, x: x @ p["c"] @ p["b"] @ p["a"], "abc", [X], "c", "a"),
    "one layer": (lambda p, x: x @ p["a"], "a", [X], "a", "a"),
    "two heads": (lambda p, x: (jnp.tanh(x @ p["a"]) @ p["v"], jnp.tanh(x @ p["a"]) @ p["w"]), "avw", [X], "a", "vw"),
    "two towers": (lambda p, x, y: (x @ p["a"] @ p["b"]) @ (y @ p["c"] @ p["d"]).T, "abcd", [X, X], "ac", "bd"),
    "a residual network": (lambda p, x: _residual(p, x @ p["a"]) @ p["d"], "abcd", [X], "a", "d"),
    "features beside logits": (lambda p, x: (h := x @ p["a"], h @ p["b"]), "ab", [X], "a", "b"),
    "used twice": (lambda p, x: x @ p["a"] @ p["b"] @ p["a"], "ab", [X], "a", "a"),
    "a score that is looked up": (
        lambda p, x, t: jnp.take_along_axis(jnp.tanh(x @ p["a"]) @ p["b"], t[:, None], axis=1),
        *("ab", [X, shape(6, dtype=jnp.int32)], "a", "b"),
    ),
    "inputs that are chosen": (lambda p, x, t: x[t] @ p["a"] @ p["b"], "ab", [X, shape(6, dtype=jnp.int32)], "a", "b"),
    "layers in a scan": (lambda p, x: lax.scan(lambda h, _: (h @ p["a"] @ p["b"], 0), x, length=3)[0], *_AB),
}


def _residual(p, x):
    x = x + jnp.tanh(x @ p["b"])
    return x + jnp.tanh(x @ p["c"])


@pytest.mark.parametrize("kind", ENDS)
def test_first_and_last_by_the_flow_of_data(kind):
    apply, names, inputs, first, last = ENDS[kind]
    traced = nm.trace(apply, square(*names), *inputs)
    assert (traced.first, traced.last) == (tuple(first), tuple(last))


def test_ends_of_networks_with_several_inputs():
    traced = nm.trace(recurrent, square("in", "state", "head"), shape(5, 6, 8))
    assert (traced.first, traced.last) == (("in",), ("head",))
    traced = nm.trace(unet, square("in", "time", "time2", "mid", "out"), X, shape(6, 8))
    assert (traced.first, traced.last) == (("in", "time"), ("out",))


def test_an_embedding_that_is_looked_up_is_a_first_layer():
    def apply(p, tokens, x):
        return (p["table"][tokens] @ p["a"] + x @ p["b"]) @ p["c"]

    params = square("a", "b", "c") | {"table": shape(10, 8)}
    assert nm.trace(apply, params, shape(6, dtype=jnp.int32), X).first == ("b",)
