"""Every word and every line of the tables of module layouts, alone: what a tensor of that name is, written by hand.

Families (`test_knowledge.py`) have many signs at once; here one decides, so that no entry can be lost or turned unseen.
"""

import itertools

import pytest

from nm_jax.checkpoint.knowledge import Contents, identify

MATRIX, WINDOW = (64, 32), (64, 32, 3, 3)


def finding(name, shape=MATRIX, model_type="", file_format="", **beside):
    """What is known of a tensor, among others whose names are written with `__` for dots."""
    others = {other.replace("__", "."): size for other, size in beside.items()}
    config = {"model_type": model_type} if model_type else None
    contents = Contents({name: shape, **others}, config, {"format": file_format} if file_format else None)
    return identify(contents, name)


def axes(*args, **kwargs):
    """Its axes, with `?` where the orientation is open; empty if they are not known."""
    found = finding(*args, **kwargs).axes
    return "" if found is None else found.axes + "?" * found.either


def kept(*args, **kwargs):
    """Why it stays dense; empty if nothing speaks for that."""
    found = finding(*args, **kwargs).kept
    return "" if found is None else found.reason


def every(text):
    return pytest.mark.parametrize("word", text.split())


# ------------------------------------------------------------------------------------------------------ lookup tables


@every(
    "emb embs embd embds embed embeds embedded embedding embeddings embedder codebook codebooks codes codeword "
    "codewords centroid centroids vocab lookup table tables token tokens queries positional position positions pos "
    "pe ape rpe rel relative relpos"
)
def test_words_of_tables(word):
    assert "looked up" in kept(f"m.my_{word}_bank.weight")
    assert "looked up" not in kept(
        f"m.my_{word}_bank.weight", m__my_x_bank__bias=(64,), **{f"m__my_{word}_bank__bias": (64,)}
    )


@every("shared wte wpe query_embed query_feat query_feat_2 token mask_tokens mask_token object_queries proj_tokens")
def test_names_of_tables(word):
    assert "looked up" in kept(f"m.{word}.weight")


@every(
    "word_embedding word_embeddings position_embeddings token_type_embeddings tok_embeddings segment_embeddings "
    "token_embeddings embed_tokens embed_positions wte wpe embedding_table"
)
def test_tables_whatever_is_beside_them(word):
    assert "looked up" in kept(f"m.{word}.weight", **{f"m__{word}__bias": (64,)})


@every(
    "proj projs projection projections projector project linear lin dense fc conv convs convd convolution map "
    "mapper mapping transform"
)
def test_words_of_layers_beside_words_of_tables(word):
    assert "looked up" not in kept(f"m.emb_{word}.weight")


@every("mlp ffn")
def test_the_embedding_of_a_branch_is_a_table(word):
    assert "looked up" in kept(f"m.{word}_embedding.weight")
    assert "looked up" not in kept(f"m.{word}_embedding_proj.weight")


@every("emb embed embedding embeddings embed_tokens my_tok_embeddings token_embedding words_emb word_embed wte shared")
def test_a_head_is_as_long_as_the_table_of_tokens(word):
    assert "as long as the table of tokens" in kept("readout.weight", (256, 64), **{f"m__{word}__weight": (256, 64)})


def test_numbered_tables_of_tokens():
    beside = {"word_emb__emb_layers__0__weight": (256, 64)}
    assert "as long as the table of tokens" in kept("m.readout.weight", (256, 64), **beside)


# ---------------------------------------------------------------------------------- what is not, or not only, a weight


@every("weight_scale weight_scale_inv scales absmax SCB weight_zero_point qweight qzeros")
def test_scales_of_quantised_weights(word):
    assert "quantised" in kept("m.q_proj.weight", **{f"m__q_proj__{word}": (64, 1)})
    assert "quantised" in kept(f"m.q_proj.{word}")


@every("weight_g weight_v weight_u weight_orig parametrizations.weight.original")
def test_reparametrised_weights(word):
    assert "computed from it" in kept(f"m.q_proj.{word}")
    if "original" in word:
        assert all("computed from it" in kept(f"m.q_proj.{word}{k}") for k in (0, 1))
        assert kept("m.q_proj.original") == ""


