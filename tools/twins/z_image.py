"""Twins of Z-Image and Z-Image-Turbo, which differ by their schedule's shift."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

REAL_NAMES = {"z-image": "Tongyi-MAI/Z-Image", "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo"}

TRANSFORMER = {
    "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
    "cap_feat_dim": 32, "axes_dims": [4, 4, 4], "axes_lens": [546, 64, 64],
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 16, 16, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make(folder: Path, shift: float) -> Path:
    """A twin whose schedule is shifted by so much."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    from tools.tiny import stir

    torch.manual_seed(0)
    words = tokenizer()
    transformer, vae = ZImageTransformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE)
    text = Qwen3Model(Qwen3Config(vocab_size=len(words), **TEXT))
    for module, deviation in ((transformer, 0.15), (vae, 0.05), (text, 0.05)):
        stir(module, deviation)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ZImagePipeline(scheduler, vae, text, words, transformer).save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Bytes and a few words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("r", "e"), ("re", "d"), ("Ġ", "ca"), ("Ġ", "re")]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
        model_max_length=1024,
    )


MAKERS = {"z-image": partial(make, shift=6.0), "z-image-turbo": partial(make, shift=3.0)}
