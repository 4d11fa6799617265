"""`verify` with a judge: masks along wrong axes have their pattern, and only the model knows that they are wrong."""

import jax
import jax.numpy as jnp
import pytest

import nm_jax as nm
from nm_jax._core.rules import resolve

PARAMS = {
    "layers": {"kernel": jax.random.normal(jax.random.key(0), (16, 3, 8))},  # stacked at the second axis
    "table": jax.random.normal(jax.random.key(1), (12, 16)),
    "head": {"kernel": jax.random.normal(jax.random.key(2), (8, 8))},
}


def apply(params, tokens):
    x = params["table"][tokens]
    for k in range(3):
        x = jnp.pad(jnp.tanh(x @ params["layers"]["kernel"][:, k]), ((0, 0), (0, 8)))
    return x[:, :8] @ params["head"]["kernel"]


TRACE = nm.trace(apply, PARAMS, jnp.arange(5))
PLAN = nm.plan(apply, PARAMS, jnp.arange(5), pattern="2:4", last="2:4")


@pytest.mark.parametrize("judge", [TRACE, PLAN], ids=["trace", "plan"])
def test_wrong_axes_are_seen_by_a_judge_alone(judge):
    rules = [("layers", "2:4", "obi"), ("head", "2:4")]
    masked = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, rules))
    assert nm.verify(masked, rules).ok
    report = nm.verify(masked, rules, judge=judge)
    assert not report.ok
    assert not report["layers/kernel"].ok
    assert report["layers/kernel"].judged == "WRONG AXES: ibo by the judge"
    assert report["head/kernel"].ok
    assert "WRONG AXES" in str(report)
    right = [("layers", "2:4", "ibo"), ("head", "2:4")]
    masked = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, right))
    assert nm.verify(masked, right, judge=judge).ok
    assert jax.jit(lambda p: nm.verify(p, right, judge=judge))(masked).ok


def test_what_the_model_does_not_contract_is_not_ok():
    rules = [("table", "2:4"), ("head", "2:4")]
    masked = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, rules))
    report = nm.verify(masked, rules, judge=PLAN)
    assert report["table"].judged == "by the judge looked up, not contracted"
    assert not report.ok


def test_axes_that_group_alike_are_the_same_to_a_judge():
    rules = [("head", "2:4-T", "oi")]
    masked = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, rules))
    assert nm.verify(masked, rules, judge=TRACE).ok
    assert not nm.verify(masked, [("head", "2:4", "oi")], judge=TRACE).ok


def test_a_judge_of_another_model_is_an_error():
    with pytest.raises(ValueError, match="the judge knows no other/kernel"):
        nm.verify({"other": {"kernel": jnp.zeros((8, 8))}}, "2:4", judge=TRACE)


def test_the_report_says_on_what_axes_rest():
    masked = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, PLAN))
    report = nm.verify(masked, PLAN)
    assert report["head/kernel"].leaf.source == "the plan: dot"
    assert "the plan: dot" in str(report)
    again = nm.verify(masked, [("layers", "2:4", "ibo"), ("head", "2:4")])  # not what was compiled for the plan
    assert again["head/kernel"].leaf.source.startswith("the name 'kernel' of Flax")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4, jnp.int32])
def test_quantised_weights(dtype):
    sparse = nm.apply_masks(PARAMS, nm.compute_masks(PARAMS, PLAN))
    scaled = jax.tree.map(lambda w: jnp.where(w == 0, 0, jnp.sign(w) * 7).astype(dtype), sparse)
    assert nm.verify(scaled, PLAN).ok
    assert nm.verify(scaled, [("head", "2:4")]).ok
    assert not nm.verify(jax.tree.map(jnp.ones_like, scaled), [("head", "2:4")]).ok
    with pytest.raises(ValueError, match="needs floating point weights"):
        resolve(scaled, [("head", "2:4")])  # as computing masks does
