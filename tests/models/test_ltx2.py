"""LTX-2 and LTX-2.3 against diffusers: video and sound, from text and from a first frame."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgld.errors import BadRequest, ModelError, SgldError
from sgld.models import ltx2, names
from sgld.models.base import Sound
from sgld.models.ltx2_transformer import LTX2Config, LTX2Transformer
from sgld.nn.attention import TORCH
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.nn.weights import Uninitialized, read_architecture
from sgld.resolve import resolve
from tests.models.contract import LTX2, LTX2_GUIDANCE
from tests.models.parity import (
    activate,
    apart,
    edit,
    levels,
    load,
    made_by_ranks,
    make,
    picture,
    quiet,
    ranks_decode_tiles,
    same_state,
    shown,
    spelled,
    write_lora,
)
from tools.twins import ltx2 as twins_of

GUIDANCE: dict[str, Mapping[str, Any]] = {  # of diffusers, whose own defaults are LTX-2.3's
    "ltx2": LTX2_GUIDANCE,
    "ltx23": {"spatio_temporal_guidance_blocks": [1]},
    "ltx2-neighbours": {},
}  # fmt: skip
GUIDANCE["ltx2-neighbours"] = GUIDANCE["ltx2"]
NAMES = ("ltx2", "ltx23", "ltx2-neighbours")
PIPELINE, FROM_PICTURE = "LTX2Pipeline", "LTX2ImageToVideoPipeline"
SECOND_BLOCK = attrs.evolve(ltx2.LTX23_GUIDANCE, block=1)  # the twins have no 28th to perturb
proves = pytest.mark.proves


def both(feature: str) -> pytest.MarkDecorator:
    """Once for each pipeline, as `name` and whether it `looks` at a picture."""
    cases = {PIPELINE: ("ltx23", False), FROM_PICTURE: ("ltx23-picture", True)}
    marked = [pytest.param(*case, marks=proves(pipeline, feature), id=pipeline) for pipeline, case in cases.items()]
    return pytest.mark.parametrize(("name", "looks"), marked)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins of `NAMES`, and two of them again as of the pipeline that begins with a picture."""
    folder = tmp_path_factory.mktemp("ltx2")
    for name, maker in twins_of.MAKERS.items():
        maker(folder / name)
        edit(shutil.copytree(folder / name, folder / f"{name}-picture") / "model_index.json", _class_name=FROM_PICTURE)
    twins_of.make_ltx2(folder / "ltx2-neighbours", rope_type="interleaved", rope_double_precision=False)
    return folder


@pytest.fixture(autouse=True)
def second_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ltx2, "LTX23_GUIDANCE", SECOND_BLOCK)


