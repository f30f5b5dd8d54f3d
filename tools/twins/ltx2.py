"""Random tiny twins of LTX-2 and LTX-2.3: video and sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import tiny

REAL_NAMES = {"ltx2": "Lightricks/LTX-2", "ltx23": "Lightricks/LTX-2.3"}

TRANSFORMER = {
    "num_attention_heads": 4, "attention_head_dim": 14, "cross_attention_dim": 56, "in_channels": 6, "out_channels": 6,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32,
    "audio_in_channels": 8, "audio_out_channels": 8, "num_layers": 2, "caption_channels": 16,
}  # fmt: skip
NEWER = {
    "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip
CONNECTORS = {
    "caption_channels": 16, "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 8, "video_connector_num_layers": 1,
    "video_connector_num_learnable_registers": 8,
    "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 8, "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": 8, "connector_rope_base_seq_len": 64, "rope_type": "split",
}  # fmt: skip
NEWER_CONNECTORS = {
    "video_connector_num_attention_heads": 4, "video_connector_attention_head_dim": 14,
    "audio_connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 8,
    "video_gated_attn": True, "audio_gated_attn": True, "per_modality_projections": True,
    "video_hidden_dim": 56, "audio_hidden_dim": 32, "proj_bias": True,
}  # fmt: skip
VAE = {
    "latent_channels": 6, "block_out_channels": (8, 8, 8, 16), "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1), "decoder_causal": False,
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
AUDIO_VAE = {
    "base_channels": 8, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 8,
    "resolution": 16,
}  # fmt: skip
VOCODER = {
    "in_channels": 16, "hidden_channels": 32, "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]],
}  # fmt: skip
BANDWIDTH = {
    "in_channels": 16, "hidden_channels": 64, "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]],
    "bwe_in_channels": 16, "bwe_hidden_channels": 32, "bwe_resnet_kernel_sizes": [3], "bwe_resnet_dilations": [[1, 3]],
    "filter_length": 32, "window_length": 32, "num_mel_channels": 8,
}  # fmt: skip


def make_ltx2(folder: Path, **transformer: Any) -> Path:
    """A twin of LTX-2; keyword arguments change the transformer's config."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    config = TRANSFORMER | {"rope_type": "split"} | transformer
    return _make(folder, config, lambda: LTX2TextConnectors(**CONNECTORS), lambda: LTX2Vocoder(**VOCODER), 2.0)


def make_ltx23(folder: Path, **transformer: Any) -> Path:
    """A twin of LTX-2.3; keyword arguments change the transformer's config."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    config = TRANSFORMER | NEWER | {"rope_type": "split"} | transformer
    connectors = CONNECTORS | NEWER_CONNECTORS
    return _make(folder, config, lambda: LTX2TextConnectors(**connectors), lambda: LTX2VocoderWithBWE(**BANDWIDTH), 1.3)


MAKERS = {"ltx2": make_ltx2, "ltx23": make_ltx23}


def _make(
    folder: Path, config: dict[str, Any], connectors: Callable[[], Any], vocoder: Callable[[], Any], gain: float
) -> Path:
    """`gain` is of the vocoder's convolutions: with less than one all sounds are alike."""
    import torch
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )

    torch.manual_seed(0)
    parts = {
        "transformer": LTX2VideoTransformer3DModel(**config), "connectors": connectors(), "vocoder": vocoder(),
        "vae": AutoencoderKLLTX2Video(**VAE), "audio_vae": AutoencoderKLLTX2Audio(**AUDIO_VAE),
        "text_encoder": _text_encoder(),
    }  # fmt: skip
    for name, deviation in (("transformer", 0.1), ("connectors", 0.1), ("text_encoder", 0.05), ("vocoder", 0.02)):
        tiny.stir(parts[name], deviation)
    for name in ("vae", "audio_vae"):
        tiny.stir(parts[name], 0.05)
        parts[name].latents_mean.normal_()
        parts[name].latents_std.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in parts["vocoder"].parameters():
            parameter.mul_(gain if parameter.ndim > 2 else 1)
    for name, buffer in parts["vocoder"].named_buffers():
        if name.endswith("_basis"):
            buffer.uniform_(-0.1, 0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    LTX2Pipeline(tokenizer=_tokenizer(), scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def _text_encoder() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": len(_vocabulary()), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
        "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])}


def _tokenizer() -> Any:
    from transformers import GemmaTokenizer

    return GemmaTokenizer(vocab=_vocabulary(), merges=[], add_bos_token=True, model_max_length=1024)
