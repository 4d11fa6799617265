"""The optax transformation on its own: what it computes, when it refreshes, what it refuses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.helpers import worst_group


def make_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 16), dtype) / 3, "bias": jnp.zeros(16, dtype)},
        "b": {"kernel": jax.random.normal(keys[1], (16, 8), dtype) / 4},
    }


X = jax.random.normal(jax.random.key(7), (32, 8))
Y = jnp.sin(2 * X[:, ::-1])


def loss(params, x=X, y=Y):
    hidden = jnp.tanh(x.astype(params["a"]["kernel"].dtype) @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean((hidden @ params["b"]["kernel"] - y.astype(hidden.dtype)) ** 2)


def make_step(tx, loss=loss, **jit):
    def step(params, state):
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit)


def run(tx, params, steps, **jit):
    step, state = make_step(tx, **jit), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_it_is_sr_ste_written_by_hand():
    """Dense copy, straight-through gradient at the masked weights, decay of pruned ones, refresh every 5 updates."""
    lr, decay, every = 0.1, 0.05, 5
    params = make_params()
    inner = optax.sgd(lr, momentum=0.9)
    tx = nm.sparse_training(inner, "2:4-T", refresh_every=every, decay=decay, scale_steps=0.0)
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    step = make_step(tx)

    dense = make_params()
    names = ("a", "b")
    masks = {k: np.asarray(nm.solve(jnp.abs(dense[k]["kernel"]), "2:4-T")) for k in names}
    velocity = jax.tree.map(np.zeros_like, dense)
    for k in range(1, 18):
        seen = {k: {**dense[k], "kernel": dense[k]["kernel"] * masks[k]} for k in names}
        gradient = jax.grad(loss)(seen)
        for name in names:
            gradient[name]["kernel"] += decay * ~masks[name] * dense[name]["kernel"]
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        dense = jax.tree.map(lambda w, v: w - lr * v, dense, velocity)
        if k % every == 0:
            masks = {k: np.asarray(nm.solve(jnp.abs(dense[k]["kernel"]), "2:4-T")) for k in names}
        params, state = step(params, state)
        for name in names:
            np.testing.assert_array_equal(nm.masks(state)[name]["kernel"], masks[name], err_msg=str(k))
            np.testing.assert_allclose(
                params[name]["kernel"], dense[name]["kernel"] * masks[name], rtol=1e-5, atol=1e-6
            )
    chex.assert_trees_all_close(nm.dense_params(state, params), dense, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 17


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "4:8-S", "US-0.75"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_params_are_the_masked_dense_weights_after_every_update(pattern, dtype):
    """Zeros exact; kept entries within one rounding in the params' dtype, without accumulation; dense is float32."""
    params = make_params(dtype)
    tx = nm.sparse_training(optax.adam(0.02), pattern, refresh_every=3)
    state, step = tx.init(params), None
    step = make_step(tx)
    for _ in range(12):
        before = params
        params, state = step(params, state)
        for name in ("a", "b"):
            mask, dense = nm.masks(state)[name]["kernel"], nm.dense_params(state)[name]["kernel"]
            assert dense.dtype == jnp.float32
            value = params[name]["kernel"]
            assert value.dtype == dtype
            assert (value[~mask] == 0).all()
            largest = jnp.maximum(abs(dense), abs(before[name]["kernel"].astype(jnp.float32)))
            error = abs(value.astype(jnp.float32) - jnp.where(mask, dense, 0))
            assert (error <= 2 * jnp.finfo(dtype).eps * largest).all()
    assert nm.verify(params, pattern).ok


