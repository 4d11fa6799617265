"""The strength of a decay from flip rates, which are counted here; and that a call which was cut off goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.training.test_training import make_params, make_step

ADAM = optax.adam(0.05)
EVERY = {"refresh_every": 6}
RATES = {"dense": 0.2, "1e-06": 0.3, "1e-05": 0.195, "0.0001": 0.18, "0.001": 0.13, "0.01": 0.0}


def probe(tx, steps=13):
    params, state, step = make_params(), tx.init(make_params()), make_step(tx)
    for _ in range(steps):
        params, state = step(params, state)
    return state


def never(tx):
    del tx
    raise AssertionError("nothing is left to measure")


@pytest.mark.parametrize(
    ("between", "strength"), [((0.6, 0.95), 1e-4), ((0.5, 0.8), 1e-3), ((0.96, 1.0), 1e-5), ((0.0, 0.1), 1e-2)]
)
def test_the_weakest_within_the_limits(between, strength):
    assert nm.choose_decay(never, ADAM, "2:4", between=between, found=RATES) == nm.GradientDecay(strength)


def test_flip_rates_are_those_of_the_last_refresh():
    """Of dense training too, which is not changed by being looked at."""

    def masks_of(params):
        return [np.asarray(nm.solve(jnp.abs(params[name]["kernel"]), "2:4")) for name in "ab"]

    def flips(before, after):
        return np.mean(np.concatenate([(old != new).ravel() for old, new in zip(before, after, strict=True)]))

    found = {}
    chosen = nm.choose_decay(
        probe, ADAM, "2:4", decay=nm.StepDecay, strengths=(0.5, 1.0, 3.0), between=(0.0, 1.0), found=found, **EVERY
    )
    dense, step, state = make_params(), make_step(ADAM), ADAM.init(make_params())
    for k in range(1, 13):
        dense, state = step(dense, state)
        if k == 6:
            before = masks_of(dense)
    assert found["dense"] == pytest.approx(flips(before, masks_of(dense)), rel=1e-6)

    tx = nm.sparse_training(ADAM, "2:4", decay=chosen, **EVERY)
    before, after = (nm.masks(probe(tx, steps)) for steps in (11, 12))
    rate = flips(*([masks[name]["kernel"] for name in "ab"] for masks in (before, after)))
    assert found[repr(chosen.strength)] == pytest.approx(rate, rel=1e-6)
    assert isinstance(chosen, nm.StepDecay)
    assert 0 < rate <= found["dense"]


def test_a_call_that_was_cut_off_goes_on():
    """Nothing is measured twice, and what is found is the same."""
    calls = []

    def cut_off(tx):
        calls.append(tx)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return probe(tx)

    arguments = {"decay": nm.StepDecay, "strengths": (0.1, 3.0), "between": (0.0, 0.9), **EVERY}
    whole, parts = {}, {}
    expected = nm.choose_decay(probe, ADAM, "2:4", found=whole, **arguments)
    with pytest.raises(KeyboardInterrupt):
        nm.choose_decay(cut_off, ADAM, "2:4", found=parts, **arguments)
    assert list(parts) == ["dense"]
    assert nm.choose_decay(cut_off, ADAM, "2:4", found=parts, **arguments) == expected
    assert parts == whole
    assert len(calls) == 1 + len(whole)


def test_what_is_watched_is_not_changed():
    seen = []

    def watch(tx):
        params, state, step = make_params(), tx.init(make_params()), make_step(tx)
        for _ in range(7):
            params, state = step(params, state)
        seen.append((params, state.inner))
        assert step._cache_size() == 1
        return state

    with pytest.raises(ValueError, match="no decay has"):
        nm.choose_decay(watch, ADAM, "2:4", strengths=(1e-9,), between=(0.0, 1e-9), **EVERY)
    params, state, step = make_params(), ADAM.init(make_params()), make_step(ADAM)
    for _ in range(7):
        params, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, seen[0], (params, state))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"between": (0.3, 0.5)}, r"by strength it is .*0\.001: 0\.65, 0\.01: 0\.0}: try"),
        ({"between": (-0.1, 0.5)}, "0 <= lower < upper"),
        ({"strengths": (1e-5, 1e-5)}, "must rise"),
        ({"strengths": ()}, "must rise"),
        ({"found": {"dense": 0.0}}, "did not change"),
        ({"strengths": (-1.0,), "found": RATES}, "must not be negative"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        nm.choose_decay(never, ADAM, "2:4", **{"found": RATES, **arguments})


def test_a_probe_without_a_refresh_is_refused():
    with pytest.raises(ValueError, match="ended before a refresh"):
        nm.choose_decay(lambda tx: probe(tx, 3), ADAM, "2:4", **EVERY)
