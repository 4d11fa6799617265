import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from tests.helpers import check_mask, worst_group


def params(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "Conv_0": {"kernel": jax.random.normal(keys[0], (3, 3, 8, 16), dtype), "bias": jnp.zeros(16, dtype)},
        "Dense_0": {"kernel": jax.random.normal(keys[1], (16, 24), dtype)},
        "head": {"kernel": jax.random.normal(keys[2], (24, 10), dtype)},
        "experts": {"w": jax.random.normal(keys[3], (3, 8, 8), dtype)},
    }


RULES = [("head", None), ("experts", "2:4-T", "bio"), ("kernel", "2:4-T")]


def test_masks_have_the_pattern_along_the_right_axes():
    p = params()
    masks = nm.compute_masks(p, RULES)
    assert masks["head"]["kernel"] is None
    assert masks["Conv_0"]["bias"] is None
    for position in np.ndindex(3, 3):
        assert check_mask(masks["Conv_0"]["kernel"][position], nm.TransposableNM(2, 4))
    assert check_mask(masks["Dense_0"]["kernel"], nm.TransposableNM(2, 4))
    for expert in range(3):
        assert check_mask(masks["experts"]["w"][expert], nm.TransposableNM(2, 4))
    # Each expert and each kernel position on its own, as for one matrix.
    np.testing.assert_array_equal(masks["experts"]["w"][1], nm.solve(jnp.abs(p["experts"]["w"][1]), "2:4-T"))
    np.testing.assert_array_equal(masks["Conv_0"]["kernel"][2, 1], nm.solve(abs(p["Conv_0"]["kernel"][2, 1]), "2:4-T"))


def test_flattened_heads_and_pytorch_layout():
    query = jax.random.normal(jax.random.key(0), (8, 4, 6))
    params = {"query": {"kernel": query, "bias": jnp.ones((4, 6))}}
    mask = nm.compute_masks(params, "2:4-T")["query"]["kernel"]
    assert check_mask(mask.reshape(8, 24), nm.TransposableNM(2, 4))
    weight = jax.random.normal(jax.random.key(1), (8, 16))
    mask = nm.compute_masks({"fc": {"weight": weight, "bias": jnp.ones(8)}}, "2:4")["fc"]["weight"]
    assert check_mask(mask.T, nm.NM(2, 4))


def test_jit_agrees_with_plain():
    p = params()
    plain = nm.compute_masks(p, RULES)
    jitted = jax.jit(lambda p: nm.compute_masks(p, RULES))(p)
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4-T", "2:4-T-at-most", "2:8-S", "US-0.75"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_and_verify(pattern, dtype):
    p = params(dtype=dtype)
    masks = nm.compute_masks(p, [("head|experts", None), ("kernel", pattern)])
    masked = nm.apply_masks(p, masks)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, p, masked))
    np.testing.assert_array_equal(masked["head"]["kernel"], p["head"]["kernel"])
    for tree in (masked, masks):
        rules = [("kernel", pattern)] if tree is masks else [("head|experts", None), ("kernel", pattern)]
        assert nm.verify(tree, rules).ok
    report = nm.verify(p, [("head|experts", None), ("kernel", pattern)])
    assert not report.ok
    assert "VIOLATE" in str(report)


def test_verify_is_not_fooled():
    """One entry too many, in a group of W or of W^T, is found and located."""
    p = {"kernel": nm.apply_masks(params()["Dense_0"], nm.compute_masks(params()["Dense_0"], "2:4-T"))["kernel"]}
    assert nm.verify(p, "2:4-T").ok
    column = np.asarray(p["kernel"])[:4, 0]
    p["kernel"] = p["kernel"].at[int(np.flatnonzero(column == 0)[0]), 0].set(1e-45)
    report = nm.verify(p, "2:4-T")
    assert not report.ok
    assert (int(report["kernel"].contraction), int(report["kernel"].output)) == (3, 3)
    assert worst_group(p["kernel"], 0, 4) == 3


def test_verify_needs_the_transpose_only_where_it_is_promised():
    kernel = np.zeros((8, 8), np.float32)
    kernel[:2] = kernel[4:6] = 1  # 2:4 along the contraction axis, dense along the output axis
    assert nm.verify({"kernel": jnp.asarray(kernel)}, "2:4").ok
    row = nm.verify({"kernel": jnp.asarray(kernel)}, "2:4-T")["kernel"]
    assert not row.ok
    assert (int(row.contraction), int(row.output)) == (2, 4)
    assert nm.verify({"kernel": jnp.asarray(kernel.T)}, [("kernel", "2:4", "oi")]).ok


