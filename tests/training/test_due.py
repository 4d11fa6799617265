"""When masks are found anew, against the rule in plain Python; and what the statistics say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from nm_jax._training.due import Due
from tests.matmul.implementations import REFERENCE
from tests.training.test_training import make_params, make_step


def refreshes(due, rates, steps):
    """After which updates masks are found, when each refresh changes the next of these shares of two leaves."""
    params = {name: {"kernel": jnp.ones((4, size))} for name, size in (("a", 4), ("b", 12))}
    stats = nm.refresh_stats(nm.sparse_training(optax.sgd(0.1), "2:4").init(params))
    ask, found, rates = jax.jit(lambda step, stats: due(step, stats, (16, 48))), [], iter(rates)
    for step in range(1, steps + 1):
        if ask(jnp.int32(step), stats):
            found.append(step)
            new = stats._replace(flip_rate=jnp.full(2, next(rates), jnp.float32))
            stats = new.after(stats, jnp.int32(step), jnp.array(step > due.begin_step))
    assert ask._cache_size() == 1
    return found


@pytest.mark.parametrize("begin_step", [0, 3])
@pytest.mark.parametrize("interval", [lambda step: 1 + step // 5, lambda step: 2.5 + 0.3 * step, lambda step: 0])
def test_a_schedule_of_intervals(interval, begin_step):
    expected, last = [], 0
    for step in range(1, 41):
        if step == begin_step or (step > begin_step and step - last >= max(interval(step), 1)):
            expected.append(step)
            last = step
    assert refreshes(Due(interval, begin_step, None, None), [0.1] * 40, 40) == expected
    ended = [step for step in expected if step <= 20]
    assert refreshes(Due(interval, begin_step, 20, None), [0.1] * 40, 40) == ended


@pytest.mark.parametrize("begin_step", [0, 3])
def test_a_constant_schedule_is_a_number(begin_step):
    by_number, by_schedule = (
        refreshes(Due(every, begin_step, 30, None), [0.1] * 40, 40) for every in (4, optax.constant_schedule(4))
    )
    assert by_number == by_schedule
    assert len(by_number) > 5


def test_refreshes_end_when_masks_have_settled():
    """Not in the warm-up, in which nothing changes yet, and not by the first masks after dense updates."""
    assert refreshes(Due(2, 0, None, 0.1), [0, 0.01, 0.2, 0.05, 0.02, 0.5], 20) == [2, 4, 6, 8, 10]
    assert refreshes(Due(2, 3, None, 0.1), [0.5, 0.04, 0.02, 0.004, 0.5], 20) == [3, 5, 7, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end_when_settled": 1.0}, "end_when_settled is a share"),
        ({"end_when_settled": -0.1}, "end_when_settled is a share"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nm.sparse_training(optax.sgd(0.1), "2:4", **arguments)


def test_training_by_a_schedule_until_settled_resumes_bit_for_bit():
    """Masks change only where the rule says so; the statistics are those of the refreshes, counted here."""
    steps = 24
    schedule = optax.linear_schedule(2, 6, steps)

    def make():
        rate = optax.linear_schedule(0.3, 0.0, steps)
        return nm.sparse_training(
            optax.sgd(rate), "2:4", decay=0.0, refresh_every=schedule, begin_step=1, end_when_settled=0.2
        )

    params, tx = make_params(), make()
    state, step = tx.init(params), make_step(tx)
    last, largest, sizes, settled = 0, np.zeros(2), np.array([128.0, 128.0]), False
    best, moves = np.zeros(2), np.zeros(2)
    for k in range(1, steps + 1):
        before = [np.asarray(nm.masks(state)[name]["kernel"]) for name in "ab"]
        dense = [np.asarray(nm.dense_params(state)[name]["kernel"], np.float64) for name in "ab"]
        params, state = step(params, state)
        stats, after = nm.refresh_stats(state), [np.asarray(nm.masks(state)[name]["kernel"]) for name in "ab"]
        moved = [np.asarray(nm.dense_params(state)[name]["kernel"], np.float64) for name in "ab"]
        flips = np.array([np.mean(a != b) for a, b in zip(before, after, strict=True)])
        if k == 1 or (k - last >= float(schedule(k)) and not settled):
            last = k
            if k > 1:
                largest = np.maximum(largest, flips)
                settled = largest @ sizes > 0 and flips @ sizes <= 0.2 * (largest @ sizes)
            move = [np.linalg.norm(new - old) / np.linalg.norm(new) for new, old in zip(moved, dense, strict=True)]
            np.testing.assert_allclose(stats.move, move, rtol=1e-3, atol=1e-7)
            np.testing.assert_allclose(stats.flip_rate, flips, rtol=1e-6)
            best, moves = np.maximum(best, stats.retained), np.maximum(moves, stats.move)
        else:
            assert not flips.any()
        np.testing.assert_array_equal(stats.step, [last, last])
        np.testing.assert_allclose(stats.largest_flip_rate, largest, rtol=1e-6)
        np.testing.assert_array_equal(stats.largest_retained, best)
        np.testing.assert_array_equal(stats.largest_move, moves)
        assert nm.verify(params, "2:4").ok
        if k == 11:
            saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    assert largest.max() > 0
    again, again_state = jax.tree.unflatten(jax.tree.structure((params, state)), [jnp.asarray(leaf) for leaf in saved])
    for _ in range(steps - 11):
        again, again_state = step(again, again_state)
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, (again, again_state), (params, state))


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, False),
        ({"retained": 0.68}, True),
        ({"retained": 0.69}, False),
        ({"flip_rate": 0.06, "move": 0.0009}, True),
        ({"flip_rate": 0.06, "move": 0.002}, False),
        ({"flip_rate": 0.04, "move": 0.0009}, False),
    ],
)
def test_failing(changed, failing):
    """Of a second leaf; the first is as at the beginning, which is no failure."""
    params = {name: {"kernel": jnp.ones((4, 4))} for name in "ab"}
    state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
    values = {"retained": 0.7, "flip_rate": 0.1, "move": 0.01} | changed
    values |= {"largest_retained": 0.7, "largest_flip_rate": 0.1, "largest_move": 0.01}
    stats = state.stats._replace(**{k: getattr(state.stats, k).at[1].set(v) for k, v in values.items()})
    state = state._replace(stats=stats)
    np.testing.assert_array_equal(jax.jit(lambda s: nm.refresh_stats(s).failing)(state), [False, failing])


def test_positions_follow_masks_whose_refreshes_a_schedule_says():
    """Found anew with them, until they have settled."""
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    schedule = optax.linear_schedule(1, 4, 12)
    tx = nm.sparse_training(
        optax.sgd(optax.linear_schedule(0.2, 0.0, 12)),
        [("w", "2:4")],
        decay=0.0,
        refresh_every=schedule,
        end_when_settled=0.3,
        packed=True,
    )
    state, step = tx.init(params), make_step(tx, lambda p: jnp.sum(jnp.sin(9 * p["w"])))
    params, changes = nm.sparse_params(state, params), 0
    for _ in range(12):
        before = nm.masks(state)["w"]
        params, state = step(params, state)
        changes += int((before != nm.masks(state)["w"]).any())
        packed = nm.pack_params(state, params)["w"]
        found = nm.nm_matmul(jnp.eye(16), packed, implementation=REFERENCE)
        np.testing.assert_allclose(found, params["w"], rtol=1e-6)
    assert 1 < changes < 12
