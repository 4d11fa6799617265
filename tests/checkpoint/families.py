"""Layouts of well-known models, shrunken, as their own code defines them.

Each line is a name, its shape, and what it is: its axes, or a word of why it stays dense (`...`: whatever is said).
`+n` is a bias of n beside a `weight` or a `kernel`. Widths are 64, heads 4, tokens 256; square matrices are where
mistakes hide.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """A model: `model_type` of its `config.json` ("" without one), `format` of its metadata, and its tensors."""

    model_type: str
    format: str
    tensors: str


_LLAMA = """
    model.embed_tokens.weight 256x64 embedding
    model.layers.0.self_attn.q_proj.weight 64x64 oi
    model.layers.0.self_attn.k_proj.weight 32x64 oi
    model.layers.0.self_attn.o_proj.weight 64x64 oi
    model.layers.0.mlp.gate_proj.weight 128x64 oi
    model.layers.0.mlp.down_proj.weight 64x128 oi
    model.layers.0.input_layernorm.weight 64 1-D:
    lm_head.weight 256x64 head
"""
_GPT2 = """
    transformer.wte.weight 256x64 embedding
    transformer.wpe.weight 64x64 embedding
    transformer.h.0.attn.c_attn.weight 64x192 io +192
    transformer.h.0.attn.c_proj.weight 64x64 io +64
    transformer.h.0.mlp.c_fc.weight 64x256 io +256
    transformer.h.0.mlp.c_proj.weight 256x64 io +64
"""
_NANOGPT = """
    _orig_mod.transformer.wte.weight 256x64 embedding
    _orig_mod.transformer.h.0.attn.c_attn.weight 192x64 oi
    _orig_mod.transformer.h.0.attn.c_proj.weight 64x64 oi
    _orig_mod.transformer.h.0.mlp.c_fc.weight 256x64 oi
    _orig_mod.transformer.h.0.mlp.c_proj.weight 64x256 oi
    _orig_mod.lm_head.weight 256x64 head
