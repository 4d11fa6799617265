"""Small networks of every kind whose channels are permuted: (apply, params, inputs, groups of dimensions that move)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def random_like(tree):
    """No zero bias and no scale of one: what is permuted wrongly shows."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [
        0.5 * jnp.abs(normal(*leaf.shape, seed=k)) + 0.3 * normal(*leaf.shape, seed=~k % 99)
        for k, leaf in enumerate(leaves)
    ]
    paths = ["".join(map(str, path)) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return jax.tree.unflatten(
        treedef, [jnp.abs(x) if "var" in path else x for path, x in zip(paths, drawn, strict=True)]
    )


def linen(module, *inputs):
    """A module whose running statistics are among its parameters."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return module.apply, random_like(shapes), inputs


IMAGES, TOKENS, X = normal(2, 8, 8, 4), jnp.arange(6).reshape(2, 3) % 5, normal(2, 3, 8)


def mlp():
    params = {"up": normal(8, 12), "bias": normal(12), "down": normal(12, 4)}
    return (
        lambda p, x: jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"],
        params,
        (X,),
        [("up", 1, "bias", 0, "down", 0)],
    )


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(x.shape[-1], (3, 3))(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Residual()(nn.max_pool(nn.Conv(8, (3, 3))(x), (2, 2), (2, 2)))
        x = nn.relu(
            nn.Conv(12, (1, 1), strides=2)(x) + nn.avg_pool(Residual()(x), (2, 2), (2, 2)).repeat(2, -1)[..., :12]
        )
        return nn.Dense(3)(x.mean((1, 2)))


def resnet():
    stream = ("Conv_0/kernel", 3, "Residual_0/Conv_1/kernel", 3, "Residual_0/BatchNorm_1/scale", 0)
    inside = (
        "Residual_0/Conv_0/kernel",
        3,
        "batch_stats/Residual_0/BatchNorm_0/mean",
        0,
        "Residual_0/Conv_1/kernel",
        2,
    )
    return *linen(ResNet(), IMAGES), [inside, stream[2:]]


class InvertedBottleneck(nn.Module):
    squeeze: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.relu6(nn.Conv(16, (1, 1), name="expand")(x))
        y = nn.relu6(nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y))
        if self.squeeze:
            s = nn.relu(nn.Dense(4, name="reduce")(y.mean((1, 2))))
            y = y * nn.sigmoid(nn.Dense(16, name="excite")(s))[:, None, None]
        return x + nn.Conv(4, (1, 1), name="project")(y)


def inverted_bottleneck():
    return *linen(InvertedBottleneck(), IMAGES), [("expand/kernel", 3, "depthwise/kernel", 3, "project/kernel", 2)]


def squeeze_and_excite():
    wide = ("expand/kernel", 3, "depthwise/bias", 0, "reduce/kernel", 0, "excite/kernel", 1, "project/kernel", 2)
    return *linen(InvertedBottleneck(squeeze=True), IMAGES), [wide, ("reduce/kernel", 1, "excite/kernel", 0)]


class Transformer(nn.Module):
    pre: bool = True
    tied: bool = False
    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(5, 8, name="embed")
        x = table(tokens)
        for k in range(self.layers):
            x = self.around(x, nn.LayerNorm(name=f"norm{k}a"), nn.MultiHeadDotProductAttention(2, name=f"attention{k}"))
            up, down = nn.Dense(16, name=f"up{k}"), nn.Dense(8, name=f"down{k}")
            x = self.around(x, nn.LayerNorm(name=f"norm{k}b"), lambda h, up=up, down=down: down(nn.gelu(up(h))))
        return table.attend(x) if self.tied else nn.Dense(3, name="head")(x)

    def around(self, x, norm, layer):
        return x + layer(norm(x)) if self.pre else norm(x + layer(x))


def transformer(layers=2, **options):
    last = layers - 1
    stream = ("embed/embedding", 1, "norm0a/scale", 0, "attention0/query/kernel", 0)
    stream += (f"attention{last}/out/kernel", 2, f"up{last}/kernel", 0)
    heads = ("attention0/value/kernel", 2, "attention0/value/bias", 1, "attention0/out/kernel", 1)
    keys = ("attention0/query/kernel", 2, "attention0/key/bias", 1)
    whole = ("attention0/query/kernel", 1, "attention0/key/kernel", 1, "attention0/out/kernel", 0)
    return *linen(Transformer(layers=layers, **options), TOKENS), [
        stream,
        heads,
        keys,
        whole,
        ("up0/kernel", 1, "down0/kernel", 0),
    ]


def grouped_query_attention():
    def apply(p, x):
        q = jnp.einsum("bsd,dhk->bshk", x, p["q"])
        k, v = (jnp.repeat(jnp.einsum("bsd,dhk->bshk", x, p[name]), 2, axis=2) for name in "kv")
        mask = jnp.tril(jnp.ones((3, 3), bool))
        logits = jnp.where(mask, jnp.einsum("bshk,bthk->bhst", q, k), -1e9)
        mixed = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(logits), v)
        return x + mixed.reshape(2, 3, 16) @ p["o"]

    params = {"q": normal(8, 4, 4), "k": normal(8, 2, 4), "v": normal(8, 2, 4), "o": normal(16, 8)}
    return apply, params, (X,), [("v", 2, "o", 0), ("q", 2, "k", 2), ("q", 1, "k", 1, "v", 1, "o", 0)]


def gated_mlp():
    def apply(p, x):
        h = x @ p["in"]
        h = h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * p["scale"]
        return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"] + h[..., :1]

    params = {"in": normal(8, 8), "scale": normal(8), "gate": normal(8, 12), "up": normal(8, 12), "down": normal(12, 3)}
    return apply, params, (X,), [("gate", 1, "up", 1, "down", 0)]


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for k in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"norm{k}")(x))
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), name=f"conv{k}")(y)], axis=-1)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def dense_net():
    stem = ("stem/kernel", 3, "norm0/scale", 0, "batch_stats/norm2/var", 0, "conv2/kernel", 2, "head/kernel", 0)
    return *linen(DenseNet(), IMAGES), [stem, ("conv0/kernel", 3, "norm1/bias", 0, "conv2/kernel", 2)]


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(8, (3, 3), name="down")(x))
        y = nn.relu(nn.Conv(16, (3, 3), name="bottom")(nn.max_pool(skip, (2, 2), (2, 2))))
        y = nn.GroupNorm(4, name="norm")(nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="up")(y))
        y = jnp.concatenate([skip, jax.image.resize(y, skip.shape, "nearest")], -1)
        return nn.Conv(2, (1, 1), name="head")(y)


def unet():
    return *linen(UNet(), IMAGES), [
        ("down/kernel", 3, "bottom/kernel", 2, "head/kernel", 2),
        ("bottom/kernel", 3, "up/kernel", 2),
        ("up/kernel", 3, "norm/scale", 0, "head/kernel", 2),
    ]


def scan_over_layers():
    def apply(p, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], h.sum()

        h, sums = lax.scan(jax.checkpoint(layer), x @ p["in"], p["layers"])
        return h @ p["out"], sums

    layers = {"up": normal(3, 8, 12) / 4, "down": normal(3, 12, 8) / 4}
    params = {"in": normal(8, 8) / 3, "layers": layers, "out": normal(8, 2)}
    return (
        apply,
        params,
        (X,),
        [("layers/up", 2, "layers/down", 1), ("in", 1, "layers/up", 1, "layers/down", 2, "out", 0)],
    )


def flattened():
    def apply(p, x):
        y = nn.relu(lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return nn.relu(y.reshape(2, -1) @ p["dense"] + p["bias"]) @ p["head"]

    params = {"conv": normal(3, 3, 4, 8), "dense": normal(512, 12) / 20, "bias": normal(12), "head": normal(12, 2)}
    return apply, params, (IMAGES,), [("conv", 3, "dense", 0), ("dense", 1, "bias", 0, "head", 0)]


class Shuffled(nn.Module):
    """Grouped convolutions with a shuffle between them."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(12, (1, 1), name="stem")(x)
        y = nn.Conv(12, (1, 1), feature_group_count=3, name="grouped")(y)
        y = y.reshape(2, 8, 8, 3, 4).swapaxes(3, 4).reshape(2, 8, 8, 12)
        y = nn.Conv(16, (3, 3), name="wide")(nn.relu(y))
        return nn.Conv(2, (1, 1), name="head")(nn.relu(y))


def grouped_convolutions():
    groups = [
        ("stem/kernel", 3, "grouped/kernel", 2),
        ("grouped/kernel", 3, "wide/kernel", 2),
        ("wide/kernel", 3, "head/kernel", 2),
    ]
    return *linen(Shuffled(), IMAGES), groups


def fused_attention():
    def apply(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["bias"], 3, axis=-1)
        q, k, v = (y.reshape(2, 3, 2, 8) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k) / 2)
        return jnp.einsum("bhst,bthk->bshk", weights, v).reshape(2, 3, 16) @ p["out"]

    params = {"qkv": normal(8, 48), "bias": normal(48), "out": normal(16, 8)}
    return apply, params, (X,), [("qkv", 1, "bias", 0, "out", 0), ("qkv", 1, "bias", 0)]


