"""Layouts of more models, and of code that no library owns, as in `families`.

A line in brackets begins a model: its name, its `model_type`, and the `format` of its metadata.
"""

import re

from tests.checkpoint.families import Family

_TEXT = """\
[open_clip |  | ]
positional_embedding 77x64 ...
text_projection 64x64 ...
token_embedding.weight 256x64 embedding
transformer.resblocks.0.attn.in_proj_weight 192x64 oi
transformer.resblocks.0.attn.out_proj.weight 64x64 oi +64
transformer.resblocks.0.mlp.c_fc.weight 256x64 oi +256
transformer.resblocks.0.mlp.c_proj.weight 64x256 oi +64
visual.proj 64x64 ...
visual.class_embedding 64 1-D:
visual.positional_embedding 17x64 ...
visual.conv1.weight 64x4x8x8 ...
visual.transformer.resblocks.0.mlp.c_proj.weight 64x256 oi +64
visual.attnpool.positional_embedding 17x64 ...
visual.attnpool.c_proj.weight 32x64 oi +32
visual.attnpool.q_proj.weight 64x64 oi +64
visual.layer1.0.downsample.0.weight 64x32x1x1 oibb
[swin | swin | pt]
swin.embeddings.patch_embeddings.projection.weight 32x4x4x4 oibb +32
swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table 49x4 ...
swin.encoder.layers.0.blocks.0.attention.self.query.weight 32x32 oi +32
swin.encoder.layers.0.blocks.0.attention.output.dense.weight 32x32 oi +32
swin.encoder.layers.0.downsample.reduction.weight 64x128 oi
classifier.weight 8x64 head +8
[convnext hf | convnext | pt]
convnext.embeddings.patch_embeddings.weight 32x4x4x4 oibb +32
convnext.encoder.stages.1.downsampling_layer.1.weight 64x32x2x2 oibb +64
convnext.encoder.stages.1.layers.0.dwconv.weight 64x1x7x7 ... +64
convnext.encoder.stages.1.layers.0.pwconv1.weight 256x64 oi +256
convnext.encoder.stages.1.layers.0.pwconv2.weight 64x256 oi +64
[deformable detr |  | ]
transformer.level_embed 4x32 ...
transformer.encoder.layers.0.self_attn.sampling_offsets.weight 64x32 oi +64
transformer.encoder.layers.0.self_attn.attention_weights.weight 32x32 oi +32
transformer.encoder.layers.0.self_attn.value_proj.weight 32x32 oi +32
transformer.reference_points.weight 2x32 oi +2
query_embed.weight 16x64 embedding
tgt_embed.weight 16x32 embedding
input_proj.0.0.weight 32x64x1x1 oibb +32
input_proj.3.0.weight 32x64x3x3 oibb +32
[encodec norm removed | encodec | pt]
encoder.layers.0.conv.weight 32x1x7 ... +32
encoder.layers.1.block.1.conv.weight 16x32x3 oib +16
encoder.layers.3.conv.weight 64x32x4 oib +64
encoder.layers.13.lstm.weight_ih_l0 256x64 oi
decoder.layers.3.conv.weight 64x32x16 iob +32
decoder.layers.4.block.1.conv.weight 16x32x3 oib +16
decoder.layers.6.conv.weight 64x64x8 ... +64
quantizer.layers.0.codebook.embed 256x64 ...
quantizer.layers.0.codebook.embed_avg 256x64 ...
[encodec facebook |  | ]
encoder.model.0.conv.conv.weight_g 32x1x1 ...
encoder.model.0.conv.conv.weight_v 32x1x7 ...
decoder.model.3.convtr.convtr.weight 64x32x16 iob +32
decoder.model.6.convtr.convtr.weight 64x64x8 iob +64
quantizer.vq.layers.0._codebook.embed 256x64 ...
quantizer.vq.layers.0._codebook.embed_avg 256x64 ...
[mimi | mimi | pt]
decoder.layers.2.conv.weight 64x32x16 iob +32
decoder.layers.0.conv.weight 64x32x7 oib +64
decoder.layers.5.conv.weight 64x64x12 ... +64
downsample.conv.weight 32x32x4 oib
upsample.conv.weight 32x1x4 ...
encoder_transformer.layers.0.self_attn.q_proj.weight 32x32 oi
encoder_transformer.layers.0.mlp.fc1.weight 128x32 oi
quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum 256x16 ...
quantizer.acoustic_residual_vector_quantizer.input_proj.weight 16x32x1 oib
[dac hf, norm removed | dac | pt]
decoder.block.0.conv_t1.weight 64x32x16 iob +32
decoder.block.1.conv_t1.weight 64x64x16 ... +64
decoder.block.0.res_unit1.conv1.weight 32x32x7 oib +32
decoder.block.0.res_unit1.conv2.weight 32x32x1 oib +32
decoder.block.0.snake1.alpha 1x64x1 ...
encoder.block.0.conv1.weight 64x32x4 oib +64
quantizer.quantizers.0.codebook.weight 256x8 table
quantizer.quantizers.0.in_proj.weight 8x64x1 oib +8
[vits | vits | pt]
text_encoder.embed_tokens.weight 40x32 embedding
text_encoder.encoder.layers.0.attention.emb_rel_k 1x9x16 ...
text_encoder.encoder.layers.0.attention.k_proj.weight 32x32 oi +32
text_encoder.encoder.layers.0.feed_forward.conv_1.weight 128x32x3 oib +128
text_encoder.project.weight 64x32x1 oib +64
flow.flows.0.conv_pre.weight 32x16x1 oib +32
flow.flows.0.wavenet.in_layers.0.weight 64x32x5 oib +64
decoder.conv_pre.weight 64x32x7 oib +64
decoder.upsampler.0.weight 64x32x16 iob +32
decoder.upsampler.1.weight 32x32x16 iob +32
decoder.resblocks.0.convs1.0.weight 32x32x3 oib +32
decoder.conv_post.weight 4x32x7 oib
duration_predictor.conv_dds.convs_dilated.0.weight 32x1x3 ... +32
posterior_encoder.conv_proj.weight 32x32x1 oib +32
[hifigan |  | ]
conv_pre.weight 64x80x7 oib +64
ups.0.weight 64x32x16 iob +32
ups.1.weight 32x32x16 ... +32
resblocks.0.convs1.0.weight 32x32x3 oib +32
conv_post.weight 4x32x7 oib +4
[demucs |  | ]
encoder.0.0.weight 64x4x8 ... +64
encoder.0.2.weight 128x64x1 oib +128
encoder.1.0.weight 128x64x8 oib +128
decoder.0.0.weight 256x128x3 ... +256
decoder.0.2.weight 128x64x8 iob +64
decoder.1.2.weight 64x64x8 ... +64
lstm.lstm.weight_ih_l0 512x128 oi
lstm.linear.weight 128x256 oi +128
[qwen3 moe, fused | qwen3_moe | pt]
model.layers.0.mlp.gate.weight 8x64 router
model.layers.0.mlp.experts.gate_up_proj 8x64x64 boi
model.layers.0.mlp.experts.down_proj 8x64x32 boi
[qwen3 moe, fused io | qwen3_vl_moe | pt]
model.layers.0.mlp.gate.weight 8x64 router
model.layers.0.mlp.experts.gate_up_proj 8x64x64 bio
model.layers.0.mlp.experts.down_proj 8x32x64 bio
[deepseek v3 | deepseek_v3 | pt]
model.layers.0.self_attn.q_a_proj.weight 32x64 oi
model.layers.0.self_attn.q_b_proj.weight 96x32 oi
model.layers.0.self_attn.kv_a_proj_with_mqa.weight 24x64 oi
model.layers.0.self_attn.kv_b_proj.weight 128x16 oi
model.layers.0.self_attn.o_proj.weight 64x64 oi
model.layers.1.mlp.gate.weight 8x64 router
model.layers.1.mlp.gate.e_score_correction_bias 8 1-D:
model.layers.1.mlp.experts.0.up_proj.weight 32x64 oi
model.layers.1.mlp.shared_experts.down_proj.weight 64x32 oi
model.layers.61.eh_proj.weight 64x128 oi
model.layers.61.shared_head.head.weight 256x64 head
model.layers.61.embed_tokens.weight 256x64 embedding
[gemma3n | gemma3n | pt]
model.language_model.embed_tokens_per_layer.weight 256x64 embedding
model.language_model.per_layer_model_projection.weight 64x64 oi
model.language_model.layers.0.altup.modality_router.weight 4x64 router
model.language_model.layers.0.altup.prediction_coefs.weight 16x4 oi
model.language_model.layers.0.laurel.linear_left.weight 16x64 oi
model.language_model.layers.0.per_layer_input_gate.weight 16x64 oi
model.embed_vision.embedding.weight 128x64 embedding
model.embed_vision.embedding_projection.weight 64x64 oi
[sd original ldm |  | ]
model.diffusion_model.time_embed.0.weight 128x64 oi +128
model.diffusion_model.label_emb.0.0.weight 128x64 oi +128
model.diffusion_model.input_blocks.0.0.weight 64x4x3x3 oibb +64
model.diffusion_model.input_blocks.3.0.op.weight 64x64x3x3 ... +64
model.diffusion_model.input_blocks.1.0.in_layers.2.weight 64x64x3x3 oibb +64
model.diffusion_model.input_blocks.1.0.emb_layers.1.weight 64x128 oi +64
model.diffusion_model.output_blocks.2.1.conv.weight 64x64x3x3 oibb +64
model.diffusion_model.output_blocks.2.0.skip_connection.weight 64x128x1x1 oibb +64
model.diffusion_model.out.2.weight 4x64x3x3 oibb +4
model.diffusion_model.middle_block.1.proj_in.weight 64x64x1x1 oibb +64
first_stage_model.encoder.down.0.downsample.conv.weight 32x32x3x3 oibb +32
first_stage_model.decoder.mid.attn_1.q.weight 64x64x1x1 oibb +64
first_stage_model.decoder.up.0.block.0.nin_shortcut.weight 32x64x1x1 oibb +32
first_stage_model.decoder.up.1.upsample.conv.weight 64x64x3x3 oibb +64
first_stage_model.quant_conv.weight 8x8x1x1 oibb +8
cond_stage_model.transformer.text_model.embeddings.token_embedding.weight 256x64 embedding
model_ema.diffusion_modeltime_embed0weight 128x64 ...
[flux |  | pt]
img_in.weight 64x64 oi +64
txt_in.weight 64x128 oi +64
time_in.in_layer.weight 64x32 oi +64
guidance_in.out_layer.weight 64x64 oi +64
vector_in.in_layer.weight 64x48 oi +64
double_blocks.0.img_mod.lin.weight 384x64 oi +384
double_blocks.0.img_attn.qkv.weight 192x64 oi +192
double_blocks.0.img_attn.proj.weight 64x64 oi +64
double_blocks.0.img_mlp.0.weight 256x64 oi +256
double_blocks.0.img_attn.norm.query_norm.scale 16 1-D:
single_blocks.0.linear1.weight 448x64 oi +448
single_blocks.0.modulation.lin.weight 192x64 oi +192
final_layer.linear.weight 64x64 oi +64
final_layer.adaLN_modulation.1.weight 128x64 oi +128
[lora kohya |  | pt]
lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight 8x64 oi
lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight 64x8 oi
lora_unet_down_blocks_0_attentions_0_proj_in.alpha 1 1-D:
lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight 8x64 oi
lora_unet_conv.lora_down.weight 8x64x3x3 oibb
[rwkv original |  | ]
emb.weight 256x64 embedding
blocks.0.att.key.weight 64x64 oi
blocks.0.att.time_maa_w1 64x160 ...
blocks.0.att.time_decay_w1 64x64 ...
blocks.0.att.time_faaaa 4x16 ...
blocks.0.ffn.receptance.weight 64x64 oi
blocks.0.ffn.value.weight 64x256 oi
head.weight 256x64 head
[dbrx | dbrx | pt]
transformer.blocks.0.ffn.router.layer.weight 4x64 router
transformer.blocks.0.ffn.experts.mlp.w1 512x64 ...
transformer.blocks.0.ffn.experts.mlp.v1 512x64 ...
transformer.blocks.0.ffn.experts.mlp.w2 512x64 ...
transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight 96x64 oi
transformer.blocks.0.norm_attn_norm.norm_1.weight 64 1-D:
[deberta | deberta-v2 | pt]
deberta.embeddings.word_embeddings.weight 256x64 embedding
deberta.encoder.rel_embeddings.weight 512x64 embedding
deberta.encoder.layer.0.attention.self.query_proj.weight 64x64 oi +64
deberta.encoder.layer.0.attention.self.pos_key_proj.weight 64x64 oi
deberta.encoder.conv.conv.weight 64x64x3 oib +64
[albert | albert | pt]
albert.embeddings.word_embeddings.weight 256x16 embedding
albert.encoder.embedding_hidden_mapping_in.weight 64x16 oi +64
albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight 256x64 oi +256
albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight 64x256 oi +64
albert.pooler.weight 64x64 oi +64
predictions.dense.weight 16x64 oi +16
predictions.decoder.weight 256x16 head +256
[squeezebert | squeezebert | pt]
transformer.encoder.layers.0.attention.query.weight 64x16x1 oib +64
transformer.encoder.layers.0.post_attention.conv1d.weight 64x64x1 oib +64
[segformer | segformer | pt]
segformer.encoder.patch_embeddings.0.proj.weight 32x4x7x7 oibb +32
segformer.encoder.block.0.0.attention.self.sr.weight 32x32x8x8 oibb +32
segformer.encoder.block.0.0.mlp.dwconv.dwconv.weight 128x1x3x3 ... +128
decode_head.linear_c.0.proj.weight 64x32 ... +64
decode_head.linear_fuse.weight 64x256x1x1 oibb
decode_head.classifier.weight 8x64x1x1 head +8
[blip2 qformer | blip-2 | pt]
query_tokens 1x32x64 ...
qformer.encoder.layer.0.crossattention.attention.key.weight 64x64 oi +64
qformer.encoder.layer.0.output_query.dense.weight 64x256 oi +64
qformer.encoder.layer.0.intermediate_query.dense.weight 256x64 oi +256
language_projection.weight 64x64 oi +64
[tacotron2 |  | ]
embedding.weight 148x64 embedding
encoder.convolutions.0.0.conv.weight 64x64x5 oib +64
encoder.lstm.weight_ih_l0_reverse 128x64 oi
decoder.prenet.layers.0.linear_layer.weight 32x80 oi
decoder.attention_rnn.weight_ih 256x96 oi
decoder.attention_layer.query_layer.linear_layer.weight 16x64 oi
decoder.attention_layer.location_layer.location_conv.conv.weight 32x2x31 ...
decoder.linear_projection.linear_layer.weight 80x96 oi +80
decoder.gate_layer.linear_layer.weight 1x96 oi +1
postnet.convolutions.0.0.conv.weight 64x80x5 oib +64
[nemo conformer |  | ]
encoder.pre_encode.conv.0.weight 64x1x3x3 ... +64
encoder.pre_encode.conv.2.weight 64x64x3x3 oibb +64
encoder.pre_encode.out.weight 64x256 oi +64
encoder.layers.0.self_attn.pos_bias_u 4x16 ...
encoder.layers.0.self_attn.linear_pos.weight 64x64 oi
encoder.layers.0.conv.pointwise_conv1.weight 128x64x1 oib +128
encoder.layers.0.feed_forward1.linear1.weight 256x64 oi +256
decoder.decoder_layers.0.weight 128x64x1 oib +128
decoder.prediction.embed.weight 129x64 embedding
decoder.prediction.dec_rnn.lstm.weight_ih_l0 256x64 oi
joint.enc.weight 64x64 oi +64
joint.pred.weight 64x64 oi +64
joint.joint_net.2.weight 129x64 head +129
[mask rcnn |  | ]
backbone.fpn.inner_blocks.0.0.weight 64x64x1x1 oibb +64
backbone.fpn.layer_blocks.0.0.weight 64x64x3x3 oibb +64
rpn.head.conv.0.0.weight 64x64x3x3 oibb +64
rpn.head.cls_logits.weight 3x64x1x1 ... +3
roi_heads.box_head.fc6.weight 64x128 oi +64
roi_heads.box_predictor.cls_score.weight 8x64 head +8
roi_heads.mask_head.0.0.weight 64x64x3x3 ... +64
roi_heads.mask_predictor.conv5_mask.weight 64x64x2x2 ... +64
roi_heads.mask_predictor.mask_fcn_logits.weight 8x64x1x1 ... +8
[pix2pix  or  cyclegan |  | ]
model.1.weight 64x4x7x7 oibb +64
model.4.weight 128x64x3x3 oibb +128
model.10.conv_block.1.weight 128x128x3x3 oibb +128
model.19.weight 128x64x3x3 iobb +64
model.22.weight 64x64x3x3 ... +64
[unet generic |  | ]
inc.double_conv.0.weight 64x4x3x3 oibb
down1.maxpool_conv.1.double_conv.0.weight 128x64x3x3 oibb
up1.up.weight 128x64x2x2 iobb +64
up1.conv.double_conv.0.weight 64x128x3x3 ...
up2.up.weight 64x64x2x2 ... +64
outc.conv.weight 2x64x1x1 oibb +2
[nnunet |  | ]
encoder.stages.0.0.convs.0.conv.weight 32x4x3x3x3 oibbb +32
decoder.transpconvs.0.weight 64x32x2x2x2 iobbb +32
decoder.transpconvs.1.weight 32x32x2x2x2 iobbb +32
decoder.stages.0.convs.0.conv.weight 32x64x3x3x3 oibbb +32
decoder.seg_layers.0.weight 4x32x1x1x1 oibbb +4
[flax bert transformers | bert | flax]
bert.embeddings.word_embeddings.embedding 256x64 embedding
bert.encoder.layer.0.attention.self.query.kernel 64x64 io +64
bert.encoder.layer.0.intermediate.dense.kernel 64x128 io +128
bert.pooler.dense.kernel 64x64 io +64
cls.predictions.transform.dense.kernel 64x64 io +64
bert.embeddings.LayerNorm.scale 64 1-D:
[flax gpt2 transformers | gpt2 | flax]
transformer.wte.embedding 256x64 embedding
transformer.h.0.attn.c_attn.kernel 192x64 oi +192
transformer.h.0.attn.c_proj.kernel 64x64 ... +64
transformer.h.0.mlp.c_fc.kernel 256x64 oi +256
[haiku |  | ]
mlp/~/linear_0.w 784x300 io
mlp/~/linear_0.b 300 1-D:
mlp/~/linear_1.w 64x64 ...
mlp/~/linear_1.b 64 1-D:
conv2_d.w 3x3x32x64 ...
conv2_d.b 64 1-D:
conv2_d_transpose.w 3x3x64x32 ...
embed.embeddings 256x64 embedding
layer_norm.scale 64 1-D:
[keras |  | ]
dense.kernel 64x32 io +32
conv2d.kernel 3x3x4x64 bbio +64
conv2d_transpose.kernel 3x3x32x64 ... +32
depthwise_conv2d.depthwise_kernel 3x3x32x1 ...
lstm.lstm_cell.kernel 64x256 io +256
lstm.lstm_cell.recurrent_kernel 64x256 ...
embedding.embeddings 256x64 embedding
multi_head_attention.query.kernel 64x4x16 ...
multi_head_attention.attention_output.kernel 4x16x64 ... +64
[mlx whisper | whisper | mlx]
encoder.conv1.weight 64x3x80 obi +64
encoder.conv2.weight 64x3x64 obi +64
encoder.blocks.0.attn.query.weight 64x64 oi +64
encoder.blocks.0.attn.key.weight 64x64 oi
encoder.blocks.0.mlp1.weight 256x64 oi +256
decoder.token_embedding.weight 256x64 embedding
decoder.positional_embedding 64x64 ...
[mlx mixtral | mixtral | mlx]
model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight 8x128x64 boi
model.layers.0.block_sparse_moe.gate.weight 8x64 router
model.embed_tokens.weight 256x64 embedding
model.layers.0.self_attn.q_proj.weight 64x64 oi
[jukebox-like | jukebox | pt]
priors.0.prior.transformer._attn_mods.0.attn.c_attn.weight 64x192 io +192
priors.0.prior.transformer._attn_mods.0.attn.c_proj.weight 64x64 io +64
priors.0.prior.transformer._attn_mods.0.mlp.c_fc.weight 64x64 io +64
vqvae.decoders.0.level_blocks.0.upsample_block.1.weight 64x32x4 iob +32
vqvae.bottleneck.level_blocks.0.codebook 256x64 embedding
priors.0.embed_tokens.weight 256x64 embedding
[switch transformers | switch_transformers | pt]
shared.weight 256x64 table
encoder.block.1.layer.1.mlp.router.classifier.weight 8x64 router
encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight 128x64 oi
encoder.block.1.layer.1.mlp.experts.expert_0.wo.weight 64x128 oi
lm_head.weight 256x64 head
[graphormer | graphormer | pt]
encoder.graph_encoder.graph_node_feature.atom_encoder.weight 512x64 table
encoder.graph_encoder.graph_attn_bias.spatial_pos_encoder.weight 512x4 table
encoder.graph_encoder.graph_attn_bias.edge_encoder.weight 512x4 table
encoder.graph_encoder.graph_attn_bias.graph_token_virtual_distance.weight 1x4 table
encoder.graph_encoder.graph_node_feature.in_degree_encoder.weight 512x64 table
encoder.graph_encoder.layers.0.self_attn.k_proj.weight 64x64 oi +64
encoder.graph_encoder.layers.0.fc1.weight 64x64 oi +64
[recommender dlrm |  | ]
emb_l.0.weight 256x64 embedding
emb_l.1.weight 64x64 embedding
bot_l.0.weight 64x16 oi +64
bot_l.2.weight 64x64 oi +64
top_l.0.weight 128x128 oi +128
[recommender ncf |  | ]
user_embedding_gmf.weight 256x16 embedding
item_embedding_mlp.weight 256x16 embedding
embed_user_MLP.weight 256x16 embedding
embed_item_GMF.weight 256x16 embedding
MLP_layers.1.weight 32x64 oi +32
MLP_user.weight 256x32 table
mlp.weight 256x32 ...
user_mlp.weight 256x32 table
predict_layer.weight 1x32 oi +1
[kge |  | ]
entity_embedding 256x64 ...
relation_embedding 64x64 ...
ent_embeddings.weight 256x64 embedding
rel_embeddings.weight 64x64 embedding
ent.weight 256x64 table
rel.weight 16x64 table
[fasttext or word2vec |  | ]
in_embed.weight 256x64 embedding
out_embed.weight 256x64 embedding
in_embeddings.weight 256x64 embedding
u_embeddings.weight 256x64 embedding
center.weight 256x64 table
context.weight 256x64 table
syn0.weight 256x64 table
output.weight 256x64 ...
[pyg |  | ]
conv1.lin_l.weight 64x32 oi +64
conv1.lin_r.weight 64x32 oi
conv2.att_src 1x4x16 ...
conv2.lin_src.weight 64x64 oi
conv3.weight 64x64 ... +64
conv3.root 64x64 ...
conv4.weight 8x64x64 ...
conv4.comp 4x8 ...
node_emb.weight 256x64 embedding
[dgl graphconv |  | ]
layers.0.weight 64x16 io +16
layers.1.weight 16x16 ... +16
layers.2.weight 16x8 io +8
[torch rl |  | ]
features_extractor.cnn.0.weight 32x4x8x8 oibb +32
features_extractor.cnn.2.weight 64x32x4x4 oibb +64
features_extractor.cnn.4.weight 64x64x3x3 oibb +64
features_extractor.linear.0.weight 128x64 oi +128
mlp_extractor.policy_net.0.weight 64x128 oi +64
action_net.weight 4x64 oi +4
value_net.weight 1x64 oi +1
[keras square |  | ]
conv2d_transpose.kernel 3x3x64x64 ... +64
conv2d.kernel 3x3x64x64 bbio +64
dense.kernel 64x64 io +64
[flax convtranspose |  | ]
ConvTranspose_0.kernel 3x3x64x64 ... +64
ConvTranspose_1.kernel 3x3x64x32 ... +32
ConvTranspose_2.kernel 3x3x32x64 ... +32
[rgcn |  | ]
conv1.weight 4x16x16 ... +16
conv2.weight 8x64x16 ... +16
conv3.weight 8x64x64 ... +64
conv4.weight 8x64x64 ...
[bilinear |  | ]
bilinear.weight 64x64x16 ... +64
[sequential with embedding |  | ]
net.0.weight 256x64 table
net.1.weight 32x64 oi +32
net.3.weight 8x32 oi +8
[sequential with square embedding |  | ]
net.0.weight 64x64 table
net.1.weight 32x64 oi +32
[sequential |  | ]
mlp.0.weight 64x32 oi
mlp.1.weight 128x64 oi
mlp.3.weight 64x128 oi
[sequential inside |  | ]
a.mlp.0.weight 64x64 oi
a.mlp.2.weight 64x64 oi
a.mlp.4.weight 8x64 oi
[jax own square |  | ]
layer1.weight 32x64 io +64
layer2.weight 64x64 ... +64
fc.weight 64x64 ... +64
proj.weight 64x16 ...
"""


def blocks(text: str) -> dict[str, Family]:
    """The models of a text like the one above."""
    found = {}
    for block in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        head, _, tensors = block.partition("]\n")
        name, model_type, form = (part.strip() for part in head.split("|"))
        found[name] = Family(model_type, form, tensors)
    return found


MORE = blocks(_TEXT)