Reference = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def reference(twins: Path) -> Reference:
    """Frames u8 and sound [2, n] of `LTX2` with changes, as diffusers makes them in float32."""
    from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline

    @cache
    def pipeline_of(name: str) -> Any:
        return LTX2Pipeline.from_pretrained(twins / name)

    @cache
    def made(name: str, lora: Path | None = None, image: Path | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
        pipeline, request = pipeline_of(name), LTX2 | GUIDANCE[name] | changes
        if image is not None:
            pipeline, request["image"] = LTX2ImageToVideoPipeline(**pipeline.components), Image.open(image)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        quiet(pipeline)
        generator = torch.Generator("cpu").manual_seed(request.pop("seed"))
        rate = request.pop("fps", 24)
        video, sound = pipeline(**request, frame_rate=rate, generator=generator, output_type="np", return_dict=False)
        if lora is not None:
            pipeline.unload_lora_weights()
        return levels(video[0]), sound[0]

    return made


@pytest.fixture(scope="module")
def shot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of odd sides."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "shot.png"
    Image.fromarray(pixels).resize((131, 87), Image.Resampling.BICUBIC).save(path)
    return path


def unlike(sound: Sound | None, expected: Tensor) -> float:
    """The largest difference of two sounds."""
    assert sound is not None
    assert sound.samples.shape == expected.shape
    return float((sound.samples - expected).abs().max())


# ------------------------------------------------------------------------------------------- same as diffusers


@proves(PIPELINE, "text-to-video", "audio")
@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_video_and_sound_as_diffusers(twins: Path, reference: Reference, name: str) -> None:
    frames, sound = make(load(twins / name), LTX2)
    expected, heard = reference(name)
    other, other_sound = reference(name, seed=8)
    assert frames.float().std() > 10
    assert apart(frames, expected) <= 1
    assert apart(other, expected) > 20
    assert unlike(sound, heard) < 1e-4
    assert unlike(sound, other_sound) > 0.05


@pytest.mark.parametrize(
    "changes",
    [{"num_frames": 17, "fps": 12}, {"max_sequence_length": 8}, {"negative_prompt": None}],
    ids=lambda c: next(iter(c)),
)
@pytest.mark.parametrize("name", ["ltx2", "ltx23"])
def test_same_at_the_edges(twins: Path, reference: Reference, name: str, changes: dict[str, Any]) -> None:
    frames, sound = make(load(twins / name), LTX2 | changes)
    expected, heard = reference(name, **changes)
    assert apart(frames, expected) <= 1
    assert unlike(sound, heard) < 1e-4


def test_without_guidance(twins: Path, reference: Reference) -> None:
    """A scale of 1 turns every guidance of a checkpoint off."""
    off = {name: GUIDANCE["ltx2"][name] for name in GUIDANCE["ltx2"] if name != "use_cross_timestep"}
    for name in ("ltx2", "ltx23"):
        expected, heard = reference(name, **off, guidance_scale=1.0)
        frames, sound = make(load(twins / name), LTX2 | {"guidance_scale": 1.0})
        assert apart(frames, expected) <= 1
        assert unlike(sound, heard) < 1e-4


@proves(PIPELINE, "image-to-video")
@pytest.mark.parametrize("name", ["ltx2", "ltx23"])
def test_a_picture_is_the_first_frame(twins: Path, reference: Reference, shot: Path, name: str) -> None:
    frames, sound = make(load(twins / name), LTX2 | {"image_path": [str(shot)]})
    expected, heard = reference(name, image=shot)
    assert apart(frames, expected) <= 1
    assert unlike(sound, heard) < 1e-4
    assert apart(frames, reference(name)[0]) > 20


@proves(PIPELINE, "text-to-image")
@pytest.mark.parametrize("name", ["ltx2", "ltx23"])
def test_a_single_frame_is_a_silent_picture(twins: Path, reference: Reference, name: str) -> None:
    frames, sound = make(load(twins / name), LTX2 | {"num_frames": 1})
    assert sound is None
    assert frames.float().std() > 10
    assert apart(frames, reference(name, num_frames=1)[0]) <= 1
    assert apart(frames, reference(name, num_frames=1, seed=8)[0]) > 20


@proves(FROM_PICTURE, "image-to-video", "audio")
def test_the_same_from_a_folder_of_the_other_pipeline(twins: Path, reference: Reference, shot: Path) -> None:
    frames, sound = make(load(twins / "ltx2-picture"), LTX2 | {"image_path": [str(shot)]})
    expected, heard = reference("ltx2", image=shot)
    assert apart(frames, expected) <= 1
    assert unlike(sound, heard) < 1e-4


@proves(FROM_PICTURE, "text-to-video", "text-to-image")
@pytest.mark.parametrize("count", [1, 9])
def test_that_folder_needs_no_picture(twins: Path, reference: Reference, count: int) -> None:
    frames = picture(load(twins / "ltx2-picture"), LTX2 | {"num_frames": count})
    assert apart(frames, reference("ltx2", num_frames=count)[0]) <= 1


def test_one_step(twins: Path) -> None:
    """Diffusers divides by zero where a single level shall be stretched."""
    frames, sound = make(load(twins / "ltx2"), LTX2 | {"num_inference_steps": 1})
    assert frames.float().std() > 10
    assert sound is not None
    assert sound.samples.isfinite().all()


def test_every_guidance_of_ltx23_counts(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = picture(load(twins / "ltx23"), LTX2)
    for change in ({"perturbed": 0.0}, {"isolated": 1.0}, {"rescale": 0.0}, {"audio_text": 1.5}, {"block": 0}):
        with monkeypatch.context() as patch:
            patch.setattr(ltx2, "LTX23_GUIDANCE", attrs.evolve(ltx2.LTX23_GUIDANCE, **change))
            assert apart(picture(load(twins / "ltx23"), LTX2), base) > 5, change


# ------------------------------------------------------------------------------------------------------- ranks


def _second_block() -> None:
    ltx2.LTX23_GUIDANCE = SECOND_BLOCK


@proves(PIPELINE, "USP", "CFG parallel")
@proves(FROM_PICTURE, "USP", "CFG parallel")
@pytest.mark.parametrize("world", [2, 4])
def test_same_on_several_ranks(twins: Path, tmp_path: Path, reference: Reference, shot: Path, world: int) -> None:
    look = {"image_path": [str(shot)]}
    odd = {"height": 96, "num_frames": 17}  # 27 tokens, which no two ranks have alike
    two: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("ltx2", {"ulysses_degree": 2, "tp_size": 2}, {}),
        ("ltx23", {"ring_degree": 2}, {}),
        ("ltx23", {"enable_cfg_parallel": True}, {}),
        ("ltx2-picture", {"ulysses_degree": 2}, look),
        ("ltx23-picture", {"ring_degree": 2}, look),
        ("ltx2-picture", {"enable_cfg_parallel": True}, look),
        ("ltx2", {"ring_degree": 2}, odd),
    ]
    four: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("ltx2", {"ulysses_degree": 2, "ring_degree": 2}, {}),
        ("ltx23", {"enable_cfg_parallel": True, "ulysses_degree": 2}, odd),
    ]
    asked = {2: two, 4: four}[world]
    cases = [(twins / name, LTX2 | changes, settings) for name, settings, changes in asked]
    made = made_by_ranks(world, tmp_path / "store", cases, _second_block)
    for (frames, sound), (name, _, changes) in zip(made, asked, strict=True):
        given = {"image": shot} if changes is look else changes
        expected, heard = reference(name.removesuffix("-picture"), **given)
        assert apart(frames, expected) <= 1
        assert sound is not None and float((sound - heard).abs().max()) < 1e-3


