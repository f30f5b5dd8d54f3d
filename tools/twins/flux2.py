"""Twins of FLUX.2 dev, of FLUX.2 klein distilled and base, and of fal.ai's tiny autoencoder, one component."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools import tiny
from tools.twins import z_image

REAL_NAMES = {
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "flux2-klein-base": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "flux2-tiny-autoencoder": "fal/FLUX.2-Tiny-AutoEncoder",
}

TRANSFORMER = {
    "in_channels": 32, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "joint_attention_dim": 48, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 8, "norm_num_groups": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 2,
    "image_size": 8,
}  # fmt: skip
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
TINY_VAE = {
    "latent_channels": 32, "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1),
}  # fmt: skip
MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "[{{ mark }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"
)


def make_dev(folder: Path) -> Path:
    """A twin of dev: embedded guidance, a Mistral 3 that could see, and a tokenizer that pads at the left."""
    import torch
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    words = mistral_tokenizer()
    text = {"model_type": "mistral", "num_hidden_layers": 32, "vocab_size": len(words), **TEXT}
    config = Mistral3Config(
        text_config=text, vision_config={"model_type": "pixtral", **VISION}, image_token_index=MARKS.index("[IMG]")
    )
    encoder = Mistral3ForConditionalGeneration(config)
    _save(Flux2Pipeline, folder, words, encoder, guidance_embeds=True)
    _set_index(folder, tokenizer=["transformers", "PixtralProcessor"])
    return folder


def make_klein(folder: Path, is_distilled: bool) -> Path:
    """A twin of klein."""
    import torch
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    words = z_image.tokenizer()
    encoder = Qwen3ForCausalLM(
        Qwen3Config(num_hidden_layers=28, vocab_size=len(words), tie_word_embeddings=True, **TEXT)
    )
    _save(Flux2KleinPipeline, folder, words, encoder, guidance_embeds=False)
    _set_index(folder, is_distilled=is_distilled)
    return folder


def make_tiny_autoencoder(folder: Path) -> Path:
    """A twin of the tiny autoencoder, which fits the other twins."""
    import torch
    from safetensors.torch import save_file

    from sgld.models.flux2_vae import Flux2TinyAutoEncoder

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    module = Flux2TinyAutoEncoder(TINY_VAE)
    tiny.stir(module, 0.05)
    save_file(module.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "Flux2TinyAutoEncoder", "act_fn": "silu", "in_channels": 3, "out_channels": 3, **TINY_VAE}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "flux2-dev": make_dev,
    "flux2-klein": partial(make_klein, is_distilled=True),
    "flux2-klein-9b": partial(make_klein, is_distilled=True),
    "flux2-klein-base": partial(make_klein, is_distilled=False),
    "flux2-klein-base-9b": partial(make_klein, is_distilled=False),
    "flux2-tiny-autoencoder": make_tiny_autoencoder,
}


def _save(pipeline: Any, folder: Path, words: Any, encoder: Any, guidance_embeds: bool) -> None:
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(**TRANSFORMER, guidance_embeds=guidance_embeds)
    vae = AutoencoderKLFlux2(**VAE)
    tiny.stir(transformer, 0.1)
    tiny.stir(vae, 0.05)
    tiny.stir(encoder, 0.05)
    vae.bn.running_mean.copy_(torch.randn(32) / 4)
    vae.bn.running_var.copy_(0.5 + torch.rand(32))
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=transformer
    ).save_pretrained(folder)


def _set_index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def mistral_tokenizer() -> Any:
    """Byte-level BPE to which each word of the system's message and of the prompts is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sgld.models.flux2_text import SYSTEM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM, " ".join(tiny.WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", chat_template=TEMPLATE, extra_special_tokens=list(MARKS[3:8]),
    )  # fmt: skip
