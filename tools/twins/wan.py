"""Twins of the Wan checkpoints beside the plain ones: with picture input, per-token times, or few steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tools.tiny import TEXT, TRANSFORMER, VAE, stir, tokenizer

SHOWN = {"in_channels": 12}  # latents; a mask for each of the frames of a latent frame; and the picture's latents
WITH_CLIP = SHOWN | {"image_dim": 16, "added_kv_proj_dim": 48}
CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
RESIDUAL_VAE = VAE | {
    "is_residual": True, "decoder_base_dim": 12, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16,
}  # fmt: skip


def make_i2v(folder: Path, **transformer: Any) -> Path:
    """A twin of Wan 2.1 I2V; keyword arguments change the transformer's config."""
    make(folder, "WanImageToVideoPipeline", WITH_CLIP | transformer)
    add(folder, "transformer", (f"blocks.{i}.attn2.norm_added_q.weight" for i in range(2)))
    return folder


def make_i2v_a14b(folder: Path, name: str = "WanImageToVideoPipeline") -> Path:
    """A twin of the two-expert Wan 2.2 I2V A14B, which has no image encoder."""
    return make(folder, name, SHOWN, experts=2, boundary_ratio=0.9)


def make_ti2v(folder: Path, name: str = "WanPipeline") -> Path:
    """A twin of Wan 2.2 TI2V-5B."""
    return make(folder, name, {}, RESIDUAL_VAE, flow_shift=5.0, expand_timesteps=True)


def make_fast(folder: Path) -> Path:
    """A twin of FastWan 2.1, whose blocks bring a layer for sparse attention."""
    make(folder, "WanDMDPipeline", {})
    names = (f"blocks.{i}.to_gate_compress.{part}" for i in range(2) for part in ("weight", "bias"))
    add(folder, "transformer", names)
    return folder


def make(
    folder: Path,
    name: str,
    transformer: dict[str, Any],
    vae: dict[str, Any] = VAE,
    *,
    experts: int = 1,
    flow_shift: float = 3.0,
    **index: Any,
) -> Path:
    """A folder whose model_index.json says that pipeline; `transformer` changes the transformer's config."""
    import diffusers
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    denoisers = [diffusers.WanTransformer3DModel(**TRANSFORMER | transformer) for _ in range(experts)]
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT, feed_forward_proj="gated-gelu"))
    parts: dict[str, Any] = {"vae": diffusers.AutoencoderKLWan(**vae), "text_encoder": text}
    if transformer.get("image_dim"):
        parts["image_encoder"] = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    for module in denoisers:
        stir(module, 0.15)
    for module in parts.values():
        stir(module, 0.05)
    if transformer.get("image_dim"):
        sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        parts["image_processor"] = CLIPImageProcessorPil(**sides)
    parts |= {
        "tokenizer": tokenizer(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        "transformer": denoisers[0],
        "transformer_2": denoisers[1] if experts == 2 else None,
    }
    made = getattr(diffusers, name, diffusers.WanPipeline)(**parts, **index)
    made.save_pretrained(folder)
    file = folder / "model_index.json"
    known = json.loads(file.read_text()) | {"_class_name": name}
    if "image_processor" in parts:
        known["image_processor"] = ["transformers", "CLIPImageProcessor"]  # as the repositories have it
    file.write_text(json.dumps(known, indent=2))
    return folder


def add(folder: Path, component: str, names: Iterable[str]) -> None:
    """More tensors in a component's file, as the repositories have them."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / component / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {name: torch.randn(48) for name in names}, file, {"format": "pt"})


MAKERS: dict[str, Callable[[Path], Path]] = {
    "wan21-i2v-480p": make_i2v,
    "wan21-i2v-720p": make_i2v,
    "wan22-i2v-a14b": make_i2v_a14b,
    "wan22-ti2v-5b": make_ti2v,
    "fastwan21": make_fast,
    "fastwan22-ti2v-5b": partial(make_ti2v, name="WanDMDPipeline"),
    "turbowan22-i2v-a14b": partial(make_i2v_a14b, name="WanImageToVideoDmdPipeline"),
}
REAL_NAMES = {
    "wan21-i2v-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan21-i2v-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "wan22-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "wan22-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "fastwan21": "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
    "fastwan22-ti2v-5b": "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    "turbowan22-i2v-a14b": "loayrashid/TurboWan2.2-I2V-A14B-Diffusers",
}
