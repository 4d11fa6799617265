"""Gram matrices against activations that were captured by hand, in float64."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nm_jax as nm
from nm_jax._model.gram._moments import product_moments
from nm_jax._model.gram._patches import window_moments
from nm_jax._model.tracing.windows import Windows

TOLERANCE = 1e-5


def normal(seed, *sizes):
    return jax.random.normal(jax.random.key(seed), sizes)


def check(record, x, contraction=None, mask=None):
    """x: (rows, K) or (batch, rows, K), as captured by hand."""
    x = np.asarray(x, np.float64)
    x = x[None] if x.ndim == 2 else x
    if mask is not None:
        x = x[:, np.asarray(mask).reshape(-1)]
    expected = np.einsum("brk,brl->bkl", x, x)
    assert record.h.dtype == jnp.float32
    assert record.h.shape == expected.shape
    np.testing.assert_allclose(record.h, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    np.testing.assert_allclose(record.total, x.sum(1), rtol=0, atol=TOLERANCE * np.abs(x).sum(1).max())
    np.testing.assert_array_equal(record.rows, np.full(len(x), x.shape[1]))
    if contraction is not None:
        assert record.contraction == contraction


def patches(x, kernel, strides=None, padding="SAME", spread=None, dilation=None):
    """(images, *outputs, *kernel, features), by indexing one output position after another."""
    x = np.asarray(x, np.float64)
    dims = len(kernel)
    strides, spread, dilation = (value or (1,) * dims for value in (strides, spread, dilation))
    if padding == "SAME":
        pairs = zip(x.shape[1:-1], kernel, strides, dilation, strict=True)
        whole = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in pairs]
        padding = [(total // 2, total - total // 2) for total in whole]
    for axis, (step, (low, high)) in enumerate(zip(spread, padding, strict=True), start=1):
        wide = np.zeros((*x.shape[:axis], (x.shape[axis] - 1) * step + 1, *x.shape[axis + 1 :]))
        wide[(slice(None),) * axis + (slice(None, None, step),)] = x
        x = np.pad(wide, [(low, high) if k == axis else (0, 0) for k in range(x.ndim)])
    sizes = [
        (n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(x.shape[1:-1], kernel, strides, dilation, strict=True)
    ]
    out = np.zeros((x.shape[0], *sizes, *kernel, x.shape[-1]))
    for where in np.ndindex(*sizes):
        window = tuple(
            slice(t * s, t * s + (k - 1) * d + 1, d)
            for t, s, k, d in zip(where, strides, kernel, dilation, strict=True)
        )
        out[(slice(None), *where)] = x[(slice(None), *window)]
    return out


# ------------------------------------------------------------------------------------------------ moments of windows

WINDOWS = {
    "3 x 3": ((2, 6, 5, 4), Windows((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1)),
    "strided": ((2, 6, 7, 4), Windows((3, 3), (2, 2), ((1, 1), (0, 1)), (1, 1), (1, 1), 1)),
    "strided across only": ((2, 6, 7, 4), Windows((3, 2), (1, 2), ((1, 1), (0, 1)), (1, 1), (1, 1), 1)),
    "dilated": ((2, 7, 8, 4), Windows((3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1), (2, 2), 1)),
    "transposed": ((2, 3, 4, 4), Windows((3, 3), (1, 1), ((2, 1), (2, 1)), (2, 2), (1, 1), 1)),
    "grouped": ((2, 5, 5, 6), Windows((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 2)),
    "depthwise, strided": ((2, 5, 5, 3), Windows((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 3)),
    "1 x 1": ((2, 5, 5, 4), Windows((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1)),
    "no padding": ((2, 5, 5, 4), Windows((2, 4), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1)),
    "kernel as large as the image": ((2, 3, 3, 4), Windows((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1)),
    "line": ((2, 9, 4), Windows((3,), (2,), ((1, 1),), (1,), (1,), 1)),
    "volume": ((2, 3, 4, 4, 2), Windows((2, 2, 2), (1, 1, 1), ((0, 1),) * 3, (1, 1, 1), (1, 1, 1), 1)),
}


@pytest.mark.parametrize(
    ("case", "masked"),
    [
        *((case, "all") for case in WINDOWS),
        *((case, masked) for case in ("3 x 3", "line") for masked in ("images", "positions")),
        ("strided", "positions"),
    ],
)
def test_windows(case, masked):
    sizes, windows = WINDOWS[case]
    x = normal(0, *sizes)
    by_hand = patches(x, windows.kernel, windows.strides, windows.padding, windows.spread, windows.dilation)
    outputs = by_hand.shape[1 : 1 + len(windows.kernel)]
    rows = {"all": None, "images": (sizes[0],), "positions": (sizes[0], *outputs)}[masked]
    keep = None if rows is None else jax.random.bernoulli(jax.random.key(1), 0.6, rows).at[0].set(True)
    by_hand = by_hand.reshape(sizes[0], -1, math.prod(windows.kernel), windows.groups, sizes[-1] // windows.groups)
    by_hand = np.moveaxis(by_hand, 3, 0).reshape(windows.groups, sizes[0] * math.prod(outputs), -1)
    wide = None
    if keep is not None:
        wide = np.broadcast_to(
            np.asarray(keep).reshape(*keep.shape, *(1,) * (1 + len(outputs) - keep.ndim)), (sizes[0], *outputs)
        )
    found = jax.jit(window_moments, static_argnums=1)(x, windows, keep)
    check(nm.Gram(*found), by_hand, mask=wide)


def test_products_with_any_layout_and_a_mask_over_nan():
    x = normal(0, 3, 4, 5, 2)
    keep = jnp.array([[True, False, True, True, False], [False, True, True, True, True]]).T
    dirty = jnp.where(keep[None, None], x, jnp.nan)
    found = product_moments(dirty.transpose(2, 0, 1, 3), contracted=(2,), batch=(1,), keep=keep)
    by_hand = np.asarray(x).transpose(0, 2, 3, 1).reshape(3, 10, 4)
    check(nm.Gram(*found), by_hand, mask=keep)


# ------------------------------------------------------------------------------------------------------------ models

conv = functools.partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)
x, w, w3 = normal(1, 6, 8), normal(2, 8, 12), normal(3, 3, 8, 8)
images, kernel = normal(4, 2, 5, 5, 4), normal(5, 3, 3, 4, 6)
unfolded = patches(images, (3, 3))
hidden = [x, x @ w3[0], x @ w3[0] @ w3[1]]
backward = [x @ w3[2] @ w3[1], x @ w3[2], x]


def loop(reverse=False, wrap=lambda f: f):
    return lambda p, x: lax.scan(wrap(lambda h, k: (h @ k, None)), x, p["w"], reverse=reverse)[0]


def nested(p, x):
    """Two loops, one in the other, over a stack of stacks; and a weight that they share."""

    def outer(h, stack):
        return lax.scan(lambda h, k: (h @ k @ p["v"], None), h, stack)[0], None

    return lax.scan(outer, x, p["w"])[0]


def nested_by_hand():
    rows, shared, h = [], [], np.asarray(x, np.float64)
    for k in np.asarray(nested_w, np.float64).reshape(4, 8, 8):
        rows.append(h)
        shared.append(h @ k)
        h = shared[-1] @ np.asarray(nested_v, np.float64)
    return np.stack(rows), np.concatenate(shared)


nested_w, nested_v = normal(6, 2, 2, 8, 8) / 4, normal(7, 8, 8) / 4

# name: (apply, params, inputs, path -> (activation by hand, contraction))
CASES = {
    "product": (lambda p, x: x @ p["w"], {"w": w}, {"w": (x, "io")}),
    "PyTorch layout": (lambda p, x: x @ p["w"].T, {"w": w.T}, {"w": (x, "oi")}),
    "bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        {"w": w},
        {"w": (x.astype(jnp.bfloat16), "io")},
    ),
    "heads, reshaped": (lambda p, x: x @ p["w"].reshape(12, 8).T, {"w": w.T.reshape(3, 4, 8)}, {"w": (x, "ooi")}),
    "another order": (
        lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(8, 12),
        {"w": w.reshape(4, 2, 12)},
        {"w": (np.asarray(x).reshape(6, 2, 4).transpose(0, 2, 1).reshape(6, 8), "iio")},
    ),
    "split kernel": (
        lambda p, x: [x @ k for k in jnp.split(p["w"], 3, axis=1)],
        {"w": w},
        # One input, of which three parts of one weight make three outputs: it counts once.
        {"w": (x, "io")},
    ),
    "concatenated kernels": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1),
        {"w": w, "v": w[:, :4]},
        {"w": (x, "io"), "v": (x, "io")},
    ),
    "layers by index": (lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2], {"w": w3}, {"w": (hidden, "bio")}),
    "used twice": (lambda p, x: x @ p["w"] @ p["w"], {"w": w3[0]}, {"w": (np.concatenate(hidden[:2]), "io")}),
    "scan": (loop(), {"w": w3}, {"w": (hidden, "bio")}),
    "scan, reversed and rematerialised": (loop(True, jax.checkpoint), {"w": w3}, {"w": (backward, "bio")}),
    "scan in a scan": (
        nested,
        {"w": nested_w, "v": nested_v},
        {"w": (nested_by_hand()[0], "bbio"), "v": (nested_by_hand()[1], "io")},
    ),
    "carried": (
        lambda p, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, p["w"]), None, length=2)[0][0],
        {"w": w3[0]},
        {"w": (np.concatenate(hidden[:2]), "io")},
    ),
    "cond": (
        lambda p, x: lax.cond(x.sum() > 1e9, lambda: x @ p["w"], lambda: (x * 2) @ p["w"]),
        {"w": w},
        {"w": (2 * x, "io")},
    ),
    "straight-through": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])),
        {"w": w},
        {"w": (x, "io")},
    ),
    "nm.ste": (lambda p, x: x @ nm.ste(p["w"], p["w"] > 0), {"w": w}, {"w": (x, "io")}),
    "LoRA": (
        lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"],
        {"w": w, "a": w[:, :2], "b": w[:2]},
        {"w": (x, "io"), "a": (x, "io"), "b": (x @ w[:, :2], "io")},
    ),
    "ensemble on one input": (lambda p, x: jax.vmap(lambda k: x @ k)(p["w"]), {"w": w3}, {"w": (x, "oio")}),
    "ensemble on its own": (
        lambda p, x: jax.vmap(jnp.dot)(jnp.stack([x, 2 * x, 3 * x]), p["w"]),
        {"w": w3},
        {"w": ([x, 2 * x, 3 * x], "bio")},
    ),
    "weight repeated along a batch": (
        lambda p, x: jnp.einsum("bri,bio->bro", x.reshape(2, 3, 8), jnp.broadcast_to(p["w"], (2, 8, 12))),
        {"w": w},
        {"w": (x, "io")},
    ),
}
IMAGE_CASES = {
    "convolution": (lambda p, x: conv(x, p["w"]), {"w": kernel}, {"w": (unfolded.reshape(-1, 36), "iiio")}),
    "PyTorch convolution": (
        lambda p, x: conv(x, p["w"], dimension_numbers=("NHWC", "OIHW", "NHWC")),
        {"w": kernel.transpose(3, 2, 0, 1)},
        {"w": (np.moveaxis(unfolded, -1, 3).reshape(-1, 36), "oiii")},
    ),
    "flipped kernel": (
        lambda p, x: conv(x, jnp.flip(p["w"], (0, 1))),
        {"w": kernel},
        {"w": (unfolded[:, :, :, ::-1, ::-1].reshape(-1, 36), "iiio")},
    ),
    "images one by one": (
        lambda p, x: jax.vmap(lambda image: conv(image[None], p["w"]))(x),
        {"w": kernel},
        {"w": (unfolded.reshape(-1, 36), "iiio")},
    ),
    "images and kernels one by one": (
        lambda p, x: jax.vmap(conv)(jnp.stack([x, 2 * x]), p["w"]),
        {"w": jnp.stack([kernel, kernel])},
        {"w": ([unfolded.reshape(-1, 36), 2 * unfolded.reshape(-1, 36)], "biiio")},
    ),
    "grouped": (
        lambda p, x: conv(x, p["w"], feature_group_count=2),
        {"w": kernel[:, :, :2]},
        {"w": (np.moveaxis(unfolded.reshape(50, 9, 2, 2), 2, 0).reshape(2, 50, 18), "iiio")},
    ),
    "grouped, one by one": (
        lambda p, x: jax.vmap(functools.partial(conv, feature_group_count=2))(jnp.stack([x, 2 * x]), p["w"]),
        {"w": jnp.stack([kernel[:, :, :2]] * 2)},
        {
            "w": (
                np.concatenate(
                    [s * np.moveaxis(unfolded.reshape(50, 9, 2, 2), 2, 0).reshape(2, 50, 18) for s in (1, 2)]
                ),
                "biiio",
            )
        },
    ),
}


@pytest.mark.parametrize("case", [*CASES, *IMAGE_CASES])
def test_gram_matrices_are_those_of_activations_by_hand(case):
    apply, params, expected = (CASES | IMAGE_CASES)[case]
    records = nm.gram(apply, params, [images if case in IMAGE_CASES else x])
    assert set(records) == set(params)
    for path, (by_hand, contraction) in expected.items():
        check(records[path], np.asarray(by_hand, np.float64), contraction)


def test_batches_of_different_sizes_add_up():
    apply, params, _ = CASES["scan"]
    whole = nm.gram(apply, params, [x])
    parts = nm.gram(apply, params, iter([(x[:4],), (x[4:],)]))
    for part, one in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(part, one, rtol=1e-5, atol=1e-4)
    twice = jax.tree.map(lambda a, b: a + b, whole, whole, is_leaf=lambda node: isinstance(node, nm.Gram))
    np.testing.assert_allclose(twice["w"].h, 2 * whole["w"].h)


def test_sharded_batches_give_the_same():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    batch = normal(0, 8, 5, 5, 4)
    apply, params, _ = IMAGE_CASES["convolution"]
    records = nm.gram(apply, params, [jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))])
    check(records["w"], patches(batch, (3, 3)).reshape(-1, 36))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, attended=None):
        mask = None if attended is None else attended[:, None, None]
        self.sow("intermediates", "mixed", x)
        y = nn.MultiHeadDotProductAttention(4)(x, x, mask=mask)
        return nn.Dense(3)(nn.relu(x + y))


def test_query_key_and_value_share_one_matrix():
    model, tokens = Attention(), normal(0, 2, 6, 16)
    params = model.init(jax.random.key(1), tokens)["params"]
    records = nm.gram(lambda p, x: model.apply({"params": p}, x), params, [tokens])
    attention = records["MultiHeadDotProductAttention_0"]
    check(attention["query"]["kernel"], tokens.reshape(-1, 16), "ioo")
    assert attention["query"]["kernel"].h is attention["key"]["kernel"].h
    assert attention["query"]["kernel"].h is attention["value"]["kernel"].h
    assert attention["out"]["kernel"].contraction == "iio"
    weights = params["MultiHeadDotProductAttention_0"]
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", tokens, weights[name]["kernel"]) + weights[name]["bias"][None, None]
        for name in ("query", "key", "value")
    )
    check(attention["out"]["kernel"], nn.dot_product_attention(q, k, v).reshape(-1, 16))


@pytest.mark.parametrize("give", ["function", "arrays"])
def test_padded_positions_do_not_count(give):
    model, tokens = Attention(), normal(0, 3, 6, 16)
    attended = jnp.arange(6)[None] < jnp.array([[6], [2], [4]])
    params = model.init(jax.random.key(1), tokens)["params"]

    def apply(params, *inputs):
        return model.apply({"params": params}, *inputs)

    mask = (lambda x, attended: attended) if give == "function" else [attended]
    records = nm.gram(apply, params, [(tokens, attended)], row_mask=mask)
    check(records["MultiHeadDotProductAttention_0"]["key"]["kernel"], tokens.reshape(-1, 16), mask=attended.reshape(-1))
    plain = nm.gram(apply, params, [(tokens, attended)])
    assert float(plain["Dense_0"]["kernel"].rows[0]) == 18
    assert float(records["Dense_0"]["kernel"].rows[0]) == 12


def test_padded_positions_of_images_and_scanned_layers_do_not_count():
    keep = jnp.array([True, False])
    apply, params, _ = IMAGE_CASES["convolution"]
    records = nm.gram(apply, params, [images], row_mask=[keep])
    check(records["w"], unfolded[:1].reshape(-1, 36))
    keep = jnp.array([True, False, True, True, False, True])
    records = nm.gram(CASES["scan"][0], CASES["scan"][1], [x], row_mask=[keep])
    check(records["w"], np.asarray(hidden), mask=keep)


def moe(params, x):
    """Every expert gets the tokens of which it is the argmax, in slots."""
    chosen = jax.nn.one_hot((x @ params["router"]).argmax(-1), 4)
    slot = jnp.max(jnp.cumsum(chosen, axis=0) * chosen - 1, axis=-1).astype(int)
    dispatch = chosen[:, :, None] * jax.nn.one_hot(slot, 12)[:, None]
    return jnp.einsum("ecd,edf->ecf", jnp.einsum("nd,nec->ecd", x, dispatch), params["up"])


def test_every_expert_has_its_own_matrix():
    params, tokens = {"router": normal(1, 8, 4), "up": normal(2, 4, 8, 16)}, normal(0, 12, 8)
    records = nm.gram(moe, params, [tokens], leaves="up")
    expert = np.asarray((tokens @ params["router"]).argmax(-1))
    by_hand = np.zeros((4, 12, 8))
    for token, e in enumerate(expert):
        by_hand[e, token] = tokens[token]
    check(records["up"], by_hand, "bio")
    assert records["router"] is None


def test_nnx_and_transposed_convolutions():
    """||X W||^2 = tr(W^T H W): whatever the layout."""
    layer = nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), use_bias=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    record = jax.tree.leaves(
        nm.gram(lambda p, x: nnx.merge(graph, p)(x), params, [images]), is_leaf=lambda n: isinstance(n, nm.Gram)
    )[0]
    assert record.contraction == "iiio"
    kernel = np.asarray(layer.kernel[...], np.float64).reshape(-1, 6)
    np.testing.assert_allclose(
        np.trace(kernel.T @ np.asarray(record.h[0], np.float64) @ kernel), np.square(layer(images)).sum(), rtol=1e-5
    )


# ------------------------------------------------------------------------------------------- what is asked, and errors


def test_leaves_are_chosen_by_regex_or_plan():
    apply, params, _ = CASES["LoRA"]
    assert nm.gram(apply, params, [x], leaves="^w$")["a"] is None
    assert nm.gram(apply, params, [x], leaves=["a", "b"])["w"] is None
    plan = nm.plan(apply, params, x, pattern="2:4-T", first="2:4-T")
    assert [leaf.path for leaf in plan.leaves if leaf.pattern] == ["w"]
    records = nm.gram(apply, params, [x], leaves=plan)
    assert records["w"] is not None
    assert records["a"] is None
    with pytest.raises(ValueError, match="'nothing' matches none of a, b, w"):
        nm.gram(apply, params, [x], leaves="nothing")


REFUSED = {
    "tied": (lambda p, x: x @ p["w"] @ p["w"].T, "contracted as io and contracted as oi"),
    "split contraction": (lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:], "only a part of its contraction"),
    "different outputs": (
        lambda p, x: [x @ p["w"][:, :4], jnp.sin(x) @ p["w"][:, 4:]],
        "different outputs have different inputs",
    ),
    "ragged": (lambda p, x: lax.ragged_dot(x, p["w"].reshape(1, 8, 8), jnp.array([6])), "ragged"),
    "while": (
        lambda p, x: lax.while_loop(lambda c: c[1] < x.sum(), lambda c: (c[0] @ p["w"], c[1] + 1), (x, 0.0))[0],
        "loop of unknown length",
    ),
    "elementwise": (lambda p, x: x[:, :, None] * p["w"][None], "elementwise"),
    "concatenated": (
        lambda p, x: jnp.concatenate([x, x], axis=1) @ jnp.concatenate([p["w"], p["w"]]),
        "concatenated with others",
    ),
}


def test_layers_by_the_counter_of_a_loop_give_no_gram_matrix():
    with pytest.raises(ValueError, match="an index that is known only at run time chooses a part of it"):
        nm.gram(lambda p, x: lax.fori_loop(0, 3, lambda k, h: h @ p["w"][k], x), {"w": w3}, [x], leaves="w")


@pytest.mark.parametrize("case", REFUSED)
def test_what_gives_no_gram_matrix_is_named(case):
    apply, reason = REFUSED[case]
    with pytest.raises(ValueError, match=f"w: no Gram matrix, because .*{reason}"):
        nm.gram(apply, {"w": w3[0]}, [x], leaves="w")
    with pytest.raises(ValueError, match="no parameter gives a Gram matrix"):
        nm.gram(apply, {"w": w3[0]}, [x])


def test_a_mask_that_does_not_fit_is_an_error():
    apply, params, _ = CASES["product"]
    with pytest.raises(ValueError, match=r"w: row_mask has shape \(5,\), but the rows of its input have shape \(6,\)"):
        nm.gram(apply, params, [x], row_mask=[jnp.ones(5, bool)])
    with pytest.raises(ValueError, match=r"have shape \(6,\)"):
        nm.gram(apply, params, [x], row_mask=lambda x: jnp.ones((6, 8), bool))
    with pytest.raises(ValueError, match="fewer arrays than there are batches"):
        nm.gram(apply, params, [x, x], row_mask=[jnp.ones(6, bool)])


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        nm.gram(CASES["product"][0], CASES["product"][1], [])


def test_records_of_ones_own():
    rows = normal(0, 10, 8)
    keep = jnp.arange(10) < 7
    record = nm.Gram.from_inputs(rows, mask=keep)
    check(record, rows, "io", mask=keep)
    check(nm.Gram.from_inputs(normal(0, 3, 10, 8), "bio"), normal(0, 3, 10, 8), "bio")
    same = nm.Gram.from_moments(record.h[0], record.total[0], 7)
    for found, expected in zip(jax.tree.leaves(same), jax.tree.leaves(record), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="flatten the rows"):
        nm.Gram.from_inputs(normal(0, 2, 2, 5, 8))
    with pytest.raises(ValueError, match="give one per row"):
        nm.Gram.from_inputs(rows, mask=jnp.ones(8, bool))
    with pytest.raises(ValueError, match=r"h must be \(batch, K, K\)"):
        nm.Gram.from_moments(rows, rows[0], 10)
    with pytest.raises(ValueError, match=r"total must be \(1, 8\)"):
        nm.Gram.from_moments(record.h, rows, 10)
    with pytest.raises(ValueError, match="2 groups do not divide"):
        nm.Gram.from_moments(record.h, record.total, 10, "iiio", groups=2)
    with pytest.raises(ValueError, match="one number or one per matrix"):
        nm.Gram.from_moments(record.h, record.total, rows[0])
    with pytest.raises(ValueError, match="only Gram matrices of one layer add up"):
        record + nm.Gram.from_inputs(rows[:, :4])


def test_records_are_pytrees():
    record = nm.Gram.from_inputs(x, "io")
    doubled = jax.jit(lambda tree: jax.tree.map(lambda a: 2 * a, tree))({"a": record, "b": None})
    assert doubled["a"].contraction == "io"
    np.testing.assert_allclose(doubled["a"].h, 2 * record.h)
