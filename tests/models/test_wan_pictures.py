"""Wan that looks at pictures, and Wan of few steps, against diffusers: the same seed makes the same picture."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.messages import Cancel, Load
from sgld.models import names
from sgld.models.components import ComponentLoader
from sgld.models.vae import WanDecoder, WanVaeConfig
from sgld.models.vae_encoder import VaeEncoder, WanEncoder
from sgld.models.wan import Wan
from sgld.models.wan_defaults import FAST, NEGATIVE, TURBO, TURBO_PICTURE, few_steps, levels_of
from sgld.models.wan_transformer import WanConfig, WanTransformer
from sgld.nn.attention import TORCH
from sgld.nn.parallel import Mesh
from sgld.params import SamplingParams
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings, VaeConfig
from sgld.worker.run_context import RunContext, Stopped
from sgld.worker.sampler import sample
from tests.models.parity import (
    activate,
    apart,
    levels,
    load,
    picture,
    pictures_of_ranks,
    quiet,
    same_state,
    shown,
    spelled,
    write_lora,
)
from tools.twins import wan as twins

Folders = Callable[[str], Path]
REQUEST = {
    "prompt": "a red cat &amp; the green   ball", "negative_prompt": "blurred", "height": 32, "width": 64,
    "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 7,
}  # fmt: skip
TI2V = REQUEST | {"height": 64}
EXPERTS = REQUEST | {"guidance_scale_2": 2.5}
TEXT, PICTURE = "WanPipeline", "WanImageToVideoPipeline"
FEW_TEXT, FEW_PICTURE = "WanDMDPipeline", "WanImageToVideoDmdPipeline"
proves = pytest.mark.proves
FEW = {"guidance_scale": 1.0, "num_inference_steps": 3}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a twin, made when it is first asked for."""
    root = tmp_path_factory.mktemp("wan")

    def find(name: str) -> Path:
        return root / name if (root / name).is_dir() else twins.MAKERS[name](root / name)

    return find


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two picture files of another size than any output."""
    y, x = np.mgrid[0:50, 0:90]
    waves = np.stack([x * 2.8, y * 5.0, (x + y) % 40 * 6.0], -1).astype(np.uint8)
    files = [tmp_path_factory.mktemp("pictures") / name for name in ("waves.png", "turned.png")]
    Image.fromarray(waves).save(files[0])
    Image.fromarray(waves[:, ::-1]).save(files[1])
    return [str(file) for file in files]


def few_step_scheduler(times: tuple[int, ...]) -> Any:
    """diffusers' stochastic Euler scheduler, with these times and the nearest levels of the trained schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    trained = FlowMatchEulerDiscreteScheduler(shift=8.0)
    sigmas = [float(trained.sigmas[(trained.timesteps - t).abs().argmin()]) for t in times]

    class Scheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, steps: int, device: Any = None) -> None:
            assert steps == len(times)
            super().set_timesteps(sigmas=sigmas, timesteps=[float(t) for t in times], device=device)

    return Scheduler(stochastic_sampling=True)


def their_picture(
    folder: Path, request: Mapping[str, Any], times: tuple[int, ...] | None = None, adapter: Path | None = None
) -> Tensor:
    """Frames u8 [N, H, W, 3] as diffusers makes them in float32, in few steps where their `times` are given."""
    return _their_picture(folder, json.dumps(request, sort_keys=True), times, adapter)


@cache
def _their_picture(folder: Path, asked: str, times: tuple[int, ...] | None, adapter: Path | None) -> Tensor:
    """Noise comes from torch's own generator."""
    import diffusers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    request = json.loads(asked)
    looks = [Image.open(file) for file in request.pop("image_path", [])]
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {} if times is None else {"scheduler": few_step_scheduler(times)}
    if index.get("image_processor", [None])[0]:
        parts["image_processor"] = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    name = "WanImageToVideoPipeline" if looks else "WanPipeline"
    if "strength" in request:
        name = "WanVideoToVideoPipeline"
    if name == "WanImageToVideoPipeline" and "image_encoder" not in index:
        parts |= {"image_encoder": None, "image_processor": None}
    pipeline = quiet(getattr(diffusers, name).from_pretrained(folder, **parts))
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    size = request["width"], request["height"]
    fitted = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in looks]
    if "strength" in request:
        request["video"] = fitted * request.pop("num_frames")
    else:
        request |= zip(("image", "last_image"), fitted, strict=False)
    torch.manual_seed(request.pop("seed"))
    return levels(pipeline(**request, output_type="np").frames[0])