def test_bfloat16_params_learn_from_steps_below_their_resolution():
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    tx = nm.sparse_training(optax.sgd(1e-4), "2:4", scale_steps=0.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(400):
        updates, state = update({"kernel": jnp.full((4, 4), 1.0, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    kept = nm.masks(state)["kernel"]
    np.testing.assert_allclose(np.asarray(params["kernel"], np.float32)[kept], 0.96, atol=0.004)


def test_refresh_happens_when_due_and_only_then():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.5), "2:4", refresh_every=4, begin_step=3, end_step=11, decay=0.0)
    state, step = tx.init(params), make_step(tx)
    changed = []
    for k in range(1, 20):
        before = nm.masks(state)["a"]["kernel"]
        params, state = step(params, state)
        after = nm.masks(state)["a"]["kernel"]
        if (before != after).any():
            changed.append(k)
        assert nm.verify(params, "2:4").ok == (k >= 3)
        if k < 3:
            assert after.all()
    assert changed[0] == 3
    assert set(changed) <= {3, 7, 11}
    assert len(changed) > 1


def test_flip_rate_and_retained_magnitude_are_in_the_state():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.5), "2:4", refresh_every=5, decay=0.0)
    state, step = tx.init(params), make_step(tx)
    stats = nm.refresh_stats(state)
    np.testing.assert_array_equal(stats.flip_rate, [0, 0])
    for k in range(1, 11):
        old = nm.masks(state)
        params, state = step(params, state)
        if k % 5 == 0:
            new, dense, stats = nm.masks(state), nm.dense_params(state), nm.refresh_stats(state)
            for place, name in enumerate(("a", "b")):
                flips = np.mean(old[name]["kernel"] != new[name]["kernel"])
                weights = np.abs(dense[name]["kernel"])
                retained = float((weights * new[name]["kernel"]).sum() / weights.sum())
                assert float(stats.flip_rate[place]) == pytest.approx(flips)
                assert float(stats.retained[place]) == pytest.approx(retained, rel=1e-5)
            assert not stats.nan.any()
    assert stats.flip_rate.max() > 0


def test_nan_is_flagged_and_masks_stay_valid():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.1), "2:4-T", refresh_every=1)
    state = tx.init(params)
    gradient = jax.grad(loss)(params)
    gradient["a"]["kernel"] = gradient["a"]["kernel"].at[0, 0].set(jnp.nan)
    _, state = jax.jit(tx.update)(gradient, state, params)
    np.testing.assert_array_equal(nm.refresh_stats(state).nan, [True, False])
    assert nm.verify(nm.masks(state), "2:4-T").ok
    params["b"]["kernel"] = params["b"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"b/kernel: .*NaN"):
        tx.init(params)


def test_a_fixed_mask_keeps_no_dense_copy_and_masks_gradients():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.1, momentum=0.9), "2:4-T", refresh_every=None)
    state = tx.init(params)
    assert state.dense is None
    masks = nm.masks(state)
    params = nm.sparse_params(state, params)
    step = make_step(tx)
    for _ in range(10):
        expected_gradient = jax.grad(loss)(params)
        params, state = step(params, state)
        jax.tree.map(np.testing.assert_array_equal, nm.masks(state), masks)
        assert nm.verify(params, "2:4-T").ok
    velocity = optax.tree_utils.tree_get(state, "trace")
    assert (velocity["a"]["kernel"][~masks["a"]["kernel"]] == 0).all()
    assert expected_gradient["a"]["kernel"][~masks["a"]["kernel"]].any()
    with pytest.raises(ValueError, match="no dense copy"):
        nm.dense_params(state)


def test_a_fixed_mask_is_plain_training_of_the_kept_entries():
    params = make_params()
    fixed = nm.recipes.fixed_mask(optax.adam(0.01), "2:4")
    state = fixed.init(params)
    masks = nm.masks(state)
    sparse, _ = run(fixed, nm.sparse_params(state, params), 20)
    by_hand, _ = run(optax.adam(0.01), params, 0)
    by_hand = nm.apply_masks(by_hand, masks)
    tx = optax.adam(0.01)
    opt_state, step = tx.init(by_hand), make_step(tx, lambda p: loss(nm.apply_masks(p, masks)))
    for _ in range(20):
        by_hand, opt_state = step(by_hand, opt_state)
    chex.assert_trees_all_close(sparse, by_hand, rtol=1e-5, atol=1e-7)


