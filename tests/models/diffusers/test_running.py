"""The pipeline's own picture, made by the engine: progress, cancel, adapters, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from sgld.errors import BadRequest, NotBuilt
from sgld.inputs import upright
from sgld.models.diffusers.running import DiffusersPipeline
from sgld.nn.lora import WeightedAdapter
from sgld.nn.lora_formats import read_adapter
from tests.models.diffusers.pipelines import CLIP, REQUEST, load, pipeline, refusal, run
from tests.models.parity import apart, levels, make, photo, picture, quiet, theirs, write_lora
from tools.twins import stable_diffusion


def test_ovis_image_is_what_diffusers_makes(
    twin: Callable[[str], Path], ovis: DiffusersPipeline, ovis_picture: Tensor
) -> None:
    from diffusers import OvisImagePipeline

    expected = theirs(quiet(OvisImagePipeline.from_pretrained(twin("ovis-image"))), REQUEST)
    assert ovis_picture.shape == (1, 32, 48, 3)
    assert apart(ovis_picture, expected) == 0
    assert apart(ovis_picture, picture(ovis, REQUEST | {"seed": 8})) > 20
    assert apart(ovis_picture, picture(ovis, REQUEST)) == 0, "a call leaves something behind"


def test_what_it_says_of_itself(ovis: DiffusersPipeline) -> None:
    info = ovis.info
    assert (info.name, info.kind, info.backend, info.tasks) == (
        "OvisImagePipeline", "image", "diffusers", ("text-to-image",),
    )  # fmt: skip
    assert info.defaults == {
        "num_inference_steps": 50, "guidance_scale": 5.0, "height": 1024, "width": 1024, "negative_prompt": "",
        "max_sequence_length": 256,
    }  # fmt: skip
    assert (info.size_multiple, info.pictures.max, info.memory) == (16, 0, None)
    assert set(info.components) == {"vae", "text_encoder", "tokenizer", "transformer", "scheduler"}


@pytest.mark.parametrize(("name", "request_"), [("z-image", REQUEST | {"cfg_normalization": 0}), ("wan21", CLIP)])
def test_a_native_family_is_the_same_either_way(
    twin: Callable[[str], Path], name: str, request_: dict[str, Any]
) -> None:
    native, forced = (picture(load(twin(name), backend=b), request_) for b in ("native", "diffusers"))
    assert apart(native, forced) <= 1
    assert apart(forced, picture(pipeline(twin(name)), request_ | {"seed": 8})) > 20


def test_a_video_is_what_diffusers_makes(twin: Callable[[str], Path]) -> None:
    from diffusers import WanPipeline

    model, reference = pipeline(twin("wan21")), quiet(WanPipeline.from_pretrained(twin("wan21")))
    given = {name: value for name, value in CLIP.items() if name != "seed"}
    expected = levels(reference(**given, generator=torch.Generator().manual_seed(7), output_type="np").frames[0])
    made = run(model, CLIP)
    assert made.frames is not None and apart(made.frames, expected) == 0
    assert made.notes == []
    info = model.info
    assert (info.kind, info.size_multiple, info.frame_multiple, info.defaults["num_frames"]) == ("video", 16, 4, 81)


def test_several_pictures_are_looked_at(twin: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import Flux2KleinPipeline

    model = pipeline(twin("flux2-klein"))
    files = [str(photo(tmp_path / f"{width}.png", width, 64)) for width in (64, 96)]
    request = {name: value for name, value in REQUEST.items() if name != "negative_prompt"}
    reference = quiet(Flux2KleinPipeline.from_pretrained(twin("flux2-klein")))
    pictures = [upright(file) for file in files]
    expected = theirs(reference, request | {"image": pictures})
    assert apart(picture(model, request | {"image_path": files}), expected) == 0
    assert apart(picture(model, request), expected) > 20
    assert (model.info.pictures.min, model.info.tasks) == (0, ("text-to-image", "image-to-image"))
    assert "guidance_scale" not in model.info.unsupported and "strength" in model.info.unsupported


def test_one_picture_begins_a_video(twin: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    model, file = pipeline(twin("wan21-i2v-480p")), str(photo(tmp_path / "a.png", 48, 32))
    reference = quiet(WanImageToVideoPipeline.from_pretrained(twin("wan21-i2v-480p")))
    given = {name: value for name, value in CLIP.items() if name != "seed"} | {"image": upright(file)}
    expected = levels(reference(**given, generator=torch.Generator().manual_seed(7), output_type="np").frames[0])
    assert apart(picture(model, CLIP | {"image_path": [file]}), expected) == 0
    with pytest.raises(BadRequest, match="image_path: none given; this model takes 1"):
        picture(model, CLIP)


def test_a_unet(twin: Callable[[str], Path]) -> None:
    from diffusers import StableDiffusionPipeline

    model, request = pipeline(twin("stable-diffusion")), REQUEST | {"num_inference_steps": 4}
    expected = theirs(quiet(StableDiffusionPipeline.from_pretrained(twin("stable-diffusion"))), request)
    assert apart(picture(model, request), expected) == 0
    assert (model.info.size_multiple, model.info.defaults["height"], model.info.lora_targets) == (8, 64, ())
    with pytest.raises(BadRequest, match="sage cannot run here"):
        pipeline(twin("stable-diffusion"), attention_backend="sage")


def test_a_picture_to_start_from(tmp_path: Path) -> None:
    """This call takes no size; the steps that are run are its own choice."""
    from diffusers import StableDiffusionImg2ImgPipeline

    folder = stable_diffusion.make(tmp_path / "model", "StableDiffusionImg2ImgPipeline")
    model, file = pipeline(folder), str(photo(tmp_path / "a.png", 48, 32))
    assert (model.info.pictures.min, model.info.pictures.max, model.info.tasks) == (1, 1, ("image-to-image",))
    request = {name: value for name, value in REQUEST.items() if name not in ("height", "width")}
    request |= {"num_inference_steps": 4, "strength": 0.75}
    reference = quiet(StableDiffusionImg2ImgPipeline.from_pretrained(folder))
    made = run(model, request | {"image_path": [file]})
    assert made.frames is not None and apart(made.frames, theirs(reference, request | {"image": upright(file)})) == 0
    assert ("denoise", 3, 3) in made.stages and made.notes == []
    with pytest.raises(NotBuilt, match="height: this model cannot use it: the call of StableDiffusionImg2Img"):
        picture(model, request | {"image_path": [file], "height": 64})


def test_sound(twin: Callable[[str], Path]) -> None:
    from diffusers import LTX2Pipeline

    model, reference = pipeline(twin("ltx2")), quiet(LTX2Pipeline.from_pretrained(twin("ltx2")))
    request = CLIP | {"num_frames": 9, "num_inference_steps": 2, "width": 64, "height": 64}
    given = {name: value for name, value in request.items() if name != "seed"}
    generator = torch.Generator().manual_seed(7)
    expected = reference(**given, frame_rate=8.0, generator=generator, output_type="np")
    frames, sound = make(model, request | {"fps": 8})
    assert apart(frames, levels(expected.frames[0])) == 0
    assert sound is not None and sound.rate == reference.vocoder.config.output_sampling_rate
    torch.testing.assert_close(sound.samples, expected.audio[0].float(), rtol=0, atol=0)
    assert model.info.audio


def test_progress_and_timings_are_told_as_of_any_model(ovis: DiffusersPipeline) -> None:
    made = run(ovis, REQUEST)
    assert made.stages[0] == ("encode", 0, 1) and made.stages[-1] == ("decode", 1, 1)
    assert ("denoise", 0, 3) in made.stages and ("denoise", 3, 3) in made.stages
    assert set(made.context.stages_ms) == {"encode", "denoise", "decode"}
    assert len(made.context.steps_ms) == 3


@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_a_cancel_is_heard_on_the_way(ovis: DiffusersPipeline, ovis_picture: Tensor, stage: str) -> None:
    stopped = run(ovis, REQUEST | {"num_inference_steps": 50}, cancel_in=stage)
    assert stopped.frames is None
    assert len(stopped.context.steps_ms) <= 1
    assert apart(picture(ovis, REQUEST), ovis_picture) == 0, "a stopped call leaves something behind"


def test_a_pipeline_without_callbacks_runs_and_can_be_stopped(
    ovis: DiffusersPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {name: p for name, p in ovis.call.arguments.items() if not name.startswith("callback")}
    monkeypatch.setattr(ovis, "call", attrs.evolve(ovis.call, arguments=arguments))
    made = run(ovis, REQUEST)
    assert made.frames is not None and made.context.steps_ms == []
    assert ("denoise", 1, 1) in made.stages
    assert run(ovis, REQUEST, cancel_in="denoise").frames is None


def test_a_field_that_the_call_does_not_take_is_refused(ovis: DiffusersPipeline) -> None:
    told = "this model cannot use it: the call of OvisImagePipeline has no argument"
    assert refusal(ovis, NotBuilt, true_cfg_scale=4.0) == f"true_cfg_scale: {told} true_cfg_scale"
    assert refusal(ovis, NotBuilt, flow_shift=4.0) == f"flow_shift: {told} flow_shift"
    assert refusal(ovis, image_path=["a.png"]).startswith("image_path: 1 given; this model makes pictures from text")
    assert refusal(ovis, num_frames=5).startswith("num_frames: 5: this model makes single pictures")
    assert refusal(ovis, height=40).startswith("height: 40 is not a multiple of 16")
    assert "max_sequence_length" in refusal(ovis, max_sequence_length=300)  # by the pipeline itself, before it begins


def test_diffusers_kwargs_reach_the_call(ovis: DiffusersPipeline, ovis_picture: Tensor) -> None:
    changed = run(ovis, REQUEST | {"diffusers_kwargs": {"sigmas": [1.0, 0.7, 0.2]}})
    assert changed.frames is not None and apart(changed.frames, ovis_picture) > 5
    assert changed.notes == []


def test_attention_arguments_go_by_the_pipeline_s_own_name(ovis: DiffusersPipeline, ovis_picture: Tensor) -> None:
    made = run(ovis, REQUEST | {"diffusers_kwargs": {"cross_attention_kwargs": {"scale": 0.5}}})
    assert made.frames is not None and apart(made.frames, ovis_picture) == 0  # no adapter is there to be scaled
    assert made.notes == [
        "diffusers_kwargs.cross_attention_kwargs: OvisImagePipeline names it joint_attention_kwargs",
        "diffusers_kwargs.cross_attention_kwargs.scale: it does not reach adapters; each has a strength of its own",
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("generator", "diffusers_kwargs.generator: sgld itself decides it; leave it out"),
        ("callback_on_step_end", "diffusers_kwargs.callback_on_step_end: sgld itself decides it"),
        ("output_type", "diffusers_kwargs.output_type: sgld itself decides it"),
        ("num_images_per_prompt", "diffusers_kwargs.num_images_per_prompt: sgld itself decides it"),
        ("height", "diffusers_kwargs.height: give it as height, not among these"),
        ("image", "diffusers_kwargs.image: give it as image_path, not among these"),
        ("sigma", "diffusers_kwargs.sigma: the call of OvisImagePipeline has no such argument; did you mean sigmas?"),
    ],
)
def test_keys_of_diffusers_kwargs_that_are_refused(ovis: DiffusersPipeline, name: str, line: str) -> None:
    assert refusal(ovis, diffusers_kwargs={name: 1}).startswith(line)


def test_an_adapter_is_worn_and_taken_off(twin: Callable[[str], Path], tmp_path: Path, ovis_picture: Tensor) -> None:
    """As `pipe.transformer` with the same adapter in PEFT has it."""
    from diffusers import OvisImagePipeline

    model = pipeline(twin("ovis-image"))
    reference = quiet(OvisImagePipeline.from_pretrained(twin("ovis-image")))
    file = write_lora(tmp_path / "a.safetensors", reference.transformer)
    layers = model.lora["transformer"]
    layers.apply([WeightedAdapter(layers.fit(read_adapter(file)))])
    reference.transformer.load_lora_adapter(read_tensors(file), prefix="transformer")
    worn = picture(model, REQUEST)
    assert apart(worn, theirs(reference, REQUEST)) <= 1
    assert apart(worn, ovis_picture) > 5
    layers.clear()
    assert apart(picture(model, REQUEST), ovis_picture) == 0


def read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_an_output_is_told_where_it_is_not_as_asked(ovis: DiffusersPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(ovis.pipeline).__call__

    def smaller(self: Any, *args: Any, **given: Any) -> Any:
        made = original(self, *args, **given)
        made.images = np.asarray(made.images)[:, :16]
        made["images"] = made.images
        return made

    monkeypatch.setattr(type(ovis.pipeline), "__call__", smaller)
    assert run(ovis, REQUEST).notes == ["size: OvisImagePipeline made 48x16, not 48x32"]