@every("router my_router routers gate gating wg switch shared_expert_gate moe_gate")
def test_routers(word):
    assert "router" in kept(f"layers.0.moe.{word}.weight", (8, 64))


@every(
    "lm_head lmhead head heads my_head predictions classifier classifiers score logit logits unembed embed_out "
    "seq_relationship qa_output qa_outputs class_embed bbox_embed class_predictor bbox_predictor "
    "class_labels_classifier output_layer cls_score bbox_pred classification_layer"
)
def test_heads(word):
    assert kept(f"m.{word}.weight") == "an output head"
    assert kept(f"m.q_{word}.weight") == ("" if "head" in word[:5] else "an output head")


@every(
    "fc my_fc outproj out_proj proj projection proj_out linear out decoder classifier logits predictor pred output "
    "layers"
)
def test_the_last_layer_of_a_head(word):
    assert kept(f"m.head.{word}.weight") == "an output head"


@every("fc output decoder to_out out proj_out last_linear linear_out final final_layer")
def test_output_layers_at_the_root(word):
    assert kept(f"{word}.weight", m__q_proj__weight=MATRIX) == "an output layer"


@every("_orig_mod module base_layer default modules_to_save original_module")
def test_wrappers_are_no_part_of_a_name(word):
    assert kept(f"{word}.fc.weight", m__q_proj__weight=MATRIX) == "an output layer"
    assert axes(f"m.q_proj.{word}.weight") == "oi"


# -------------------------------------------------------------------------------------------------------- linear layers


@every(
    "proj projs projection projections projector project linear lin dense fc fcs qkv kv qk wqkv query key value "
    "receptance reduction intermediate output expansion adapter lora transform mapper mapping attn attention head "
    "heads classifier classifiers score logits unembed router gate gating"
)
def test_words_of_linear_layers(word):
    assert axes(f"m.my_{word}_part.weight") == "oi"
    assert axes("m.my_part.weight") == ""


@every(
    "wq w_q wk wv wo wi wqkv wpack w_kv wq_a wq_b w_up w_down w_gate w1 w3 wi_0 to_q up down gate in my_in out my_out"
)
def test_names_of_linear_layers(word):
    assert axes(f"m.{word}.weight") == "oi"


@every("q k v o r g query key value")
def test_names_in_attention(word):
    assert axes(f"m.attn.{word}.weight") == "oi"
    assert axes(f"m.{word}.weight") == ""  # may be a table of queries


@every("mlp mlps ffn ff feedforward layer layers net")
def test_branches_are_layers_in_a_stack_only(word):
    assert axes(f"blocks.0.{word}.weight") == "oi"
    assert axes(f"m.user_{word}.weight") == ""


@every("a b c x y l1 l12")
def test_meaningless_names_in_no_module(word):
    assert axes(f"{word}.weight") == "oi"
    assert axes(f"{word}.weight", WINDOW) == "oibb"
    assert axes(f"m.{word}.weight") == ""


@every("patch_embed my_patch_embedding patches_embed patch_projection patchifier patchify encoder_to_decoder")
def test_layers_of_patches(word):
    assert axes(f"m.{word}.weight") == "oi"


@every("predictions.dense cls.predictions.dense")
def test_beside_the_table_of_mobilebert(word):
    assert axes(f"{word}.weight", (64, 64)) == "oi?"
    assert axes(f"{word}.weight", (64, 64), model_type="mobilebert") == "io"
    assert axes(f"{word.replace('predictions', 'mypredictions')}.weight", (64, 64)) == "oi"


@every("c_attn c_fc c_enc_kv c_proj q_attn")
def test_gpt2s_names(word):
    """(in, out) or (out, in), which widening tells; with a `kernel` of Flax likewise."""
    assert axes(f"h.0.{word}.weight", (64, 64)) == "oi?"
    assert axes(f"h.0.{word}.weight", (64, 64), file_format="mlx") == "oi"
    assert axes(f"h.0.{word}.kernel", (64, 64)) == "io?"
    if word in ("c_attn", "c_fc", "c_enc_kv"):
        assert axes(f"h.0.{word}.weight", (64, 192)) == "io"
        assert axes(f"h.0.{word}.weight", (192, 64)) == "oi"


