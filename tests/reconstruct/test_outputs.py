"""The outputs of a network before and after, by numpy; and a network that falls apart though its layers look fine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._reconstruct._outputs import OutputChange, compare_outputs


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(params, x):
    return x @ params["w"] + 100  # a mean that is the same for all inputs does not count


def test_outputs_are_compared_over_all_batches():
    old, new = {"w": normal(0, 8, 5)}, {"w": normal(0, 8, 5) + 0.5 * normal(1, 8, 5)}
    x = normal(2, 30, 8)
    found = compare_outputs(linear, old, new, [(x[:20],), (x[20:],)])
    was, now = (np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64) for params in (old, new))
    assert found.error == pytest.approx(np.sum((now - was) ** 2) / np.sum((was - was.mean(axis=0)) ** 2), rel=1e-3)
    assert found.agreement == np.mean(was.argmax(axis=1) == now.argmax(axis=1))
    assert found.examples == 30
    same = compare_outputs(linear, old, old, [(x,)])
    assert same == OutputChange(0.0, 1.0, 30) and not same.collapsed and not same.changed


def test_inputs_that_are_all_the_same():
    """Their outputs have no variance but rounding: what counts is their size."""
    old, new = {"w": normal(0, 8, 5)}, {"w": 1.01 * normal(0, 8, 5)}
    x = jnp.ones((6, 8)) / 3
    found = compare_outputs(lambda params, x: x @ params["w"], old, new, [(x,)])
    assert found.error == pytest.approx(1e-4, rel=1e-2)
    assert not found.changed


def test_outputs_of_several_kinds():
    def apply(params, x, keep):
        return {"hidden": (x @ params["w"])[..., None], "steps": jnp.int32(3)}

    old, new = {"w": normal(0, 8, 5)}, {"w": 2 * normal(0, 8, 5)}
    x, keep = normal(1, 3, 6, 8), jnp.arange(6)[None] < jnp.array([[6], [2], [4]])
    found = compare_outputs(apply, old, new, [(x, keep)], row_mask=lambda x, keep: keep)
    was = (np.asarray(x)[np.asarray(keep)] @ np.asarray(old["w"])).astype(np.float64)
    assert found.error == pytest.approx(np.sum(was**2) / np.sum((was - was.mean(axis=0)) ** 2), rel=1e-4)
    assert found.agreement is None
    one = compare_outputs(apply, old, new, [(x[:1, 0], keep)])
    assert one.error == pytest.approx(1)  # a single example has no variance: its square is taken
    assert compare_outputs(lambda params, x: None, old, new, [(x,)]) is None


@pytest.mark.parametrize(
    "error, agreement, collapsed, changed",
    [
        (0.01, 0.99, False, False),
        (0.01, None, False, False),
        (0.3, 0.9, False, True),
        (0.1, 0.7, False, True),
        (0.1, 0.3, True, True),
        (0.1, 0.0, True, True),
        (0.7, 0.9, False, True),
        (0.7, None, True, True),
        (1.2, 0.9, True, True),
        (float("nan"), 0.9, True, True),
        (float("nan"), None, True, True),
    ],
)
def test_what_is_bad_is_said(error, agreement, collapsed, changed):
    change = OutputChange(error, agreement, 7)
    assert (change.collapsed, change.changed) == (collapsed, changed)
    assert ("COLLAPSED" in str(change)) == collapsed
    assert ("evaluate" in str(change)) == changed
    assert "(7 examples)" in str(change)


def deep(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return x


def test_a_network_that_collapses_does_not_look_fine():
    params = {f"layer{k}": {"kernel": normal(k, 24, 24) / 3} for k in range(8)}
    x = normal(9, 200, 24)
    with pytest.warns(UserWarning, match="COLLAPSED"):
        _, conversion = nm.convert(deep, params, "2:4", [x])
    assert conversion.check.ok and conversion.outputs.collapsed
    assert "outputs of the network: error" in str(conversion) and "COLLAPSED" in str(conversion)
    assert "verification passed: 8 sparse leaves, all have their pattern" in str(conversion)
    _, conversion = nm.convert(deep, params, [("layer0", "3:4")], [x], held_out=[x[:50]])
    assert not conversion.outputs.collapsed and conversion.outputs.examples == 50
