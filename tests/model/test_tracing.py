"""How models use their parameters, against tables written by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import nm_jax as nm
from tests.model.models import (
    EXPERTS,
    IMAGES,
    NnxBlocks,
    NnxNet,
    Normed,
    Scanned,
    X,
    all_experts,
    conv,
    flax_nnx,
    guarded,
    linen,
    linen_conv,
    moe,
    over_layers,
    rnn,
    shape,
    weight,
)

# ------------------------------------------------------------------------------------------------------------- table
# Each case returns (apply, params, inputs). Then, by path: what is contracted, and how it is grouped; `None` where a
# parameter cannot be N:M sparse, with a word of the reason.
dot = jnp.dot
TOKENS = shape(6, dtype=jnp.int32)
KINDS = {
    # Linen
    "dense": (lambda: linen(nn.Dense(12), X), {"kernel": ("io", "io"), "bias": "elementwise"}),
    "dense, bfloat16": (lambda: linen(nn.Dense(12, dtype=jnp.bfloat16), X), {"kernel": ("io", "io")}),
    "dense on sequences": (lambda: linen(nn.Dense(12), shape(2, 6, 8)), {"kernel": ("io", "io")}),
    "dense of one feature": (lambda: linen(nn.Dense(12), shape(6, 1)), {"kernel": ("io", "io")}),
    "conv": (linen_conv(), {"kernel": ("iiio", "bbio"), "bias": "elementwise"}),
    "conv, strided": (linen_conv(strides=2), {"kernel": ("iiio", "bbio")}),
    "conv, dilated": (linen_conv(kernel_dilation=2), {"kernel": ("iiio", "bbio")}),
    "conv, grouped": (linen_conv(feature_group_count=2), {"kernel": ("iiio", "bbio")}),
    "conv, depthwise": (linen_conv(4, feature_group_count=4), {"kernel": "depthwise"}),
    "conv, depthwise with a multiplier": (linen_conv(8, feature_group_count=4), {"kernel": "depthwise"}),
    "conv, 1 x 1": (linen_conv(kernel=(1, 1)), {"kernel": ("iiio", "bbio")}),
    "conv, one output": (linen_conv(1), {"kernel": ("iiio", "bbio")}),
    "conv, one-dimensional": (lambda: linen(nn.Conv(8, (3,)), shape(2, 9, 4)), {"kernel": ("iio", "bio")}),
    "conv, transposed": (linen_conv(cls=nn.ConvTranspose, strides=(2, 2)), {"kernel": ("iiio", "bbio")}),
    "conv, transposed kernel": (
        linen_conv(cls=nn.ConvTranspose, strides=(2, 2), transpose_kernel=True),
        {"kernel": ("iioi", "bboi")},
    ),
    "attention": (
        lambda: linen(nn.MultiHeadDotProductAttention(4), shape(2, 6, 16)),
        {f"{name}/kernel": ("ioo", "ioo") for name in ("query", "key", "value")} | {"out/kernel": ("iio", "iio")},
    ),
    "scan over rematerialised layers, tied embedding": (
        lambda: linen(Scanned(), shape(4, 10, dtype=jnp.int32)),
        {
            "Embed_0/embedding": "ambiguous: contracted as oi and looked up",
            "blocks/Dense_0/kernel": ("bio", "bio"),
            "blocks/Dense_1/kernel": ("bio", "bio"),
            "blocks/MultiHeadDotProductAttention_0/query/kernel": ("bioo", "bioo"),
            "blocks/MultiHeadDotProductAttention_0/out/kernel": ("biio", "biio"),
        },
    ),
    "batch norm and weight norm": (
        lambda: linen(Normed(), IMAGES),
        {"Conv_0/kernel": ("iiio", "bbio"), "Dense_0/kernel": ("io", "io"), "BatchNorm_0/scale": "elementwise"},
    ),
    "lstm": (
        lambda: linen(nn.RNN(nn.OptimizedLSTMCell(8)), shape(2, 5, 4)),
        {"cell/hi/kernel": ("io", "io"), "cell/ig/kernel": ("io", "io")},
    ),
    # NNX
    "nnx network with LoRA": (
        lambda: flax_nnx(NnxNet(nnx.Rngs(0)), shape(8, 16)),
        {"inner/kernel": ("io", "io"), "outer/kernel": ("io", "io"), "lora/lora_a": ("io", "io")},
    ),
    "nnx attention": (
        lambda: flax_nnx(nnx.MultiHeadAttention(4, 16, 16, decode=False, rngs=nnx.Rngs(0)), shape(2, 6, 16)),
        {"query/kernel": ("ioo", "ioo"), "out/kernel": ("iio", "iio")},
    ),
    "nnx scan over layers": (lambda: flax_nnx(NnxBlocks(nnx.Rngs(0)), X), {"blocks/kernel": ("bio", "bio")}),
    "nnx conv": (lambda: flax_nnx(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), IMAGES), {"kernel": ("iiio", "bbio")}),
    # Layouts
    "PyTorch linear": (lambda: weight(lambda p, x: x @ p["w"].T, (12, 8), X), {"w": ("oi", "oi")}),
    "PyTorch conv": (
        lambda: weight(lambda p, x: conv(x, p["w"], dimension_numbers=("NHWC", "OIHW", "NHWC")), (6, 4, 3, 3), IMAGES),
        {"w": ("oiii", "oibb")},
    ),
    "heads, then reshaped": (
        lambda: weight(lambda p, x: x @ p["w"].reshape(12, 8).T, (3, 4, 8), X),
        {"w": ("ooi", "ooi")},
    ),
    "input stored split": (
        lambda: weight(lambda p, x: x @ p["w"].reshape(8, 12), (2, 4, 12), X),
        {"w": ("iio", "iio")},
    ),
    "contracted in another order": (
        lambda: weight(lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(8, 12), (4, 2, 12), X),
        {"w": ("iio", "iio")},
    ),
    "stored flat": (
        lambda: weight(lambda p, x: x @ p["w"].reshape(8, 12), (96,), X),
        {"w": "dimension 0 is contracted in part"},
    ),
    "query, key, value in one": (
        lambda: weight(lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)], (8, 12), X),
        {"w": ("io", "io")},
    ),
    "kernels concatenated": (
        lambda: weight(lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1), (8, 12), X, v=(8, 4)),
        {"w": ("io", "io"), "v": ("io", "io")},
    ),
    # Changed before they are used
    "masked": (lambda: weight(lambda p, x: x @ (p["w"] * (jnp.abs(p["w"]) > 0.1)), (8, 12), X), {"w": ("io", "io")}),
    "straight-through": (
        lambda: weight(lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])), (8, 12), X),
        {"w": ("io", "io")},
    ),
    "int8, dequantised": (
        lambda: (
            lambda p, x: x @ (p["w"].astype(jnp.float32) * p["s"][None]),
            {"w": shape(8, 12, dtype=jnp.int8), "s": shape(12)},
            (X,),
        ),
        {"w": ("io", "io"), "s": "changes other weights"},
    ),
    "weight norm by hand": (
        lambda: weight(
            lambda p, x: x @ (p["g"][None] * p["w"] / jnp.linalg.norm(p["w"], axis=0)[None]), (8, 12), X, g=(12,)
        ),
        {"w": ("io", "io"), "g": "changes other weights"},
    ),
    "LoRA, merged": (
        lambda: weight(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), (8, 12), X, a=(8, 2), b=(2, 12)),
        {"w": "its sum with a, b", "a": "other parameters only", "b": "other parameters only"},
    ),
    # Not zero where the parameter is
    "weight-standardised conv": (
        lambda: weight(lambda p, x: conv(x, (p["w"] - p["w"].mean()) / p["w"].std()), (3, 3, 4, 6), IMAGES),
        {"w": "its sum with something else"},
    ),
    "base and its change": (
        lambda: weight(lambda p, x: x @ (p["w"] + p["d"]), (8, 12), X, d=(8, 12)),
        {"w": "its sum with d, which is not zero where it is", "d": "its sum with w"},
    ),
    "mean and noise": (
        lambda: weight(lambda p, x: x @ (p["w"] + p["s"] * jnp.cos(jnp.arange(12.0))[None]), (8, 12), X, s=(8, 12)),
        {"w": "its sum with s", "s": "its sum with w"},
    ),
    "a zero point": (
        lambda: weight(lambda p, x: x @ ((p["w"] - p["z"][None]) * 2), (8, 12), X, z=(12,)),
        {"w": "its sum with z"},
    ),
    "exponentials": (lambda: weight(lambda p, x: x @ jnp.exp(p["w"]), (8, 12), X), {"w": "exp of it"}),
    "sums beside others": (
        lambda: weight(lambda p, x: x @ jnp.concatenate([p["w"] + p["d"], p["v"]], 1), (8, 4), X, d=(8, 4), v=(8, 8)),
        {"w": "its sum with d,", "d": "its sum with w", "v": ("io", "io")},
    ),
    # Zero where the parameter is
    "a product of two": (
        lambda: weight(lambda p, x: x @ (p["w"] * p["v"]), (8, 12), X, v=(8, 12)),
        {"w": ("io", "io"), "v": ("io", "io")},
    ),
    "quantised in training": (
        lambda: weight(lambda p, x: x @ (jnp.clip(jnp.round(p["w"] / 0.1), -8, 7) * 0.1), (8, 12), X),
        {"w": ("io", "io")},
    ),
    "clipped, dropped and squashed": (
        lambda: weight(
            lambda p, x: x @ jnp.where(x[:1, 0] > 0, jnp.tanh(jnp.maximum(p["w"], -1) ** 3), 0.0), (8, 12), X
        ),
        {"w": "elementwise"},
    ),
    "clipped and squashed": (
        lambda: weight(
            lambda p, x: x @ jnp.where(p["w"] > -2, jnp.tanh(jnp.minimum(jnp.maximum(p["w"], -1), 1) ** 3), 0.0),
            *((8, 12), X),
        ),
        {"w": ("io", "io")},
    ),
    "clipped off zero": (lambda: weight(lambda p, x: x @ jnp.maximum(p["w"], 0.1), (8, 12), X), {"w": "max of it"}),
    # Chosen at run time
    "experts that are gathered": (
        lambda: weight(
            lambda p, x, k: jnp.einsum("td,tdf->tf", x, p["w"][k]), (4, 8, 12), X, shape(6, dtype=jnp.int32)
        ),
        {"w": ("bio", "bio")},
    ),
    "experts that are gathered, by vmap": (
        lambda: weight(
            lambda p, x, k: jax.vmap(lambda x, k: x @ (p["w"][k].T * 2))(x, k), (4, 12, 8), X, shape(6, dtype=jnp.int32)
        ),
        {"w": ("boi", "boi")},
    ),
    "experts that are taken": (
        lambda: weight(
            lambda p, x, k: jnp.einsum("td,tkdf->tkf", x, jnp.take(p["w"], k, axis=0)),
            *((4, 8, 12), X, shape(6, 2, dtype=jnp.int32)),
        ),
        {"w": ("bio", "bio")},
    ),
    "embeddings that are compared": (
        lambda: weight(lambda p, k: p["w"][k] @ p["v"][k].T, (9, 8), shape(6, dtype=jnp.int32), v=(9, 8)),
        {"w": "looked up", "v": "looked up"},
    ),
    "embeddings, projected": (
        lambda: weight(lambda p, k: jnp.tanh(p["w"][k] * 2) @ p["v"], (9, 8), shape(6, dtype=jnp.int32), v=(8, 12)),
        {"w": "looked up", "v": ("io", "io")},
    ),
    # Control flow and transformations
    "custom derivative": (lambda: weight(lambda p, x: guarded(x, p["w"]), (8, 12), X), {"w": ("io", "io")}),
    "jit and remat": (
        lambda: weight(jax.jit(lambda p, x: jax.checkpoint(dot)(x, p["w"])), (8, 12), X),
        {"w": ("io", "io")},
    ),
    "cond": (
        lambda: weight(lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ (2 * p["w"])), (8, 12), X),
        {"w": ("io", "io")},
    ),
    "shared in an RNN": (lambda: weight(rnn, (16, 8), shape(5, 6, 8)), {"w": ("io", "io")}),
    "scan over layers": (lambda: weight(over_layers(dot), (3, 8, 8), X), {"w": ("bio", "bio")}),
    "carried by a scan": (
        lambda: weight(
            lambda p, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, p["w"]), None, length=2)[0][0],
            (8, 8),
            X,
        ),
        {"w": ("io", "io")},
    ),
    "changed by a scan": (
        lambda: weight(
            lambda p, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1] / 2), None), (x, p["w"]), None, length=2)[0][0],
            (8, 8),
            X,
        ),
        {"w": "changes inside a loop"},
    ),
    "layers by index": (
        lambda: weight(lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][-1], (3, 8, 8), X),
        {"w": ("bio", "bio")},
    ),
    "layers by the counter of a loop": (
        lambda: weight(lambda p, x: lax.fori_loop(0, 3, lambda k, h: h @ p["w"][k], x), (3, 8, 8), X),
        {"w": ("bio", "bio")},
    ),
    "loop of unknown length": (
        lambda: weight(
            lambda p, x, n: lax.fori_loop(0, n, lambda k, h: h @ p["w"], x), (8, 8), X, shape(dtype=jnp.int32)
        ),
        {"w": ("io", "io")},
    ),
    "ensemble on one input": (
        lambda: weight(lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), (3, 8, 8), X),
        {"w": ("oio", "oio")},
    ),
    "ensemble on its own inputs": (
        lambda: weight(lambda p, x: jax.vmap(dot)(x, p["w"]), (3, 8, 8), shape(3, 6, 8)),
        {"w": ("bio", "bio")},
    ),
    "vmap of images": (
        lambda: weight(lambda p, x: jax.vmap(lambda image: conv(image[None], p["w"]))(x), (3, 3, 4, 6), IMAGES),
        {"w": ("iiio", "bbio")},
    ),
    "vmap of images and kernels": (
        lambda: weight(lambda p, x: jax.vmap(conv)(x, p["w"]), (2, 3, 3, 4, 6), shape(2, 2, 5, 5, 4)),
        {"w": ("biiio", "bbbio")},
    ),
    "experts with dispatch": (
        lambda: (moe, EXPERTS, (shape(12, 8),)),
        {"router": ("io", "io"), "up": ("bio", "bio"), "down": ("bio", "bio")},
    ),
    "experts that share inputs": (
        lambda: (all_experts, EXPERTS, (shape(12, 8),)),
        {"router": ("io", "io"), "up": ("oio", "oio"), "down": ("bio", "bio")},
    ),
    "ragged experts": (
        lambda: weight(lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([3, 3])), (2, 8, 12), X),
        {"w": ("bio", "bio")},
    ),
    "shard_map": (
        lambda: weight(
            lambda p, x: jax.shard_map(
                dot,
                mesh=Mesh(np.array(jax.devices()[:1]), ("d",)),
                in_specs=(PartitionSpec("d"), PartitionSpec()),
                out_specs=PartitionSpec("d"),
            )(x, p["w"]),
            (8, 12),
            X,
        ),
        {"w": ("io", "io")},
    ),
    # What cannot be derived, and is said so
    "looked up": (lambda: weight(lambda p, t: p["w"][t], (8, 12), shape(5, dtype=jnp.int32)), {"w": "looked up"}),
    "scaled by data": (
        lambda: weight(lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][None] * x.mean(1)[:, None, None]), (8, 12), X),
        {"w": "elementwise"},
    ),
    "transformed": (
        lambda: weight(lambda p, x: x @ jnp.fft.irfft(jnp.fft.rfft(p["w"], axis=0), n=8, axis=0), (8, 12), X),
        {"w": "cannot be followed through fft"},
    ),
    "permuted": (
        lambda: weight(lambda p, x: x @ p["w"][jnp.array([3, 2, 1, 0, 7, 6, 5, 4])], (8, 12), X),
        {"w": "cannot be followed through gather"},
    ),
    "low rank, multiplied out": (
        lambda: weight(lambda p, x: x @ (p["w"] @ p["v"]), (8, 2), X, v=(2, 12)),
        {"w": "cannot be followed through dot_general", "v": "cannot be followed"},
    ),
    "both orientations": (
        lambda: weight(lambda p, x: x @ p["w"] @ p["w"].T, (8, 12), X),
        {"w": "contracted as io and contracted as oi"},
    ),
    "closed over": (lambda: weight(lambda p, x: x @ jnp.ones((8, 12)), (8, 12), X), {"w": "does not read it"}),
    "empty": (lambda: weight(lambda p, x: x[:, :0] @ p["w"], (0, 12), X), {"w": "does not read it"}),
}


def test_the_table_has_every_kind_that_is_promised():
    assert len([1 for _, rows in KINDS.values() if any(isinstance(row, tuple) for row in rows.values())]) >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_axes_of_every_kind(kind):
    build, expected = KINDS[kind]
    apply, params, inputs = build()
    traced = nm.trace(apply, params, *inputs)
    assert len(traced.leaves) == len(jax.tree.leaves(params))
    for path, row in expected.items():
        leaf = traced[path]
        if isinstance(row, tuple):
            assert (leaf.contraction, leaf.axes) == row
            assert leaf.reason == ""
            assert leaf.flops > 0
        else:
            assert row in leaf.reason


# Weights that are contracted must give the same under any transformation of the model.
WRAPPED = {
    "jit": lambda apply: jax.jit(apply),
    "remat": lambda apply: jax.checkpoint(apply),
    "vmap": lambda apply: lambda p, *x: jax.vmap(lambda *one: apply(p, *one))(*jax.tree.map(lambda y: y[None], x)),
    "bfloat16": lambda apply: lambda p, *x: apply(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), *x),
    "straight-through": lambda apply: lambda p, *x: apply(nm_masked(p), *x),
}


def nm_masked(params):
    return jax.tree.map(lambda w: nm.ste(w, w > 0), params)


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("kind", ["dense", "conv, grouped", "attention", "experts with dispatch", "scan over layers"])
def test_axes_do_not_depend_on_transformations(kind, wrapper):
    apply, params, inputs = KINDS[kind][0]()
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), inputs)
    plain, wrapped = nm.trace(apply, params, *zeros), nm.trace(WRAPPED[wrapper](apply), params, *zeros)
    assert [(leaf.contraction, leaf.axes) for leaf in wrapped.leaves] == [
        (leaf.contraction, leaf.axes) for leaf in plain.leaves
    ]


# -------------------------------------------------------------------------------------------------- flops and counts


def test_flops_are_counted_by_hand():
    def apply(params, x):
        x = lax.scan(lambda h, w: (h @ w, None), x, params["layers"])[0]
        scores = x @ x.T  # without parameters
        return scores @ conv(x.reshape(1, 6, 8, 1), params["conv"]).reshape(6, 16)

    params = {"layers": shape(3, 8, 8), "conv": shape(3, 3, 1, 2)}
    traced = nm.trace(apply, params, X)
    layers, kernel = 3 * 2 * 6 * 8 * 8, 2 * (6 * 8 * 2) * 9
    assert traced["layers"].flops == layers
    assert traced["layers"].count == 3
    assert traced["conv"].flops == kernel
    assert traced.flops == layers + kernel + 2 * 6 * 6 * 8 + 2 * 6 * 6 * 16


def test_groups_and_operation_are_reported():
    apply, params, inputs = KINDS["conv, grouped"][0]()
    leaf = nm.trace(apply, params, *inputs)["kernel"]
    assert (leaf.op, leaf.groups) == ("conv", 2)
    assert nm.trace(*weight(lambda p, x: x @ p["w"], (8, 12), X)[:2], X)["w"].op == "dot"


def test_uses_come_in_the_order_of_the_program():
    apply, params, inputs = weight(lambda p, x: x @ p["b"] @ p["w"] @ p["a"], (8, 8), X, a=(8, 8), b=(8, 8))
    traced = nm.trace(apply, params, *inputs)
    orders = {leaf.path: leaf.contractions[0].order for leaf in traced.leaves}
    assert sorted(orders, key=orders.get) == ["b", "w", "a"]


def test_part_of_a_concatenation_gets_its_part_of_the_flops():
    traced = nm.trace(*KINDS["kernels concatenated"][0]()[:2], X)
    assert (traced["w"].flops, traced["v"].flops) == (2 * 6 * 8 * 12, 2 * 6 * 8 * 4)


def test_weights_that_are_closed_over_are_named():
    traced = nm.trace(*KINDS["closed over"][0]()[:2], X)
    assert traced.constants == ((8, 12),)
    assert "constant of shape (8, 12)" in str(traced)


def test_the_table_prints_one_row_per_parameter():
    apply, params, inputs = KINDS["conv, grouped"][0]()
    lines = str(nm.trace(apply, params, *inputs)).splitlines()
    assert lines[0].split() == ["path", "shape", "op", "contracts", "axes", "uses", "MFLOP", "remark"]
    assert lines[2].split()[:5] == ["kernel", "3x3x2x8", "conv/2", "iiio", "bbio"]
    assert len(lines) == 3


def test_leaves_that_are_not_arrays_are_passed_on():
    params = {"activation": jax.nn.relu, "w": shape(8, 12), "none": None}
    traced = nm.trace(lambda p, x: p["activation"](x @ p["w"]), params, X)
    assert traced["w"].axes == "io"
    with pytest.raises(KeyError, match="'v' is not among"):
        traced["v"]


def test_two_leaves_of_one_product_do_not_mix():
    """What is looked up, masked or scaled elsewhere does not touch the other."""
    apply, params, inputs = weight(lambda p, x: (x @ p["w"]) * p["v"], (8, 12), X, v=(6, 12))
    traced = nm.trace(apply, params, *inputs)
    assert (traced["w"].axes, traced["v"].reason) == ("io", "elementwise, not contracted")
