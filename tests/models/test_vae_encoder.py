"""The encoder against diffusers' AutoencoderKLWan: both forms, in chunks, in tiles; and on the embedded model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgld.errors import ModelError
from sgld.models import vae_encoder as module
from sgld.models.vae import Vae
from sgld.models.vae_encoder import VaeEncoder, has_encoder
from sgld.settings import Settings, VaeConfig
from tests.models.test_vae import FORMS, TILES
from tools.judge import parse_prompt, scenes
from tools.tiny import VAE

DEMO = Path(__file__).parents[2] / "sgld" / "demo" / "vae"


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' autoencoder, and the folder it is saved in."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    theirs = AutoencoderKLWan(**VAE | FORMS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


def ours(folder: Path, **settings: Any) -> VaeEncoder:
    return VaeEncoder(folder, Settings.of(**settings), torch.float32, torch.device("cpu"))


@torch.inference_mode()
def raw(vae: Any, x: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] to latents [1, C, T, h, w] with mean 0 and deviation 1, as diffusers' pipeline has them."""
    z: Tensor = vae.encode(x.transpose(0, 1)[None]).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (z - mean) * (1.0 / std)


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("chunk", [1, 2**20], ids=["one by one", "at once"])
@torch.inference_mode()
def test_encoder_equals_diffusers(
    pair: tuple[Any, Path], frames: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_PIXELS", chunk)
    theirs, folder = pair
    x = torch.rand(frames, 3, 32, 48) * 2 - 1
    expected = raw(theirs, x)
    made = ours(folder).encode(x)
    assert made.shape == expected.shape and made.dtype == torch.float32
    assert (made - expected).abs().max() < 1e-5
    assert (made - ours(folder).encode(x.flip(-1))).abs().max() > 1e-2


@torch.inference_mode()
def test_tiles_equal_diffusers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    if theirs.config.patch_size:
        pytest.skip("diffusers measures tiles in patches here and cuts others; no text-to-video checkpoint has any")
    tiled = ours(folder, vae_tiling=True, vae_config=VaeConfig(**TILES))
    x = torch.rand(5, 3, 64, 80) * 2 - 1
    whole = raw(theirs, x)
    theirs.enable_tiling(**TILES)
    expected = raw(theirs, x)
    theirs.use_tiling = False
    assert (tiled.encode(x) - expected).abs().max() < 1e-5
    assert (whole - expected).abs().max() > 1e-3


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two pictures u8, in decibels."""
    return float(-10 * ((a.float() - b.float()) / 255).square().mean().log10())


@pytest.mark.parametrize("frames", [1, 17])
@torch.inference_mode()
def test_the_embedded_model_gives_a_picture_back(frames: int) -> None:
    scene = parse_prompt("a red circle on a blue background moving left", image=frames == 1)
    drawn = scenes.render_batch([scene], frames, 96, random.Random(0))  # [1, 3, N, H, W] in -1..1
    x = torch.from_numpy(drawn)[0].transpose(0, 1)
    z = ours(DEMO).encode(x)
    decoder = Vae(DEMO, Settings(), torch.float32, torch.device("cpu"))
    before = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert psnr(decoder.decode(z), before) > 22
    assert psnr(decoder.decode(z.roll(3, -1)), before) < 16, "the control: the picture moved by 24 pixels"


def test_strict(pair: tuple[Any, Path], tmp_path: Path) -> None:
    weights = load_file(pair[1] / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((pair[1] / "config.json").read_text())
    cut = {name: tensor for name, tensor in weights.items() if not name.startswith("quant_conv.")}
    save_file(cut, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=r"2 tensors missing: quant_conv"):
        ours(tmp_path)


def test_whether_there_is_an_encoder(pair: tuple[Any, Path], tmp_path: Path) -> None:
    weights = load_file(pair[1] / "diffusion_pytorch_model.safetensors")
    cut = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
    save_file(cut, tmp_path / "diffusion_pytorch_model.safetensors")
    assert has_encoder(pair[1]) and not has_encoder(tmp_path)