def check(family: Wan, request: Mapping[str, Any], times: tuple[int, ...] | None = None) -> Tensor:
    """Our picture, which is diffusers', and not that of another seed."""
    ours = picture(family, request)
    assert ours.float().std() > 10  # not a blank picture, on which everything agrees
    assert apart(ours, their_picture(family.parts.folder, request, times)) <= 1
    assert apart(ours, picture(family, {**request, "seed": 8})) > 20
    return ours


def wan(folder: Path, **settings: Any) -> Wan:
    family = load(folder, **settings)
    assert isinstance(family, Wan)
    return family


# ---------------------------------------------------------------------------------------------- image to video


@proves(PICTURE, "image-to-video")
@pytest.mark.parametrize(("name", "request_of"), [("wan21-i2v-480p", REQUEST), ("wan22-i2v-a14b", EXPERTS)])
def test_a_picture_moves_as_with_diffusers(
    folders: Folders, pictures: list[str], name: str, request_of: dict[str, Any]
) -> None:
    family = wan(folders(name))
    ours = check(family, request_of | {"image_path": pictures[:1]})
    other = picture(family, request_of | {"image_path": pictures[1:]})
    assert apart(ours, other) > 20, "another picture makes another clip"


def test_a_cancel_is_heard_while_a_picture_is_encoded(
    folders: Folders, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = wan(folders("wan22-i2v-a14b"))
    params = resolve(EXPERTS | {"image_path": pictures[:1]}, family.info).params
    ours, theirs = Pipe()
    whole = VaeEncoder.encode

    def encode(encoder: VaeEncoder, clip: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        ours.send(Cancel("job"))
        return whole(encoder, clip, raise_if_cancelled)

    monkeypatch.setattr(VaeEncoder, "encode", encode)
    with ours, theirs, pytest.raises(Stopped, match="^stopped in encode, step 1 of 1$"):
        sample(family, params, RunContext("job", Mesh.solo(), theirs))


def test_the_last_frame_may_be_given_too(folders: Folders, pictures: list[str]) -> None:
    family = wan(folders("wan22-i2v-a14b"))
    both = check(family, EXPERTS | {"image_path": pictures})
    assert apart(both, picture(family, EXPERTS | {"image_path": pictures[:1]})) > 20
    with pytest.raises(BadRequest, match="^num_frames: 1: it is too few for 2 pictures$"):
        picture(family, EXPERTS | {"image_path": pictures, "num_frames": 1})


def test_two_pictures_for_an_encoder_that_tells_them_apart(tmp_path: Path, pictures: list[str]) -> None:
    folder = twins.make_i2v(tmp_path / "flf2v", pos_embed_seq_len=2 * 17)
    family = wan(folder)
    assert (family.info.pictures.min, family.info.pictures.max) == (2, 2)
    check(family, REQUEST | {"image_path": pictures})


@proves(TEXT, "text-to-video", "image-to-video", "text-to-image")
@pytest.mark.parametrize("frames", [1, 9])
def test_tokens_with_times_of_their_own(folders: Folders, pictures: list[str], frames: int) -> None:
    family = wan(folders("wan22-ti2v-5b"))
    request = TI2V | {"num_frames": frames}
    check(family, request)
    if frames > 1:
        ours = check(family, request | {"image_path": pictures[:1]})
        assert apart(ours[:1], picture(family, request | {"image_path": pictures[1:]})[:1]) > 20


# -------------------------------------------------------------------------------------------------- few steps


@proves(FEW_TEXT, "text-to-video", "image-to-video", "text-to-image")
@proves(FEW_PICTURE, "image-to-video")
@pytest.mark.parametrize(
    ("name", "request_of", "shows", "times"),
    [
        ("fastwan21", REQUEST, 0, FAST),
        ("fastwan21", REQUEST | {"num_frames": 1}, 0, FAST),
        ("fastwan22-ti2v-5b", TI2V, 0, FAST),
        ("fastwan22-ti2v-5b", TI2V, 1, FAST),
        ("wan22-i2v-a14b", REQUEST, 1, TURBO_PICTURE),
        ("turbowan22-i2v-a14b", REQUEST, 1, TURBO),
    ],
)
def test_few_steps_as_with_diffusers(
    folders: Folders, pictures: list[str], name: str, request_of: dict[str, Any], shows: int, times: tuple[int, ...]
) -> None:
    given = {"dmd_denoising_steps": list(times)} if name.startswith("wan22") else {}
    family = wan(folders(name), **given)
    request = request_of | FEW | {"num_inference_steps": len(times)}
    request |= {"image_path": pictures[:1]} if shows else {}
    check(family, request, times)


@pytest.mark.parametrize("times", [FAST, TURBO, TURBO_PICTURE])
def test_the_noise_level_of_each_time(times: tuple[int, ...]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    trained = FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [float(trained.sigmas[(trained.timesteps - t).abs().argmin()]) for t in times]
    assert levels_of(times, 1000, 8.0) == pytest.approx(nearest, abs=1e-6)
    assert levels_of(times, 1000, 8.0) == pytest.approx([t / 1000 for t in times], abs=2e-3)


def test_which_steps_a_model_takes() -> None:
    assert few_steps("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "WanDMDPipeline", None) == FAST
    assert few_steps("loayrashid/TurboWan2.1-T2V-1.3B-Diffusers", "WanDMDPipeline", None) == TURBO
    assert few_steps("TurboWan2.2-I2V-A14B-Diffusers", "WanImageToVideoDmdPipeline", None) == TURBO_PICTURE
    assert few_steps("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", None) is None
    assert few_steps("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", [900, 300]) == [900, 300]


def test_another_number_of_steps_is_refused(folders: Folders) -> None:
    info = load(folders("fastwan21")).info
    with pytest.raises(BadRequest, match="^num_inference_steps: 50: this model takes 3 steps and no other number$"):
        resolve({"num_inference_steps": 50}, info)
    assert resolve({}, info).params.num_inference_steps == 3
    assert load(folders("fastwan21"), dmd_denoising_steps=[900, 100]).info.fixed_steps == 2


def test_the_setting_is_refused_where_nothing_reads_it(folders: Folders) -> None:
    load_it = Load(Settings.of(dmd_denoising_steps=[900, 100]), folders("fastwan21"))
    with pytest.raises(BadRequest, match="^dmd_denoising_steps: it is of Wan checkpoints; leave it out$"):
        ComponentLoader(load_it, Mesh.solo(), Cpu(), lambda step, total: None)


@proves(FEW_TEXT, "image-to-video", "image-to-image")
@pytest.mark.parametrize("frames", [1, 9])
def test_few_steps_may_begin_at_a_picture(folders: Folders, pictures: list[str], frames: int) -> None:
    family = wan(folders("fastwan21"))
    request = REQUEST | FEW | {"num_frames": frames, "image_path": pictures[:1]}
    started = check(family, request | {"strength": 0.7}, FAST)
    assert apart(started, picture(family, request | {"strength": 1.0})) > 20


# ------------------------------------------------------------------------------------------------------ ranks


@proves(PICTURE, "USP", "CFG parallel")
@proves(FEW_TEXT, "USP")
@proves(FEW_PICTURE, "USP")
def test_same_picture_on_two_ranks(folders: Folders, pictures: list[str], tmp_path: Path) -> None:
    look = {"image_path": pictures[:1]}
    moving, times = (folders("wan21-i2v-480p"), REQUEST | look), (folders("wan22-ti2v-5b"), TI2V | look)
    fast = folders("fastwan22-ti2v-5b"), TI2V | FEW | look
    ways = {"ulysses_degree": 2}, {"ring_degree": 2}, {"enable_cfg_parallel": True}
    turbo = folders("turbowan22-i2v-a14b"), REQUEST | FEW | {"num_inference_steps": 4} | look
    rows = ways[1] | {"vae_sp": True}  # of an autoencoder that packs pixels
    cases = [(*moving, way) for way in ways] + [(*times, rows), (*fast, ways[0]), (*turbo, ways[0])]
    steps = {fast[0]: FAST, turbo[0]: TURBO}
    for (folder, request, way), frames in zip(cases, pictures_of_ranks(2, tmp_path / "store", cases), strict=True):
        assert apart(frames, their_picture(folder, request, steps.get(folder))) <= 1, (folder.name, way)


def test_same_picture_on_four_ranks(folders: Folders, pictures: list[str], tmp_path: Path) -> None:
    look = {"image_path": pictures[:1]}
    clip, fast = (folders("wan21-i2v-480p"), REQUEST | look), (folders("fastwan22-ti2v-5b"), TI2V | FEW | look)
    cases = [
        (*clip, {"enable_cfg_parallel": True, "ulysses_degree": 2, "tp_size": 2}),
        (*fast, {"ring_degree": 4, "vae_sp": True}),
    ]
    moving, clean_frames = pictures_of_ranks(4, tmp_path / "store", cases)
    assert apart(moving, their_picture(*clip)) <= 1
    assert apart(clean_frames, their_picture(*fast, FAST)) <= 1


# ---------------------------------------------------------------------------------------------- the real sizes

CROSS = {"text_dim": 4096, "freq_dim": 256, "attention_head_dim": 128}
LARGE = CROSS | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "out_channels": 16}
WITH_CLIP = LARGE | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
REAL: dict[str, dict[str, Any]] = {
    "Wan2.1-T2V-1.3B": CROSS
    | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "in_channels": 16, "out_channels": 16},
    "Wan2.1-T2V-14B": LARGE | {"in_channels": 16},
    "Wan2.1-I2V-14B": WITH_CLIP,
    "Wan2.1-FLF2V-14B": WITH_CLIP | {"pos_embed_seq_len": 514},
    "Wan2.2-I2V-A14B": LARGE | {"in_channels": 36},
    "Wan2.2-TI2V-5B": CROSS
    | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}


@pytest.mark.parametrize("name", REAL)
def test_full_size_transformers_have_diffusers_keys(name: str) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        ours = WanTransformer(WanConfig(**REAL[name]), Mesh.solo(), TORCH)
        same_state(ours, WanTransformer3DModel(**REAL[name]))


def test_the_full_size_autoencoder_of_ti2v_has_diffusers_keys() -> None:
    from diffusers import AutoencoderKLWan

    config = {
        "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256, "is_residual": True, "out_channels": 12, "patch_size": 2,
        "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    }  # fmt: skip
    with torch.device("meta"):
        theirs = AutoencoderKLWan(**config, in_channels=12)
        same_state(WanDecoder(WanVaeConfig(**config)), theirs, ["encoder.", "quant_conv."])
        same_state(WanEncoder(WanVaeConfig(**config)), theirs, ["decoder.", "post_quant_conv."])


# ------------------------------------------------------------------------------- memory, precision and adapters


@pytest.mark.parametrize(
    ("name", "request_of"),
    [
        pytest.param("wan21-i2v-480p", REQUEST, marks=proves(PICTURE, "offload")),
        pytest.param("fastwan22-ti2v-5b", TI2V | FEW, marks=proves(FEW_TEXT, "offload")),
        pytest.param(
            "turbowan22-i2v-a14b", REQUEST | FEW | {"num_inference_steps": 4}, marks=proves(FEW_PICTURE, "offload")
        ),
    ],
)
def test_offloaded_weights_make_the_same_picture(
    folders: Folders, pictures: list[str], name: str, request_of: dict[str, Any]
) -> None:
    folder, request = folders(name), request_of | {"image_path": pictures[:1]}
    stays = picture(load(folder), request)
    rest = dict.fromkeys(("text_encoder_cpu_offload", "vae_cpu_offload"), True)
    if name == "wan21-i2v-480p":
        rest["image_encoder_cpu_offload"] = True
    for transformer in ("dit_cpu_offload", "dit_layerwise_offload"):
        family = load(folder, **rest, **{transformer: True})
        assert torch.equal(picture(family, request), stays)
        assert torch.equal(picture(family, request), stays), "again, now that all weights were let go"


def test_half_precision(folders: Folders, pictures: list[str]) -> None:
    for name, request in (("wan21-i2v-480p", REQUEST), ("wan22-ti2v-5b", TI2V)):
        look = request | {"image_path": pictures[:1]}
        half, whole = (picture(load(folders(name), precision=precision), look) for precision in ("bf16", "fp32"))
        assert 0 < apart(half, whole) < 128


def original(key: str) -> str:
    """An adapter's key with the authors' name of its layer."""
    layer, part = key.removeprefix("transformer.").split(".lora_")
    for pattern, replacement in names.WAN:
        layer = re.sub(pattern, replacement, layer)
    return f"transformer.{layer}.lora_{part}"


@pytest.mark.parametrize(
    ("name", "request_of"),
    [
        pytest.param("wan21-i2v-480p", REQUEST, marks=proves(PICTURE, "LoRA")),
        pytest.param("wan22-ti2v-5b", TI2V, marks=proves(TEXT, "LoRA")),
    ],
)
def test_an_adapter_as_with_diffusers(
    folders: Folders, pictures: list[str], tmp_path: Path, name: str, request_of: dict[str, Any]
) -> None:
    family = wan(folders(name))
    request = request_of | {"image_path": pictures[:1]}
    plain = picture(family, request)
    file = write_lora(tmp_path / "adapter.safetensors", family.transformers["transformer"])
    activate(family, file)
    worn = picture(family, request)
    assert apart(worn, plain) > 20
    assert apart(worn, their_picture(family.parts.folder, request, adapter=file)) <= 1
    family.lora["transformer"].clear()
    assert torch.equal(picture(family, request), plain)
    ours = load_file(file)
    theirs = {original(key): tensor for key, tensor in ours.items()}
    assert not theirs.keys() & ours.keys()
    for tensors, spelling in ((theirs, "comfy"), (theirs, "kohya"), (ours, "kohya")):
        activate(family, spelled(tensors, spelling, tmp_path / "other.safetensors"))
        assert torch.equal(picture(family, request), worn), spelling
        family.lora["transformer"].clear()


def test_the_estimate_of_memory_grows(folders: Folders) -> None:
    info = load(folders("wan22-ti2v-5b")).info
    few, many = (SamplingParams(height=704, width=1280, num_frames=n) for n in (61, 121))
    small, large = (info.memory_needs(params)["num_frames"] for params in (few, many))
    assert 1.5 < large / small < 2.5


# ---------------------------------------------------------------------------------------------------- requests


def test_what_the_models_say_of_themselves(folders: Folders) -> None:
    info = load(folders("wan21-i2v-480p")).info
    assert (info.pictures.starts_denoising, info.pictures.min, info.pictures.max) == (False, 1, 1)
    assert (info.name, info.tasks, info.fixed_steps) == ("WanImageToVideoPipeline", ("image-to-video",), None)
    info = load(folders("wan22-ti2v-5b")).info
    assert (info.pictures.starts_denoising, info.pictures.min, info.pictures.max) == (False, 0, 1)
    assert (info.size_multiple, info.frame_multiple) == (32, 4)
    assert info.tasks == ("text-to-video", "text-to-image", "image-to-video")
    info = load(folders("fastwan21")).info
    assert (info.name, info.fixed_steps, info.pictures.starts_denoising) == ("WanDMDPipeline", 3, True)


DEFAULTS = {  # steps, guidance, width, height, frames, fps, shift
    "wan21-i2v-480p": (50, 5.0, 832, 480, 81, 16, 3.0),
    "wan21-i2v-720p": (50, 5.0, 1280, 720, 81, 16, 5.0),
    "wan22-i2v-a14b": (40, 3.5, 1280, 720, 81, 16, 5.0),
    "wan22-ti2v-5b": (50, 5.0, 1280, 704, 121, 24, 5.0),
    "fastwan21": (3, 1.0, 832, 480, 61, 16, 8.0),
    "fastwan22-ti2v-5b": (3, 1.0, 1280, 704, 121, 24, 8.0),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_of_a_known_name(folders: Folders, tmp_path: Path, name: str) -> None:
    link = tmp_path / twins.REAL_NAMES[name].replace("/", "--")
    link.symlink_to(folders(name.replace("720p", "480p")))
    params = resolve({"image_path": ["a.png"]} if "i2v-" in name else {}, load(link).info).params
    names = "num_inference_steps", "guidance_scale", "width", "height", "num_frames", "fps", "flow_shift"
    assert tuple(getattr(params, field) for field in names) == DEFAULTS[name]
    assert params.negative_prompt == ("" if name.startswith("fast") else NEGATIVE)
    if name == "wan22-i2v-a14b":
        assert (params.guidance_scale_2, params.boundary_ratio) == (3.5, 0.9)


def test_a_picture_gives_the_size(folders: Folders, pictures: list[str]) -> None:
    info = load(folders("wan21-i2v-480p")).info
    params = resolve({"image_path": pictures[:1]}, info, picture=(90, 50)).params
    assert (params.width, params.height) == (832, 464)


def test_what_a_picture_model_refuses(folders: Folders, pictures: list[str]) -> None:
    info = load(folders("wan21-i2v-480p")).info
    for count in (0, 2):
        with pytest.raises(BadRequest, match="^image_path: (none|2) given; this model takes 1$"):
            resolve({"image_path": pictures[:count] or None}, info)
    with pytest.raises(NotBuilt, match="^strength: this model cannot use it"):
        resolve({"image_path": pictures[:1], "strength": 0.5}, info)


def previewed(family: Wan, request: Mapping[str, Any], count: int) -> tuple[Tensor, list[Tensor]]:
    """A clip, and that many previews on the way."""
    frames, previews = shown(family, request, count)
    assert torch.equal(frames, picture(family, request)), "previews change nothing"
    return frames, previews


@proves(PICTURE, "previews")
def test_previews_show_their_own_clip(folders: Folders, pictures: list[str]) -> None:
    family = wan(folders("wan21-i2v-480p"))
    request = REQUEST | {"image_path": pictures[:1], "guidance_scale": 1.0, "num_inference_steps": 6}
    frames, previews = previewed(family, request, 5)
    assert [preview.shape for preview in previews] == [(1, 32, 64, 3)] * 5
    other = picture(family, request | {"seed": 8})
    away, nearby = ((previews[-1].float() - clip[4:5]).abs().mean() for clip in (other, frames))
    assert nearby < 0.75 * away


@proves(FEW_TEXT, "previews")
@proves(FEW_PICTURE, "previews")
@pytest.mark.parametrize(("name", "times"), [("fastwan22-ti2v-5b", FAST), ("turbowan22-i2v-a14b", TURBO)])
def test_a_preview_is_the_clip_of_the_steps_so_far(
    folders: Folders, pictures: list[str], name: str, times: tuple[int, ...]
) -> None:
    request = TI2V | FEW | {"image_path": pictures[:1]}
    frames, previews = previewed(wan(folders(name)), request | {"num_inference_steps": len(times)}, 2)
    for steps, preview in enumerate(previews, 1):
        family = load(folders(name), dmd_denoising_steps=list(times[:steps]))
        assert apart(preview, picture(family, request | {"num_inference_steps": steps})[4:5]) <= 1
        assert apart(preview, frames[4:5]) > 20


@proves(FEW_TEXT, "LoRA")
@proves(FEW_PICTURE, "LoRA")
@pytest.mark.parametrize("name", ["fastwan22-ti2v-5b", "turbowan22-i2v-a14b"])
def test_an_adapter_of_few_steps(folders: Folders, pictures: list[str], name: str, tmp_path: Path) -> None:
    family = wan(folders(name))
    times = FAST if name.startswith("fast") else TURBO
    request = TI2V | FEW | {"num_inference_steps": len(times), "image_path": pictures[:1]}
    file = write_lora(tmp_path / "adapter.safetensors", family.transformers["transformer"])
    activate(family, file)
    theirs = their_picture(family.parts.folder, request, times, file)
    assert apart(picture(family, request), theirs) <= 1
    assert apart(theirs, their_picture(family.parts.folder, request, times)) > 20


def test_a_preview_is_not_the_picture_that_was_given(folders: Folders, pictures: list[str]) -> None:
    family = wan(folders("wan22-ti2v-5b"))
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        preview, frames = family.preview(x, lambda: None), family.decode(x, lambda: None)
    assert torch.equal(preview, frames[4:5])
    assert not torch.equal(preview, frames[:1])


def test_models_that_lack_what_they_need(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vae: this model cannot work without the VAE's encoder"):
        load(folders("wan21-i2v-480p"), vae_config=VaeConfig(load_encoder=False))
    assert load(folders("wan22-ti2v-5b"), vae_config=VaeConfig(load_encoder=False)).info.pictures.max == 0
    folder = Path(shutil.copytree(folders("wan21-i2v-480p"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
    with pytest.raises(ModelError, match=r"model_index\.json: lacks image_encoder$"):
        load(folder)
