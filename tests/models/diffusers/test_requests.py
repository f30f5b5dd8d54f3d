"""What requests may bring to a pipeline of diffusers: fields that are left to its call, arguments of its own, text."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import diffusers
import PIL.Image
import pytest
import torch

from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.models.diffusers.call import ENGINE_ARGUMENTS, REQUEST_FIELDS, CallSignature
from sgld.models.diffusers.running import DiffusersPipeline
from sgld.resolve import resolve
from tests.models.diffusers.pipelines import CLIP, REQUEST, pipeline, refusal, run, set_class
from tests.models.parity import photo, picture

CODE = """
import PIL.Image
import torch
from diffusers import OvisImagePipeline


class Curious(OvisImagePipeline):
    def __call__(self, prompt=None, image: PIL.Image.Image = None, mask_image: PIL.Image.Image = None, height: int = 32,
                 width: int = 48, num_inference_steps: int = None, guidance_scale: float = None, schedule=(3.0, 4.0),
                 cfg_normalization: bool = True, max_sequence_length: int = None, style: str = None, generator=None,
                 output_type="np", return_dict=True, callback=None, callback_on_step_end=None, tensors=None, **kwargs):
        if guidance_scale is not None and schedule is not None:
            raise ValueError("only one of guidance_scale and schedule")
        self.seen, self._num_timesteps = dict(locals()), 2
        for i in range(2):
            self.transformer.proj_out(torch.zeros(1, self.transformer.proj_out.in_features))
            for each in (callback, callback_on_step_end):
                each and each(self, i, 0, {})
        latents = tensors and tensors.shape
        return super().__call__(prompt, height=height, width=width, num_inference_steps=1, generator=generator,
                                output_type="np")
