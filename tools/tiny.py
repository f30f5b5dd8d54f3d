"""Random tiny twins of real checkpoints, made with diffusers' and transformers' own classes.

python -m tools.tiny wan21 FOLDER
python -m tools.tiny wan21 FOLDER --cache
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("a", "the", "red", "green", "blue", "cat", "dog", "ball", "moving", "still", "over", "on", "bright", "blurred")
REAL_NAMES = {"wan21": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan22-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}

TRANSFORMER = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "patch_size": (1, 2, 2), "rope_max_seq_len": 64,
}  # fmt: skip
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.1, 2.0],
}  # fmt: skip
TEXT = {
    "vocab_size": 3 + len(WORDS), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip


def make_wan21(folder: Path, **transformer: Any) -> Path:
    """A twin of Wan 2.1 T2V; keyword arguments change the transformer's config."""
    _make(folder, transformer, experts=1, flow_shift=3.0)
    return folder


def make_wan22_a14b(folder: Path, **transformer: Any) -> Path:
    """A twin of the two-expert Wan 2.2 T2V A14B."""
    _make(folder, transformer, experts=2, flow_shift=3.0, boundary_ratio=0.875)
    return folder


def makers() -> dict[str, Callable[[Path], Path]]:
    """The makers of all twins, by name."""
    found: dict[str, Callable[[Path], Path]] = {"wan21": make_wan21, "wan22-a14b": make_wan22_a14b}
    for module in _families():
        found |= module.MAKERS
    return found


def real_names() -> dict[str, str]:
    """The repository that each twin stands for, by name."""
    found = dict(REAL_NAMES)
    for module in _families():
        found |= module.REAL_NAMES
    return found


def _families() -> list[Any]:
    """Modules with MAKERS, name -> maker of a folder, and REAL_NAMES, name -> repository."""
    files = sorted((Path(__file__).parent / "twins").glob("*.py"))
    return [importlib.import_module(f"tools.twins.{file.stem}") for file in files]


def make_cache(name: str, cache: Path) -> Path:
    """That twin under its real name in a Hugging Face cache folder; returns the snapshot."""
    real = real_names()[name]
    repository = cache / f"models--{real.replace('/', '--')}"
    commit = hashlib.sha1(real.encode(), usedforsecurity=False).hexdigest()
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return makers()[name](repository / "snapshots" / commit)


def set_scheduler(folder: Path, name: str, **config: Any) -> None:
    """Give a model another scheduler: a class of diffusers."""
    import diffusers

    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, name)(**config).save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"scheduler": ["diffusers", name]}, indent=2))


def _make(folder: Path, changes: dict[str, Any], experts: int, flow_shift: float, **index: Any) -> None:
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    transformers = [WanTransformer3DModel(**TRANSFORMER | changes) for _ in range(experts)]
    vae = AutoencoderKLWan(**VAE)
    text = UMT5EncoderModel(UMT5Config(**TEXT, feed_forward_proj="gated-gelu"))
    for module in transformers:
        stir(module, 0.15)
    for module in (vae, text):
        stir(module, 0.05)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text,
        vae=vae,
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        **index,
    ).save_pretrained(folder)


def stir(module: Any, deviation: float) -> None:
    """Make every weight matter: nothing zero, nothing one."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=deviation)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=makers())
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", action="store_true", help="lay FOLDER out as a Hugging Face cache")
    given = parser.parse_args()
    print(make_cache(given.model, given.folder) if given.cache else makers()[given.model](given.folder))


if __name__ == "__main__":
    main()