def experts():
    def apply(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.relu(jnp.einsum("bsd,edf->bsef", x, p["up"]))
        return jnp.einsum("bse,bsef,efd->bsd", gates, hidden, p["down"])

    params = {"router": normal(8, 4), "up": normal(4, 8, 12), "down": normal(4, 12, 8)}
    return apply, params, (X,), [("up", 2, "down", 1), ("router", 1, "up", 0, "down", 0)]


def lstm():
    def apply(p, x):
        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["bias"], 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            return (nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = lax.scan(step, (jnp.zeros((2, 8)), jnp.zeros((2, 8))), x.swapaxes(0, 1))
        return h @ p["out"]

    params = {"x": normal(8, 32), "h": normal(8, 32), "bias": normal(32), "out": normal(8, 2)}
    return apply, params, (X,), [("x", 1, "h", 1, "h", 0, "bias", 0, "out", 0)]


def mixer():
    def apply(p, x):
        x = x @ p["in"]
        x = x + jnp.einsum("bsc,st,tu->buc", x, p["a"], p["b"])
        return (x + jax.nn.gelu(x @ p["c"]) @ p["d"]).mean(1) @ p["head"]

    params = {"in": normal(8, 8), "a": normal(3, 6), "b": normal(6, 3), "c": normal(8, 12), "d": normal(12, 8)}
    return apply, params | {"head": normal(8, 2)}, (X,), [("a", 1, "b", 0), ("c", 1, "d", 0), ("in", 1, "c", 0, "d", 1)]


def branches():
    def apply(p, x):
        h = lax.cond(x.sum() > 0, lambda h: h @ p["a"], lambda h: jnp.sin(h @ p["b"]), x)
        return jnp.pad(h, ((0, 0), (0, 0), (2, 0)))[..., 2:] @ p["out"]

    return apply, {"a": normal(8, 12), "b": normal(8, 12), "out": normal(12, 2)}, (X,), [("a", 1, "b", 1, "out", 0)]


ARCHITECTURES = {
    "mlp": mlp,
    "resnet": resnet,
    "inverted bottleneck": inverted_bottleneck,
    "squeeze and excite": squeeze_and_excite,
    "pre-norm transformer": transformer,
    "post-norm transformer": lambda: transformer(pre=False),
    "tied embedding": lambda: transformer(tied=True, layers=1),
    "grouped-query attention": grouped_query_attention,
    "gated mlp": gated_mlp,
    "dense net": dense_net,
    "u-net": unet,
    "scan over layers": scan_over_layers,
    "flattened": flattened,
    "grouped convolutions": grouped_convolutions,
    "fused attention": fused_attention,
    "experts": experts,
    "lstm": lstm,
    "mixer": mixer,
    "branches": branches,
}
