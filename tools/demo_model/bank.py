"""Stage `bank`: encodes rendered clips and images once, for the transformer to train on."""

import json
import random
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .autoencoder import SIZE, channels_last
from .compress import compress_bank
from .runs import Run
from .scenes import FULL_LENGTH, SHAPES, Scene, render_batch, sample_scene

CHUNK = 8


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Posterior means of clips [B, 3, T, H, W], in bf16 arithmetic: [B, C, t, h, w] float32."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents: Tensor = vae.encode(pixels).latent_dist.mode().float()
    return latents


def draw_twins(
    rng: random.Random, frames: int, image: bool, effects: Collection[str] = ()
) -> tuple[list[Scene], Tensor]:
    """Two scenes that differ in nothing but the shape, and their pictures [2, 3, T, H, W]."""
    scene = sample_scene(rng, image=image)
    others = [replace(scene, shape=shape) for shape in SHAPES if shape != scene.shape]
    scenes = [scene, rng.choice([other for other in others if not other.held_out])]
    state, pictures = rng.getstate(), []
    for twin in scenes:
        rng.setstate(state)
        pictures.append(torch.from_numpy(render_batch([twin], frames, SIZE, rng, effects=effects)))
    return scenes, torch.cat(pictures)


def encode_scenes(
    run: Run, vae: AutoencoderKLWan, count: int, image: bool, effects: Collection[str] = ()
) -> tuple[list[Scene], Tensor]:
    """This worker's share of `count` scenes, twin beside twin, and their latents."""
    scenes: list[Scene] = []
    latents, name = [], "images" if image else "clips"
    for chunk in range(count // CHUNK // run.workers):
        rng = run.own_rng(f"bank-{name}", chunk)
        twins = [draw_twins(rng, 1 if image else FULL_LENGTH, image, effects) for _ in range(CHUNK // 2)]
        latents.append(encode(vae, torch.cat([pictures for _, pictures in twins])))
        scenes += [scene for pair, _ in twins for scene in pair]
        if chunk % 32 == 31:
            run.log(f"bank {name} {len(scenes) * run.workers}")
    return scenes, torch.cat(latents)


def make_bank(run: Run, clips: int, images: int) -> None:
    """Encodes this worker's share and writes it as `bank-<rank>.pt`, not yet normalised."""
    vae = channels_last(AutoencoderKLWan.from_pretrained(run.folder("vae")).eval())
    parts = {}
    for name, count, image in (("clips", clips, False), ("images", images, True)):
        scenes, latents = encode_scenes(run, vae, count, image)
        parts[name] = {"scenes": json.dumps([asdict(scene) for scene in scenes]), "latents": latents.half()}
    torch.save(parts, run.folder(f"bank-{run.rank}.pt"))


def join_bank(workdir: Path, workers: int) -> None:
    """Joins the shares, turns the latents onto their principal axes, writes `bank.pt` and `vae_small`."""
    shares = [torch.load(workdir / f"bank-{rank}.pt", weights_only=True) for rank in range(workers)]
    names = ("clips", "images")
    raw = {name: torch.cat([share[name]["latents"].float() for share in shares]) for name in names}
    small = compress_bank(AutoencoderKLWan.from_pretrained(workdir / "vae"), raw, workdir / "vae_small")
    scenes = {name: [scene for share in shares for scene in json.loads(share[name]["scenes"])] for name in names}
    bank = {name: {"scenes": json.dumps(scenes[name]), "latents": small[name].half()} for name in names}
    torch.save(bank, workdir / "bank.pt")
    for rank in range(workers):
        (workdir / f"bank-{rank}.pt").unlink()


def load_bank(workdir: Path) -> dict[str, tuple[list[Scene], Tensor]]:
    """Scenes and normalised latents [N, C, t, h, w] (float16) of `clips` and `images`."""
    bank = torch.load(workdir / "bank.pt", weights_only=True)
    return {
        name: ([Scene(**scene) for scene in json.loads(part["scenes"])], part["latents"]) for name, part in bank.items()
    }
