"""Layouts of models of recent years, and of those whose tables and heads have names of their own, as in `families`."""

from tests.checkpoint.families_more import blocks

_TEXT = """\
[mamba2 hf | mamba2 | pt]
backbone.embeddings.weight 256x64 embedding
backbone.layers.0.mixer.in_proj.weight 296x64 oi
backbone.layers.0.mixer.conv1d.weight 160x1x4 ... +160
backbone.layers.0.mixer.norm.weight 128 1-D:
backbone.layers.0.mixer.out_proj.weight 64x128 oi
lm_head.weight 256x64 head
[rwkv7 original |  | ]
emb.weight 256x64 embedding
blocks.0.att.w1 64x32 ...
blocks.0.att.w2 32x64 ...
blocks.0.att.g1 64x64 ...
blocks.0.att.r_k 4x16 ...
blocks.0.att.receptance.weight 64x64 oi
blocks.0.att.x_r 1x1x64 ...
blocks.0.ffn.value.weight 64x256 oi
head.weight 256x64 head
[swinv2 timm |  | ]
patch_embed.proj.weight 32x3x4x4 oibb +32
layers.0.blocks.0.attn.logit_scale 4x1x1 ...
layers.0.blocks.0.attn.cpb_mlp.0.weight 512x2 oi +512
layers.0.blocks.0.attn.cpb_mlp.2.weight 4x512 oi
layers.0.blocks.0.attn.qkv.weight 96x32 oi
layers.0.blocks.0.attn.proj.weight 32x32 oi +32
layers.1.downsample.reduction.weight 64x128 oi
head.fc.weight 8x64 head +8
[convnextv2 fb |  | ]
downsample_layers.0.0.weight 32x3x4x4 oibb +32
downsample_layers.1.1.weight 64x32x2x2 oibb +64
stages.0.0.dwconv.weight 32x1x7x7 ... +32
stages.0.0.pwconv1.weight 128x32 oi +128
stages.0.0.grn.gamma 1x1x1x128 ...
stages.0.0.pwconv2.weight 32x128 oi +32
head.weight 8x64 head +8
[hubert fairseq |  | ]
feature_extractor.conv_layers.0.0.weight 32x1x10 ...
feature_extractor.conv_layers.1.0.weight 32x32x3 oib
feature_extractor.conv_layers.5.0.weight 32x32x2 oib
encoder.pos_conv.0.weight_g 1x1x128 ...
encoder.pos_conv.0.weight_v 64x4x128 ... +64
mask_emb 64 1-D:
label_embs_concat 504x32 ...
post_extract_proj.weight 64x32 oi +64
encoder.layers.0.self_attn.k_proj.weight 64x64 oi +64
encoder.layers.0.fc1.weight 256x64 oi +256
final_proj.weight 32x64 oi +32
[wavlm | wavlm | pt]
encoder.layers.0.attention.rel_attn_embed.weight 320x4 embedding
encoder.layers.0.attention.gru_rel_pos_linear.weight 8x16 oi +8
encoder.layers.0.attention.gru_rel_pos_const 1x4x1x1 ...
[dinov2 registers | dinov2_with_registers | pt]
embeddings.cls_token 1x1x64 ...
embeddings.mask_token 1x64 ...
embeddings.register_tokens 1x4x64 ...
embeddings.position_embeddings 1x257x64 ...
embeddings.patch_embeddings.projection.weight 64x3x14x14 oibb +64
encoder.layer.0.attention.attention.query.weight 64x64 oi +64
encoder.layer.0.mlp.weights_in.weight 344x64 oi +344
encoder.layer.0.mlp.weights_out.weight 64x172 oi +64
[sam2 meta |  | ]
image_encoder.trunk.pos_embed 1x64x8x8 ...
image_encoder.trunk.patch_embed.proj.weight 64x3x7x7 oibb +64
image_encoder.trunk.blocks.0.attn.qkv.weight 192x64 oi +192
image_encoder.neck.convs.0.conv.weight 64x256x1x1 oibb +64
sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix 2x32 ...
sam_prompt_encoder.point_embeddings.0.weight 1x64 ...
sam_prompt_encoder.not_a_point_embed.weight 1x64 ...
sam_prompt_encoder.mask_downscaling.0.weight 4x1x2x2 ... +4
sam_prompt_encoder.mask_downscaling.3.weight 16x4x2x2 oibb +16
sam_mask_decoder.output_upscaling.0.weight 64x16x2x2 iobb +16
sam_mask_decoder.output_upscaling.3.weight 16x8x2x2 iobb +8
sam_mask_decoder.conv_s0.weight 8x64x1x1 oibb +8
sam_mask_decoder.obj_score_token.weight 1x64 ...
sam_mask_decoder.mask_tokens.weight 4x64 table
sam_mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight 32x64 oi +32
sam_mask_decoder.output_hypernetworks_mlps.0.layers.0.weight 64x64 oi +64
maskmem_tpos_enc 7x1x1x16 ...
memory_encoder.fuser.layers.0.pwconv1.weight 256x64 oi +256
memory_attention.layers.0.self_attn.q_proj.weight 64x64 oi +64
[sd3 |  | pt]
pos_embed.proj.weight 64x16x2x2 oibb +64
pos_embed.pos_embed 1x36864x64 ...
transformer_blocks.0.attn.add_k_proj.weight 64x64 oi +64
transformer_blocks.0.norm1.linear.weight 384x64 oi +384
transformer_blocks.0.ff.net.0.proj.weight 256x64 oi +256
transformer_blocks.0.ff_context.net.2.weight 64x256 oi +64
time_text_embed.timestep_embedder.linear_1.weight 64x32 oi +64
context_embedder.weight 64x128 oi +64
norm_out.linear.weight 128x64 oi +128
proj_out.weight 64x64 ... +64
[gpt-oss original |  | ]
block.0.attn.qkv.weight 96x64 oi +96
block.0.attn.sinks 4 1-D:
block.0.mlp.gate.weight 4x64 router +4
block.0.mlp.mlp1_weight 4x128x64 ...
block.0.mlp.mlp1_bias 4x128 ...
block.0.mlp.mlp2_weight 4x64x64 ...
embedding.weight 256x64 embedding
unembedding.weight 256x64 ...
[qwen3 next | qwen3_next | pt]
model.layers.0.linear_attn.in_proj_qkvz.weight 384x64 oi
model.layers.0.linear_attn.in_proj_ba.weight 16x64 oi
model.layers.0.linear_attn.conv1d.weight 256x1x4 ...
model.layers.0.linear_attn.out_proj.weight 64x128 oi
model.layers.0.linear_attn.norm.weight 16 1-D:
model.layers.0.mlp.gate.weight 8x64 router
model.layers.0.mlp.shared_expert_gate.weight 1x64 router
model.layers.0.mlp.shared_expert.up_proj.weight 32x64 oi
model.layers.0.mlp.experts.0.gate_proj.weight 32x64 oi
[siglip | siglip | pt]
vision_model.head.probe 1x1x64 ...
vision_model.head.attention.in_proj_weight 192x64 oi
vision_model.head.attention.out_proj.weight 64x64 oi +64
vision_model.head.mlp.fc1.weight 256x64 oi +256
vision_model.embeddings.patch_embedding.weight 64x3x16x16 oibb +64
text_model.head.weight 64x64 head +64
[perceiver | perceiver | pt]
perceiver.embeddings.latents 256x64 ...
perceiver.input_preprocessor.embeddings.weight 262x64 embedding
perceiver.input_preprocessor.position_embeddings.weight 2048x64 embedding
perceiver.encoder.cross_attention.attention.self.query.weight 64x64 oi +64
perceiver.encoder.cross_attention.mlp.dense1.weight 64x64 oi +64
perceiver.decoder.output_position_encodings.position_embeddings 2048x64 ...
perceiver.decoder.decoding_cross_attention.attention.output.dense.weight 64x64 oi +64
[perceiver resampler |  | ]
latents 64x64 ...
media_pos_emb 4x1x64 ...
layers.0.0.to_q.weight 64x64 oi
layers.0.0.to_kv.weight 128x64 oi
layers.0.1.1.weight 256x64 oi
layers.0.1.3.weight 64x256 oi
[maxvit timm |  | ]
stem.conv1.weight 32x3x3x3 oibb +32
stages.0.blocks.0.conv.conv1_1x1.weight 128x32x1x1 oibb
stages.0.blocks.0.conv.conv2_kxk.weight 128x1x3x3 ...
stages.0.blocks.0.conv.se.fc1.weight 8x128x1x1 oibb +8
stages.0.blocks.0.conv.conv3_1x1.weight 32x128x1x1 oibb +32
stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table 4x13x13 ...
stages.0.blocks.0.attn_block.attn.qkv.weight 96x32 oi +96
stages.0.blocks.0.attn_grid.mlp.fc2.weight 32x128 oi +32
head.fc.weight 8x64 head +8
[olmo original |  | ]
transformer.wte.weight 256x64 embedding
transformer.blocks.0.att_proj.weight 192x64 oi
transformer.blocks.0.attn_out.weight 64x64 oi
transformer.blocks.0.ff_proj.weight 256x64 oi
transformer.blocks.0.ff_out.weight 64x128 oi
transformer.ff_out.weight 256x64 head
[fairseq lm |  | ]
decoder.embed_tokens.weight 256x64 embedding
decoder.embed_positions.weight 66x64 embedding
decoder.layers.0.self_attn.k_proj.weight 64x64 oi +64
decoder.layers.0.fc1.weight 256x64 oi +256
decoder.output_projection.weight 256x64 head
[xlm | xlm | pt]
transformer.embeddings.weight 256x64 embedding
transformer.position_embeddings.weight 64x64 embedding
transformer.attentions.0.q_lin.weight 64x64 oi +64
transformer.ffns.0.lin1.weight 256x64 oi +256
pred_layer.proj.weight 256x64 head +256
[mobilebert | mobilebert | pt]
mobilebert.embeddings.word_embeddings.weight 256x16 embedding
mobilebert.embeddings.embedding_transformation.weight 64x48 oi +64
mobilebert.encoder.layer.0.bottleneck.input.dense.weight 16x64 oi +16
mobilebert.encoder.layer.0.ffn.0.intermediate.dense.weight 64x16 oi +64
cls.predictions.transform.dense.weight 64x64 oi +64
cls.predictions.decoder.weight 256x16 head
cls.predictions.dense.weight 48x256 head
[transfo-xl | transfo-xl | pt]
transformer.word_emb.emb_layers.0.weight 256x64 embedding
transformer.word_emb.emb_projs.0 64x32 ...
transformer.layers.0.dec_attn.qkv_net.weight 192x64 oi
transformer.layers.0.dec_attn.r_net.weight 64x64 oi
transformer.layers.0.pos_ff.CoreNet.0.weight 256x64 oi +256
crit.out_layers.0.weight 256x64 head +256
crit.cluster_weight 3x64 ...
[prophetnet | prophetnet | pt]
prophetnet.word_embeddings.weight 256x64 embedding
prophetnet.decoder.ngram_embeddings.weight 2x64 embedding
prophetnet.decoder.layers.0.self_attn.relative_pos_embeddings.weight 128x64 oi +128
[layoutlmv3 | layoutlmv3 | pt]
layoutlmv3.encoder.rel_pos_bias.weight 4x32 table
layoutlmv3.encoder.rel_pos_x_bias.weight 4x64 table
layoutlmv3.embeddings.x_position_embeddings.weight 1024x16 embedding
[depth_pro | depth_pro | pt]
depth_pro.neck.feature_upsample.image_block.layers.0.weight 64x64x2x2 convolution
depth_pro.neck.feature_upsample.scaled_images.0.layers.0.weight 64x64x1x1 oibb
depth_pro.neck.feature_upsample.scaled_images.0.layers.1.weight 64x64x2x2 convolution
fusion_stage.intermediate.0.deconv.weight 64x64x2x2 iobb
head.layers.1.weight 32x32x2x2 convolution +32
head.layers.4.weight 4x32x1x1 head +4
head.layers.0.weight 32x64x3x3 oibb +32
[eomt | eomt | pt]
query.weight 100x64 table
upscale_block.block.0.conv1.weight 64x64x2x2 convolution +64
upscale_block.block.0.conv2.weight 64x1x3x3 ...
class_predictor.weight 9x64 head +9
mask_head.fc1.weight 64x64 oi +64
[stylegan2 |  | ]
synthesis.b4.const 64x4x4 ...
synthesis.b4.conv1.weight 64x64x3x3 oibb +64
synthesis.b8.conv0.affine.weight 64x64 ... +64
synthesis.b8.torgb.weight 4x64x1x1 oibb +4
mapping.fc0.weight 64x64 oi +64
[vocos |  | ]
backbone.embed.weight 64x100x7 oib +64
backbone.convnext.0.dwconv.weight 64x1x7 ... +64
backbone.convnext.0.pwconv1.weight 192x64 oi +192
head.out.weight 128x64 ... +128
[yolov8 |  | ]
model.0.conv.weight 16x3x3x3 oibb
model.2.cv1.conv.weight 32x32x1x1 oibb
model.2.m.0.cv1.conv.weight 16x16x3x3 oibb
model.22.cv2.0.2.weight 64x64x1x1 oibb +64
model.22.dfl.conv.weight 1x16x1x1 learned
[mask2former | mask2former | pt]
model.transformer_module.queries_embedder.weight 100x64 embedding
model.transformer_module.queries_features.weight 100x64 table
model.transformer_module.level_embed.weight 3x64 ...
model.pixel_level_module.decoder.mask_projection.weight 64x64x1x1 oibb +64
class_predictor.weight 9x64 head +9
[vptq | llama | pt]
model.layers.0.self_attn.q_proj.centroids.weight 1x256 table
model.layers.0.self_attn.q_proj.res_centroids.weight 16x256 table
[moshi | moshi | pt]
depth_decoder.model.layers.0.self_attn.q_proj.linear.weight 8x64x64 ...
depth_decoder.model.layers.0.mlp.fc1.weight 8x256x64 boi
depth_decoder.model.layers.0.mlp.fc2.weight 8x64x128 boi
depth_decoder.text_embed_tokens.weight 256x64 embedding
depth_decoder.model.embed_tokens.0.weight 256x64 embedding
depth_decoder.lm_heads.weight 8x256x64 ...
decoder.model.layers.0.self_attn.q_proj.linear.weight 64x64 oi
[aria | aria | pt]
language_model.model.layers.0.mlp.router.weight 8x64 router
language_model.model.layers.0.mlp.experts.fc1.weight 8x64x64 bio
language_model.model.layers.0.mlp.experts.fc2.weight 8x32x64 bio
[recurrent gemma | recurrent_gemma | pt]
model.layers.0.temporal_block.linear_y.weight 64x64 oi +64
model.layers.0.temporal_block.conv_1d.weight 64x1x4 ... +64
model.layers.0.temporal_block.rg_lru.input_gate_weight 4x16x16 ...
model.layers.0.temporal_block.rg_lru.recurrent_gate_weight 4x16x16 ...
[patchtst | patchtst | pt]
model.encoder.embedder.input_embedding.weight 64x16 oi +64
model.encoder.layers.0.self_attn.q_proj.weight 64x64 oi +64
head.linear.weight 96x64 ... +96
[informer tslib |  | ]
enc_embedding.value_embedding.tokenConv.weight 64x8x3 oib
enc_embedding.temporal_embedding.embed.weight 64x4 ...
encoder.attn_layers.0.attention.query_projection.weight 64x64 oi +64
encoder.attn_layers.0.conv1.weight 128x64x1 oib +128
encoder.conv_layers.0.downConv.weight 64x64x3 oib +64
projection.weight 8x64 oi +8
[funnel | funnel | pt]
funnel.encoder.blocks.0.0.attention.r_kernel 64x4x16 ...
funnel.encoder.blocks.0.0.attention.seg_embed 2x4x16 ...
funnel.encoder.blocks.0.0.attention.q_head.weight 64x64 oi
funnel.encoder.blocks.0.0.attention.k_head.weight 64x64 oi +64
funnel.encoder.blocks.0.0.ffn.linear_1.weight 256x64 oi +256
[inception |  | ]
Conv2d_1a_3x3.conv.weight 32x3x3x3 oibb
Mixed_6b.branch7x7_2.conv.weight 64x64x1x7 oibb
AuxLogits.fc.weight 8x64 head +8
"""

RECENT = blocks(_TEXT)
