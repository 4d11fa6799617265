"""What is put inside, around and into `sparse_training`: frozen layers, losses, averages, states of other runs."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.helpers import worst_group
from tests.training.test_training import loss, make_params, make_step, run


def sparse(inner=None, **kwargs):
    return nm.sparse_training(optax.adam(0.02) if inner is None else inner, "2:4", **{"refresh_every": 3, **kwargs})


def is_sparse(params):
    return all(worst_group(params[name]["kernel"], 0, 4) <= 2 for name in ("a", "b"))


# ------------------------------------------------------------------------------------------------------ frozen leaves


@pytest.mark.parametrize("refresh_every", [1, None])
def test_a_leaf_without_gradient_is_frozen(refresh_every):
    """As the frozen layers of Equinox: no step, no decay; the mask is applied all the same."""
    params = make_params()
    tx = sparse(optax.sgd(0.1), refresh_every=refresh_every)
    state = tx.init(params)
    masks = nm.masks(state)
    for _ in range(3):
        gradient = {**jax.grad(loss)(params), "a": {"kernel": None, "bias": jnp.ones(16)}}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["a"]["kernel"], make_params()["a"]["kernel"] * masks["a"]["kernel"])
    assert (params["a"]["bias"] != 0).all()
    assert (params["b"]["kernel"] != make_params()["b"]["kernel"] * masks["b"]["kernel"]).any()
    assert is_sparse(params)


def test_the_frozen_layers_of_equinox():
    model = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0))
    everything_but_last = jax.tree.map(lambda _: False, model)
    trained = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), everything_but_last, replace=(True, True))
    trainable, frozen = eqx.partition(model, trained)
    x = jnp.ones((4, 8))
    gradient = eqx.filter_grad(lambda t, f: jnp.mean(jax.vmap(eqx.combine(t, f))(x) ** 2))(trainable, frozen)
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = nm.sparse_training(optax.sgd(0.1), "2:4-T")
    updates, _ = tx.update(gradient, tx.init(params), params)
    updated = eqx.apply_updates(params, updates)
    for layer in updated.layers:
        assert worst_group(layer.weight, 0, 4) == worst_group(layer.weight, 1, 4) == 2
    kept = updated.layers[0].weight != 0
    np.testing.assert_array_equal(updated.layers[0].weight[kept], params.layers[0].weight[kept])
    np.testing.assert_array_equal(updated.layers[0].bias, params.layers[0].bias)


# ------------------------------------------------------------------------------------- losses evaluated on the inside

EVALUATING = {
    "sam": (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), "grad_fn"),
    "sophia": (lambda: optax.contrib.sophia(0.01), "obj_fn"),
    "any name": (lambda: optax.GradientTransformationExtraArgs(lambda p: (), _with_a_loss), "closure"),
}


def _with_a_loss(updates, state, params=None, *, closure):
    return jax.tree.map(lambda u: u * closure(params), updates), state


@pytest.mark.parametrize("refresh_every", [3, None])
@pytest.mark.parametrize("case", EVALUATING)
def test_an_optimiser_that_evaluates_the_loss_is_refused(case, refresh_every):
    make, name = EVALUATING[case]
    params = make_params()
    tx = sparse(make(), refresh_every=refresh_every)
    state = tx.init(params)
    function = {"grad_fn": lambda p, _: jax.grad(loss)(p)}.get(name, loss)
    for update in (tx.update, jax.jit(tx.update, static_argnames=name)):
        with pytest.raises(ValueError, match=f"'{name}'.*dense weights"):
            update(jax.grad(loss)(params), state, params, **{name: function})


def test_a_loss_that_nobody_evaluates_inside_may_pass():
    """A transformation before `sparse_training` evaluates at the sparse parameters, as it should."""
    seen = []

    def first(updates, state, params=None, *, closure, **extra_args):
        seen.append(closure(params))
        return updates, state

    outside = optax.GradientTransformationExtraArgs(lambda p: (), first)
    tx = optax.chain(outside, sparse())
    params = make_params()
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    tx.update(jax.grad(loss)(params), state, params, closure=is_sparse)
    assert seen == [True]


# ----------------------------------------------------------------------------------------------------- schedule-free


@pytest.mark.parametrize("refresh_every", [3, None])
def test_schedule_free_is_evaluated_at_sparse_parameters(refresh_every):
    params = make_params()
    inner = optax.contrib.schedule_free_adamw(0.02, warmup_steps=2)
    tx = sparse(inner, refresh_every=refresh_every)
    state = tx.init(params)
    params, step = nm.sparse_params(state, params), make_step(tx)
    for _ in range(10):
        params, state = step(params, state)
        found = optax.contrib.schedule_free_eval_params(state, params)
        assert is_sparse(found)
    dense = params if refresh_every is None else nm.dense_params(state, params)
    expected = nm.apply_masks(optax.contrib.schedule_free_eval_params(state.inner, dense), nm.masks(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    assert not hasattr(sparse(optax.sgd(0.1)).init(params), "z")


# --------------------------------------------------------------------------- what moves the parameters on the outside

OUTSIDE = {
    "mechanize": optax.contrib.mechanize,
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "unknown": lambda tx: optax.chain(tx, optax.stateless(lambda u, p: jax.tree.map(lambda x: x + 0.1, u))),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_moves_parameters_outside_is_told(case):
    params = make_params()
    tx = OUTSIDE[case](sparse(optax.sgd(0.1), decay=2e-4))
    state = tx.init(params)
    step = make_step(tx)
    for _ in range(7):
        params, state = step(params, state)
    assert not is_sparse(params)
    if case == "unknown":
        with pytest.warns(UserWarning, match=r"% of their size away.*with_params.*belongs inside"):
            assert (nm.refresh_stats(state).drift > 0.2).all()
        return
    for read in (nm.masks, nm.refresh_stats, nm.dense_params, lambda s: nm.sparse_params(s, params)):
        with pytest.warns(UserWarning, match="State is around sparse_training.*put it inside"):
            read(state)
    with pytest.warns(UserWarning):
        assert (nm.refresh_stats(state).drift > 0.01).all()


@pytest.mark.parametrize("refresh_every", [3, None])
@pytest.mark.parametrize("case", ["sam", "lookahead"])
def test_what_computes_with_the_state_outside_is_refused(case, refresh_every):
    params = make_params()
    inner = sparse(optax.sgd(0.1), refresh_every=refresh_every)
    if case == "sam":
        tx = optax.contrib.sam(inner, optax.sgd(0.1))
    else:
        tx = optax.lookahead(inner, 3, 0.5, reset_state=True)
        params = optax.LookaheadParams.init_synced(params)
    state = tx.init(params)
    gradient = jax.grad(loss)(make_params())
    _, state = tx.update(gradient, state, params)
    with pytest.raises(ValueError, match=r"masks in the state have become .*; put it inside"):
        tx.update(gradient, state, params)
    with pytest.warns(UserWarning, match="is around sparse_training") if refresh_every else contextlib.nullcontext():
        nm.refresh_stats(state)


@pytest.mark.parametrize("refresh_every", [3, None])
def test_lookahead_is_fine_around_a_fixed_mask_only(refresh_every):
    params = make_params()
    inner = sparse(optax.sgd(0.5), refresh_every=refresh_every, decay=0.0)  # so that masks change
    tx = optax.lookahead(inner, sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(nm.sparse_params(inner.init(params), params))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        return optax.apply_updates(params, updates), state

    patterns = []
    for _ in range(12):
        params, state = step(params, state)
        patterns += [is_sparse(params.fast), is_sparse(params.slow)]
    if refresh_every is None:
        assert all(patterns)
        np.testing.assert_array_equal(nm.refresh_stats(state).drift, [0, 0])
    else:
        assert not all(patterns)
        with pytest.warns(UserWarning, match="LookaheadState is around.*fixed mask"):
            assert (nm.refresh_stats(state).drift > 0.01).all()
    moved = pytest.warns(UserWarning, match="belongs inside") if refresh_every else contextlib.nullcontext()
    with moved, pytest.raises(ValueError, match="for a/kernel, which is not among params"):
        nm.sparse_params(state.fast_state, params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_drift_is_rounding_until_somebody_edits(dtype):
    params = make_params(dtype)
    tx = sparse(optax.sgd(0.05))
    _, state = run(tx, params, 10)  # whose first gradient is taken at dense parameters
    rounding = 1e-6 if dtype == jnp.float32 else 0.01
    assert (nm.refresh_stats(state).drift < rounding).all()
    params, state = run(tx, params, 10)
    edited = {**params, "b": {"kernel": params["b"]["kernel"].at[3].add(1.0)}}
    _, after = make_step(tx)(edited, state)
    with pytest.warns(UserWarning, match=r"% of their size away.*nm_jax.with_params"):
        drift = nm.refresh_stats(after).drift
    assert drift[0] < rounding
    assert drift[1] > 0.1
    told = nm.with_params(state, edited)
    with pytest.warns(UserWarning, match="with_params"):
        heard = nm.with_params(after, edited)
    assert (nm.refresh_stats(heard).drift == 0).all()
    _, after = make_step(tx)(nm.sparse_params(told, edited), told)
    assert (nm.refresh_stats(after).drift < rounding).all()


@pytest.mark.parametrize("sparse_from_the_start", [True, False])
def test_lookahead_starts_from_sparse_parameters(sparse_from_the_start):
    """Else what is dense in the slow ones comes back at every synchronisation, which the inner state tells too."""
    params = make_params()
    inner = sparse(optax.sgd(0.1), refresh_every=None)
    tx = optax.lookahead(inner, sync_period=3, slow_step_size=0.5)
    start = nm.sparse_params(inner.init(params), params) if sparse_from_the_start else params
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert is_sparse(params.slow) == sparse_from_the_start
    with contextlib.nullcontext() if sparse_from_the_start else pytest.warns(UserWarning, match="belongs inside"):
        nm.sparse_params(state.fast_state, params.fast)


def test_drift_is_seen_later_too_whatever_the_period():
    """After 40 updates one in 37 is looked at, so that no period hides from it."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}
    tx = nm.sparse_training(optax.sgd(0.0), "2:4", refresh_every=1000)
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    update = jax.jit(tx.update)
    seen = {}
    for k in range(1, 240):
        given = {"kernel": params["kernel"] + (0.5 if k > 41 and k % 6 == 5 else 0.0)}
        _, state = update(jax.tree.map(jnp.zeros_like, params), state, given)
        seen[k] = float(state.stats.drift[0])
    assert seen[184] == 0
    assert seen[185] > 0.1  # the first multiple of 37 after 41 that is 5 modulo 6
    assert seen[185] == seen[239]


