"""`sparse_training` inside and around the transformations of optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.training.test_training import loss, make_params, make_step, run

PATTERN = "2:4"  # what is tested here does not depend on the pattern, and this one compiles fast


def sparse(inner=None, rules=PATTERN, **kwargs):
    return nm.sparse_training(optax.adam(0.02) if inner is None else inner, rules, **{"refresh_every": 3, **kwargs})


CASES = {
    "chain before": lambda: optax.chain(optax.clip_by_global_norm(1.0), sparse()),
    "chain inside": lambda: sparse(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02))),
    "schedule": lambda: sparse(optax.adamw(optax.cosine_decay_schedule(0.05, 50))),
    "weight decay mask": lambda: sparse(
        optax.adamw(0.02, mask=lambda p: jax.tree_util.tree_map(lambda x: x.ndim > 1, p))
    ),
    "inject_hyperparams": lambda: sparse(optax.inject_hyperparams(optax.adamw)(learning_rate=0.02)),
    "apply_if_finite": lambda: optax.apply_if_finite(sparse(), 5),
    "MultiSteps": lambda: optax.MultiSteps(sparse(), 2).gradient_transformation(),
    "masked": lambda: optax.chain(
        optax.masked(sparse(), lambda p: jax.tree_util.tree_map(lambda x: x.ndim > 1, p)),
        optax.masked(optax.scale(-0.01), lambda p: jax.tree_util.tree_map(lambda x: x.ndim == 1, p)),
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"first": sparse(optax.sgd(0.1)), "second": sparse(optax.adam(0.02), refresh_every=2)},
        {"a": "first", "b": "second"},
    ),
    "multi_transform within a layer": lambda: optax.multi_transform(
        {"bias": optax.sgd(0.1), "a": sparse(optax.sgd(0.1)), "b": sparse()},
        {"a": {"kernel": "a", "bias": "bias"}, "b": {"kernel": "b"}},
    ),
    "contrib schedule free": lambda: optax.chain(optax.identity(), sparse(optax.sgd(0.1, momentum=0.9, nesterov=True))),
    "weight decay and lion": lambda: sparse(optax.lion(0.01, weight_decay=0.1)),
    "adafactor": lambda: sparse(optax.adafactor(0.02, min_dim_size_to_factor=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_params_stay_sparse_and_state_is_found(case):
    params = make_params()
    tx = CASES[case]()
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    start = float(loss(params))
    step = make_step(tx, donate_argnums=(0, 1))
    for _ in range(24):
        params, state = step(params, state)
        assert nm.verify(params, PATTERN).ok
    assert step._cache_size() == 1
    assert float(loss(params)) < start
    masks, dense = nm.masks(state), nm.dense_params(state, params)
    assert masks["a"]["bias"] is None
    for name in ("a", "b"):
        np.testing.assert_array_equal(params[name]["kernel"] != 0, masks[name]["kernel"])
        chex.assert_trees_all_close(
            params[name]["kernel"], jnp.where(masks[name]["kernel"], dense[name]["kernel"], 0), rtol=1e-5
        )
    assert nm.refresh_stats(state).flip_rate.shape == (2,)
    chex.assert_trees_all_close(nm.sparse_params(state, params), params, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(nm.with_params(state, params), state, rtol=1e-6, atol=1e-7)


def test_the_gradient_chain_sees_the_loops_gradient():
    """Clipping before and inside are both plain optax: SGD inside a chain equals SGD after clipping by hand."""
    params = make_params()
    chained, _ = run(optax.chain(optax.clip_by_global_norm(0.01), sparse(optax.sgd(1.0), decay=0.0)), params, 5)
    tx = sparse(optax.sgd(1.0), decay=0.0)
    state = tx.init(params)
    for _ in range(5):
        gradient = jax.grad(loss)(params)
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1, 0.01 / n), gradient)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(chained, params, rtol=1e-5, atol=1e-7)


def test_apply_if_finite_skips_a_bad_step():
    params = make_params()
    tx = CASES["apply_if_finite"]()
    state = tx.init(params)
    params = nm.sparse_params(state, params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, state = jax.jit(tx.update)(bad, state, params)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    assert int(state.inner_state.step) == 0
    assert not np.isnan(nm.dense_params(state)["a"]["kernel"]).any()


def test_multi_steps_equals_one_step_of_the_mean_gradient():
    params = make_params()
    tx = optax.MultiSteps(sparse(optax.sgd(0.1)), 2)
    state = tx.init(params)
    first, second = (jax.tree.map(lambda p, s=s: jnp.full_like(p, s), params) for s in (1.0, 3.0))
    updates, state = jax.jit(tx.update)(first, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = jax.jit(tx.update)(second, state, params)
    plain = sparse(optax.sgd(0.1))
    mean = jax.tree.map(lambda p: jnp.full_like(p, 2.0), params)
    expected, _ = plain.update(mean, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_a_schedule_reads_from_the_injected_state():
    tx = CASES["inject_hyperparams"]()
    params, state = run(tx, make_params(), 3)
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0))
    after, _ = make_step(tx)(params, state)
    chex.assert_trees_all_close(after, params, rtol=1e-6)


def test_tree_map_params_reaches_every_copy_of_the_parameters():
    params = make_params()
    tx = sparse()
    _, state = run(tx, params, 2)
    shapes = optax.tree_utils.tree_map_params(
        tx, lambda leaf: leaf.shape, state, transform_non_params=lambda _: "other"
    )
    assert shapes.dense["a"]["kernel"] == shapes.masks["a"]["kernel"] == (8, 16)
    assert shapes.inner[0].mu["b"]["kernel"] == (16, 8)
    assert shapes.step == "other"
    assert set(jax.tree.leaves(shapes.stats)) == {"other"}
    spec = jax.tree.map(lambda p: f"{p.ndim}-D", params)
    specs = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
        state,
        spec,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    assert specs.dense["a"]["kernel"] == "2-D"
    assert isinstance(specs.dense["a"]["bias"], optax.MaskedNode)


def test_eval_shape_gives_the_state_of_init():
    params = make_params(jnp.bfloat16)
    for case in CASES.values():
        tx = case()
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))


def test_a_link_after_it_breaks_sparsity_as_documented():
    """The docstring says that it must be the last link: this is why."""
    tx = optax.chain(sparse(), optax.scale(0.5))
    params, _ = run(tx, make_params(), 3)
    assert not nm.verify(params, PATTERN).ok
    assert "*last* link" in nm.sparse_training.__doc__


def test_extra_arguments_reach_the_inner_transformation():
    params = make_params()
    tx = sparse(optax.contrib.reduce_on_plateau(patience=1))
    state = tx.init(params)
    gradient = jax.grad(loss)(params)
    _, state = tx.update(gradient, state, params, value=loss(params))
    assert float(state.inner.best_value) == pytest.approx(float(loss(params)), rel=1e-6)