"""


@pytest.fixture(scope="module")
def curious(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> DiffusersPipeline:
    """A pipeline of a repository's own code, which keeps what it was called with in `seen`."""
    folder = shutil.copytree(twin("ovis-image"), tmp_path_factory.mktemp("code") / "model")
    set_class(folder, ["curious", "Curious"])
    (folder / "curious.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
        return pipeline(folder, trust_remote_code=True)


def seen(model: DiffusersPipeline, **request: Any) -> dict[str, Any]:
    """What the curious pipeline was called with."""
    picture(model, {"prompt": "a red cat", "seed": 7, **request})
    found: dict[str, Any] = model.pipeline.seen
    return found


def test_no_text_reaches_what_a_processor_opens(
    twin: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the server, as the last picture of a clip: transformers would open it, and so would an address."""
    model, canary = pipeline(twin("wan21-i2v-480p")), str(photo(tmp_path / "canary.png", 48, 32))
    opened: list[Any] = []
    original = PIL.Image.open

    def spy(file: Any, *args: Any, **given: Any) -> Any:
        opened.append(file)
        return original(file, *args, **given)

    monkeypatch.setattr(PIL.Image, "open", spy)
    first = str(photo(tmp_path / "first.png", 48, 32))
    for value in (canary, [canary], {"a": [{"b": canary}]}):
        request = CLIP | {"image_path": [first], "diffusers_kwargs": {"last_image": value}}
        with pytest.raises(BadRequest, match=r"^diffusers_kwargs.last_image: .*: no text is taken here") as caught:
            picture(model, request)
        assert caught.value.param == "diffusers_kwargs.last_image"
    assert set(opened) <= {first}
    monkeypatch.setattr(CallSignature, "takes_text", lambda self, name: True)
    with pytest.raises(BadRequest):
        picture(model, CLIP | {"image_path": [first], "diffusers_kwargs": {"last_image": canary}})
    assert canary in opened, "without the refusal it is not opened either: this test shows nothing"


@pytest.mark.parametrize(
    ("name", "argument", "taken"),
    [
        ("OmniGenPipeline", "input_images", False),
        ("StableDiffusionPipeline", "ip_adapter_image", False),
        ("StableDiffusionPipeline", "cross_attention_kwargs", False),
        ("WanVACEPipeline", "reference_images", False),
        ("LTX2Pipeline", "prompt_enhancement_kwargs", False),
        ("Flux2Pipeline", "no_such_argument", False),
        ("LTX2Pipeline", "system_prompt", True),
        ("FluxPipeline", "prompt_2", True),
        ("SanaPipeline", "complex_human_instruction", True),
    ],
)
def test_which_arguments_take_text(name: str, argument: str, taken: bool) -> None:
    call = CallSignature.of(getattr(diffusers, name))
    assert (argument in call.arguments) == (argument != "no_such_argument")
    assert call.takes_text(argument) is taken


@pytest.mark.filterwarnings("ignore")  # of modules as they are imported
def test_the_arguments_of_any_pipeline_that_take_text() -> None:
    """None of these is opened; what a newer diffusers adds is to be looked at before it is added here."""
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    calls = [CallSignature.of(k) for k in kinds if issubclass(k, diffusers.DiffusionPipeline) and "__call__" in dir(k)]
    found = {name for call in calls for name in call.arguments if call.takes_text(name)}
    words = {name for name in found if re.fullmatch("(.*_)?prompt(_[234])?", name)}
    assert len(calls) > 200 and {"prompt_2", "system_prompt"} < words
    assert found - words - {*ENGINE_ARGUMENTS, *REQUEST_FIELDS} == {
        "action", "cache_implementation", "complete_track_classes", "complex_human_instruction", "gligen_phrases",
        "instruction", "keyscale", "lyrics", "mixed_precision_format", "mixed_precision_reasoner_policy", "mode",
        "negative_prompt_embeds", "prior_callback_on_step_end_tensor_inputs", "resample_method_input",
        "resample_method_output", "sampling_method", "sampling_type", "source_subject_category",
        "target_subject_category", "task_type", "timesignature", "track_name", "transcription", "vocal_language",
    }  # fmt: skip


def test_text_is_taken_where_the_call_says_so(curious: DiffusersPipeline) -> None:
    assert seen(curious, diffusers_kwargs={"style": "wild"})["style"] == "wild"
    for name in ("tensors", "unknown"):
        line = rf"^diffusers_kwargs.{name}: 'a.png': no text is taken here"
        with pytest.raises(BadRequest, match=line):
            seen(curious, diffusers_kwargs={name: "a.png"})


def test_what_the_call_leaves_open_is_not_passed_unless_somebody_gives_it(curious: DiffusersPipeline) -> None:
    assert set(curious.info.left_open) == {"num_inference_steps", "guidance_scale", "max_sequence_length"}
    told = seen(curious)
    assert [told[name] for name in (*curious.info.left_open, "height")] == [None, None, None, 32]
    given = {"num_inference_steps": 9, "max_sequence_length": 20}
    told = seen(curious, **given)
    assert {name: told[name] for name in given} == given and told["guidance_scale"] is None
    with pytest.raises(BadRequest, match="Curious refuses the request: only one of guidance_scale and schedule"):
        seen(curious, guidance_scale=2.0)
    told = seen(curious, guidance_scale=2.0, diffusers_kwargs={"schedule": None})
    assert told["guidance_scale"] == 2.0
    assert seen(curious, diffusers_kwargs={"num_inference_steps": None})["num_inference_steps"] is None


def test_the_operator_s_and_the_folder_s_values_are_given_ones(twin: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    info = pipeline(folder).info
    assert info.left_open == ("height", "width")
    assert resolve({}, info).params.diffusers_kwargs == {"height": None, "width": None}
    assert resolve({"height": 64}, info).params.diffusers_kwargs == {"width": None}
    assert resolve({"height": 64}, info, base={"width": 64}).params.diffusers_kwargs is None
    (folder / "generation_config.json").write_text('{"height": 64, "width": 32}')
    assert pipeline(folder).info.left_open == ()


def test_a_picture_s_shape_is_a_size_that_is_given(ovis: DiffusersPipeline) -> None:
    info = attrs.evolve(ovis.info, pictures=attrs.evolve(ovis.info.pictures, max=1))
    params = resolve({"image_path": ["a.png"]}, info, picture=(64, 32)).params
    assert (params.width, params.height, params.diffusers_kwargs) == (1440, 720, None)


def test_a_clip_s_length_is_the_call_s_own(twin: Callable[[str], Path]) -> None:
    from diffusers import LTX2Pipeline

    assert inspect.signature(LTX2Pipeline.__call__).parameters["num_frames"].default is None
    model = pipeline(twin("ltx2"))
    assert "num_frames" in model.info.left_open and model.info.defaults["num_frames"] == 121
    request = {"prompt": "a red cat", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 7}
    made = run(model, request)
    assert made.frames is not None and len(made.frames) == 121


def test_a_default_that_is_true_or_false_is_the_call_s_own(curious: DiffusersPipeline) -> None:
    assert curious.info.defaults["cfg_normalization"] == 1.0
    assert seen(curious)["cfg_normalization"] == 1.0
    assert seen(curious, cfg_normalization=0)["cfg_normalization"] == 0.0


def test_unknown_arguments_are_for_a_repository_s_own_code_alone(
    curious: DiffusersPipeline, twin: Callable[[str], Path]
) -> None:
    model = pipeline(twin("stable-diffusion"))
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model.pipeline).__call__).parameters.values())
    told = refusal(model, diffusers_kwargs={"clip_skp": 1})
    assert told.startswith("diffusers_kwargs.clip_skp: the call of StableDiffusionPipeline has no such argument; did")
    assert seen(curious, diffusers_kwargs={"more": 1})["kwargs"] == {"more": 1}


def test_what_the_pipeline_says_of_its_own_arguments_is_the_client_s_to_mend(ovis: DiffusersPipeline) -> None:
    told = refusal(ovis, diffusers_kwargs={"latents": [1, 2]})
    assert told.startswith("diffusers_kwargs: OvisImagePipeline cannot run with them: ")
    with pytest.raises(BadRequest) as caught:
        picture(ovis, REQUEST | {"diffusers_kwargs": {"latents": [1, 2]}})
    assert caught.value.param == "diffusers_kwargs"


def test_memory_that_runs_out_is_no_fault_of_the_arguments(
    ovis: DiffusersPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(ovis.pipeline, "encode_prompt", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        picture(ovis, REQUEST | {"diffusers_kwargs": {"sigmas": [1.0, 0.5]}})


def test_one_argument_under_two_names_is_refused(ovis: DiffusersPipeline) -> None:
    told = refusal(ovis, diffusers_kwargs={"cross_attention_kwargs": {}, "attention_kwargs": {}})
    assert told == (
        "diffusers_kwargs.attention_kwargs: joint_attention_kwargs is given under another name too; give it once"
    )


def test_a_mask_needs_no_strength(curious: DiffusersPipeline, tmp_path: Path) -> None:
    file, mask = (str(photo(tmp_path / name, 48, 32)) for name in ("a.png", "m.png"))
    PIL.Image.new("L", (48, 32), 255).save(mask)
    told = seen(curious, image_path=[file], mask_path=mask)
    assert told["mask_image"].size == (48, 32) and told["mask_image"].getextrema() == (255, 255)
    assert seen(curious, image_path=[file])["mask_image"] is None
    with pytest.raises(NotBuilt, match="strength: this model cannot use it: the call of Curious has no argument"):
        seen(curious, image_path=[file], strength=0.5)


def test_a_mask_that_the_call_has_no_argument_for(twin: Callable[[str], Path], tmp_path: Path) -> None:
    file = str(photo(tmp_path / "a.png", 48, 32))
    with pytest.raises(NotBuilt, match="mask_path: this model cannot use it: the call of WanImageToVideoPipeline has"):
        picture(pipeline(twin("wan21-i2v-480p")), CLIP | {"image_path": [file], "mask_path": file})


def test_a_step_counts_once(curious: DiffusersPipeline) -> None:
    made = run(curious, {"prompt": "a red cat", "seed": 7, "num_inference_steps": 2})
    assert len(made.context.steps_ms) == 2
    assert curious.pipeline.seen["callback"] is None and curious.pipeline.seen["callback_on_step_end"] is not None


def test_a_stopped_call_leaves_nothing_on_the_device(ovis: DiffusersPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    original = ovis.pipeline.maybe_free_model_hooks
    monkeypatch.setattr(ovis.pipeline, "maybe_free_model_hooks", lambda: freed.append(original()))
    assert run(ovis, REQUEST | {"num_inference_steps": 50}, cancel_in="denoise").frames is None
    assert freed == [None]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LattePipeline", "it counts its frames in an argument of its own, video_length"),
        ("StableAudioPipeline", "it makes sound alone"),
        ("AudioLDM2Pipeline", "it makes sound alone"),
        ("MusicLDMPipeline", "it makes sound alone"),
        ("AceStepPipeline", "it makes sound alone"),
        ("MarigoldDepthPipeline", "it measures a picture and makes none"),
        ("VersatileDiffusionDualGuidedPipeline", "its prompt is a picture"),
    ],
)
def test_calls_whose_output_is_nothing_here(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^{name} cannot run here: {reason}"):
        CallSignature.of(getattr(diffusers, name)).check()
    CallSignature.of(diffusers.OvisImagePipeline).check()


def test_a_folder_s_defaults_that_the_call_lacks_are_refused(twin: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"true_cfg_scale": 4.0}')
    line = "generation_config.json: true_cfg_scale: the call of OvisImagePipeline has no argument true_cfg_scale; leave"
    with pytest.raises(ModelError, match=line):
        pipeline(folder)