"""

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "pt", _LLAMA),
    "llama without config": Family("", "", _LLAMA),
    "llama of mlx": Family("llama", "mlx", _LLAMA),
    "gpt2": Family("gpt2", "pt", _GPT2),
    "gpt2 without config": Family("", "", _GPT2),
    "gpt2, square only": Family("gpt2", "pt", "h.0.attn.c_proj.weight 64x64 io +64"),
    "gpt2 of mlx": Family("gpt2", "mlx", "h.0.attn.c_proj.weight 64x64 oi +64\nh.0.attn.c_attn.weight 192x64 oi +192"),
    "nanogpt": Family("", "", _NANOGPT),
    "gpt_bigcode": Family(
        "gpt_bigcode",
        "pt",
        """
        transformer.h.0.attn.c_attn.weight 96x64 oi +96
        transformer.h.0.attn.c_proj.weight 64x64 oi +64
        """,
    ),
    "imagegpt": Family("imagegpt", "pt", "transformer.h.0.attn.c_proj.weight 64x64 io +64"),
    "bert": Family(
        "bert",
        "pt",
        """
        bert.embeddings.word_embeddings.weight 256x64 embedding
        bert.embeddings.position_embeddings.weight 64x64 embedding
        bert.embeddings.token_type_embeddings.weight 2x64 embedding
        bert.embeddings.LayerNorm.weight 64 1-D:
        bert.encoder.layer.0.attention.self.query.weight 64x64 oi +64
        bert.encoder.layer.0.attention.output.dense.weight 64x64 oi +64
        bert.encoder.layer.0.intermediate.dense.weight 128x64 oi +128
        bert.pooler.dense.weight 64x64 oi +64
        classifier.weight 4x64 head +4
        """,
    ),
    "t5": Family(
        "t5",
        "pt",
        """
        shared.weight 256x64 table
        encoder.block.0.layer.0.SelfAttention.q.weight 64x64 oi
        encoder.block.0.layer.0.SelfAttention.k.weight 64x64 oi
        encoder.block.0.layer.0.SelfAttention.v.weight 64x64 oi
        encoder.block.0.layer.0.SelfAttention.o.weight 64x64 oi
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight 32x4 table
        encoder.block.0.layer.1.DenseReluDense.wi_0.weight 128x64 oi
        encoder.block.0.layer.1.DenseReluDense.wo.weight 64x128 oi
        """,
    ),
    "ctrl": Family("ctrl", "pt", "transformer.w.weight 256x64 embedding\ntransformer.h.0.ffn.0.weight 128x64 oi +128"),
    "xlnet": Family(
        "xlnet",
        "pt",
        """
        transformer.word_embedding.weight 256x64 embedding
        transformer.layer.0.rel_attn.q 64x4x16 ioo
        transformer.layer.0.rel_attn.o 64x4x16 oii
        transformer.layer.0.rel_attn.r_w_bias 4x16 ...
        transformer.layer.0.ff.layer_1.weight 128x64 oi +128
        """,
    ),
    "mixtral": Family(
        "mixtral",
        "pt",
        """
        model.layers.0.block_sparse_moe.gate.weight 8x64 router
        model.layers.0.block_sparse_moe.experts.0.w1.weight 128x64 oi
        model.layers.0.block_sparse_moe.experts.0.w2.weight 64x128 oi
        """,
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "pt",
        """
        model.layers.0.mlp.router.weight 4x64 router +4
        model.layers.0.mlp.experts.gate_up_proj 4x64x128 bio
        model.layers.0.mlp.experts.gate_up_proj_bias 4x128 ...
        model.layers.0.mlp.experts.down_proj 4x64x64 bio
        model.layers.0.mlp.experts.down_proj_bias 4x64 ...
        """,
    ),
    "granitemoe": Family(
        "granitemoe",
        "pt",
        """
        model.layers.0.block_sparse_moe.input_linear.weight 4x256x64 boi
        model.layers.0.block_sparse_moe.output_linear.weight 4x64x128 boi
        model.layers.0.block_sparse_moe.router.layer.weight 4x64 router
        """,
    ),
    "llama4": Family(
        "llama4",
        "pt",
        """
        language_model.model.layers.0.feed_forward.experts.gate_up_proj 4x64x256 bio
        language_model.model.layers.0.feed_forward.experts.down_proj 4x128x64 bio
        """,
    ),
    "mlx experts": Family("qwen3_moe", "mlx", "model.layers.0.mlp.switch_mlp.up_proj.weight 4x64x64 boi"),
    "mamba": Family(
        "mamba",
        "pt",
        """
        backbone.embeddings.weight 256x64 embedding
        backbone.layers.0.mixer.A_log 128x16 ...
        backbone.layers.0.mixer.conv1d.weight 128x1x4 depthwise +128
        backbone.layers.0.mixer.in_proj.weight 256x64 oi
        backbone.layers.0.mixer.dt_proj.weight 128x4 oi +128
        """,
    ),
    "whisper": Family(
        "whisper",
        "pt",
        """
        model.encoder.conv1.weight 64x80x3 oib +64
        model.encoder.conv2.weight 64x64x3 oib +64
        model.encoder.embed_positions.weight 64x64 embedding
        model.decoder.layers.0.self_attn.k_proj.weight 64x64 oi
        """,
    ),
    "wav2vec2": Family(
        "wav2vec2",
        "pt",
        """
        wav2vec2.feature_extractor.conv_layers.1.conv.weight 32x32x3 oib
        wav2vec2.feature_extractor.conv_layers.6.conv.weight 32x32x2 oib
        wav2vec2.encoder.pos_conv_embed.conv.weight_g 1x1x16 norm
        wav2vec2.encoder.pos_conv_embed.conv.weight_v 64x16x16 norm
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1 64x16x16 parametrization
        """,
    ),
    "sam": Family(
        "sam",
        "pt",
        """
        mask_decoder.upscale_conv1.weight 64x64x2x2 iobb +64
        mask_decoder.mask_tokens.weight 4x64 table
        prompt_encoder.point_embed.0.weight 1x64 embedding
        prompt_encoder.mask_embed.conv1.weight 4x4x2x2 oibb +4
        vision_encoder.layers.0.attn.rel_pos_h 7x16 ...
        vision_encoder.neck.conv1.weight 32x64x1x1 oibb
        """,
    ),
    "detr": Family(
        "",
        "",
        """
        transformer.encoder.layers.0.self_attn.in_proj_weight 192x64 oi
        transformer.encoder.layers.0.self_attn.out_proj.weight 64x64 oi +64
        transformer.encoder.layers.0.linear1.weight 128x64 oi +128
        query_embed.weight 16x64 embedding
        bbox_embed.layers.0.weight 64x64 oi +64
        bbox_embed.layers.1.weight 4x64 head +4
        """,
    ),
    "vit of timm": Family(
        "",
        "",
        """
        cls_token 1x1x64 ...
        pos_embed 1x17x64 ...
        patch_embed.proj.weight 64x4x8x8 oibb +64
        blocks.0.attn.qkv.weight 192x64 oi +192
        blocks.0.attn.proj.weight 64x64 oi +64
        head.weight 8x64 head +8
        """,
    ),
    "resnet": Family(
        "",
        "",
        """
        conv1.weight 64x4x7x7 oibb
        layer1.0.conv1.weight 64x64x3x3 oibb
        layer2.0.downsample.0.weight 128x64x1x1 oibb
        layer1.0.bn1.weight 64 1-D:
        fc.weight 1000x512 layer +1000
        """,
    ),
    "densenet": Family(
        "",
        "",
        """
        features.denseblock1.denselayer1.norm1.weight 64 1-D:
        features.denseblock1.denselayer1.conv1.weight 128x64x1x1 oibb
        features.denseblock1.denselayer1.conv2.weight 32x128x3x3 oibb
        """,
    ),
    "convnext": Family(
        "",
        "",
        """
        stages.1.downsample.1.weight 32x16x2x2 oibb +32
        stages.1.blocks.0.conv_dw.weight 32x1x7x7 depthwise +32
        stages.1.blocks.0.mlp.fc1.weight 128x32 oi +128
        """,
    ),
    "stable diffusion": Family(
        "",
        "",
        """
        up_blocks.0.upsamplers.0.conv.weight 64x64x3x3 oibb +64
        up_blocks.0.resnets.0.conv1.weight 64x128x3x3 oibb +64
        up_blocks.0.resnets.0.conv2.weight 64x64x3x3 oibb +64
        up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight 64x64 oi +64
        time_embedding.linear_1.weight 128x64 oi +128
        decoder.up.1.upsample.conv.weight 64x64x3x3 oibb +64
        """,
    ),
    "unet": Family(
        "",
        "",
        """
        down.0.weight 64x32x3x3 oibb +64
        up.0.weight 64x32x2x2 iobb +32
        up.1.weight 64x64x2x2 convolution +64
        up.2.weight 32x8x4x4 convolution +32
        up.3.weight 32x8x4x4 iobb +16
        up.4.weight 64x64x3x3 convolution +64
        deconv.weight 64x64x3x3 iobb
        0.weight 64x64x3x3 convolution +64
        block.up.conv.weight 64x64x2x2 convolution +64
        """,
    ),
    "dcgan": Family("", "", "main.0.weight 64x64x4x4 convolution\nmain.3.weight 64x32x4x4 convolution"),
    "language model of torch": Family(
        "",
        "",
        """
        encoder.weight 256x64 table
        rnn.weight_ih_l0 256x64 oi
        rnn.weight_hh_l0_reverse 256x64 oi
        decoder.weight 256x64 layer +256
        """,
    ),
    "lora": Family(
        "",
        "pt",
        """
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight 8x64 oi
        base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight 64x8 oi
        base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight 64x64 oi
        """,
    ),
    "quantised": Family(
        "llama",
        "pt",
        """
        model.layers.0.mlp.up_proj.weight 64x64 quantised
        model.layers.0.mlp.up_proj.weight_scale_inv 4x4 quantised
        """,
    ),
    "mlx": Family(
        "",
        "mlx",
        """
        conv.weight 64x4x4x32 obbi +64
        conv1d.weight 64x3x32 obi
        up.weight 64x2x2x64 obbi +64
        encoder.weight 256x64 table
        model.layers.0.mlp.experts.up_proj.weight 4x64x32 boi
        attn.q_proj.lora_a 64x8 io
        """,
    ),
    "flax": Family(
        "",
        "",
        """
        params.Embed_0.embedding 256x64 embedding
        params.Dense_0.kernel 64x64 io +64
        params.Conv_0.kernel 3x3x32x64 bbio +64
        params.attn.query.kernel 64x4x16 ioo
        params.attn.out.kernel 4x16x64 iio
        params.layers.mlp.up.kernel 3x64x128 ...
        params.fused.qkv.kernel 64x3x4x16 ...
        """,
    ),
    "flax, stacked by scan": Family(
        "",
        "",
        """
        layers.attn.query.kernel 4x64x64 bio
        layers.attn.out.kernel 4x64x64 bio
        """,
    ),
    "graphs": Family("", "", "conv1.weight 128x64 io +64\nconv2.weight 64x64 graph +64\nconv1.lin.weight 64x64 oi"),
    "what says nothing": Family(
        "",
        "",
        """
        memory.weight 64x64 table
        query.weight 64x64 table
        P.weight 64x64 table
        stack.weight 8x64x64 bilinear
        thing 64x64 ...
        thing2.weight 64x64 square +64
        item_factors.weight 100x64 table
        router.scale.weight 64x64 router
        """,
    ),
}
