"""Models and layers whose parameters are traced."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def linen(module, *inputs, **collections):
    variables = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, **collections), *inputs)
    state = {name: value for name, value in variables.items() if name != "params"}

    def apply(params, state, *x):
        return module.apply({"params": params, **state}, *x, **collections)

    return apply, variables["params"], (state, *inputs)


def flax_nnx(module, *inputs):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return lambda params, *x: nnx.merge(graph, params, rest)(*x), params, inputs


def weight(function, sizes, *inputs, **others):
    """A plain function of one weight `w`, and of other parameters."""
    return function, {"w": shape(*sizes), **{k: shape(*v) for k, v in others.items()}}, inputs


X = shape(6, 8)
IMAGES = shape(2, 5, 5, 4)
conv = functools.partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 16)
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return embed.attend(blocks(name="blocks")(embed(tokens), None)[0])


class NnxBlocks(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return nnx.relu(block(x))

        return run(self.blocks, x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(16, 32, rngs=rngs)
        self.lora = nnx.LoRA(16, 4, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.1, deterministic=True)
        self.outer = nnx.Linear(32, 8, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.gelu(self.drop(self.norm(self.inner(x) + self.lora(x)))))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), strides=2)(x)))
        return nn.WeightNorm(nn.Dense(4))(x.mean((1, 2)))


def linen_conv(features=8, kernel=(3, 3), cls=nn.Conv, **options):
    return lambda: linen(cls(features, kernel, **options), IMAGES)


def moe(params, x):
    """Experts with capacity: tokens are dispatched to slots by one-hot products."""
    gates = jax.nn.softmax(x @ params["router"])
    chosen = jax.nn.one_hot(gates.argmax(-1), 4)
    slot = jnp.max(jnp.cumsum(chosen, axis=0) * chosen - 1, axis=-1).astype(int)
    dispatch = chosen[:, :, None] * jax.nn.one_hot(slot, 5)[:, None]
    inputs = jnp.einsum("nd,nec->ecd", x, dispatch)
    hidden = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", inputs, params["up"]))
    outputs = jnp.einsum("ecf,efd->ecd", hidden, params["down"])
    return jnp.einsum("ecd,nec->nd", outputs, dispatch * gates[:, :, None])


def all_experts(params, x):
    hidden = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd,te->td", hidden, params["down"], jax.nn.softmax(x @ params["router"]))


EXPERTS = {"router": shape(8, 4), "up": shape(4, 8, 16), "down": shape(4, 16, 8)}


@jax.custom_vjp
def guarded(x, w):
    return x @ w


guarded.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def rnn(params, x):
    def step(h, t):
        h = jnp.tanh(jnp.concatenate([h, t], axis=-1) @ params["w"])
        return h, h

    return lax.scan(step, jnp.zeros((6, 8)), x)[1]


def over_layers(body):
    return lambda p, x: lax.scan(lambda h, w: (body(h, w), None), x, p["w"])[0]
