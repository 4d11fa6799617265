"""What a bare pattern makes of the layouts of public code: the true axes, dense, or refused; never other axes.

Two judges that know nothing of names: tables of real layouts, written from the equations of the code that they come
from, and the trace of real modules.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import nm_jax as nm
from nm_jax._core.axes import same_groups
from nm_jax._core.rules import DenseLeaf, SparseLeaf, resolve

REFUSED = "refused"

# code -> rows of (path, shape, true axes, what a bare pattern makes of it); `None`: it stays dense.
LAYOUTS = {
    "big_vision, layers scanned": [
        ("encoderblock/MlpBlock_0/Dense_0/kernel", (12, 768, 3072), "bio", "bio"),
        ("encoderblock/MlpBlock_0/Dense_0/bias", (12, 3072), None, None),
        ("encoderblock/MlpBlock_0/Dense_1/kernel", (12, 3072, 768), "bio", "bio"),
        ("encoderblock/MlpBlock_0/Dense_1/bias", (12, 768), None, None),
        ("encoderblock/MultiHeadDotProductAttention_0/query/kernel", (12, 768, 16, 48), "bioo", "bioo"),
        ("encoderblock/MultiHeadDotProductAttention_0/query/bias", (12, 16, 48), None, None),
        ("encoderblock/MultiHeadDotProductAttention_0/out/kernel", (12, 16, 48, 768), "biio", "biio"),
        ("encoderblock/MultiHeadDotProductAttention_0/out/bias", (12, 768), None, None),
        ("encoderblock/LayerNorm_0/scale", (12, 768), None, None),
        ("pos_embedding", (1, 196, 768), None, None),
        ("embedding/kernel", (16, 16, 4, 768), "bbio", "bbio"),
        ("embedding/bias", (768,), None, None),
        ("MAPHead_0/probe", (1, 1, 768), None, None),
    ],
    "MaxText, layers scanned at the second axis": [
        ("decoder/layers/mlp/wi_0/kernel", (2048, 16, 8192), "ibo", REFUSED),
        ("decoder/layers/self_attention/query/kernel", (2048, 16, 32, 64), "iboo", REFUSED),
        ("decoder/layers/self_attention/out/kernel", (32, 16, 64, 2048), "ibio", REFUSED),
        ("decoder/layers/layer_3/attention/attention/out/kernel", (4096, 12, 2048), "ibo", REFUSED),
        ("decoder/layers/self_attention/qkv_proj/kernel", (2048, 16, 32, 128), "iboo", REFUSED),
        ("decoder/moe_layers/self_attention/wq_b/kernel", (1536, 58, 128, 192), "iboo", REFUSED),
        ("decoder/layers_0/self_attention/qkv_proj/kernel", (2048, 32, 128), "ioo", REFUSED),
        ("decoder/layers/moe_block/wi_0", (8, 16, 4096, 14336), "bbio", None),
        ("decoder/layers_0/mlp/wi_0/kernel", (2048, 8192), "io", "io"),
        ("decoder/layers/pre_self_attention_layer_norm/scale", (2048, 16), None, None),
        ("token_embedder/embedding", (32000, 2048), None, None),
    ],
    "MaxText, scanned, with biases": [
        ("decoder/layers/mlp/wi_0/kernel", (2048, 16, 8192), "ibo", "ibo"),
        ("decoder/layers/mlp/wi_0/bias", (8192, 16), None, None),
        ("decoder/layers/self_attention/query/kernel", (2048, 16, 32, 64), "iboo", "iboo"),
        ("decoder/layers/self_attention/query/bias", (32, 16, 64), None, None),
        ("decoder/layers/self_attention/out/kernel", (32, 16, 64, 2048), "ibio", "ibio"),
        ("decoder/layers/self_attention/out/bias", (2048, 16), None, None),
    ],
    "T5X, scalable": [
        ("encoder/encoder/mlp/wi_0/kernel", (768, 12, 2048), "ibo", REFUSED),
        ("encoder/encoder/attention/query/kernel", (768, 12, 12, 64), "iboo", REFUSED),
        ("encoder/relpos_bias/rel_embedding", (12, 32), None, None),
    ],
    "T5X, minimal": [
        ("encoder/layers_0/attention/query/kernel", (768, 768), "io", "io"),
        ("encoder/layers_0/attention/out/kernel", (768, 768), "io", "io"),
        ("token_embedder/embedding", (32128, 768), None, None),
        ("decoder/logits_dense/kernel", (768, 32128), "io", "io"),
    ],
    "GPT-2 of transformers, Flax": [
        ("h/0/attn/c_attn/kernel", (2304, 768), "oi", "oi"),
        ("h/0/attn/c_attn/bias", (2304,), None, None),
        ("h/0/attn/c_proj/kernel", (768, 768), "oi", REFUSED),
        ("h/0/attn/c_proj/bias", (768,), None, None),
        ("h/0/mlp/c_fc/kernel", (3072, 768), "oi", "oi"),
        ("h/0/mlp/c_fc/bias", (3072,), None, None),
        ("wte/embedding", (50257, 768), None, None),
    ],
    "Gemma, Tunix": [
        ("transformer/layer_0/attn/q_einsum/w", (8, 2304, 256), "oio", None),
        ("transformer/layer_0/attn/kv_einsum/w", (2, 4, 2304, 256), "ooio", None),
        ("transformer/layer_0/attn/attn_vec_einsum/w", (8, 256, 2304), "iio", None),
        ("transformer/layer_0/mlp/gating_einsum", (2, 9216, 2304), "ooi", None),
        ("transformer/layer_0/mlp/linear", (9216, 2304), "io", None),
        ("transformer/embedder/input_embedding", (256128, 2304), None, None),
        ("layers/0/attn/q_proj/w", (2048, 32, 64), "ioo", None),
        ("layers/0/mlp/gate_proj/kernel", (2048, 8192), "io", "io"),
        ("layers/0/mlp/experts/gate_proj", (128, 2048, 768), "bio", None),
    ],
    "NNX einsums, EasyDeL experts": [
        ("layers/0/attn/q_proj/kernel", (1024, 16, 128), "ioo", REFUSED),
        ("layers/0/mlp/experts/gate_proj/kernel", (8, 14336, 4096), "boi", REFUSED),
        ("fused/kernel", (3, 64, 4, 16), "oioo", REFUSED),
    ],
    "Levanter": [
        ("transformer/layers/stacked/mlp/gate_proj/weight/0", (16, 8192, 2048), "boi", None),
        ("transformer/layers/stacked/self_attn/q_proj/weight/0", (16, 8, 4, 64, 2048), "boooi", None),
        ("embeddings/token_embeddings/weight/0", (50304, 768), None, None),
    ],
    "Haiku, Penzai": [
        ("mlp/~/linear_0/w", (784, 300), "io", None),
        ("res_net50/~/initial_conv/w", (7, 7, 4, 64), "bbio", None),
        ("gru/w_h", (256, 768), "io", None),
        ("body/sublayers/0/query/weights/value_or_slot/data_array", (2048, 8, 256), "ioo", None),
    ],
    "Linen": [
        ("Conv_0/kernel", (3, 3, 64, 128), "bbio", "bbio"),
        ("conv_init/kernel", (7, 7, 4, 64), "bbio", "bbio"),
        ("Block_0/Conv_1/kernel", (1, 7, 64, 64), "bbio", "bbio"),
        ("Block_1/Conv_1/kernel", (3, 64, 128), "bio", "bio"),
        ("Block_2/Conv_1/kernel", (3, 3, 3, 64, 128), "bbbio", "bbbio"),
        ("stem/kernel", (4, 4, 4, 96), "bbio", "bbio"),
        ("downsample/kernel", (2, 2, 96, 192), "bbio", "bbio"),
        ("downsample/bias", (192,), None, None),
        ("ConvTranspose_0/kernel", (4, 4, 64, 128), "bbio", "bbio"),
        ("ConvTranspose_0/bias", (128,), None, None),
        ("ConvTranspose_1/kernel", (4, 4, 128, 64), "bboi", "bboi"),
        ("ConvTranspose_1/bias", (128,), None, None),
        ("qkv/kernel", (64, 3, 4, 16), "iooo", "iooo"),
        ("qkv/bias", (3, 4, 16), None, None),
        ("attention/out/kernel", (4, 16, 64), "iio", "iio"),
        ("attention/out/bias", (64,), None, None),
        ("flatten/kernel", (7, 7, 64, 128), "iiio", "bbio"),  # groups of either are the same
        ("flatten/bias", (128,), None, None),
        ("SpectralNorm_0/Dense_0/kernel/u", (1, 128), None, None),
    ],
    "fused and stacked, without biases": [
        ("qkv/kernel", (64, 3, 4, 16), "iooo", REFUSED),
        ("q_proj/kernel", (4, 64, 4, 16), "bioo", REFUSED),
        ("o_proj/kernel", (4, 4, 16, 64), "biio", REFUSED),
        ("Stack_0/query/kernel", (12, 768, 768), "bio", REFUSED),
        ("kv/kernel", (2, 2, 64, 64), "bbio", REFUSED),
        ("out/kernel", (2, 2, 16, 64), "biio", REFUSED),
    ],
    "PyTorch, nested": [
        ("layers/0/weight", (128, 64), "oi", "oi"),
        ("layers/1/weight", (64, 32, 3, 3), "oibb", "oibb"),
        ("conv1/weight", (64, 3, 8, 8), "oibb", None),
        ("conv/weight", (64, 32, 3), "oib", "oib"),
        ("lstm/weight_ih_l0", (256, 64), "oi", "oi"),
        ("lstm/weight_hh_l0_reverse", (256, 64), "oi", "oi"),
        ("attn/in_proj_weight", (192, 64), "oi", "oi"),
        ("up/weight", (64, 32, 2, 2), "iobb", "iobb"),
        ("up/bias", (32,), None, None),
        ("wte/weight", (50304, 768), None, None),
        ("wpe/weight", (1024, 768), None, None),
        ("encoder/embed_positions/weight", (512, 64), None, None),
        ("shared/weight", (32128, 512), None, None),
        ("tower/weight", (50304, 768), None, None),
        ("lm_head/weight", (50304, 768), "oi", "oi"),
        ("norm/weight", (32, 16), None, None),
        ("ln/weight", (32, 16), None, None),
        ("affine/weight", (32, 16), None, None),
        ("affine/bias", (32, 16), None, None),
        ("patch_embed/weight", (64, 48), "oi", "oi"),
        ("patch_embed/bias", (64,), None, None),
        ("experts/weight", (8, 64, 32), "boi", REFUSED),
    ],
    "Linen, what its names leave open": [
        ("conv/kernel", (4, 4, 64, 64), "bboi", REFUSED),
        ("conv/bias", (64,), None, None),
        ("Conv_0/kernel", (4, 4, 64, 64), "bbio", "bbio"),
        ("Conv_0/bias", (64,), None, None),
        ("patchify/kernel", (16, 16, 64, 64), "bbio", "bbio"),
        ("patchify/bias", (64,), None, None),
        ("Einsum_0/kernel", (64, 128), "oi", REFUSED),
        ("q_einsum/kernel", (64, 64), "oi", REFUSED),
        ("q_einsum/bias", (64,), None, None),
    ],
    "PyTorch's words in JAX's order": [
        ("l1/weight", (32, 64), "io", "io"),
        ("l1/bias", (64,), None, None),
        ("l2/weight", (64, 64), "io", "io"),
        ("l2/bias", (64,), None, None),
        ("proj/weight", (64, 16), "io", "io"),
    ],
    "PyTorch's words, and nothing that says whose": [
        ("fc/weight", (64, 128), "io", REFUSED),
        ("square/weight", (64, 64), "oi", REFUSED),
        ("square/bias", (64,), None, None),
        ("norm/weight", (64,), None, None),
    ],
    "PyTorch's words in both orders": [
        ("a/weight", (32, 64), "io", "io"),
        ("a/bias", (64,), None, None),
        ("b/weight", (32, 64), "oi", "oi"),
        ("b/bias", (32,), None, None),
        ("fc/weight", (64, 64), "io", REFUSED),
    ],
    "tables called like layers": [
        ("user/weight", (1000, 32), None, None),
        ("mlp/weight", (256, 32), None, None),
        ("item_mlp/weight", (256, 32), None, None),
        ("fc/weight", (32, 64), "oi", "oi"),
        ("fc/bias", (32,), None, None),
        ("head.weight", (16, 32), "oi", "oi"),
    ],
    "transposed convolutions called like others": [
        ("conv/weight", (64, 64, 4, 4), "iobb", REFUSED),
        ("conv/bias", (64,), None, None),
        ("conv1/weight", (64, 32, 4, 4), "iobb", REFUSED),
        ("0/weight", (64, 32, 2, 2), "iobb", REFUSED),
        ("conv2/weight", (64, 32, 4), "iob", REFUSED),
        ("conv3/weight", (64, 32, 4, 4), "iobb", "iobb"),
        ("conv3/bias", (32,), None, None),
        ("conv4/weight", (64, 64, 3, 3), "oibb", "oibb"),
        ("conv4/bias", (64,), None, None),
        ("down/weight", (64, 64, 2, 2), "oibb", "oibb"),
        ("down/bias", (64,), None, None),
        ("patch/conv/weight", (64, 4, 16, 16), "oibb", "oibb"),
    ],
    "PyTorch, flat and dotted": [
        ("l0.weight", (16, 8), "oi", "oi"),
        ("l0.bias", (16,), None, None),
        ("h.0.attn.c_attn.weight", (64, 192), "io", "io"),
        ("h.0.attn.c_attn.bias", (192,), None, None),
        ("h.1.mlp.c_fc.weight", (256, 64), "oi", "oi"),
        ("h.1.mlp.c_fc.bias", (256,), None, None),
        ("stack.mlp.weight", (12, 64, 32), "boi", "boi"),
        ("stack.mlp.bias", (12, 64), None, None),
        ("wte.weight", (64, 16), None, None),
    ],
}


def shapes(rows):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, *_ in rows}


def resolved(tree, pattern):
    """Axes, `None` or `REFUSED` by path."""
    found = {}
    while True:  # leaves that an error names are refused: look at the others
        try:
            leaves = resolve({k: v for k, v in tree.items() if found.get(k) != REFUSED}, pattern)
        except ValueError as error:
            if "ambiguous" in str(error):
                found |= {path: REFUSED for path in tree if f"{path} ({tree[path].shape[0]}," in str(error)}
                continue
            assert "no parameter becomes sparse" in str(error)
            leaves = [DenseLeaf(path, (), "") for path in tree if path not in found]
        return found | {leaf.path: leaf.axes if isinstance(leaf, SparseLeaf) else None for leaf in leaves}


@pytest.mark.parametrize("code", LAYOUTS)
def test_layouts_of_public_code(code):
    rows = LAYOUTS[code]
    found = resolved(shapes(rows), "2:4")
    assert found == {path: expected for path, _, _, expected in rows}


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T"])
@pytest.mark.parametrize("code", LAYOUTS)
def test_no_leaf_alone_gets_wrong_axes(code, pattern):
    """Without its siblings less is known, never something else."""
    for path, shape, true, _ in LAYOUTS[code]:
        alone = resolved(shapes([(path, shape)]), pattern)[path]
        if alone not in (None, REFUSED):
            assert true is not None or "affine" in path, path  # a scale of two dimensions, without its bias
            assert true is None or same_groups(shape, alone, true, nm.parse_pattern(pattern)), path


def test_the_first_of_a_sequence_is_a_table_where_the_next_takes_its_columns():
    rows = [("net.0.weight", (256, 64)), ("net.2.weight", (32, 64)), ("net.2.bias", (32,)), ("net.3.weight", (8, 32))]
    assert resolved(shapes(rows), "2:4") == dict(zip((path for path, _ in rows), (None, "oi", None, "oi"), strict=True))
    assert resolved(shapes([("net.0.weight", (64, 256)), *rows[1:]]), "2:4")["net.0.weight"] == "oi"


# ---------------------------------------------------------------------------------------------- modules, traced
KEY = jax.random.key(0)
X = jnp.ones((2, 6, 16))
IMAGES = jnp.ones((2, 8, 8, 16))


class Stacked(nn.Module):
    bias: bool
    axis: int

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            bias: bool

            @nn.compact
            def __call__(self, x, _):
                x = x + nn.MultiHeadDotProductAttention(2, use_bias=self.bias)(nn.LayerNorm()(x))
                return x + nn.Dense(16, use_bias=self.bias)(nn.gelu(nn.Dense(32, use_bias=self.bias)(x))), None

        kind = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return kind(self.bias)(x, None)[0]


class Fused(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        qkv = nn.DenseGeneral((3, 4, 8), use_bias=self.bias, name="qkv")(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        x = nn.DenseGeneral(16, axis=(-2, -1), use_bias=self.bias, name="o")(nn.dot_product_attention(q, k, v))
        return nn.Dense(16)(x)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (1, 6), use_bias=False)(nn.Conv(16, (3, 3), name="first")(x))
        x = nn.Conv(16, (3, 3), use_bias=False, name="proj")(nn.Conv(16, (4, 4), use_bias=False, name="conv_in")(x))
        return nn.Conv(16, (3,), use_bias=False)(x[:, 0])


LINEN = {
    "dense": (lambda: nn.Dense(8), X, True),
    "convolutions": (lambda: Convolutions(), IMAGES, True),
    "transposed": (lambda: nn.ConvTranspose(8, (3, 3), strides=(2, 2)), IMAGES, True),
    "transposed kernel": (lambda: nn.ConvTranspose(8, (3, 3), strides=(2, 2), transpose_kernel=True), IMAGES, True),
    "attention": (lambda: nn.MultiHeadDotProductAttention(2), X, True),
    "attention, heads as many as features of one": (lambda: nn.MultiHeadDotProductAttention(4), X, True),
    "attention without bias": (lambda: nn.MultiHeadDotProductAttention(2, use_bias=False), X, True),
    "fused": (lambda: Fused(True), X, True),
    "fused without bias": (lambda: Fused(False), X, False),
    "stacked": (lambda: Stacked(True, 0), X, True),
    "stacked at the second axis": (lambda: Stacked(True, 1), X, True),
    "stacked without bias": (lambda: Stacked(False, 0), X, False),
    "stacked at the second axis without bias": (lambda: Stacked(False, 1), X, False),
    "recurrent": (lambda: nn.RNN(nn.OptimizedLSTMCell(8)), X, True),
    "gated recurrent": (lambda: nn.RNN(nn.GRUCell(8)), X, True),
    "normalised": (lambda: nn.Sequential([nn.WeightNorm(nn.Dense(8)), nn.GroupNorm(2), nn.Dense(8)]), X, True),
}


def linen(module, x):
    variables = jax.eval_shape(module.init, KEY, x)
    return (lambda params, x: module.apply({"params": params}, x)), variables["params"], x


def agrees(apply, params, x, known):
    """Whether names or classes give the axes of the trace to whatever they make sparse; `known`: to all weights."""
    try:
        leaves = resolve(params, "1:2")
    except ValueError as error:
        assert not known, error
        assert "ambiguous" in str(error)
        return
    assert known
    traced = nm.trace(apply, params, x)
    sparse = {leaf.path: leaf.axes for leaf in leaves if isinstance(leaf, SparseLeaf)}
    assert sparse == {leaf.path: leaf.axes for leaf in traced.leaves if not leaf.reason}


@pytest.mark.parametrize("kind", LINEN)
def test_linen_modules_agree_with_their_trace(kind):
    module, x, known = LINEN[kind]
    agrees(*linen(module(), x), known)


class Mixer(eqx.Module):
    norm: eqx.nn.LayerNorm
    inner: eqx.nn.MLP
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x) + jax.vmap(self.inner)(self.norm(x))


class Tokens(eqx.Module):
    wte: eqx.nn.Embedding
    mix: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.mix)(jax.vmap(self.wte)(x.astype(int)[:, 0]))


class Recurrent(eqx.Module):
    first: eqx.nn.GRUCell
    second: eqx.nn.LSTMCell

    def __call__(self, x):
        h = jax.vmap(lambda x: self.first(x, x[:8]))(x)
        return jax.vmap(lambda h: self.second(h, (h, h))[0])(h)


class Ensemble(eqx.Module):
    layers: eqx.nn.Linear

    def __init__(self, bias):
        self.layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(16, 16, use_bias=bias, key=k))(jax.random.split(KEY, 3))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        return jax.lax.scan(lambda h, layer: (jax.vmap(eqx.combine(layer, static))(h), None), x, arrays)[0]


def channels_first(layer):
    return eqx.nn.Sequential([eqx.nn.Lambda(lambda x: x.T), layer, eqx.nn.Lambda(lambda x: x)])


EQUINOX = {
    "mixer": lambda: Mixer(eqx.nn.LayerNorm((6, 16)), eqx.nn.MLP(16, 16, 32, 1, key=KEY), _attention()),
    "embedding": lambda: Tokens(eqx.nn.Embedding(32, 16, key=KEY), eqx.nn.Linear(16, 8, key=KEY)),
    "recurrent": lambda: Recurrent(eqx.nn.GRUCell(16, 8, key=KEY), eqx.nn.LSTMCell(8, 8, key=KEY)),
    "ensemble": lambda: Ensemble(True),
    "ensemble without bias": lambda: Ensemble(False),
    "conv": lambda: channels_first(eqx.nn.Conv1d(16, 8, 3, use_bias=False, key=KEY)),
    "transposed": lambda: channels_first(eqx.nn.ConvTranspose1d(16, 8, 3, key=KEY)),
    "grouped": lambda: channels_first(eqx.nn.Conv1d(16, 8, 3, groups=4, key=KEY)),
}


def _attention():
    return eqx.nn.MultiheadAttention(2, 16, key=KEY)


@pytest.mark.parametrize("kind", EQUINOX)
def test_equinox_modules_agree_with_their_trace(kind):
    arrays, static = eqx.partition(EQUINOX[kind](), eqx.is_inexact_array)
    agrees(lambda params, x: eqx.combine(params, static)(x), arrays, X[0], known=True)


class OwnLinear(eqx.Module):
    weight: jax.Array


class OwnScale(eqx.Module):
    weight: jax.Array


def test_modules_of_the_user_are_not_taken_for_those_of_equinox():
    inner = eqx.nn.Linear(8, 8, key=KEY)
    tree = [OwnScale(jnp.ones((8, 8))), inner]
    dense = resolve(tree, "2:4")[0]
    assert dense.reason.startswith("the class OwnScale does not tell its axes")
    with pytest.raises(ValueError, match=r"ambiguous.*OwnLinear is not Equinox's own"):
        resolve([OwnLinear(jnp.ones((8, 16))), inner], "2:4")
    assert resolve([OwnLinear(jnp.ones((8, 16))), inner], "2:4-T")[0].axes == "oi"


NNX = {
    "linear": (lambda rngs: nnx.Linear(16, 8, rngs=rngs), X),
    "general": (lambda rngs: nnx.LinearGeneral((6, 16), (2, 4), axis=(-2, -1), use_bias=False, rngs=rngs), X),
    "conv": (lambda rngs: nnx.Conv(16, 8, (3, 3), use_bias=False, rngs=rngs), IMAGES),
    "transposed": (lambda rngs: nnx.ConvTranspose(16, 8, (3, 3), transpose_kernel=True, rngs=rngs), IMAGES),
    "einsum": (lambda rngs: nnx.Einsum("bti,sion->sbton", (3, 16, 2, 4), rngs=rngs), X),
    "attention": (lambda rngs: nnx.MultiHeadAttention(2, 16, 16, use_bias=False, decode=False, rngs=rngs), X),
}


@pytest.mark.parametrize("kind", NNX)
def test_nnx_modules_agree_with_their_trace(kind):
    build, x = NNX[kind]
    agrees(lambda model, x: model(x), build(nnx.Rngs(0)), x, known=True)
    state = nnx.state(build(nnx.Rngs(0)), nnx.Param)  # has names alone
    assert {leaf.path for leaf in resolve(build(nnx.Rngs(0)), "1:2")} >= set(resolved_state(state))


def resolved_state(state):
    try:
        return [leaf.path for leaf in resolve(state, "1:2")]
    except ValueError as error:
        assert "ambiguous" in str(error)
        return []
