"""LoRA adapters of random weights for the embedded model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ENDINGS = ("to_q.weight", "to_v.weight", "ffn.net.0.proj.weight")
SCALE = 0.1


def write_adapter(path: Path, seed: int, *, rank: int = 4, extra: tuple[str, ...] = ()) -> Path:
    """An adapter, in diffusers' names, that changes pictures visibly; `extra` are keys that no model has."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.ones(2, 2) for key in extra}
    for file in Path(str(files("sgld.demo"))).glob("transformer/*.safetensors"):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a dict
                if key.endswith(ENDINGS):
                    out, inner = weights.get_slice(key).get_shape()
                    layer = f"transformer.{key.removesuffix('.weight')}"
                    tensors[f"{layer}.lora_A.weight"] = SCALE * torch.randn(rank, inner, generator=generator)
                    tensors[f"{layer}.lora_B.weight"] = SCALE * torch.randn(out, rank, generator=generator)
    save_file(tensors, path)
    return path