def test_a_fixed_mask_that_begins_later():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=None, begin_step=3)
    state, step = tx.init(params), make_step(tx)
    for k in range(1, 8):
        params, state = step(params, state)
        assert nm.verify(params, "2:4").ok == (k >= 3)
        if k == 3:
            masks = nm.masks(state)
    jax.tree.map(np.testing.assert_array_equal, nm.masks(state), masks)


def test_first_gradient_and_edits_from_outside():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.1), "2:4")
    state = tx.init(params)
    sparse = nm.sparse_params(state, params)
    assert nm.verify(sparse, "2:4").ok
    chex.assert_trees_all_equal(sparse, nm.apply_masks(params, nm.masks(state)))
    np.testing.assert_array_equal(sparse["a"]["bias"], params["a"]["bias"])

    clipped = jax.tree.map(lambda p: jnp.clip(p, -0.1, 0.1), sparse)
    reseeded = nm.with_params(state, clipped)
    chex.assert_trees_all_equal(nm.sparse_params(reseeded, clipped), clipped)
    pruned = ~nm.masks(state)["a"]["kernel"]
    np.testing.assert_array_equal(
        nm.dense_params(reseeded)["a"]["kernel"][pruned], params["a"]["kernel"][pruned]
    )  # the hidden part stays
    zero = jax.tree.map(jnp.zeros_like, sparse)
    updates, _ = tx.update(zero, reseeded, clipped)
    chex.assert_trees_all_close(optax.apply_updates(clipped, updates), clipped, rtol=1e-6)
    loaded = jax.tree.map(lambda p: p + 1, params)
    chex.assert_trees_all_equal(nm.dense_params(nm.with_params(state, loaded), loaded), loaded)


def test_an_average_of_the_dense_weights_is_sparse_when_masked():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.5), "2:4", refresh_every=2, decay=0.0)
    state, step = tx.init(params), make_step(tx)
    average, naive = nm.dense_params(state, params), nm.sparse_params(state, params)
    for _ in range(20):
        params, state = step(params, state)
        average = optax.incremental_update(nm.dense_params(state, params), average, 0.1)
        naive = optax.incremental_update(params, naive, 0.1)
    assert not nm.verify(naive, "2:4").ok
    averaged = nm.apply_masks(average, nm.masks(state))
    assert nm.verify(averaged, "2:4").ok
    assert float(loss(averaged)) < float(loss(make_params()))


def test_init_copies_so_that_donation_works():
    params = make_params()
    tx = nm.sparse_training(optax.adam(0.01), "2:4", refresh_every=2)
    expected, _ = run(tx, params, 5)
    donated, state = run(tx, jax.tree.map(jnp.copy, params), 5, donate_argnums=(0, 1))
    chex.assert_trees_all_equal(donated, expected)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((donated, state))]
    assert len(set(pointers)) == len(pointers)


def test_no_recompilation_from_step_to_step():
    params = make_params()
    tx = nm.sparse_training(optax.adam(optax.linear_schedule(0.1, 0.0, 100)), "2:4", refresh_every=2)
    step, state = make_step(tx), tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for _ in range(5):
        params, state = step(params, state)
    assert step._cache_size() == 1


def test_jit_and_plain_updates_agree():
    params = make_params()
    tx = nm.sparse_training(optax.adam(0.01), "2:4", refresh_every=1)
    state = tx.init(params)
    gradient = jax.grad(loss)(params)
    chex.assert_trees_all_close(
        tx.update(gradient, state, params), jax.jit(tx.update)(gradient, state, params), rtol=1e-6, atol=1e-7
    )


