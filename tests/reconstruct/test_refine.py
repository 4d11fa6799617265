"""Masks changed by swaps: against every mask of small layers, and never worse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from tests.helpers import check_mask


def problem(seed=0, rows=60, size=8, outputs=8):
    """A weight and correlated inputs."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, size)) @ draw.normal(size=(size, size))
    return jnp.asarray(draw.normal(size=(size, outputs)), jnp.float32), jnp.asarray(x, jnp.float32)


def least_error(w, x, mask, ridge):
    """||X W - X V||^2 + ridge mean(diag H) ||W - V||^2 of the best V, column by column in double precision."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    h = x.T @ x
    h = h + ridge * np.diag(h).mean() * np.eye(len(h))
    errors = []
    for k in range(w.shape[1]):
        kept = np.flatnonzero(mask[:, k])
        v = np.zeros(len(w))
        v[kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ w[:, k])[kept])
        errors.append((w[:, k] - v) @ h @ (w[:, k] - v))
    return np.array(errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_swaps_of_single_columns_come_near_the_best_of_all_masks(seed):
    w, x = problem(seed)
    mask = nm.solve(jnp.abs(w), "2:4")
    found = nm.refine_mask(w, nm.Gram.from_inputs(x), mask, "2:4", ridge=0.01)
    assert check_mask(found.mask, nm.NM(2, 4))
    pairs = list(itertools.combinations(range(4), 2))
    best = np.full(w.shape[1], np.inf)
    for upper, lower in itertools.product(pairs, pairs):
        one = np.zeros(8, bool)
        one[[*upper, *(4 + k for k in lower)]] = True
        best = np.minimum(best, least_error(w, x, np.tile(one[:, None], (1, w.shape[1])), 0.01))
    before = least_error(w, x, np.asarray(mask), 0.01)
    after = least_error(w, x, np.asarray(found.mask), 0.01)
    assert np.all(after <= before * (1 + 1e-5)) and np.all(after >= best * (1 - 1e-6))
    assert after.sum() < 0.5 * (before.sum() + best.sum())  # more than half of what can be gained


@pytest.mark.parametrize("pattern", ["2:4-T", *(pytest.param(p, marks=pytest.mark.slow) for p in ("1:2-T", "4:8-T"))])
def test_exchanges_keep_blocks_and_lower_the_error(pattern):
    w, x = problem(1, rows=100, size=16, outputs=16)
    gram, mask = nm.Gram.from_inputs(x), nm.solve(jnp.abs(w), pattern)
    found = nm.refine_mask(w, gram, mask, pattern)
    assert check_mask(found.mask, nm.parse_pattern(pattern))
    before, after = (nm.reconstruct(w, gram, which).after for which in (mask, found.mask))
    assert found.before == pytest.approx(float(before)) and found.after == pytest.approx(float(after))
    assert found.after < 0.95 * found.before
    assert found.changed == int(jnp.sum(found.mask & ~mask)) > 0


def test_no_exchange_is_missed_that_lowers_the_error_of_independent_inputs():
    """With orthogonal inputs no weight stands in for another: what is kept is all that counts, and swaps can climb."""
    w, _ = problem(2, size=8, outputs=8)
    start = nm.solve(-jnp.abs(w), "2:4")  # the worst
    found = nm.refine_mask(w, nm.Gram.from_inputs(jnp.eye(8)), start, "2:4")
    np.testing.assert_array_equal(found.mask, nm.solve(jnp.abs(w), "2:4"))


@pytest.mark.slow
@pytest.mark.parametrize("axes, contraction, shape", [("bbio", "iiio", (3, 1, 8, 4)), ("oibb", "oiii", (4, 8, 3, 1))])
def test_a_convolution_is_swapped_at_each_position(axes, contraction, shape):
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    x = jnp.asarray(draw.normal(size=(80, 24)) @ draw.normal(size=(24, 24)), jnp.float32)
    gram = nm.Gram.from_inputs(x, contraction)
    mask = nm.compute_masks({"w": w}, [("w", "2:4-T", axes)])["w"]
    found = nm.refine_mask(w, gram, mask, "2:4-T", axes=axes)
    assert nm.verify({"w": found.mask}, [("w", "2:4-T", axes)]).ok and found.after < found.before


@pytest.mark.slow
def test_groups_of_a_convolution_whose_blocks_lie_across_them():
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=(1, 1, 4, 4)), jnp.float32)
    x = draw.normal(size=(2, 50, 4)) @ draw.normal(size=(4, 4))
    gram = nm.Gram.from_moments(np.einsum("bni,bnj->bij", x, x), x.sum(axis=1), 50, "iiio", groups=2)
    found = nm.refine_mask(w, gram, nm.solve(jnp.abs(w), "2:4-T", axes="bbio"), "2:4-T", axes="bbio")
    assert nm.verify({"w": found.mask}, [("w", "2:4-T", "bbio")]).ok and found.after <= found.before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pattern": "US-0.5"}, "no swaps are known"),
        ({"pattern": "2:3"}, "3 does not divide"),
        ({"mask": jnp.ones((8, 8), bool)}, "breaks 2:4"),
        ({"mask": jnp.ones((8, 4), bool)}, "has shape"),
        ({"axes": "bbio"}, "names 4 dimensions"),
    ],
)
def test_what_cannot_be_swapped_is_an_error(change, message):
    w, x = problem()
    arguments = {"mask": nm.solve(jnp.abs(w), "2:4"), "pattern": "2:4"} | change
    with pytest.raises(ValueError, match=message):
        nm.refine_mask(w, nm.Gram.from_inputs(x), **arguments)


def test_the_masks_of_a_model():
    w, x = problem(0, rows=40, size=8, outputs=8)
    params = {"a": {"kernel": w, "bias": jnp.zeros(8)}, "b": {"kernel": w.T}, "c": {"kernel": w}}
    rules = [("[ab]/kernel", "2:4-T"), ("c/kernel", "US-0.5", "io")]

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"] @ p["c"]["kernel"]

    masks = nm.compute_masks(params, rules)
    grams, others = (nm.gram(apply, params, [part]) for part in (x[:30], x[30:]))
    seen = []
    new, report = nm.refine_masks(params, masks, rules, grams, held_out=others, on_layer=seen.append)
    assert seen == list(report.layers) and report["c/kernel"].remark and new["c"]["kernel"] is masks["c"]["kernel"]
    assert nm.verify(nm.apply_masks(params, new), rules).ok
    for name in "ab":
        row = report[f"{name}/kernel"]
        assert row.after <= row.before and row.held_out_after <= row.held_out_before
        assert row.changed == int(jnp.sum(new[name]["kernel"] & ~masks[name]["kernel"]))
        assert row.changed or row.remark
        assert row.path in str(report)


def test_a_mask_that_is_no_better_on_other_inputs_is_kept():
    params, masks = {"kernel": jnp.ones((4, 1))}, {"kernel": jnp.array([[False], [False], [True], [True]])}
    here, there = ({"kernel": nm.Gram.from_inputs(jnp.diag(jnp.array([size, 1.0, 1, 1])))} for size in (3.0, 0.1))
    _, report = nm.refine_masks(params, masks, "2:4", here, biases=False)
    assert report["kernel"].changed == 1
    new, report = nm.refine_masks(params, masks, "2:4", here, held_out=there, biases=False)
    assert new["kernel"] is masks["kernel"] and report["kernel"].changed == 0
    assert report["kernel"].held_out_after == report["kernel"].held_out_before and "held out" in report["kernel"].remark


def test_rules_that_break_a_mask_name_the_leaf():
    w, x = problem()
    with pytest.raises(ValueError, match=r"^kernel: the mask breaks 1:4"):
        nm.refine_masks(
            {"kernel": w}, {"kernel": nm.solve(jnp.abs(w), "2:4")}, "1:4", {"kernel": nm.Gram.from_inputs(x)}
        )
