"""Twins of Qwen-Image and of the two that edit pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.tiny import WORDS, stir

REAL_NAMES = {
    "qwen-image": "Qwen/Qwen-Image",
    "qwen-image-edit": "Qwen/Qwen-Image-Edit",
    "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
    "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
}

TRANSFORMER = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 16, "out_channels": 4, "num_layers": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4),
}  # fmt: skip
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.1, 2.0],
}  # fmt: skip
SCHEDULER = {
    "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}  # fmt: skip
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
    "fullatt_block_indexes": [1], "patch_size": 4, "window_size": 16,
}  # fmt: skip
DEVIATIONS = {"transformer": 0.15, "text_encoder": 0.3, "vae": 0.05}  # the more, the more the prompt matters


def make(folder: Path, pipeline: str, **transformer: Any) -> Path:
    """A twin of that pipeline class; keyword arguments change the transformer's config."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer()
    parts = {
        "transformer": QwenImageTransformer2DModel(**TRANSFORMER | transformer),
        "text_encoder": text_encoder(words),
        "vae": AutoencoderKLQwenImage(**VAE),
    }
    for name, module in parts.items():
        stir(module, DEVIATIONS[name])
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    QwenImagePipeline(tokenizer=words, scheduler=scheduler, **parts).save_pretrained(folder)
    if pipeline != "QwenImagePipeline":
        size = {"shortest_edge": 64, "longest_edge": 2**24}
        Qwen2VLImageProcessorPil(patch_size=VISION["patch_size"], size=size).save_pretrained(folder / "processor")
        words.save_pretrained(folder / "processor")
        file = folder / "model_index.json"
        index = {"_class_name": pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | index, indent=2))
    return folder


def text_encoder(words: Any) -> Any:
    """A tiny Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    ends = {name: words.convert_tokens_to_ids("<|endoftext|>") for name in ("bos_token_id", "eos_token_id")}
    text = TEXT | ends | {"vocab_size": len(words)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenizer() -> Any:
    """The real class with all bytes, and with the words of the model's own prompts and of the tests as one token each.

    So these prompts have as many tokens as in the real vocabulary.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    from sgld.models.qwen_image import ASSISTANT, DRAW, EDIT, USER

    blank = Qwen2Tokenizer(vocab={"<|endoftext|>": 0})
    own = f"{DRAW}{USER}{EDIT}{ASSISTANT}Picture : {' '.join(WORDS)}"
    for mark in SPECIAL:
        own = own.replace(mark, "\n")
    split = blank.backend_tokenizer.pre_tokenizer.pre_tokenize_str(own)
    letters = sorted(ByteLevel.alphabet())
    found = sorted({word for word, _ in split}, key=lambda word: (not word.startswith("Ġ"), word))
    merges = dict.fromkeys((word[:i], word[i]) for word in found for i in range(1, len(word)))
    vocabulary = dict.fromkeys([*letters, *(a + b for a, b in merges)])
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=list(merges))
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    return made


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen-image": partial(make, pipeline="QwenImagePipeline"),
    "qwen-image-edit": partial(make, pipeline="QwenImageEditPipeline"),
    "qwen-image-edit-2509": partial(make, pipeline="QwenImageEditPlusPipeline"),
    "qwen-image-edit-2511": partial(make, pipeline="QwenImageEditPlusPipeline", zero_cond_t=True),
}
