"""Plans: what becomes sparse, why the rest does not, and that a plan goes wherever rules go."""

import dataclasses
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nm_jax as nm
from experiments.networks import ResNet, SentenceEmbedding, SqueezeNet, bert


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
        x = nn.relu(nn.Conv(6, (3, 3), name="narrow")(x))
        return nn.Dense(12, name="head")(x.mean((1, 2)))


MODEL, IMAGES = Net(), jnp.ones((2, 8, 8, 3))
PARAMS = MODEL.init(jax.random.key(0), IMAGES)["params"]


def apply(params, x):
    return MODEL.apply({"params": params}, x)


def planned(pattern="2:4-T", params=PARAMS, **options):
    return nm.plan(apply, params, IMAGES, pattern=pattern, **options)


def sparse(plan):
    return {leaf.path: (str(leaf.pattern), leaf.axes) for leaf in plan.leaves if leaf.pattern}


def test_everything_is_sparse_or_has_a_reason():
    plan = planned()
    assert sparse(plan) == {"pointwise/kernel": ("2:4-T", "bbio")}
    assert {leaf.path: leaf.reason for leaf in plan.leaves if "kernel" in leaf.path and leaf.reason} == {
        "stem/kernel": "the first layer",
        "depthwise/kernel": "depthwise: one input feature per group",
        "narrow/kernel": "output size 6 is not a multiple of 4",
        "head/kernel": "the last layer",
    }
    assert all("elementwise" in leaf.reason for leaf in plan.leaves if "bias" in leaf.path)


def test_the_table_says_it_all():
    lines = str(planned()).splitlines()
    assert lines[0].startswith("1 of 10 parameters become sparse: ")
    assert lines[1].split() == ["path", "shape", "op", "axes", "FLOPs", "pattern", "because"]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert len(rows) == 6  # five kernels, and all biases in one
    assert lines[-1].split()[:4] == ["(5", "parameters)", "elementwise", "dense"]
    assert "depthwise: one input feature per group" in rows["depthwise/kernel"]
    assert rows["pointwise/kernel"].split()[1:4] == ["1x1x8x16", "conv", "bbio"]


@pytest.mark.parametrize(("pattern", "sparse_products"), [("2:4", 1), ("2:4-T", 2), ("4:8-S", 1), ("US-0.5", 0)])
def test_share_of_flops_by_hand(pattern, sparse_products):
    plan = planned(pattern)

    def conv(inputs, outputs, kernel):
        return 2 * 2 * 8 * 8 * inputs * outputs * kernel

    flops = {
        "stem": conv(3, 8, 9),
        "depthwise": conv(1, 8, 9),
        "pointwise": conv(8, 16, 1),
        "narrow": conv(16, 6, 9),
        "head": 2 * 2 * 6 * 12,
    }
    total = sum(flops.values())
    assert plan.flops == total
    assert {leaf.path.split("/")[0]: leaf.flops for leaf in plan.leaves if "kernel" in leaf.path} == flops
    mine = sum(flops[path.split("/")[0]] for path in sparse(plan))
    assert mine > 0
    np.testing.assert_allclose(plan.sparse_flops_share, sparse_products * mine / (3 * total))
    np.testing.assert_allclose(plan.sparse_forward_share, bool(sparse_products) * mine / total)


def test_first_and_last_layers_are_dense_unless_told_otherwise():
    assert set(sparse(planned(first="2:4", last="1:2-T"))) == {"pointwise/kernel", "head/kernel"}
    assert sparse(planned(last="1:2"))["head/kernel"] == ("1:2", "io")
    assert planned(first="2:4")["stem/kernel"].reason == "contraction size 3 is not a multiple of 4"


def test_all_heads_and_all_inputs_are_ends():
    params = {name: jnp.ones((8, 8)) for name in ("image", "time", "body", "policy", "value")}

    def forward(p, x, t):
        h = jnp.tanh(jnp.tanh(x @ p["image"] + jnp.sin(t) @ p["time"]) @ p["body"])
        return h @ p["policy"], h @ p["value"]

    inputs = jnp.ones((2, 8)), jnp.ones((2, 8))
    plan = nm.plan(forward, params, *inputs, pattern="2:4")
    assert set(sparse(plan)) == {"body"}
    assert {leaf.path: leaf.reason for leaf in plan.leaves if leaf.reason} == {
        "image": "the first layer",
        "time": "the first layer",
        "policy": "the last layer",
        "value": "the last layer",
    }
    assert set(sparse(nm.plan(forward, params, *inputs, pattern="2:4", last="1:2"))) == {"body", "policy", "value"}


