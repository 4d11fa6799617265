"""What pulls pruned weights toward zero, against the formulas in NumPy; and the recipes made of it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from tests.training.test_training import loss, make_params, make_step, run


def arrays(seed=0, shape=(8, 16)):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape), generator.normal(size=shape), generator.random(shape) < 0.5


@pytest.mark.parametrize("strength", [0.0, 0.3, 3.0, 1e3])
def test_step_decay_is_its_formula(strength):
    step, weight, mask = arrays()
    step = step / 50
    rate = min(1.0, strength * np.sqrt(np.mean(step**2)) / np.sqrt(np.mean(weight**2)))
    found = nm.StepDecay(strength).step(jnp.float32(step), jnp.float32(weight), jnp.array(mask))
    np.testing.assert_allclose(found, step - rate * ~mask * weight, rtol=1e-5, atol=1e-6)


def test_gradient_decay_is_its_formula():
    gradient, weight, mask = arrays()
    found = nm.GradientDecay(0.3).gradient(jnp.float32(gradient), jnp.float32(weight), jnp.array(mask))
    np.testing.assert_allclose(found, gradient + 0.3 * ~mask * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1e30])
def test_step_decay_of_zero_and_huge_weights_is_finite(weight):
    decay, weight = nm.StepDecay(3.0), jnp.full((4, 4), weight)
    found = decay.step(jnp.full((4, 4), 0.5), weight, weight > 1e31)
    assert np.isfinite(found).all()
    assert np.isfinite(jax.grad(lambda s: decay.step(s, weight, weight > 1e31).sum())(jnp.zeros((4, 4)))).all()


def test_the_default_is_larger_steps_and_their_decay_written_by_hand():
    lr, every = 0.1, 5
    params = make_params()
    tx = nm.sparse_training(optax.sgd(lr), "2:4-T", refresh_every=every)
    state = tx.init(params)
    params, step = nm.sparse_params(state, params), make_step(tx)
    dense, names = make_params(), ("a", "b")
    masks = {k: np.asarray(nm.solve(jnp.abs(dense[k]["kernel"]), "2:4-T")) for k in names}
    for k in range(1, 12):
        gradient = jax.grad(loss)({k: {**dense[k], "kernel": dense[k]["kernel"] * masks[k]} for k in names})
        for name in names:
            weight, move = (np.asarray(tree[name]["kernel"], np.float64) for tree in (dense, gradient))
            move = -lr * 2 ** (2 / 3) * move
            rate = min(1.0, 3.0 * np.sqrt(np.mean(move**2) / np.mean(weight**2)))
            dense[name]["kernel"] = jnp.float32(weight + move - rate * ~masks[name] * weight)
        dense["a"]["bias"] = dense["a"]["bias"] - lr * gradient["a"]["bias"]
        if k % every == 0:
            masks = {k: np.asarray(nm.solve(jnp.abs(dense[k]["kernel"]), "2:4-T")) for k in names}
        params, state = step(params, state)
        for name in names:
            np.testing.assert_array_equal(nm.masks(state)[name]["kernel"], masks[name])
            expected = dense[name]["kernel"] * masks[name]
            np.testing.assert_allclose(params[name]["kernel"], expected, rtol=1e-4, atol=1e-6)


def trained(make, scale, steps=60):
    """Parameters trained on a loss of another scale; Adam without its epsilon does not see the scale."""
    tx, params = make(optax.adam(optax.cosine_decay_schedule(0.02, steps), eps=1e-30), "2:4"), make_params()
    step, state = make_step(tx, lambda p: scale * loss(p)), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_the_default_does_not_depend_on_the_scale_of_the_loss():
    """A power of two changes no rounding; the paper's recipe does depend on it."""

    def every_5(recipe):
        return lambda inner, rules: recipe(inner, rules, refresh_every=5)

    first, second = (trained(every_5(nm.sparse_training), scale) for scale in (1.0, 64.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)
    first, second = (trained(every_5(nm.recipes.paper), scale)["a"]["kernel"] for scale in (1.0, 64.0))
    assert np.abs(first - second).max() > 1e-3


def test_the_papers_recipe_is_sr_ste():
    settings = {"refresh_every": 40, "decay": 2e-4, "scale_steps": 0.0}
    expected, _ = run(nm.sparse_training(optax.sgd(0.1), "2:4", **settings), make_params(), 41)
    found, _ = run(nm.recipes.paper(optax.sgd(0.1), "2:4"), make_params(), 41)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_frozen_leaf_does_not_decay():
    params, tx = make_params(), nm.sparse_training(optax.sgd(0.1), "2:4")
    gradient = {**make_params(), "a": {"kernel": None, "bias": None}}
    _, state = tx.update(gradient, tx.init(params), params)
    np.testing.assert_array_equal(nm.dense_params(state)["a"]["kernel"], params["a"]["kernel"])


@pytest.mark.parametrize(
    ("refresh_every", "pattern", "power"), [(3, "2:4", 1.0), (None, "1:4", 0.5), (3, "1:4", None), (None, "2:4", 0.0)]
)
def test_scaled_steps_are_the_learning_rate_of_sparse_leaves(refresh_every, pattern, power):
    """After two dense updates; biases keep their learning rate."""
    settings = {"refresh_every": refresh_every, "decay": 0.0, "begin_step": 2, "scale_steps": power}
    factor = {"2:4": 2.0, "1:4": 4.0}[pattern] ** (2 / 3 if power is None else power)
    found, by_hand = make_params(), make_params()
    tx = nm.sparse_training(optax.sgd(0.05), pattern, **settings)
    state, step = tx.init(found), make_step(tx)
    for k in range(1, 7):
        gradient = jax.grad(loss)(found)
        before, dense = found, found if refresh_every is None else nm.dense_params(state, found)
        found, state = step(found, state)
        rate = 0.05 * (factor if k > 2 else 1.0)
        by_hand = jax.tree.map(lambda w, g: w - rate * g, dense, gradient)  # noqa: B023
        masked = nm.apply_masks(by_hand, nm.masks(state))
        for name in ("a", "b"):
            np.testing.assert_allclose(found[name]["kernel"], masked[name]["kernel"], rtol=1e-4, atol=1e-6)
        bias = before["a"]["bias"] - 0.05 * gradient["a"]["bias"]
        np.testing.assert_allclose(found["a"]["bias"], bias, rtol=1e-4, atol=1e-6)
    assert nm.verify(found, pattern).ok


def test_steps_are_not_scaled_behind_the_back_of_what_keeps_them():
    """Refused where it is asked for; the default leaves them as they are."""
    inner = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match="around ScheduleFreeState"):
        nm.recipes.maximal_update(inner, "2:4").init(make_params())
    found, expected = (
        run(nm.sparse_training(inner, "2:4", refresh_every=2, scale_steps=power), make_params(), 4)
        for power in (None, 0.0)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


RECIPES = [f for f in vars(nm.recipes).values() if getattr(f, "__module__", "") == "nm_jax.recipes"]
RECIPES += [nm.sparse_training]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_every_recipe_resumes_bit_for_bit_with_one_compilation(recipe):
    """From the leaves alone, as a checkpoint has them; the pattern holds after every update from `until` on."""
    settings = {"until": 20} if "until" in inspect.signature(recipe).parameters else {}
    tx = recipe(optax.adamw(0.02), "2:4", **settings)
    params, state, step = make_params(), tx.init(make_params()), make_step(tx)
    for k in range(1, 46):
        params, state = step(params, state)
        assert nm.verify(params, "2:4").ok or k < settings.get("until", 0)
        if k == 23:
            saved = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    assert step._cache_size() == 1
    again, again_state = jax.tree.unflatten(jax.tree.structure((params, state)), [jnp.asarray(leaf) for leaf in saved])
    fresh = make_step(recipe(optax.adamw(0.02), "2:4", **settings))
    for _ in range(22):
        again, again_state = fresh(again, again_state)
    jax.tree.map(np.testing.assert_array_equal, (again, again_state), (params, state))
