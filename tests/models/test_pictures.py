"""Pictures as the start, against diffusers' WanVideoToVideoPipeline: the same seed makes the same picture."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgld import inputs
from sgld.errors import BadRequest, ModelError
from sgld.nn.parallel import Mesh
from sgld.resolve import resolve
from sgld.settings import VaeConfig
from sgld.worker import sampler
from tests.models.conftest import REQUEST, generate, levels_apart, load
from tests.nn.ranks import on_ranks

MODELS = ("wan21", "wan21-euler")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of another size and shape than any output."""
    y, x = np.mgrid[0:50, 0:90]
    pixels = np.stack([x * 2.8, y * 5.0, (x + y) % 40 * 6.0], -1).astype(np.uint8)
    file = tmp_path_factory.mktemp("pictures") / "waves.png"
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture(scope="session")
def mask(picture: Path) -> Path:
    """Its left half stays."""
    grey = np.zeros((50, 90), np.uint8)
    grey[:, 45:] = 255
    file = picture.with_name("mask.png")
    Image.fromarray(grey).save(file)
    return file


@pytest.fixture(scope="session")
def reference(picture: Path) -> Callable[..., Tensor]:
    """Frames u8 [N, H, W, 3] of `REQUEST` with changes, as diffusers makes them from the picture in float32."""
    from diffusers import WanVideoToVideoPipeline

    pipelines: dict[Path, Any] = {}

    def make(folder: Path, **changes: Any) -> Tensor:
        if folder not in pipelines:
            pipelines[folder] = WanVideoToVideoPipeline.from_pretrained(folder, transformer_2=None)
            pipelines[folder].set_progress_bar_config(disable=True)
        request = REQUEST | {"strength": 0.8} | changes
        cut = inputs.read(str(picture), None, request["width"], request["height"]).picture
        video = [Image.fromarray(cut)] * request.pop("num_frames")
        generator = torch.Generator("cpu").manual_seed(request.pop("seed"))
        frames = pipelines[folder](video, **request, generator=generator, output_type="np").frames[0]
        return torch.from_numpy((frames * 255).round().astype("uint8"))

    return make


@pytest.mark.proves("WanPipeline", "image-to-video", "image-to-image")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes", [{}, {"strength": 0.5}, {"strength": 1.0}, {"strength": 0.2}, {"num_frames": 1}], ids=str
)
def test_same_seed_same_picture_as_diffusers(
    twins: Path, picture: Path, reference: Callable[..., Tensor], name: str, changes: dict[str, Any]
) -> None:
    ours = generate(load(twins / name), image_path=[str(picture)], **changes)
    assert ours.float().std() > 10  # not a blank picture, on which everything agrees
    assert levels_apart(ours, reference(twins / name, **changes)) <= 1
    assert levels_apart(ours, reference(twins / name, **changes, seed=8)) > 5


@pytest.mark.parametrize("steps", [7, 13, 20])
def test_uneven_shares_of_the_steps_are_cut_as_diffusers_cuts_them(
    twins: Path, picture: Path, reference: Callable[..., Tensor], steps: int
) -> None:
    changes = {"num_inference_steps": steps, "strength": 0.65}
    ours = generate(load(twins / "wan21"), image_path=[str(picture)], **changes)
    assert levels_apart(ours, reference(twins / "wan21", **changes)) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_full_strength_is_text_to_video(twins: Path, picture: Path, name: str) -> None:
    family = load(twins / name)
    full = generate(family, image_path=[str(picture)], strength=1.0)
    assert levels_apart(full, generate(family)) <= 1
    assert levels_apart(full, generate(family, image_path=[str(picture)], strength=0.8)) > 5


def test_both_experts_start_from_a_picture(twins: Path, picture: Path) -> None:
    family = load(twins / "wan22-a14b")
    start = {"image_path": [str(picture)]}
    assert levels_apart(generate(family, **start), generate(family)) > 5
    assert levels_apart(generate(family, **start, strength=0.2), generate(family, **start, seed=8, strength=0.2)) > 0


def _made(mesh: Mesh, folder: Path, picture: Path, mask: Path, torn: Path) -> tuple[Any, Any, str]:
    family = load(folder, mesh)
    with pytest.raises(BadRequest) as caught:
        generate(family, mesh, image_path=[str(torn)])
    whole = generate(family, mesh, image_path=[str(picture)])
    part = generate(family, mesh, image_path=[str(picture)], mask_path=str(mask))
    return whole.numpy(), part.numpy(), str(caught.value)