def test_ranks_decode_a_tile_each(twins: Path, tmp_path: Path) -> None:
    ranks_decode_tiles(tmp_path / "store", twins / "ltx2", LTX2, 64, 32)


# --------------------------------------------------------------------------------------------------- full size

FULL = {
    "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "in_channels": 128,
    "out_channels": 128, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048, "audio_in_channels": 128, "audio_out_channels": 128, "num_layers": 48,
    "caption_channels": 3840, "rope_type": "split",
}  # fmt: skip


@pytest.mark.parametrize("newer", [False, True], ids=["ltx2", "ltx23"])
def test_full_size_state(tmp_path: Path, newer: bool) -> None:
    from diffusers import LTX2VideoTransformer3DModel

    config = FULL | (twins_of.NEWER if newer else {})
    with torch.device("meta"), Uninitialized():
        theirs = LTX2VideoTransformer3DModel(**config)
        (tmp_path / "config.json").write_text(json.dumps(dict(theirs.config)))
        ours = LTX2Transformer(read_architecture(tmp_path / "config.json", LTX2Config), Mesh.solo(), TORCH)
    same_state(ours, theirs)
    billions = sum(p.numel() for p in ours.parameters()) / 1e9
    assert 18 < billions < 20


# ----------------------------------------------------------------------------------------- memory and precision

OFFLOADS = (
    {"text_encoder_cpu_offload": True, "vae_cpu_offload": True, "dit_cpu_offload": True},
    {"dit_layerwise_offload": True},
)


@both("offload")
@pytest.mark.parametrize("settings", OFFLOADS, ids=lambda s: next(iter(s)))
def test_offload_changes_nothing(twins: Path, shot: Path, name: str, looks: bool, settings: dict[str, Any]) -> None:
    request = LTX2 | ({"image_path": [str(shot)]} if looks else {})
    frames, sound = make(load(twins / name), request)
    other, heard = make(load(twins / name, **settings), request)
    assert sound is not None
    assert heard is not None
    assert torch.equal(frames, other)
    assert torch.equal(sound.samples, heard.samples)


def test_half_precision(twins: Path) -> None:
    family = load(twins / "ltx23", precision="bf16")
    assert isinstance(family, ltx2.LTX2)
    assert {part.dtype for part in (family.text.module, family.connectors)} == {torch.bfloat16}
    assert family.transformer.compute_dtype == torch.bfloat16
    frames, sound = make(family, LTX2)
    assert apart(frames, picture(load(twins / "ltx23"), LTX2)) > 0
    assert sound is not None
    assert sound.samples.isfinite().all()