# ----------------------------------------------------------------------------------------- the states of other runs


def test_the_state_of_a_dense_run_is_told_apart():
    params = make_params()
    dense_state = optax.adam(0.02).init(params)
    tx = sparse()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for state in (dense_state, {"mu": zeros}):
        with pytest.raises(ValueError, match=r"not a state of sparse_training.*tx.init\(params\).*_replace\(inner="):
            tx.update(zeros, state, params)
    state = tx.init(params)._replace(inner=dense_state)  # what it says
    updates, _ = tx.update(zeros, state, params)
    assert is_sparse(optax.apply_updates(params, updates))


def test_reading_a_state_of_other_parameters():
    params = make_params()
    state = sparse().init(params)
    for read in (nm.sparse_params, nm.masks, nm.dense_params):
        with pytest.raises(ValueError, match=r"for b/kernel, which is not among params"):
            read(state, {"a": params["a"]})
        with pytest.raises(ValueError, match=r"b/kernel: the state has .* of shape \(16, 8\)"):
            read(state, {**params, "b": {"kernel": jnp.ones((8, 8))}})


# -------------------------------------------------------------------------------------------------------- prefix trees

PREFIXES = {
    "masked": lambda tx: optax.masked(tx, {"body": True, "table": False}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"train": tx, "freeze": optax.set_to_zero()}, {"body": "train", "table": "freeze"}
    ),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_masks_under_prefix_trees(case):
    params = {"body": make_params()["a"], "table": {"rows": jnp.ones((8, 8)), "deep": {"x": jnp.ones(2)}}}
    state = PREFIXES[case](sparse()).init(params)
    masks = nm.masks(state, params)
    assert jax.tree.structure(masks, is_leaf=lambda m: m is None) == jax.tree.structure(params)
    assert masks["table"] == {"rows": None, "deep": {"x": None}}
    applied = nm.apply_masks(params, nm.masks(state))
    jax.tree.map(np.testing.assert_array_equal, applied, nm.apply_masks(params, masks))
    assert worst_group(applied["body"]["kernel"], 0, 4) == 2
    np.testing.assert_array_equal(applied["table"]["rows"], params["table"]["rows"])


