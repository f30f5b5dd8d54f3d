"""A twin of Stable Diffusion 1.5, a UNet, which the diffusers backend runs."""

from __future__ import annotations

from pathlib import Path

from tools.twins.flux import CLIP, clip_tokenizer

REAL_NAMES = {"stable-diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8, "attention_head_dim": 4,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 32, 32, 32), "latent_channels": 4, "norm_num_groups": 8,
    "down_block_types": 4 * ("DownEncoderBlock2D",), "up_block_types": 4 * ("UpDecoderBlock2D",),
}  # fmt: skip


def make(folder: Path, pipeline: str = "StableDiffusionPipeline") -> Path:
    """A random tiny twin, as of that pipeline."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from tools.tiny import stir

    torch.manual_seed(0)
    words = clip_tokenizer(folder / "tokenizer")
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNET),
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=len(words))),
    }
    for module in parts.values():
        stir(module, 0.05)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, pipeline)(**parts, tokenizer=words, scheduler=scheduler, **absent)
    made.save_pretrained(folder)
    return folder


MAKERS = {"stable-diffusion": make}