@pytest.mark.slow
def test_report_of_retained_magnitude():
    """Shares of the l1 norm, and relative to the best unstructured mask of the same size (Fig. 3b)."""
    p = {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}
    magnitude = np.abs(np.asarray(p["kernel"], np.float64))
    best = np.sort(magnitude, axis=None)[-512:].sum()
    shares = {}
    for pattern in ("US-0.5", "4:8", "2:4", "4:8-T", "2:4-T", "4:8-S"):
        masks, report = nm.compute_masks(p, pattern, return_report=True, solver=None)
        row, kept = report["kernel"], magnitude[np.asarray(masks["kernel"])].sum()
        assert float(row.retained) == pytest.approx(kept / magnitude.sum(), rel=1e-5)
        assert float(row.against_unstructured) == pytest.approx(kept / best, rel=1e-5)
        assert float(row.kept) == 0.5
        shares[pattern] = float(row.against_unstructured)
        masked = nm.apply_masks(p, masks)
        again = nm.verify(masked, pattern, dense=p)["kernel"]
        assert float(again.retained) == pytest.approx(float(row.retained), rel=1e-6)
    assert shares["US-0.5"] == pytest.approx(1)
    assert shares["4:8"] > shares["2:4"] > shares["2:4-T"] > shares["4:8-S"]
    assert shares["4:8-T"] > shares["2:4-T"]


def test_the_report_lists_every_leaf():
    p = params()
    text = str(nm.verify(nm.apply_masks(p, nm.compute_masks(p, RULES)), RULES, dense=p))
    for expected in ("Conv_0/kernel", "3x3x8x16", "bbio", "2:4-T", "50.0%", "2/4", "all have their pattern"):
        assert expected in text
    assert "by the rule 'head'" in text
    assert "Conv_0/bias" in text
    assert max(map(len, text.splitlines())) < 120


def test_verify_under_jit():
    p = params()
    masked = nm.apply_masks(p, nm.compute_masks(p, RULES))
    report = jax.jit(lambda p: nm.verify(p, RULES))(masked)
    assert report.ok
    assert str(report) == str(nm.verify(masked, RULES))


def test_scores_as_function_and_as_tree():
    p = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.ones(8)}
    scores = jax.random.normal(jax.random.key(1), (8, 8))
    expected = nm.solve(scores, "2:4")
    np.testing.assert_array_equal(nm.compute_masks(p, "2:4", scores=lambda w: scores)["kernel"], expected)
    np.testing.assert_array_equal(
        nm.compute_masks(p, "2:4", scores={"kernel": scores, "bias": None})["kernel"], expected
    )
    with pytest.raises(ValueError, match="no leaf for kernel"):
        nm.compute_masks(p, "2:4", scores={"bias": scores})
    with pytest.raises(ValueError, match=r"kernel: scores have shape \(8, 4\)"):
        nm.compute_masks(p, "2:4", scores=lambda w: scores[:, :4])


def test_nan_names_the_leaf_on_the_host_and_is_flagged_under_jit():
    p = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8)).at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="b/kernel: scores are NaN"):
        nm.compute_masks(p, "2:4-T")
    masks, report = jax.jit(lambda p: nm.compute_masks(p, "2:4-T", return_report=True))(p)
    assert not report["a/kernel"].nan
    assert report["b/kernel"].nan
    assert "scores had NaN" in str(report)
    assert check_mask(masks["b"]["kernel"], nm.TransposableNM(2, 4))


def test_a_solver_of_the_users_choice():
    p = {"kernel": jnp.abs(jax.random.normal(jax.random.key(0), (16, 16)))}
    flow = nm.compute_masks(p, "4:8-T", solver=nm.solvers.MinCostFlow())["kernel"]
    greedy = nm.compute_masks(p, "4:8-T", solver=nm.solvers.Greedy())["kernel"]
    assert (p["kernel"] * flow).sum() > (p["kernel"] * greedy).sum()
    with pytest.raises(ValueError, match="does not solve"):
        nm.compute_masks(p, "4:8", solver=nm.solvers.MinCostFlow())


def test_padding():
    p = {"kernel": jax.random.normal(jax.random.key(0), (10, 7))}
    masks, report = nm.compute_masks(p, "2:4-T", partial="pad", return_report=True)
    assert report.ok
    assert worst_group(masks["kernel"], 0, 4) <= 2
    assert worst_group(masks["kernel"], 1, 4) <= 2
    assert nm.verify(masks, "2:4-T", partial="pad").ok
    assert masks["kernel"][8:].any()


def test_trees_that_do_not_fit():
    p = params()
    masks = nm.compute_masks(p, RULES)
    with pytest.raises(ValueError, match="no entry for extra"):
        nm.apply_masks({**p, "extra": jnp.ones(3)}, masks)
    with pytest.raises(ValueError, match="entry for Dense_0/kernel, which is not among the parameters"):
        nm.apply_masks({k: v for k, v in p.items() if k != "Dense_0"}, masks)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: the mask has shape \(16, 24\)"):
        nm.apply_masks({**p, "Dense_0": {"kernel": jnp.ones((4, 4))}}, masks)
    with pytest.raises(ValueError, match="dense has shape"):
        nm.verify(p, RULES, dense={**p, "Dense_0": {"kernel": jnp.ones((4, 4))}})
    with pytest.raises(KeyError, match="nothing"):
        nm.verify(p, RULES)["nothing"]


def test_gradient_of_apply_masks_is_masked():
    p = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    masks = nm.compute_masks(p, "2:4")
    gradient = jax.grad(lambda p: jnp.sum(nm.apply_masks(p, masks)["kernel"] ** 2))(p)["kernel"]
    np.testing.assert_allclose(gradient, 2 * p["kernel"] * masks["kernel"])