# --------------------------------------------------------------------------------------------------------- convolutions


@every(
    "conv convs convd convolution pointwise depthwise deconv tconv convtranspose downsampler downsamplers upsampler "
    "upsamplers downsampling downsample upsample patch patches stem"
)
def test_words_of_convolutions_of_one_dimension(word):
    assert axes(f"m.my_{word}_part.weight", (64, 32, 3)) != ""
    assert axes("m.my_part.weight", (64, 32, 3)) == ""


@every(
    "deconv deconvolution transpose transposed convtranspose2d convt convtr tconv tconvs transconv transconvs "
    "transpconv"
)
def test_words_of_transposed_convolutions(word):
    assert axes(f"m.my_{word}.weight", WINDOW) == "iobb"


@every(
    "up ups upsampler upsamplers upsampling upsample upscale upscaling upconv unpool unpooling resize trans decoder "
    "generator gen netg dec"
)
def test_what_goes_upwards_may_be_transposed(word):
    assert axes(f"{word}.part.conv.weight", WINDOW).endswith("?")
    assert axes("part.conv.weight", WINDOW) == "oibb"


@every(
    "down downsampler downsamplers downsampling downsample subsampling patch patches stem sr merging reduction "
    "encoder extractor features backbone downsamp transition stage stages level levels trunk fuse classifier"
)
def test_what_goes_downwards_is_not(word):
    assert axes(f"{word}.part.thing.weight", WINDOW) == "oibb"
    assert axes("part.thing.weight", WINDOW) == "oibb?"


@every(
    "conv myconv2 cv proj projs projection shortcut squeeze expand reduce fpn neck inc mask_fcn1 pointwise lateral sr"
)
def test_words_of_ordinary_convolutions(word):
    assert axes(f"part.{word}.weight", WINDOW) == "oibb"


@every(
    "res.conv res2.x.conv res_1.conv resnets.0.conv1 my_resblock.conv residual.conv resunit.conv mid.conv "
    "mid_1.projection middle.conv block2.my_conv block2.conv.0 block2.conv.conv1 upsample.conv upsample.0.conv "
    "upsample2.my_conv.conv resample.1 in_layers.0 out_layers.3 conv_shortcut nin_shortcut nin_shortcut.conv "
    "conv_in conv_out my_conv_in.conv quant_conv post_quant_conv temp_conv1 temp_conv1.2"
)
def test_ordinary_convolutions_in_what_goes_upwards(word):
    assert axes(f"decoder.{word}.weight", WINDOW) == "oibb"


@every("features.conv pyramid.conv resize.conv compression.conv presence.x.conv")
def test_no_residual_blocks(word):
    """Which may hold transposed convolutions."""
    assert axes(f"decoder.{word}.weight", WINDOW) == "oibb?"


@pytest.mark.parametrize("start", ["", "m."])
def test_the_upscaling_of_sam(start):
    assert axes(f"{start}mask_decoder.upscale_conv1.weight", (64, 32, 2, 2)) == "iobb"
    assert axes("my_mask_decoder.upscale_conv1.weight", (64, 32, 2, 2)) == "iobb?"


@pytest.mark.parametrize("window", [(3,), (3, 3), (3, 3, 3)])
def test_convolutions_of_mlx_and_flax(window):
    letters = "b" * len(window)
    assert axes("m.conv.weight", (64, *window, 32), file_format="mlx") == f"o{letters}i"
    assert axes("m.conv.kernel", (*window, 64, 32)) == f"{letters}io"


def test_biases_of_flax():
    """Beside kernels of three dimensions: heads, layers stacked by scan, and what comes back from heads."""
    assert axes("m.query.kernel", (64, 4, 16), m__query__bias=(4, 16)) == "ioo"
    assert axes("m.fc.kernel", (4, 64, 32), m__fc__bias=(4, 32)) == "bio"
    for name in ("out", "o_proj"):
        assert axes(f"m.{name}.kernel", (4, 16, 64), **{f"m__{name}__bias": (64,)}) == "iio"
    assert axes("m.thing.kernel", (4, 16, 64), m__thing__bias=(64,)) == ""
    assert axes("m.fc.kernel", m__fc__bias=(32,)) == "io"
    assert axes("m.fc.kernel", m__fc__bias=(64,)) == "oi"


