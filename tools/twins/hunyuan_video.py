"""Twins of HunyuanVideo and FastHunyuan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.tiny import WORDS, stir

REAL_NAMES = {
    "hunyuan-video": "hunyuanvideo-community/HunyuanVideo", "fasthunyuan": "FastVideo/FastHunyuan-diffusers",
}  # fmt: skip

TRANSFORMER = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}  # fmt: skip
VAE = {
    "latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 77,
}  # fmt: skip
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>",
)  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)  # of Llama 3


def make_hunyuan_video(folder: Path, **transformer: Any) -> Path:
    """A twin; keyword arguments change the transformer's config."""
    return _make(folder, transformer)


def make_fasthunyuan(folder: Path) -> Path:
    """A twin of the six-step model, which only its name tells from the other."""
    return _make(folder, {})


MAKERS: dict[str, Callable[[Path], Path]] = {"hunyuan-video": make_hunyuan_video, "fasthunyuan": make_fasthunyuan}


def _make(folder: Path, changes: dict[str, Any]) -> Path:
    import torch
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer, clip_tokenizer = llama_tokenizer(), _clip_tokenizer(folder / "tokenizer_2")
    llama = LlamaConfig(**LLAMA, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    clip = CLIPTextConfig(**CLIP, vocab_size=len(clip_tokenizer), bos_token_id=0, eos_token_id=2)  # 2: as in OpenAI's
    parts = {
        "transformer": HunyuanVideoTransformer3DModel(**TRANSFORMER | changes),
        "vae": AutoencoderKLHunyuanVideo(**VAE),
        "text_encoder": LlamaModel(llama),
        "text_encoder_2": CLIPTextModel(clip),
    }
    for name, module in parts.items():
        stir(module, 0.15 if name == "transformer" else 0.05)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    HunyuanVideoPipeline(**parts, tokenizer=tokenizer, tokenizer_2=clip_tokenizer, scheduler=scheduler).save_pretrained(
        folder
    )
    return folder


def llama_tokenizer() -> Any:
    """Byte-level BPE as Llama 3's, to which each word of the prompt template and of the prompts is one token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from sgld.models.hunyuan_video import TEMPLATE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE, " ".join(WORDS)], trainer)
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=SPECIAL[1], pad_token="<pad>", padding_side="right"
    )


def _clip_tokenizer(folder: Path) -> Any:
    """CLIP's own class, from the files that its checkpoints have, to which every letter is a token."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer.from_pretrained(folder)
