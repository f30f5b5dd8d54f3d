"""A twin of HunyuanVideo 1.5 from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.tiny import WORDS, stir

REAL_NAMES = {"hunyuan-video15": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"}

TRANSFORMER = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 20,
    "rope_axes_dim": (4, 4, 4), "task_type": "t2v",
}  # fmt: skip
VAE = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16), "layers_per_block": 1}
QWEN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
}  # fmt: skip
BYTES = {
    "vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_hunyuan_video15(folder: Path, **transformer: Any) -> Path:
    """A twin; keyword arguments change the transformer's config."""
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = tokenizer()
    parts = {
        "transformer": HunyuanVideo15Transformer3DModel(**TRANSFORMER | transformer),
        "vae": AutoencoderKLHunyuanVideo15(**VAE),
        "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**QWEN, vocab_size=len(words), pad_token_id=0)),
        "text_encoder_2": T5EncoderModel(T5Config(**BYTES)),
    }
    for name, module in parts.items():
        stir(module, 0.15 if name == "transformer" else 0.05)
    made = HunyuanVideo15Pipeline(
        **parts,
        tokenizer=words,
        tokenizer_2=ByT5Tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    made.save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """The real class with all bytes, to which each word of the prompt template and of the prompts is one token."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    from sgld.models.hunyuan_video15 import TEMPLATE

    split = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    own = f"{TEMPLATE} {' '.join(WORDS)}"
    for mark in SPECIAL:
        own = own.replace(mark, "\n")
    words = sorted({word for word, _ in split(own)}, key=lambda word: (not word.startswith("Ġ"), word))
    spaces = [("Ġ" * n, "Ġ" * n) for n in (1, 2, 4)]
    merges = dict.fromkeys([*spaces, *((word[:i], word[i]) for word in words for i in range(1, len(word)))])
    vocabulary = dict.fromkeys([*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)])
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=list(merges))
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    made.chat_template = CHAT
    made.padding_side = "right"
    return made


MAKERS: dict[str, Callable[[Path], Path]] = {"hunyuan-video15": make_hunyuan_video15}