# -------------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("entering", "leaving"),
    [
        ("gate_up_proj", "down_proj"),
        ("gate_and_up_proj", "down_proj"),
        ("input_linear.weight", "output_linear.weight"),
        ("w13", "w2"),
        ("fc1.weight", "fc2.weight"),
    ],
)
def test_pairs_of_experts(entering, leaving):
    for wide, narrow, known in (((4, 64, 256), (4, 128, 64), "bio"), ((4, 256, 64), (4, 64, 128), "boi")):
        assert axes(f"part.{entering}", wide, **{f"part__{leaving.replace('.', '__')}": narrow}) == known
        assert axes(f"part.{leaving}", narrow, **{f"part__{entering.replace('.', '__')}": wide}) == known


@every("gate_proj up_proj down_proj w1 w2 w3 v1 wi wi_1 wo fc1 fc2 up down gate")
def test_experts_with_a_bias(word):
    assert axes(f"experts.{word}", (4, 64, 128), **{f"experts__{word}_bias": (4, 128)}) == "bio"
    assert axes(f"experts.{word}.weight", (4, 64, 128), **{f"experts__{word}__bias": (4, 64)}) == "boi"


@every("router.weight router.layer.weight gate.weight router.proj.weight")
def test_experts_with_a_router(word):
    router = {f"moe__{word.replace('.', '__')}": (4, 64)}
    for inputs, outputs in itertools.product(("up_proj", "w1", "gate_proj"), ("down_proj", "w2", "wo", "fc2", "down")):
        assert axes(f"moe.experts.{inputs}", (4, 64, 128), **router) == "bio"
        assert axes(f"moe.experts.{outputs}", (4, 64, 128), **router) == "boi"


# -------------------------------------------------------------------------------------------------------- architectures

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn", "c_enc_kv")
ARCHITECTURES = [  # model types, names, shape, axes
    ("gpt2 openai-gpt imagegpt decision_transformer jukebox_prior", CONV1D, (64, 64), "io"),
    ("gpt_bigcode gpt_neo starcoder2 qwen", CONV1D, (64, 64), "oi"),
    ("xlnet", [f"rel_attn.{name}" for name in "qkvr"], (64, 4, 16), "ioo"),
    ("xlnet", ["rel_attn.o"], (64, 4, 16), "oii"),
    ("sam sam2 edgetam", ["upscale_conv1", "upscale_conv2"], (64, 32, 2, 2), "iobb"),
    ("beit data2vec-vision", ["fpn1.0", "fpn1.3", "fpn2.0"], (64, 32, 2, 2), "iobb"),
    ("dpt depth_anything zoedepth chmv2", ["layers.0.resize", "layers.1.resize"], (64, 32, 4, 4), "iobb"),
    ("dpt prompt_depth_anything zoedepth chmv2", ["layers.3.resize"], (64, 32, 4, 4), "oibb"),
    ("canine", ["chars_to_molecules.conv"], (64, 32, 4), "oib"),
    ("got_ocr2", ["conv_upsampler1", "conv_upsampler2"], (64, 32, 4, 4), "oibb"),
    ("vits speecht5_hifigan fastspeech2_conformer seamless_m4t", ["upsampler.0"], (64, 32, 4), "iob"),
]


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "known"),
    [
        (model_type, name, shape, known)
        for types, names, shape, known in ARCHITECTURES
        for model_type, name in itertools.product(types.split(), names)
    ],
)
def test_architectures(model_type, name, shape, known):
    leaf = name if name.startswith("rel_attn") else f"{name}.weight"
    for start in ("", "model.part."):
        assert axes(start + leaf, shape, model_type=model_type, file_format="pt") == known
        assert finding(start + leaf, shape, model_type=model_type).axes.source.startswith(f"config: {model_type}, ")
        assert axes(start + leaf, shape) != known or name.startswith("upscale")


def test_the_table_of_ctrl():
    assert "looked up" in kept("transformer.w.weight", model_type="ctrl")
    assert "looked up" not in kept("transformer.w.weight", model_type="llama")
