"""The authors' names of layers, by family: LoRA files, GGUF files and single-file checkpoints use them.

Each pattern goes from our name, which is diffusers', to the authors'. `|` separates alternatives; `#i` says which of a
fused layer's parts it is, and `#i#0` which half comes first.
"""

from __future__ import annotations

from sgld.nn.lora_formats import Renames

FLUX: Renames = (  # Black Forest Labs, and XLabs' processors
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^(single_blocks\.\d+)\.norm\.linear$", r"\1.modulation.lin"),
    (r"^(single_blocks\.\d+)\.attn\.to_q$", r"\1.linear1#0|\1.processor.qkv_lora#0"),
    (r"^(single_blocks\.\d+)\.attn\.to_k$", r"\1.linear1#1|\1.processor.qkv_lora#1"),
    (r"^(single_blocks\.\d+)\.attn\.to_v$", r"\1.linear1#2|\1.processor.qkv_lora#2"),
    (r"^(single_blocks\.\d+)\.proj_mlp$", r"\1.linear1#3"),
    (r"^(single_blocks\.\d+)\.proj_out$", r"\1.linear2|\1.processor.proj_lora"),
    (r"^(single_blocks\.\d+)\.attn\.norm_q$", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k$", r"\1.norm.key_norm.scale"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.norm1\.linear$", ".img_mod.lin"),
    (r"\.norm1_context\.linear$", ".txt_mod.lin"),
    (r"^(.*)\.attn\.to_q$", r"\1.img_attn.qkv#0|\1.processor.qkv_lora1#0"),
    (r"^(.*)\.attn\.to_k$", r"\1.img_attn.qkv#1|\1.processor.qkv_lora1#1"),
    (r"^(.*)\.attn\.to_v$", r"\1.img_attn.qkv#2|\1.processor.qkv_lora1#2"),
    (r"^(.*)\.attn\.add_q_proj$", r"\1.txt_attn.qkv#0|\1.processor.qkv_lora2#0"),
    (r"^(.*)\.attn\.add_k_proj$", r"\1.txt_attn.qkv#1|\1.processor.qkv_lora2#1"),
    (r"^(.*)\.attn\.add_v_proj$", r"\1.txt_attn.qkv#2|\1.processor.qkv_lora2#2"),
    (r"^(.*)\.attn\.to_out\.0$", r"\1.img_attn.proj|\1.processor.proj_lora1"),
    (r"^(.*)\.attn\.to_add_out$", r"\1.txt_attn.proj|\1.processor.proj_lora2"),
    (r"\.attn\.norm_q$", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k$", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q$", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k$", ".txt_attn.norm.key_norm.scale"),
    (r"\.ff\.net\.0\.proj$", ".img_mlp.0"),
    (r"\.ff\.net\.2$", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj$", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2$", ".txt_mlp.2"),
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"_in\.linear_1$", "_in.in_layer"),
    (r"_in\.linear_2$", "_in.out_layer"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
)

FLUX2: Renames = (
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.", "time_in."),
    (r"^time_guidance_embed\.guidance_embedder\.", "guidance_in."),
    (r"_in\.linear_1$", "_in.in_layer"),
    (r"_in\.linear_2$", "_in.out_layer"),
    (r"^((?:double|single)_stream_modulation\w*)\.linear$", r"\1.lin"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj$", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm_"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.attn\.to_q$", ".img_attn.qkv#0"),
    (r"\.attn\.to_k$", ".img_attn.qkv#1"),
    (r"\.attn\.to_v$", ".img_attn.qkv#2"),
    (r"\.attn\.add_q_proj$", ".txt_attn.qkv#0"),
    (r"\.attn\.add_k_proj$", ".txt_attn.qkv#1"),
    (r"\.attn\.add_v_proj$", ".txt_attn.qkv#2"),
    (r"\.attn\.to_out\.0$", ".img_attn.proj"),
    (r"\.attn\.to_add_out$", ".txt_attn.proj"),
    (r"\.attn\.norm_added_", ".txt_attn.norm_"),
    (r"\.attn\.norm_", ".img_attn.norm_"),
    (r"\.norm_q$", ".norm.query_norm.scale"),
    (r"\.norm_k$", ".norm.key_norm.scale"),
    (r"\.ff\.", ".img_mlp."),
    (r"\.ff_context\.", ".txt_mlp."),
    (r"_mlp\.linear_in$", "_mlp.0"),
    (r"_mlp\.linear_out$", "_mlp.2"),
)

WAN: Renames = (
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.norm_added_([kq])$", r".norm_\1_img"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out$", "head.head"),
)

Z_IMAGE: Renames = (  # ComfyUI's files
    (r"^(.*)\.attention\.to_q$", r"\1.attention.qkv#0|\g<0>"),  # some files fuse the three, some only rename the last
    (r"^(.*)\.attention\.to_k$", r"\1.attention.qkv#1|\g<0>"),
    (r"^(.*)\.attention\.to_v$", r"\1.attention.qkv#2|\g<0>"),
    (r"\.attention\.to_out\.0$", ".attention.out"),
    (r"\.attention\.norm_([qk])$", r".attention.\1_norm"),
    (r"^all_x_embedder\.\d+-1$", "x_embedder"),
    (r"^all_final_layer\.\d+-1\.", "final_layer."),
)

LTX2: Renames = (
    (r"^(audio_)?proj_in$", r"\1patchify_proj"),
    (r"^time_embed\.", "adaln_single."),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
    (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
    (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
    (r"\.norm_([qk])$", r".\1_norm"),
    (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
)
