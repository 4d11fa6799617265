"""From one sparsity to another: Eq. 4, counting, and the whole recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import nm_jax as nm
from nm_jax._reconstruct import _convert, _counting, _violations
from tests.helpers import check_mask


@pytest.mark.parametrize("m", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.86, 1.0])
def test_the_probability_is_the_binomial_one(m, sparsity):
    for n in range(m + 1):
        # More than n nonzeros in m.
        expected = binom.sf(n, m, 1 - sparsity)
        assert nm.violation_probability(n, m, sparsity) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_probability_of_known_cases():
    assert nm.violation_probability(2, 4, 0.5) == pytest.approx(5 / 16)
    assert nm.violation_probability(4, 4, 0.1) == 0
    assert nm.violation_probability(0, 1, 0.25) == pytest.approx(0.75)


@pytest.mark.parametrize("arguments", [(3, 2, 0.5), (-1, 2, 0.5), (1, 2, 1.5), (1, 2, float("nan"))])
def test_the_probability_of_nonsense_is_an_error(arguments):
    with pytest.raises(ValueError, match=r"n:m|sparsity"):
        nm.violation_probability(*arguments)


def sparse_weights(shape, sparsity, seed=0):
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.normal(size=shape) * (draw.random(shape) > sparsity), jnp.float32)


def test_violations_are_counted():
    w = sparse_weights((64, 48), 0.6)
    (row,) = nm.pattern_violations({"w": w}, [("w", "2:4")])
    groups = np.count_nonzero(np.asarray(w).reshape(16, 4, 48), axis=1)
    assert row.tiles == pytest.approx(np.mean(groups > 2))
    assert row.weights == pytest.approx(np.maximum(groups - 2, 0).sum() / groups.sum())
    assert row.sparsity == pytest.approx(np.mean(np.asarray(w) == 0))
    assert row.expected == pytest.approx(nm.violation_probability(2, 4, row.sparsity))
    assert row.tiles == pytest.approx(row.expected, abs=0.06)


def test_violations_of_a_transposable_pattern():
    w = jnp.zeros((4, 4)).at[0].set(1.0)  # a full row: two of its four have to go
    (row,) = nm.pattern_violations({"w": w}, [("w", "2:4-T")])
    assert (row.tiles, row.weights, row.expected) == (1.0, 0.5, None)
    (row,) = nm.pattern_violations({"w": jnp.eye(4)}, [("w", "2:4-T")])
    assert (row.tiles, row.weights) == (0.0, 0.0)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("percent", [0, 1, 20, 100])
def test_patterns_are_chosen_by_their_probability(percent, transposable):
    params = {"dense": sparse_weights((32, 32), 0), "thin": sparse_weights((32, 32), 0.9), "b": jnp.ones(3)}
    rules = nm.choose_patterns(params, [("dense|thin", "4:8")], percent, transposable=transposable)
    found = {regex: pattern for regex, pattern, _ in rules}
    for name in ("dense", "thin"):
        sparsity = float(np.mean(np.asarray(params[name]) == 0))
        n = next(n for n in range(1, 9) if 100 * nm.violation_probability(n, 8, sparsity) <= percent)
        pattern = found[f"^{name}$"]
        assert pattern is None if n == 8 else (pattern.n, pattern.m) == (n, 8)
        assert pattern is None or isinstance(pattern, nm.TransposableNM) == transposable
    with pytest.raises(ValueError, match="percent"):
        nm.choose_patterns(params, [("thin", "4:8")], 101)


def test_a_mask_that_fits_is_kept():
    params = {"fits": jnp.diag(jnp.arange(1.0, 17.0)), "breaks": sparse_weights((16, 16), 0.3)}
    masks = nm.fit_masks(params, [("fits|breaks", "2:4-T")])
    np.testing.assert_array_equal(masks["fits"], params["fits"] != 0)
    assert check_mask(masks["breaks"], nm.TransposableNM(2, 4))


# ------------------------------------------------------------------------------------------------------ the recipe


def network():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (8, 16))},
        "middle": {"kernel": jax.random.normal(keys[1], (16, 16)), "bias": jnp.zeros(16)},
        "next": {"kernel": jax.random.normal(keys[2], (16, 16))},
        "last": {"kernel": jax.random.normal(keys[3], (16, 4)), "bias": jnp.ones(4)},
    }
    return params, jax.random.normal(jax.random.key(1), (3, 50, 8))


def apply(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"])
    x = jnp.tanh(x @ params["middle"]["kernel"] + params["middle"]["bias"][None])
    x = jnp.tanh(x @ params["next"]["kernel"])
    return x @ params["last"]["kernel"] + params["last"]["bias"][None]


def pruned(params, pattern):
    plan = nm.plan(apply, params, jnp.ones((1, 8)), pattern=pattern)
    return nm.apply_masks(params, nm.compute_masks(params, plan))


@pytest.mark.parametrize(
    "start, targets",
    [
        (None, ["2:4"]),
        ("US-0.7", ["4:8"]),
        ("4:8", ["2:4", "1:2"]),
        pytest.param("4:8-T", ["2:4-T"], marks=pytest.mark.slow),
    ],
)
def test_a_network_is_converted(start, targets):
    params, x = network()
    params = pruned(params, start) if start else params
    for target in targets:
        plan = nm.plan(apply, params, x[0], pattern=target)
        new, conversion = nm.convert(apply, params, plan, list(x), ridge=1e-3)
        assert conversion.check.ok and nm.verify(new, plan).ok
        for name in ("first", "last"):
            for leaf in params[name]:
                assert new[name][leaf] is params[name][leaf]
        for row in conversion.violations:
            kernel = np.asarray(new[row.leaf.path.split("/")[0]]["kernel"])
            assert check_at_most(kernel, target)
        assert {row.path for row in conversion.layers.layers} <= {"middle/kernel", "next/kernel"}
        assert all(row.after < row.before for row in conversion.layers.layers)
        assert "that broke the pattern" in str(conversion)
        params = new


def check_at_most(kernel, target):
    """Plain loops: no group of m holds more than n nonzeros, along both axes if transposable."""
    n, m = map(int, target.removesuffix("-T").split(":"))
    sides = [kernel, kernel.T] if target.endswith("-T") else [kernel]
    return all(
        np.count_nonzero(side[start : start + m, col]) <= n
        for side in sides
        for col in range(side.shape[1])
        for start in range(0, len(side), m)
    )


def test_a_network_that_fits_stays_as_it_is():
    params, x = network()
    params = pruned(params, "1:4")
    plan = nm.plan(apply, params, x[0], pattern="2:4")
    new, conversion = nm.convert(apply, params, plan, list(x))
    assert conversion.layers.layers == () and conversion.check.ok
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, new, params)))
    partly = params | {"next": {"kernel": jnp.ones((16, 16))}}
    new, conversion = nm.convert(apply, partly, plan, list(x))
    np.testing.assert_array_equal(new["middle"]["kernel"], params["middle"]["kernel"])
    assert [row.path for row in conversion.layers.layers] == ["next/kernel"]


def test_calibration_data_of_the_wrong_shape_is_one_error():
    params, _ = network()
    plan = nm.plan(apply, params, jnp.ones((1, 8)), pattern="2:4")
    grams = nm.gram(apply, params, [jnp.ones((5, 8))], plan)
    wrong = grams | {"middle": {"kernel": nm.Gram.from_inputs(jnp.ones((5, 12))), "bias": None}}
    with pytest.raises(ValueError, match=r"middle/kernel: weights of shape \(16, 16\).* need Gram matrices"):
        nm.reconstruct_layers(params, nm.compute_masks(params, plan), wrong)


def test_a_model_is_surveyed_once_and_only_what_is_broken_is_solved(monkeypatch):
    params, x = network()
    params = pruned(params, "1:4") | {"next": {"kernel": jnp.ones((16, 16))}}
    plan = nm.plan(apply, params, x[0], pattern="2:4")
    surveys, solved = [], []

    def resolve(*arguments):
        surveys.append(arguments)
        return plan.resolve(params, "skip")

    def compute_masks(params, rules, **options):
        solved.append([leaf.path for leaf in rules.leaves if isinstance(leaf, _violations.SparseLeaf)])
        return nm.compute_masks(params, rules, **options)

    monkeypatch.setattr(_violations, "resolve", resolve)
    for module in (_convert, _violations):
        monkeypatch.setattr(module, "compute_masks", compute_masks)
    new, conversion = nm.convert(apply, params, plan, list(x))
    assert len(surveys) == 1 and solved == [["next/kernel"]] * 2
    assert conversion.check.ok and [row.leaf.path for row in conversion.violations] == ["middle/kernel", "next/kernel"]
    np.testing.assert_array_equal(conversion.masks["middle"]["kernel"], params["middle"]["kernel"] != 0)
    assert not np.any(np.asarray(new["next"]["kernel"])[~np.asarray(conversion.masks["next"]["kernel"])])


def test_a_second_conversion_compiles_nothing():
    params, x = network()
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return apply(params, x)

    plan = nm.plan(apply, params, x[0], pattern="2:4")
    first, _ = nm.convert(counted, params, plan, (batch for batch in x), held_out=iter([x[0]]))
    traced = len(calls)
    second, conversion = nm.convert(counted, params, plan, (batch for batch in x), held_out=iter([x[0]]))
    assert len(calls) == traced
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert conversion.layers["next/kernel"].held_out_after is not None


@pytest.mark.unchecked
def test_arguments_in_each_others_place_are_named():
    params, x = network()
    plan = nm.plan(apply, params, x[0], pattern="2:4")
    masks, grams = nm.compute_masks(params, plan), nm.gram(apply, params, list(x), plan)
    for wrong, name in ((plan, "a Plan"), ("2:4", "rules"), ([("next", "2:4")], "rules")):
        with pytest.raises(ValueError, match=f"masks is {name}, and not a tree of masks; give nm_jax.compute_masks"):
            nm.adaprune(apply, params, wrong, list(x))
        with pytest.raises(ValueError, match=f"masks is {name}"):
            nm.reconstruct_layers(params, wrong, grams)
    with pytest.raises(ValueError, match="leaves is a plan, a regular expression"):
        nm.gram(apply, params, list(x), masks)
    with pytest.raises(ValueError, match="batches is one array of shape"):
        nm.convert(apply, params, plan, x)
    with pytest.raises(ValueError, match="held_out is one array of shape"):
        nm.convert(apply, params, plan, list(x), held_out=x)


def test_counts_pass_what_an_int32_holds():
    shape = (80, 8192, 28672)
    by_row = jax.eval_shape(_counting._by_row, jax.ShapeDtypeStruct(shape, bool))
    assert by_row.shape == shape[:2] and shape[2] < 2**31
    assert _counting.total(np.full(by_row.shape, shape[2], by_row.dtype)) == np.prod(shape, dtype=object)
    flags = np.random.default_rng(0).random((7, 5, 3)) < 0.3
    assert _counting.count(jnp.asarray(flags)) == flags.sum()
    assert _counting.share(jnp.asarray(flags)) == flags.mean()
    assert _counting.share(jnp.zeros((0, 4), bool)) == 0


def deep(params, x):
    for name in ("a", "b", "c"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["head"]


def deep_network():
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = {"a": (8, 16), "b": (16, 16), "c": (16, 16)}
    params = {
        name: {"kernel": jax.random.normal(key, size) / 3, "bias": jnp.zeros(size[1])}
        for key, (name, size) in zip(keys, sizes.items(), strict=False)
    }
    params["head"] = jax.random.normal(keys[3], (16, 4))
    return params, list(jax.random.normal(keys[4], (10, 32, 8)))


@pytest.mark.slow
def test_the_best_that_is_known():
    params, batches = deep_network()
    rules = [("[bc]/kernel", "2:4-T")]
    _, fast = nm.convert(deep, params, rules, batches[:8], held_out=batches[8:])
    new, found = nm.convert(
        deep, params, rules, batches[:8], held_out=batches[8:], effort="best", steps=40, boundaries=[]
    )
    assert found.check.ok and nm.verify(new, rules).ok
    assert not jnp.any(jnp.where(found.masks["b"]["kernel"], 0, new["b"]["kernel"]))
    assert [step.name for step in found.steps] == [
        "masks alone",
        "channels permuted",
        "layers reconstructed",
        "weights swapped, layers reconstructed",
        "blocks fitted",
    ]
    errors = [step.outputs.error for step in found.steps]
    assert errors[2:] == sorted(errors[2:], reverse=True) and found.outputs == found.steps[-1].outputs
    assert found.outputs.error < fast.outputs.error
    assert fast.steps == () and "blocks fitted" in str(found) and "largest logit" in str(found)


@pytest.mark.slow
def test_the_best_leaves_out_what_it_cannot_do():
    params, batches = deep_network()
    params["b"]["kernel"] = params["b"]["kernel"] * nm.solve(jnp.abs(params["b"]["kernel"]), "2:4")
    rules = [("[bc]/kernel", "2:4")]
    new, found = nm.convert(deep, params, rules, batches, effort="best", steps=4, boundaries=[])
    assert "have their pattern" in found.steps[1].remark and "left out" in str(found)
    kept = np.asarray(params["b"]["kernel"] != 0)
    np.testing.assert_array_equal(found.masks["b"]["kernel"], kept)
    assert found.check.ok and not np.asarray(new["b"]["kernel"])[~kept].any()
    _, found = nm.convert(deep, params, rules[:1], batches, effort="best", scores=jnp.abs, steps=0)
    assert "scores" in found.steps[1].remark


def test_an_effort_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="'fast' or 'best'"):
        nm.convert(deep, deep_network()[0], "2:4", [], effort="worst")
