"""LoRA adapters (Hu et al., 2021) for the embedded model: each teaches its frozen transformer one effect of the scenes.

The captions stay those of the model's own training, so that the adapter alone makes the difference.
"""

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from .autoencoder import channels_last
from .bank import encode_scenes
from .runs import Run, cosine, set_rate
from .scenes import TONES, Scene
from .transformer import Bank, Bucket, Model, flow_loss

RANK = 8
RATE = 3e-3
WARM_UP = 20
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""The endings of the names of the attentions' and the feed-forward networks' linear layers."""
BUCKETS = (Bucket(0.5, 12, 5), Bucket(0.1, 16, 3), Bucket(0.1, 20, 2), Bucket(0.3, 32, None))


class LowRank(nn.Module):
    """A weight's parametrization W + B A, with B zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W [O, I] to W + B A."""
        return torch.addmm(weight, self.up, self.down)


def add_adapter(flow: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Freezes a model and puts a pair beside every linear layer of its blocks, by the layers' names."""
    flow.requires_grad_(False)
    chosen = {
        name: layer for name, layer in flow.named_modules() if name.startswith("blocks.") and name.endswith(LAYERS)
    }
    pairs = {name: LowRank(layer.weight, rank) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        parametrize.register_parametrization(layer, "weight", pairs[name])
    return pairs


def save_adapter(pairs: dict[str, LowRank], path: Path) -> Path:
    """Writes the pairs in bf16 as diffusers' `save_lora_weights` does."""
    state = {}
    for name, pair in pairs.items():
        state[f"{name}.lora_A.weight"] = pair.down.detach().bfloat16()
        state[f"{name}.lora_B.weight"] = pair.up.detach().bfloat16()
    WanPipeline.save_lora_weights(path.parent, transformer_lora_layers=state, weight_name=path.name)
    return path


def load_model(folder: Path) -> Model:
    """A WanPipeline folder's networks in float32, frozen."""
    parts: dict[str, Any] = {"torch_dtype": torch.float32}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    text = UMT5EncoderModel.from_pretrained(folder / "text_encoder", **parts).eval().requires_grad_(False)
    flow = WanTransformer3DModel.from_pretrained(folder / "transformer", **parts).requires_grad_(False)
    return Model(tokenizer, text, flow)


def visible(scene: Scene, effect: str) -> bool:
    """Whether the shape stands out from the background that an effect gives it."""
    return effect != "grid" or scene.color != TONES[scene.background]


def make_effect_bank(run: Run, model: Path, effect: str, clips: int, images: int) -> None:
    """Renders and encodes this worker's share with an effect; writes `<effect>-<rank>.pt`."""
    vae = channels_last(AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32).eval())
    mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std))
    bank = {}
    for name, count in (("clips", clips), ("images", images)):
        scenes, latents = encode_scenes(run, vae, count, name == "images", (effect,))
        kept = [i for i, scene in enumerate(scenes) if visible(scene, effect)]
        bank[name] = {
            "scenes": [vars(scenes[i]) for i in kept],
            "latents": ((latents[kept] - mean) / std).half(),
        }
    torch.save(bank, run.folder(f"{effect}-{run.rank}.pt"))


def load_effect_bank(run: Run, effect: str) -> Bank:
    """This worker's share."""
    bank = torch.load(run.folder(f"{effect}-{run.rank}.pt"), weights_only=True)
    return {name: ([Scene(**scene) for scene in part["scenes"]], part["latents"]) for name, part in bank.items()}


def train_adapter(run: Run, model: Path, effect: str, steps: int, out: Path) -> None:
    """Trains an adapter on the workers' banks and writes `<out>/<effect>.safetensors`."""
    torch.manual_seed(run.seed)
    networks, bank = load_model(model), load_effect_bank(run, effect)
    pairs = add_adapter(networks.flow)
    parameters = [parameter for pair in pairs.values() for parameter in pair.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    stage, began, losses = f"lora-{effect}", time.monotonic(), []
    for step in range(steps):
        set_rate(optimizer, RATE * min(1, (step + 1) / WARM_UP) * cosine(step / steps))
        bucket = run.shared_rng(stage, step).choices(BUCKETS, [b.share for b in BUCKETS])[0]
        loss = flow_loss(networks, bank, bucket, run.own_rng(stage, step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            recent = losses[-50:]
            run.log(
                f"{stage} {step + 1} loss {sum(recent) / len(recent):.4f} {(time.monotonic() - began) / 60:.1f} min"
            )
            if run.rank == 0:
                save_adapter(pairs, out / f"{effect}.safetensors")