def test_a_tile_of_one_latent(twins: Path) -> None:
    """13 latents side by side leave one for the last tile, which the decoder could not reflect."""
    family, wide = load(twins / "ltx2"), LTX2 | {"width": 416, "num_inference_steps": 1}
    frames = picture(family, wide)
    whole = picture(load(twins / "ltx2", vae_tiling=False), wide)
    assert frames.shape == whole.shape == (9, 64, 416, 3)
    assert apart(frames[:, :, :32], whole[:, :, :32]) <= 1  # far from the seams
    assert picture(family, wide | {"width": 32}).shape == (9, 64, 32, 3)


# -------------------------------------------------------------------------------------------------------- LoRA


def original(name: str) -> str:
    """An adapter's key with the authors' name of its layer."""
    layer, part = name.removeprefix("transformer.").split(".lora_")
    for pattern, replacement in names.LTX2:
        layer = re.sub(pattern, replacement, layer)
    return f"transformer.{layer}.lora_{part}"


@both("LoRA")
def test_lora(twins: Path, tmp_path: Path, reference: Reference, shot: Path, name: str, looks: bool) -> None:
    family = load(twins / name)
    assert isinstance(family, ltx2.LTX2)
    request = LTX2 | ({"image_path": [str(shot)]} if looks else {})
    before = picture(family, request)
    file = write_lora(tmp_path / "a.safetensors", family.transformer)
    activate(family, file)
    worn = picture(family, request)
    assert apart(worn, before) > 20
    assert apart(worn, reference("ltx23", lora=file, image=shot if looks else None)[0]) <= 1
    family.lora["transformer"].clear()
    assert torch.equal(picture(family, request), before)
    ours = load_file(file)
    theirs = {original(name): x for name, x in ours.items()}
    for expected in ("av_ca_a2v_gate_adaln_single.linear", "audio_prompt_adaln_single.linear", "patchify_proj"):
        assert f"transformer.{expected}.lora_A.weight" in theirs
    for tensors, spelling in ((theirs, "comfy"), (theirs, "kohya"), (ours, "kohya")):
        activate(family, spelled(tensors, spelling, tmp_path / "other.safetensors"))
        assert torch.equal(picture(family, request), worn), spelling
        family.lora["transformer"].clear()


def test_an_adapter_of_the_connectors_is_refused(twins: Path, tmp_path: Path) -> None:
    """diffusers would load it."""
    family = load(twins / "ltx2")
    assert isinstance(family, ltx2.LTX2)
    parts = {"transformer": family.transformer, "connectors": family.connectors}
    files = [write_lora(tmp_path / name, module, prefix=f"{name}.") for name, module in parts.items()]
    save_file(load_file(files[0]) | load_file(files[1]), tmp_path / "both.safetensors")
    says = r"does not fit the model's transformer: \d+ of \d+ keys: connectors\.\S+\.lora_A\.weight \(no such layer\)"
    with pytest.raises(BadRequest, match=says):
        activate(family, tmp_path / "both.safetensors")
    adapter = read_adapter(tmp_path / "both.safetensors")
    fitted = family.lora["transformer"].fit(adapter, strict=False)
    assert len(fitted.skipped) == len(load_file(files[1]))


# ---------------------------------------------------------------------------------------------------- requests