def test_vmap_trains_an_ensemble():
    tx = nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=2)
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), make_params())
    state = jax.vmap(tx.init)(ensemble)
    step = jax.jit(jax.vmap(make_step(tx)))
    for _ in range(4):
        ensemble, state = step(ensemble, state)
    alone, _ = run(tx, jax.tree.map(lambda p: 2 * p, make_params()), 4)
    chex.assert_trees_all_close(jax.tree.map(lambda p: p[1], ensemble), alone, rtol=1e-5, atol=1e-6)


def test_vmap_does_not_refresh_at_every_step():
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Counting(nm.solvers.Greedy):
        def solve(self, scores, pattern):
            jax.debug.callback(lambda: calls.append(1))
            return super().solve(scores, pattern)

    tx = nm.sparse_training(optax.sgd(0.1), "2:4-T", refresh_every=5, solver=Counting())
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), make_params())
    state = jax.vmap(tx.init)(ensemble)
    step = jax.jit(jax.vmap(make_step(tx)))
    jax.effects_barrier()
    calls.clear()
    for k in range(1, 11):
        ensemble, state = step(ensemble, state)
        jax.block_until_ready(ensemble)
        jax.effects_barrier()
        assert bool(calls) == (k >= 5)
        if k in (5, 10):
            assert calls
            refreshes = len(calls)
        elif calls:
            assert len(calls) == refreshes


def test_it_learns():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(optax.cosine_decay_schedule(0.5, 400)), "2:4-T")
    target = X[:, ::-1] / 2

    def to_target(params):
        return loss(params, y=target)

    step, state, trained = make_step(tx, to_target), tx.init(params), params
    for _ in range(400):
        trained, state = step(trained, state)
    assert float(to_target(trained)) < 0.3 * float(to_target(params))
    for name in ("a", "b"):
        assert worst_group(trained[name]["kernel"], 0, 4) == worst_group(trained[name]["kernel"], 1, 4) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": "2:5:T"}, "not a sparsity pattern"),
        ({"rules": "4:2"}, "1 <= n < m"),
        ({"refresh_every": 0}, "refresh_every must be"),
        ({"begin_step": -1}, "begin_step"),
        ({"begin_step": 9, "end_step": 8}, "begin_step"),
        ({"decay": -1.0}, "decay"),
        ({"scale_steps": 1.5}, "0 <= scale_steps <= 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nm.sparse_training(optax.sgd(0.1), **{"rules": "2:4", **arguments})


def test_wrong_calls_say_what_to_do():
    params = make_params()
    tx = nm.sparse_training(optax.sgd(0.1), "2:4-T")
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(zeros, state)
    other = {**params, "c": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="no masks for c/kernel; call init"):
        tx.update(jax.tree.map(jnp.zeros_like, other), state, other)
    fewer = {"a": params["a"]}
    with pytest.raises(ValueError, match="masks for b/kernel, which is not among the parameters"):
        tx.update(jax.tree.map(jnp.zeros_like, fewer), state, fewer)
    reshaped = {**params, "b": {"kernel": jnp.ones((8, 16))}}
    with pytest.raises(ValueError, match="b/kernel: the state's masks have shape"):
        tx.update(jax.tree.map(jnp.zeros_like, reshaped), state, reshaped)
    with pytest.raises(ValueError, match="holds no state of sparse_training"):
        nm.masks(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="params has no leaf b/kernel"):
        nm.with_params(state, fewer)
    with pytest.raises(ValueError, match="contracted is ambiguous"):
        tx.init({"kernel": jnp.ones((4, 8, 8))})


@pytest.mark.parametrize(
    "search",
    [
        lambda: optax.lbfgs(),
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)),
    ],
    ids=["zoom", "backtracking"],
)
def test_line_searches_are_refused(search):
    with pytest.raises(ValueError, match="line search"):
        nm.sparse_training(search(), "2:4").init(make_params())


def test_lbfgs_without_a_line_search_is_fine():
    params, _ = run(nm.sparse_training(optax.lbfgs(0.1, linesearch=None), "2:4"), make_params(), 5)
    assert nm.verify(params, "2:4").ok