def test_a_subtree_that_masks_do_not_know_is_still_an_error():
    params = make_params()
    masks = nm.compute_masks(params, "2:4")
    with pytest.raises(ValueError, match="masks has no entry for a_b/"):
        nm.apply_masks({**params, "a_b": params["a"]}, {**masks, "a": None})


# --------------------------------------------------------------------------------------------------------- small floats


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_small_floats(dtype):
    """Zeros are exact; a kept entry is the dense weight rounded once where it changed by less than a factor of two."""
    dtype = jnp.dtype(dtype)
    params = {"kernel": (jax.random.normal(jax.random.key(0), (8, 16)) / 3).astype(dtype)}
    tx = nm.sparse_training(optax.sgd(0.05), "2:4-T", refresh_every=2)
    state = tx.init(params)
    params, update = nm.sparse_params(state, params), jax.jit(tx.update)
    eps = float(jnp.finfo(dtype).eps)
    exact = 0
    for k in range(6):
        before = np.asarray(params["kernel"], np.float32)
        gradient = jax.random.normal(jax.random.key(k), (8, 16)).astype(dtype)
        updates, state = update({"kernel": gradient}, state, params)
        assert updates["kernel"].dtype == dtype
        params = optax.apply_updates(params, updates)
        assert params["kernel"].dtype == dtype
        mask, dense = np.asarray(nm.masks(state)["kernel"]), np.asarray(state.dense["kernel"])
        value = np.asarray(params["kernel"], np.float32)
        rounded = np.asarray(state.dense["kernel"].astype(dtype), np.float32)
        assert (value[~mask] == 0).all()
        near = mask & (2 * np.minimum(abs(before), abs(rounded)) >= np.maximum(abs(before), abs(rounded)))
        near &= before * rounded > 0
        np.testing.assert_array_equal(value[near], rounded[near])
        exact += near.sum()
        smallest = float(jnp.finfo(dtype).smallest_subnormal)
        bound = eps / 2 * (2 * abs(dense) + abs(dense - before)) * (1 + eps) + smallest
        assert (abs(value - dense)[mask] <= bound[mask]).all()
        assert nm.verify(params, "2:4-T").ok
    assert exact > 200
