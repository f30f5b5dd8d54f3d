"""Stage `assemble`: writes the trained parts as a WanPipeline folder in bf16."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from .autoencoder import SIZE
from .runs import Run
from .scenes import FULL_LENGTH
from .transformer import CONFIG, SHIFT, Average, new_model

LIMIT = 12_000_000
"""Bytes of weights that the project may carry."""

DEFAULTS = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": FULL_LENGTH,
    "fps": 8,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
}


def weigh(folder: Path) -> dict[str, int]:
    """Bytes of safetensors by component."""
    return {path.parent.name: path.stat().st_size for path in sorted(folder.glob("*/*.safetensors"))}


def assemble(run: Run) -> Path:
    """Writes `final` from the averaged weights; RuntimeError where it is too big."""
    model, folder = new_model(run), run.folder("final")
    average = Average(model.parameters())
    run.resume("transformer", average=average)
    average.write(model.parameters())
    transformer = WanTransformer3DModel(**CONFIG)
    transformer.load_state_dict(model.flow.state_dict())
    vae = AutoencoderKLWan.from_pretrained(run.folder("vae_small"))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    parts = {"text_encoder": model.text, "vae": vae, "transformer": transformer}
    pipeline = WanPipeline(tokenizer=model.tokenizer, scheduler=scheduler, **parts)
    for part in parts.values():
        part.to(torch.bfloat16)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    sizes = weigh(folder)
    run.log(f"assemble {sizes} in all {sum(sizes.values()):,} bytes")
    if sum(sizes.values()) > LIMIT:
        raise RuntimeError(f"the weights take {sum(sizes.values()):,} bytes; {LIMIT:,} are allowed")
    return folder
