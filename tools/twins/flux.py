"""Random tiny twins of FLUX.1: dev, schnell and Kontext."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools import tiny

REAL_NAMES = {
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
    "flux1-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux1-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
}
TRANSFORMER = {
    "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 16,
    "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": 4 * ("DownEncoderBlock2D",), "up_block_types": 4 * ("UpDecoderBlock2D",),
    "scaling_factor": 0.7, "shift_factor": 0.2, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "projection_dim": 24, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SHIFTING = {"use_dynamic_shifting": True, "shift": 3.0}


def _make(
    folder: Path,
    pipeline: str = "FluxPipeline",
    guided: bool = True,
    schedule: dict[str, Any] | None = None,
    **transformer: Any,
) -> Path:
    """A twin; further keyword arguments change the transformer's config."""
    import diffusers
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words, pieces = clip_tokenizer(folder / "tokenizer"), t5_tokenizer()
    parts = {
        "transformer": FluxTransformer2DModel(**TRANSFORMER | {"guidance_embeds": guided} | transformer),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP, vocab_size=len(words))),
        "text_encoder_2": T5EncoderModel(T5Config(**T5, vocab_size=len(pieces))),
    }
    for module in parts.values():
        tiny.stir(module, 0.15 if module is parts["transformer"] else 0.05)
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTING if schedule is None else schedule)
    made = getattr(diffusers, pipeline)(**parts, tokenizer=words, tokenizer_2=pieces, scheduler=scheduler)
    made.save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()  # the real checkpoints have only the two files it is made of
    return folder


def clip_tokenizer(folder: Path) -> Any:
    """One of the real class, of letters and `tiny.WORDS`, from the files that the real checkpoints have."""
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    merges, known = [], dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    for word in tiny.WORDS:
        left = word[0] if len(word) > 1 else f"{word}</w>"
        for i, letter in enumerate(word[1:], 2):
            right = f"{letter}</w>" if i == len(word) else letter
            merges.append(f"{left} {right}")
            left += right
            known[left] = None
    vocabulary = {piece: i for i, piece in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer() -> Any:
    """One of the real class, of letters and `tiny.WORDS`."""
    from transformers import T5TokenizerFast

    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -3.0) for word in tiny.WORDS] + [(chr(i), -6.0) for i in range(33, 127)]
    return T5TokenizerFast(vocab=specials + words, extra_ids=0, model_max_length=512)


make_dev = _make
make_schnell = partial(_make, guided=False, schedule={"shift": 1.0})
make_kontext = partial(_make, pipeline="FluxKontextPipeline")
MAKERS: dict[str, Callable[[Path], Path]] = {
    "flux1-dev": make_dev,
    "flux1-schnell": make_schnell,
    "flux1-kontext": make_kontext,
}
