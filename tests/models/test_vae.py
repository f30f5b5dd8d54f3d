"""The decoder against diffusers' AutoencoderKLWan: both forms, in chunks, in tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgld.errors import BadRequest, ModelError
from sgld.models import vae as module
from sgld.models.vae import Vae
from sgld.settings import Settings, VaeConfig
from tools.tiny import VAE

FORMS: dict[str, dict[str, Any]] = {
    "wan21": {},
    "wan22": {"is_residual": True, "decoder_base_dim": 12},
    "patched": {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2},
}


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' autoencoder, and the folder it is saved in."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    theirs = AutoencoderKLWan(**VAE | FORMS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


def ours(folder: Path, **settings: Any) -> Vae:
    return Vae(folder, Settings.of(**settings), torch.float32, torch.device("cpu"))


@torch.inference_mode()
def raw(vae: Any, z: Tensor) -> Tensor:
    """Latents [T, C, H, W] to pictures [N, 3, H, W], by diffusers."""
    video: Tensor = vae.decode(z.transpose(0, 1)[None], return_dict=False)[0][0]
    return video.transpose(0, 1)


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2**20], ids=["one by one", "at once"])
@torch.inference_mode()
def test_decoder_equals_diffusers(
    pair: tuple[Any, Path], frames: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_PIXELS", chunk)
    theirs, folder = pair
    z = torch.randn(frames, 4, 4, 6)
    assert (ours(folder).module(z).clamp(-1, 1) - raw(theirs, z)).abs().max() < 1e-5


@torch.inference_mode()
def test_conv_by_frames_equals_conv3d() -> None:
    conv = module.CausalConv3d(5, 7, 3, 3)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(6, 5, 4, 4)
    padded = torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, 0, 2, 0))
    expected = torch.nn.functional.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1)).transpose(0, 1)
    past = module.Past()
    assert (torch.cat([conv(x[:1], past), conv(x[1:], past)]) - expected).abs().max() < 1e-4


TILES = {
    "tile_sample_min_height": 32, "tile_sample_min_width": 48, "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 32,
}  # fmt: skip


@torch.inference_mode()
def test_tiles_equal_diffusers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    if theirs.config.patch_size:
        pytest.skip("diffusers blends patches before it joins them; no text-to-video checkpoint has any")
    tiled = ours(folder, vae_tiling=True, vae_config=VaeConfig(**TILES))
    z = torch.randn(2, 4, 8, 10)
    whole = raw(theirs, z)
    theirs.enable_tiling(**TILES)
    expected = raw(theirs, z)
    theirs.use_tiling = False
    assert tiled.tiling
    assert (tiled.in_tiles(z, tiled.tiling).clamp(-1, 1) - expected).abs().max() < 1e-5
    assert (whole - expected).abs().max() > 1e-3
    assert tiled.decode(z.transpose(0, 1)[None]).shape == (5, 64, 80, 3)


def test_tiling_is_off_unless_asked(pair: tuple[Any, Path]) -> None:
    assert ours(pair[1]).tiling is None
    assert ours(pair[1], vae_config=VaeConfig(use_tiling=True)).tiling == module.Tiling(256, 256, 192, 192)
    with pytest.raises(BadRequest, match=r"^vae_config.tile_sample_min_height: it has no effect without vae_tiling$"):
        ours(pair[1], vae_config=VaeConfig(tile_sample_min_height=64))


def test_rows_are_shared_not_tiles(pair: tuple[Any, Path]) -> None:
    with pytest.raises(BadRequest, match=r"^vae_config.parallel_decode_mode: 'tiled': .* is shared row by row"):
        ours(pair[1], vae_sp=True, vae_config=VaeConfig(parallel_decode_mode="tiled"))


def test_a_model_needs_its_decoder(pair: tuple[Any, Path]) -> None:
    with pytest.raises(BadRequest, match="load_decoder"):
        ours(pair[1], vae_config=VaeConfig(load_decoder=False))


def test_strict(pair: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, _ = pair
    del theirs.decoder.conv_out
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"2 tensors missing: decoder\.conv_out"):
        ours(tmp_path)