def test_two_ranks_make_the_picture_of_one(
    twins: Path, picture: Path, mask: Path, reference: Callable[..., Tensor], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(picture.read_bytes()[:200])
    ranks = on_ranks(2, tmp_path / "store", _made, twins / "wan21", picture, mask, torn)
    (whole, part, refusal), (nothing, _, same_refusal) = ranks
    assert levels_apart(torch.from_numpy(whole), reference(twins / "wan21")) <= 1
    alone = generate(load(twins / "wan21"), image_path=[str(picture)], mask_path=str(mask))
    assert levels_apart(torch.from_numpy(part), alone) <= 1
    assert nothing.size == 0
    assert refusal == same_refusal and "torn.png' cannot be read" in refusal


def test_a_mask_keeps_what_it_leaves_out(twins: Path, picture: Path, mask: Path) -> None:
    family = load(twins / "wan21")
    made = generate(family, image_path=[str(picture)], mask_path=str(mask), strength=0.9)
    cut = inputs.read(str(picture), str(mask), 48, 32)
    assert cut.mask is not None
    stays = torch.from_numpy(cut.mask == 0)
    assert stays.float().mean() > 0.4
    for frame in made:
        assert (frame[stays] == torch.from_numpy(cut.picture)[stays]).all()
    whole = generate(family, image_path=[str(picture)], strength=0.9)
    source = torch.from_numpy(cut.picture).expand_as(made)
    assert levels_apart(made[:, ~stays], source[:, ~stays]) > 20
    assert levels_apart(whole[:, stays], source[:, stays]) > 20, "the control: without a mask all of it changes"


def test_latents_outside_the_mask_follow_the_noised_picture(
    twins: Path, picture: Path, mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases, held = [], []
    hold = sampler.SDEditStart.hold

    def watched(self: sampler.SDEditStart, x: Tensor, sigma: float) -> Tensor:
        canvases.append(self)
        held.append((hold(self, x, sigma), sigma))
        return held[-1][0]

    monkeypatch.setattr(sampler.SDEditStart, "hold", watched)
    generate(load(twins / "wan21"), image_path=[str(picture)], mask_path=str(mask))
    assert len(held) == 4 and held[-1][1] == 0
    sdedit = canvases[0]
    assert sdedit.free is not None and 0 < sdedit.free.float().mean() < 1
    stays = ~sdedit.free.expand_as(sdedit.clean)
    for x, sigma in held:
        expected = (1 - sigma) * sdedit.clean + sigma * sdedit.noise
        assert torch.equal(x[stays], expected[stays])
        assert not torch.allclose(x[~stays], expected[~stays], atol=1e-2)
    assert torch.equal(held[-1][0][stays], sdedit.clean[stays])


def test_the_encoder_is_loaded_with_the_first_picture(twins: Path, picture: Path) -> None:
    family = load(twins / "wan21")
    generate(family)
    assert family.vae.encoder is None  # type: ignore[attr-defined]
    generate(family, image_path=[str(picture)])
    encoder = family.vae.encoder  # type: ignore[attr-defined]
    generate(family, image_path=[str(picture)])
    assert encoder is not None and family.vae.encoder is encoder  # type: ignore[attr-defined]


def test_a_model_without_an_encoder_takes_no_picture(twins: Path, picture: Path, tmp_path: Path) -> None:
    assert load(twins / "wan21").info.pictures.max == 1
    assert load(twins / "wan21", vae_config=VaeConfig(load_encoder=False)).info.pictures.max == 0
    copy = Path(shutil.copytree(twins / "wan21", tmp_path / "model"))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(("enc", "quant"))}
    save_file(weights, file)
    info = load(copy).info
    assert info.pictures.max == 0
    with pytest.raises(BadRequest, match=r"image_path: 1 given; this model makes pictures from text alone"):
        resolve(REQUEST | {"image_path": [str(picture)]}, info)


def test_a_broken_encoder_is_told_at_the_first_picture(twins: Path, picture: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(twins / "wan21", tmp_path / "model"))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if not name.startswith("quant")}, weights)
    family = load(copy)
    generate(family)
    with pytest.raises(ModelError, match="2 tensors missing: quant_conv"):
        generate(family, image_path=[str(picture)])