def test_sums_of_parameters_stay_dense_and_count_once():
    """What is contracted is the sum: masks on its parts leave it dense."""
    params = {"base": jnp.ones((8, 8)), "delta": jnp.ones((8, 8))}

    def forward(p, x):
        return x @ (p["base"] + p["delta"])

    plan = nm.plan(forward, params, jnp.ones((2, 8)), pattern="2:4", first="2:4", last="2:4")
    assert plan["base"].reason == "what is contracted is its sum with delta, which is not zero where it is"
    assert plan.sparse_forward_share == 0
    assert sum(leaf.flops for leaf in plan.leaves) == plan.flops == 2 * 2 * 8 * 8

    def scaled(p, x):
        return x @ (p["base"] * p["delta"])

    plan = nm.plan(scaled, params, jnp.ones((2, 8)), pattern="2:4", first="2:4", last="2:4")
    assert plan.sparse_forward_share == 1
    masked = nm.apply_masks(params, nm.compute_masks(params, plan))
    product = np.asarray(masked["base"] * masked["delta"])
    assert (product != 0).reshape(2, 4, 8).sum(1).max() <= 2


def test_an_embedding_is_the_first_layer_where_there_is_one():
    params = {
        "embedding": jnp.ones((10, 8)),
        "up": jnp.ones((8, 16)),
        "down": jnp.ones((16, 8)),
        "out": jnp.ones((8, 4)),
    }

    def forward(p, tokens):
        return p["embedding"][tokens] @ p["up"] @ p["down"] @ p["out"]

    plan = nm.plan(forward, params, jnp.arange(3), pattern="2:4")
    assert set(sparse(plan)) == {"up", "down"}
    assert plan["embedding"].reason == "looked up, not contracted"


def test_rules_win_over_what_was_traced():
    plan = planned(rules=[("stem", "1:3"), ("pointwise", None), ("depthwise/kernel", "2:4", "bboi"), ("narrow", "2:4")])
    assert sparse(plan) == {
        "stem/kernel": ("1:3", "bbio"),
        "depthwise/kernel": ("2:4", "bboi"),
        "narrow/kernel": ("2:4", "bbio"),
    }
    assert plan["pointwise/kernel"].reason == "by the rule 'pointwise'"
    assert plan["stem/bias"].reason.startswith("elementwise")
    by_default = dict.fromkeys(("pointwise/kernel", "narrow/kernel"), ("4:8", "bbio"))
    assert sparse(planned(rules=[("head", None), "4:8"])) == by_default


def test_sizes_that_m_does_not_divide():
    assert "narrow/kernel" in sparse(planned(partial="pad"))
    with pytest.raises(ValueError, match="narrow/kernel: the output axis has size 6, which 4 does not divide"):
        planned(partial="error")


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="the rule 'tail' matches none of the paths: depthwise/bias"):
        planned(rules=[("tail", None)])
    with pytest.raises(ValueError, match=r"head/kernel: axes 'bio' names 3 dimensions but the shape \(6, 12\) has 2"):
        planned(rules=[("head/kernel", "2:4", "bio")])
    with pytest.raises(ValueError, match="the pattern goes in pattern="):
        planned(rules="2:4")
    with pytest.raises(ValueError, match="partial must be"):
        planned(partial="maybe")
    with pytest.raises(ValueError, match="not a sparsity pattern"):
        planned("two of four")
    with pytest.raises(KeyError, match="'tail' is not in the plan"):
        planned()["tail"]


def test_integer_weights_stay_dense():
    params = {"w": jnp.ones((8, 8), jnp.int8), "v": jnp.ones((8, 8)), "u": jnp.ones((8, 8))}

    def forward(p, x):
        return x @ p["u"] @ p["w"].astype(jnp.float32) @ p["v"]

    plan = nm.plan(forward, params, jnp.ones((2, 8)), pattern="2:4")
    assert plan["w"].reason == "int8: not floating point"


def test_weights_that_are_closed_over_are_remarked():

    def forward(p, x):
        return x @ jnp.ones((8, 8)) @ p["v"]

    plan = nm.plan(forward, {"v": jnp.ones((8, 8))}, jnp.ones((2, 8)), pattern="2:4")
    assert "constant of shape (8, 8): a weight that apply closes over" in str(plan)


def test_a_plan_survives_json():
    plan = planned("2:4-T", partial="pad")
    again = nm.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    for text in ("", "[]", "{}", '{"leaves": [{}], "flops": 1, "partial": "skip", "remarks": []}'):
        with pytest.raises(ValueError, match="not a plan that to_json wrote"):
            nm.Plan.from_json(text)


def test_shapes_are_enough():
    assert planned(params=jax.eval_shape(lambda: PARAMS)) == planned()


# ----------------------------------------------------------------------------------------------- wherever rules go


def test_masks_and_verify_accept_a_plan():
    plan = planned()
    masks = nm.compute_masks(PARAMS, plan)
    assert masks["head"]["kernel"] is None
    masked = nm.apply_masks(PARAMS, masks)
    for tree in (masked, masks):
        report = nm.verify(tree, plan)
        assert report.ok
        assert [row.leaf.path for row in report.rows] == ["pointwise/kernel"]
    assert not nm.verify(PARAMS, plan).ok
    reasons = {leaf.path: leaf.reason for leaf in nm.verify(masked, plan).dense}
    assert reasons["stem/kernel"] == "the first layer"


