"""Stage `vae`: trains the AutoencoderKLWan, mostly on small crops around the shapes' edges."""

import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock, unpatchify
from torch import Tensor, nn

from .runs import Run, cosine, set_rate
from .scenes import render_batch, sample_scene

LATENT_CHANNELS = 16
SIZE = 96
RATE = 3e-3
CONFIG: dict[str, Any] = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}


@dataclass(frozen=True)
class Mix:
    """One kind of batch, its size for each worker, and how often it is drawn; `crop` is None for whole pictures."""

    share: float
    batch: int
    frames: int
    crop: int | None


SHORT_STEPS = 2000
"""Steps on mostly single frames and short clips; the rest go to long clips, whose later frames drift at first."""
SHORT_MIXES = (
    Mix(0.40, 12, 1, 48),
    Mix(0.36, 3, 5, 48),
    Mix(0.10, 2, 9, 48),
    Mix(0.07, 3, 1, None),
    Mix(0.05, 1, 5, None),
    Mix(0.02, 1, 17, None),
)
LONG_MIXES = (
    Mix(0.10, 12, 1, 48),
    Mix(0.15, 3, 5, 48),
    Mix(0.20, 2, 9, 48),
    Mix(0.45, 1, 17, 48),
    Mix(0.02, 3, 1, None),
    Mix(0.03, 1, 5, None),
    Mix(0.05, 1, 17, None),
)


def new_autoencoder() -> AutoencoderKLWan:
    """Builds the model with small residual branches, so that the averaging shortcuts carry it at first."""
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.mul_(0.1)
                nn.init.zeros_(module.conv2.bias)
            elif isinstance(module, WanAttentionBlock):
                nn.init.zeros_(module.proj.weight)
                nn.init.zeros_(module.proj.bias)
    return vae


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lays convolution weights out channels last: bf16 convolutions are 1.5 times as fast so here."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def choose_mix(rng: random.Random, step: int) -> Mix:
    """Draws a kind of batch; workers must draw alike."""
    mixes = SHORT_MIXES if step < SHORT_STEPS else LONG_MIXES
    return rng.choices(mixes, [mix.share for mix in mixes])[0]


def draw_batch(mix: Mix, rng: random.Random) -> Tensor:
    """Draws a batch of one of the mixes: [B, 3, T, H, W]."""
    scenes = [sample_scene(rng, held_out=None) for _ in range(mix.batch)]
    return torch.from_numpy(render_batch(scenes, mix.frames, SIZE, rng, mix.crop))


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Decodes latents [B, C, t, h, w] as `vae.decode` does, without its clamp, whose gradient is zero outside."""
    vae.clear_cache()
    z, chunks = vae.post_quant_conv(z), []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        chunk = vae.decoder(z[:, :, i : i + 1], vae._feat_map, vae._conv_idx, first_chunk=i == 0)
        chunks.append(chunk)
    vae.clear_cache()
    pixels: Tensor = unpatchify(torch.cat(chunks, 2).float(), vae.config.patch_size)
    return pixels


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1, half the squared error and half the L1 of the spatial gradients."""
    error = y - x
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * error.pow(2).mean() + 0.5 * gradients


def training_loss(vae: AutoencoderKLWan, x: Tensor, kl_weight: float) -> Tensor:
    """Reconstruction plus a light pull of the latents towards the unit normal."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(x).latent_dist
        y = decode_unclamped(vae, latents.sample())
    mean, var, logvar = latents.mean.float(), latents.var.float(), latents.logvar.float()
    kl: Tensor = 0.5 * (mean.pow(2) + var - 1 - logvar).mean()
    return reconstruction_loss(y, x) + kl_weight * kl


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Encodes and decodes clips [B, 3, T, H, W] two at a time."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in torch.split(x, 2)])


def psnr(vae: AutoencoderKLWan) -> tuple[float, float]:
    """Mean and worst PSNR in dB over four fixed clips."""
    rng = random.Random(999)
    x = torch.from_numpy(render_batch([sample_scene(rng, held_out=None) for _ in range(4)], 17, SIZE, rng))
    mse = ((round_trip(vae, x) - x) / 2).pow(2).mean((1, 2, 3, 4))
    decibels = -10 * mse.log10()
    return decibels.mean().item(), decibels.min().item()


def train_autoencoder(run: Run, steps: int) -> Path:
    """Trains for `steps` steps, resuming where a checkpoint lies, and writes the averaged weights."""
    torch.manual_seed(run.seed)
    vae = channels_last(new_autoencoder())
    mean = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    step = run.resume("vae", vae=vae, mean=mean, optimizer=optimizer)
    began = time.monotonic()
    while step < steps:
        set_rate(optimizer, RATE * min(1, (step + 1) / 50) * cosine(step / steps))
        mix = choose_mix(run.shared_rng("vae", step), step)
        x = draw_batch(mix, run.own_rng("vae", step))
        loss = training_loss(vae, x, 2e-4 * min(1, step / 300))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        run.average(vae.parameters())
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.995, step / (10 + step))
            torch._foreach_lerp_(list(mean.parameters()), list(vae.parameters()), 1 - decay)
        if (step % 250 == 0 or step == steps) and run.rank == 0:
            run.save("vae", step, vae=vae, mean=mean, optimizer=optimizer)
            mean.save_pretrained(run.folder("vae"))
            best, worst = psnr(mean)
            minutes = (time.monotonic() - began) / 60
            run.log(f"vae {step} loss {loss.item():.4f} psnr {best:.2f} worst {worst:.2f} {minutes:.1f} min")
    return run.folder("vae")
