"""What the library relies on in jaxprs, on the oldest and the newest jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nm_jax._model.tracing._jaxpr import bind, branches, called, loop, opened
from tests.model.models import X, shape


def jaxpr_of(function, *args):
    program = opened(jax.make_jaxpr(function)(*args))
    return program.jaxpr


def test_loops_are_understood():
    def scanned(w, x, b):
        def step(h, k):
            return {"x": h["x"] @ k + b, "n": h["n"] + 1}, h["n"]

        return lax.scan(step, {"x": x, "n": 0}, w, reverse=True)

    (eqn,) = [e for e in jaxpr_of(scanned, shape(3, 8, 8), X, shape(6, 8)).eqns if e.primitive.name == "scan"]
    found = loop(eqn)
    assert (found.consts, found.carry, found.length, found.reverse, found.skipped) == (1, 2, 3, True, 0)
    assert len(found.body.jaxpr.invars) == 4

    def endless(w, x, n):
        return lax.while_loop(lambda c: c[1] < n, lambda c: (c[0] @ w, c[1] + 1), (x, 0))

    (eqn,) = [e for e in jaxpr_of(endless, shape(8, 8), X, 3).eqns if e.primitive.name == "while"]
    found = loop(eqn)
    assert (found.consts, found.carry, found.length, found.skipped) == (1, 2, None, 1)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp, lambda f: f])
def test_calls_are_opened_and_equations_are_bound(wrap):
    function = wrap(jnp.dot)
    if wrap is jax.custom_jvp:
        function.defjvp(lambda p, t: (jnp.dot(*p), t[0]))
    if wrap is jax.custom_vjp:
        function.defvjp(lambda x, w: (jnp.dot(x, w), None), lambda _, g: (g, g))
    x, w = jnp.ones((6, 8)), jnp.arange(96.0).reshape(8, 12)
    (eqn,) = jaxpr_of(lambda x, w: function(x, w), x, w).eqns
    assert (called(eqn) is None) == (eqn.primitive.name == "dot_general")
    (out,) = bind(eqn, [x, w])
    np.testing.assert_allclose(out, x @ w)


def test_branches_are_opened():
    eqn = jaxpr_of(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), X).eqns[-1]
    assert [b.jaxpr.eqns[0].primitive.name for b in branches(eqn)] == ["cos", "sin"]