def test_training_accepts_a_plan():
    plan = planned("2:4")
    tx = nm.sparse_training(optax.sgd(0.1), plan)
    state = tx.init(PARAMS)
    grads = jax.grad(lambda p: jnp.sum(apply(p, IMAGES) ** 2))(PARAMS)
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert nm.verify(params, plan).ok
    assert jnp.all(params["head"]["kernel"] != 0)


def test_a_plan_goes_through_optax_masked():
    inner = dict(PARAMS)
    tx = optax.masked(nm.sparse_training(optax.sgd(0.1), planned("2:4")), {k: k != "stem" for k in inner})
    assert nm.masks(tx.init(inner))["pointwise"]["kernel"].dtype == bool


def test_padding_is_the_plans():
    plan = planned("2:4", last="2:4", partial="pad")
    assert nm.compute_masks(PARAMS, plan)["head"]["kernel"] is not None
    with pytest.raises(ValueError, match=r"partial='pad', but the plan was made with 'skip'; give it to `plan`"):
        nm.compute_masks(PARAMS, planned(), partial="pad")


def test_a_plan_for_another_tree_names_the_first_difference():
    plan = planned()
    without = {k: v for k, v in PARAMS.items() if k != "head"}
    with pytest.raises(ValueError, match="it has head/bias, and this one has not"):
        nm.compute_masks(without, plan)
    with pytest.raises(ValueError, match="it has no tail"):
        nm.compute_masks(PARAMS | {"tail": jnp.ones((4, 4))}, plan)
    other = jax.tree.map(lambda x: x, PARAMS)
    other["pointwise"]["kernel"] = jnp.ones((1, 1, 8, 32))
    with pytest.raises(ValueError, match=r"pointwise/kernel has shape \(1, 1, 8, 16\) there, \(1, 1, 8, 32\) here"):
        nm.sparse_training(optax.sgd(0.1), plan).init(other)


def test_a_plan_without_sparse_parameters_is_an_error_where_it_is_used():
    plan = nm.plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 8))}, jnp.ones((2, 8)), pattern="2:4")
    assert "0 of 1 parameters" in str(plan)
    with pytest.raises(ValueError, match=r"no parameter becomes sparse by this plan:(.|\n)*the first layer"):
        nm.compute_masks({"w": jnp.ones((8, 8))}, plan)


def test_nnx_models_are_planned_and_trained():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return x

    model = Mlp(nnx.Rngs(0))
    graph, params = nnx.split(model)
    plan = nm.plan(lambda p, x: nnx.merge(graph, p)(x), params, jnp.ones((2, 8)), pattern="2:4")
    assert set(sparse(plan)) == {"layers/1/kernel"}
    optimizer = nnx.Optimizer(model, nm.sparse_training(optax.sgd(0.1), plan), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 8)))))(model))
    assert nm.verify(nnx.state(model, nnx.Param), plan).ok


# ----------------------------------------------------------------------------------------------------- real networks


def minilm():
    whole = "NM_JAX_DATA" in os.environ
    model = SentenceEmbedding(bert.MINILM if whole else dataclasses.replace(bert.MINILM, layers=2))
    inputs = jax.ShapeDtypeStruct((4, 16), jnp.int32), jax.ShapeDtypeStruct((4, 16), bool)
    params = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *inputs)["params"]
    return lambda params, *x: model.apply({"params": params}, *x), params, inputs


def images(model, side):
    inputs = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), inputs)
    rest = {name: jax.tree.map(jnp.ones_like, value) for name, value in variables.items() if name != "params"}
    return lambda params, x: model.apply({"params": params, **rest}, x), variables["params"], (inputs,)


@pytest.mark.parametrize("name", ["minilm", "resnet", "squeezenet"])
def test_real_networks_are_planned_without_a_rule(name):
    """Every kernel is sparse, but for the first and the last; those of Flax lie like this."""
    build = {"minilm": minilm, "resnet": lambda: images(ResNet(), 32), "squeezenet": lambda: images(SqueezeNet(), 64)}
    forward, params, inputs = build[name]()
    plan = nm.plan(forward, params, *inputs, pattern="2:4-T", last="2:4-T" if name == "minilm" else None)
    kernels = [leaf for leaf in plan.leaves if leaf.path.endswith("kernel")]
    dense = {leaf.path: leaf.reason for leaf in kernels if not leaf.pattern}
    assert set(dense.values()) == (set() if name == "minilm" else {"the first layer", "the last layer"})
    assert all(leaf.axes == {2: "io", 4: "bbio"}[len(leaf.shape)] for leaf in kernels)
    assert plan.sparse_forward_share > 0.7
