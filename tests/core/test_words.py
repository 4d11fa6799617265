"""Every word that names are read by, alone: what a leaf of that name is, written by hand.

Layouts of public code (`test_layouts.py`) have many signs at once; here one decides, so that none can be lost unseen.
"""

import pytest

from nm_jax._core.names import Siblings, by_name
from nm_jax._core.verdicts import Doubt, Known, Stays

MATRIX, WINDOW = (64, 32), (64, 32, 3, 3)
PYTORCH = {"lstm/weight_ih_l0": (256, 64)}  # what only PyTorch calls so


def verdict(path, shape, bias=None, beside=PYTORCH):
    """What the name of a leaf says, with a bias beside it and others in the tree."""
    module = path.rpartition("/")[0]
    shapes = {path: shape, **beside, **({f"{module}/bias": bias} if bias else {})}
    return by_name(path, shape, Siblings(shapes))


def axes(*args, **kwargs):
    """Its axes where they are known; empty for a doubt and for what stays dense."""
    found = verdict(*args, **kwargs)
    return found.axes if isinstance(found, Known) else ""


def every(text):
    return pytest.mark.parametrize("word", text.split())


@every("embed emb wte wpe wtt lut vocab token tokens tok position positions pos codebook lookup rel_pos my_pos")
def test_tables(word):
    """Whatever words of a layer stand beside it, but for the projection of an embedding."""
    found = verdict(f"m/{word}_fc/weight", MATRIX)
    assert isinstance(found, Stays) and "looked up" in found.reason
    assert axes("m/fc/weight", MATRIX) == "oi"


@every("shared relative_attention_bias embedding")
def test_names_of_tables(word):
    found = verdict(f"m/{word}/weight", MATRIX)
    assert isinstance(found, Stays) and "looked up" in found.reason
    assert axes("m/embed_proj/weight", MATRIX) == "oi"
    assert axes("m/shared_fc/weight", MATRIX) == "oi"


@every("norm my_norm LayerNorm_0 ln ln_1 ln1 my_ln bn bn2 gn")
def test_scales_of_norms(word):
    found = verdict(f"m/{word}/weight", MATRIX)
    assert isinstance(found, Stays) and "normalisation" in found.reason


@every(
    "proj lin linear lin_1 linear1 fc dense head gate up down_1 ff ff1 ffn out output my_out logits classifier w w_q "
    "wq q k v o query key value qkv attn attention layer expert lora l1 patch adapter transform intermediate reduction"
)
def test_linear_layers(word):
    assert axes(f"m/{word}/weight", MATRIX) == "oi"
    found = verdict("m/thing/weight", MATRIX)
    assert isinstance(found, Stays) and "lookup table" in found.reason


@every("c_attn c_proj c_fc c_q")
def test_gpt2s_names(word):
    for leaf in ("weight", "kernel"):
        assert isinstance(verdict(f"h/{word}/{leaf}", (64, 64)), Doubt)
        assert axes(f"h/{word}/{leaf}", (64, 192), (192,)) == "io"
        assert axes(f"h/{word}/{leaf}", (192, 64), (192,)) == "oi"


@every(
    "weight_ih weight_hh weight_ih_l0 weight_hh_l1_reverse in_proj_weight q_proj_weight k_proj_weight v_proj_weight "
    "running_mean num_batches_tracked"
)
def test_what_only_pytorch_calls_so(word):
    assert axes("m/fc/weight", MATRIX, beside={f"other/{word}": (8, 8)}) == "oi"
    assert isinstance(verdict("m/fc/weight", MATRIX, beside={"other/thing": (8, 8)}), Doubt)
    if "weight" in word:
        assert axes(f"m/{word}", (192, 64), beside={}) == "oi"


@every("conv convs conv1 Conv my_conv convolution convTranspose convLayer ConvBlock_0")
def test_names_of_convolutions(word):
    """A window that is too large to be known by its sizes."""
    found = verdict(f"m/{word}/kernel", (13, 13, 64, 32))
    assert "transposed" in found.why if "Transpose" in word else found == Known("bbio", found.source)
    assert "no bias beside it" in verdict("m/convention/kernel", (13, 13, 64, 32)).why


@every("convtranspose deconv upconv upsample upsampling up up1 up_1 my_up")
def test_transposed_convolutions(word):
    """Their kernels lie in either order, which neither a name nor an odd window tells."""
    for path, shape in ((f"m/{word}/weight", WINDOW), (f"m/{word}/kernel", (3, 3, 64, 32))):
        found = verdict(path, shape)
        assert isinstance(found, Doubt) and "transposed" in found.why
    assert axes("m/upper/weight", WINDOW) == "oibb"
    assert isinstance(verdict(f"m/{word}/weight", (64, 64, 3, 3), (64,)), Doubt)
    assert axes("m/upper/weight", (64, 64, 3, 3), (64,)) == "oibb"


@every("down downsample patch patchify stem pool encoder embed in init in_1 my_in in2")
def test_what_goes_down_is_not_transposed(word):
    """Whose windows may have even sizes."""
    assert axes(f"m/{word}/weight", (64, 64, 2, 2), (64,)) == "oibb"
    assert isinstance(verdict("m/thing/weight", (64, 64, 2, 2), (64,)), Doubt)


@every("out o o_proj out_proj output attention_output attn_out proj_out wo")
def test_projections_from_heads(word):
    assert axes(f"m/{word}/kernel", (4, 16, 64), (64,)) == "iio"
    assert isinstance(verdict("m/thing/kernel", (4, 16, 64), (64,)), Doubt)
