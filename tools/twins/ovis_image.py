"""A twin of Ovis-Image, which the diffusers backend runs."""

from __future__ import annotations

from pathlib import Path

from tools.twins.z_image import TEXT, VAE, tokenizer

REAL_NAMES = {"ovis-image": "AIDC-AI/Ovis-Image-7B"}
TRANSFORMER = {
    "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4,
    "attention_head_dim": 12, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip


def make(folder: Path) -> Path:
    """A random tiny twin."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        OvisImagePipeline,
        OvisImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    from tools.tiny import stir

    torch.manual_seed(0)
    words = tokenizer()
    transformer, vae = OvisImageTransformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE)
    text = Qwen3Model(Qwen3Config(vocab_size=len(words), **TEXT))
    for module, deviation in ((transformer, 0.15), (vae, 0.05), (text, 0.05)):
        stir(module, deviation)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    OvisImagePipeline(scheduler, vae, text, words, transformer).save_pretrained(folder)
    return folder


MAKERS = {"ovis-image": make}
