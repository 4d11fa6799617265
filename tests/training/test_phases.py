"""Patterns that masks have before that of the rules: which one when, and that training does not notice the change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.training.test_training import make_params, make_step

EXACT = nm.solvers.Enumeration()


def run(tx, steps, save_at=None):
    """Parameters and state after each update; and what the same training makes of a copy saved after one of them."""
    params, state, step, seen = make_params(), tx.init(make_params()), make_step(tx), []
    for k in range(1, steps + 1):
        params, state = step(params, state)
        seen.append((params, state))
        if k == save_at:
            saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    if save_at is not None:
        copy = jax.tree.unflatten(jax.tree.structure((params, state)), [jnp.asarray(leaf) for leaf in saved])
        for _ in range(steps - save_at):
            copy = step(*copy)
        jax.tree.map(np.testing.assert_array_equal, copy, (params, state))
    assert step._cache_size() == 1
    return seen


def kept(n, m):
    """Whether a mask keeps exactly n of every m rows of a column."""

    def holds(mask):
        return (np.asarray(mask).reshape(-1, m, mask.shape[1]).sum(1) == n).all()

    return holds


SLOW = [(2, 4), (0, None), (2, optax.constant_schedule(4))]


@pytest.mark.parametrize(
    ("begin_step", "refresh_every"),
    [
        (0, 4),
        pytest.param(2, None, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_masks_have_the_earlier_patterns_and_then_that_of_the_rules(begin_step, refresh_every):
    """Dense first, where asked; across a kill in the second phase; both axes hold where both are asked for."""
    tx = nm.sparse_training(
        optax.adam(0.02),
        "2:4-T",
        refresh_every=refresh_every,
        begin_step=begin_step,
        end_step=5,
        earlier=[(3, "3:4"), (7, "2:4")],
        solver=EXACT,
    )
    seen = run(tx, 12, save_at=5)
    for k, (params, state) in enumerate(seen, 1):
        phase = 0 if k < begin_step else 1 + (k >= 3) + (k >= 7)
        np.testing.assert_array_equal(nm.refresh_stats(state).phase, [phase, phase])
        for name in "ab":
            mask = nm.masks(state)[name]["kernel"]
            assert [mask.all(), kept(3, 4)(mask), kept(2, 4)(mask), kept(2, 4)(mask) and kept(2, 4)(mask.T)][phase]
            assert (params[name]["kernel"][~mask] == 0).all()
        assert nm.verify(params, "2:4-T").ok == (phase == 3)


def test_masks_are_those_that_keep_the_most_when_a_pattern_ends():
    """Found of the dense weights even where no refresh is due; the change of the pattern is no flip of masks."""
    settings = {"refresh_every": 100, "decay": 0.0, "solver": EXACT}
    tx = nm.sparse_training(optax.sgd(0.3), "2:4-T", earlier=[(3, "2:4")], **settings)
    for k, (_, state) in enumerate(run(tx, 4), 1):
        if k == 3:
            dense, masks = nm.dense_params(state), nm.masks(state)
            for name in "ab":
                expected = nm.solve(jnp.abs(dense[name]["kernel"]), "2:4-T", EXACT)
                np.testing.assert_array_equal(masks[name]["kernel"], expected)
            stats = nm.refresh_stats(state)
            assert (stats.flip_rate > 0).all()
            np.testing.assert_array_equal(stats.largest_flip_rate, [0, 0])
            np.testing.assert_array_equal(stats.largest_retained, stats.retained)
            assert not stats.failing.any()


def test_scaled_steps_follow_the_density_of_the_phase():
    """Of a fixed mask, whose parameters are what the optimiser moves."""
    params, gradient = {"kernel": jnp.ones((8, 8))}, {"kernel": jnp.full((8, 8), 0.125)}
    tx = nm.recipes.fixed_mask(optax.sgd(1.0), "2:4", scale_steps=1.0, begin_step=1, earlier=[(3, "1:4")])
    state, moved = tx.init(params), []
    for _ in range(5):
        before = params
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        stay = (params["kernel"] != 0) & (before["kernel"] != 0)
        moved.append(sorted({float(x) for x in (before["kernel"] - params["kernel"])[stay]}))
    np.testing.assert_allclose(moved, [[0.125], [0.5], [0.5], [0.25], [0.25]])


@pytest.mark.slow
def test_gradual_transposability_and_decaying_patterns():
    adam, settings = optax.adam(0.02), {"solver": EXACT}
    gradual = nm.recipes.gradual_transposable(adam, "2:4-T", until=4, **settings)
    for k, (params, state) in enumerate(run(gradual, 6), 1):
        assert nm.verify(params, "2:4").ok
        assert nm.verify(nm.masks(state), "2:4-T").ok == (k >= 4)
    for k, (_, state) in enumerate(run(nm.recipes.decaying(adam, "1:4", until=4, stages=2), 5), 1):
        n = 1 + math.ceil(2 * max(2 - k // 2, 0) / 2)
        assert all(kept(n, 4)(nm.masks(state)[name]["kernel"]) for name in "ab"), k
    transposable = run(nm.recipes.decaying(adam, "2:4-T", until=3, stages=1, **settings), 3)
    assert nm.verify(nm.masks(transposable[1][1]), "3:4-T").ok
    assert nm.verify(transposable[2][0], "2:4-T").ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"earlier": [(4, "2:4"), (4, "3:4")]}, "one after another, after begin_step=0"),
        ({"earlier": [(2, "2:4")], "begin_step": 2}, "after begin_step=2, got"),
        ({"earlier": [(2, "4:2")]}, "1 <= n < m"),
        ({"earlier": [(2, "2:4")], "packed": True}, "one pattern from the start"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nm.sparse_training(optax.sgd(0.1), "2:4-T", **arguments)


def test_an_earlier_pattern_that_does_not_fit():
    tx = nm.sparse_training(optax.sgd(0.1), "2:4", earlier=[(2, "2:4-T")])
    with pytest.raises(ValueError, match="kernel: the output axis has size 6, which 4 does not divide"):
        tx.init({"kernel": jnp.ones((8, 6))})
    with pytest.raises(ValueError, match="stages <= until"):
        nm.recipes.decaying(optax.sgd(0.1), "2:4", until=2)