def test_info(twins: Path) -> None:
    info = load(twins / "ltx2").info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == ("LTX2Pipeline", "video", 32, 8)
    assert (info.audio, info.pictures.max, info.pictures.min, info.pictures.starts_denoising) == (True, 1, 0, False)
    assert info.tasks == ("text-to-video", "text-to-image", "image-to-video")
    assert info.memory is not None
    wanted = {
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "width": 768,
        "height": 512,
        "num_frames": 121,
        "fps": 24,
    }
    assert wanted.items() <= info.defaults.items()
    newer = load(twins / "ltx23", vae_config={"load_encoder": False}).info
    assert {"num_inference_steps": 30, "guidance_scale": 3.0}.items() <= newer.defaults.items()
    assert (newer.pictures.max, newer.tasks) == (0, ("text-to-video", "text-to-image"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 80}, "width: 80 is not a multiple of 32"),
        ({"max_sequence_length": 30}, "max_sequence_length: 30 is not a multiple of 8"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale: this model cannot use it"),
        ({"strength": 0.5, "image_path": ["x.png"]}, "strength: this model cannot use it"),
        ({"image_path": ["x.png", "y.png"]}, "image_path: 2 given; this model takes"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(twins: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SgldError, match=says):
        make(load(twins / "ltx2"), LTX2 | changes)


def test_a_picture_too_small_to_be_seen(twins: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 40)).save(tmp_path / "thin.png")
    with pytest.raises(BadRequest, match="image_path: '.*thin.png' of 1x40 pixels is too small; each side needs 2"):
        make(load(twins / "ltx2"), LTX2 | {"image_path": [str(tmp_path / "thin.png")]})


def test_a_long_prompt_is_cut(twins: Path) -> None:
    family = load(twins / "ltx2")
    params = resolve(LTX2 | {"prompt": "long " * 20, "max_sequence_length": 8}, family.info).params
    condition, notes = family.encode(params, [])
    assert notes == ["prompt cut from 100 to 8 tokens, the most this request allows"]
    assert condition.prompt_tokens == 8


@both("previews")
def test_previews_draw_near_to_what_is_made(twins: Path, shot: Path, name: str, looks: bool) -> None:
    """The first frame, or with a picture the first latent after it; the decoder looks ahead, so no more are made."""
    family = load(twins / name)
    request = LTX2 | {"num_inference_steps": 6} | ({"image_path": [str(shot)]} if looks else {"num_frames": 1})
    frames, previews = shown(family, request, 5)
    assert torch.equal(frames, picture(family, request)), "previews change nothing"
    assert [tuple(preview.shape) for preview in previews] == [(1, 64, 96, 3)] * 5
    other = picture(family, request | {"seed": 8, "prompt": "a dog"})
    away, nearby = ((previews[-1].float() - clip[8 * looks]).abs().mean() for clip in (other, frames))
    assert nearby < 0.75 * away
    assert not looks or apart(previews[-1], frames[:1]) > 20, "it is the picture that was given"


def test_attention_of_the_connectors_is_torchs(twins: Path) -> None:
    backends = {"text_encoder": "torch_sdpa", "connectors": "torch_sdpa"}
    load(twins / "ltx2", component_attention_backends=backends)
    with pytest.raises(BadRequest, match="component_attention_backends.connectors: fa2 cannot be used"):
        load(twins / "ltx2", component_attention_backends=backends | {"connectors": "fa2"})


# ---------------------------------------------------------------------------------------------- wrong checkpoints


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"ff_bias": False}, r"transformer/config.json: ff_bias is False; only True"),
        ("transformer/config.json", {"rope_type": "other"}, "rope_type is 'other'"),
        ("transformer/config.json", {"audio_num_attention_heads": 2}, "num_attention_heads is 4 and audio"),
        ("transformer/config.json", {"num_layers": 3}, r"tensors missing: transformer_blocks\.2\."),
        ("transformer/config.json", {"in_channels": 8}, "proj_in.weight"),
        ("text_encoder/config.json", {"model_type": "gemma4"}, "model_type is 'gemma4'; only 'gemma3'"),
        ("vae/config.json", {"timestep_conditioning": True}, "timestep_conditioning is True"),
        ("vae/config.json", {"spatial_compression_ratio": 16}, "16 pixels a latent of the vae; 32 are needed"),
        ("audio_vae/config.json", {"_class_name": "Other"}, "_class_name is 'Other'; only AutoencoderKLLTX2Audio"),
        ("vocoder/config.json", {"_class_name": "Other"}, "only LTX2Vocoder, LTX2VocoderWithBWE"),
        ("model_index.json", {"vocoder": [None, None]}, "lacks vocoder"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused(
    twins: Path, tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    copy = Path(shutil.copytree(twins / "ltx2", tmp_path / "model"))
    edit(copy / file, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "connectors", "audio_vae"])
def test_a_missing_component_is_named(twins: Path, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(twins / "ltx2", tmp_path / "model"))
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=part):
        load(copy)
