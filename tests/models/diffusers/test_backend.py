"""The diffusers backend: a pipeline's own picture, made by the engine; and all that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from sgld.config import settings_of
from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.inputs import upright
from sgld.messages import Cancel, Load, Note, Progress
from sgld.models import load_family
from sgld.models.base import DiffusionModel, OpaquePipeline
from sgld.models.diffusers.backend import Pipeline
from sgld.nn.lora import WeightedAdapter
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings
from sgld.worker.run_context import RunContext, Stopped
from sgld.worker.sampler import sample
from tests.models.parity import Request, apart, levels, make, photo, picture, quiet, theirs, write_lora
from tools import tiny
from tools.twins import stable_diffusion

REQUEST = {
    "prompt": "a red cat", "negative_prompt": "blurred", "height": 32, "width": 48, "num_inference_steps": 3,
    "guidance_scale": 3.0, "seed": 7,
}  # fmt: skip
CLIP = REQUEST | {"num_frames": 5}


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a twin by name."""

    @cache
    def make(name: str) -> Path:
        return tiny.makers()[name](tmp_path_factory.mktemp("twin") / name)

    return make


@pytest.fixture(scope="session")
def ovis(twin: Callable[[str], Path]) -> Pipeline:
    return pipeline(twin("ovis-image"))


@pytest.fixture(scope="session")
def ovis_picture(ovis: Pipeline) -> Tensor:
    return picture(ovis, REQUEST)


def load(folder: Path, components: dict[str, Path] | None = None, **settings: Any) -> DiffusionModel | OpaquePipeline:
    command = Load(Settings.of(model_path=str(folder), **settings), folder, components or {})
    return load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


def pipeline(folder: Path, components: dict[str, Path] | None = None, **settings: Any) -> Pipeline:
    made = load(folder, components, **{"backend": "diffusers"} | settings)
    assert isinstance(made, Pipeline)
    return made


@attrs.frozen
class Heard:
    """What came of one request."""

    frames: Tensor | None
    stages: list[tuple[str, int, int]]
    notes: list[str]
    context: RunContext


@attrs.frozen
class Cancelling:
    """A worker's end of a pipe; a cancel comes from the other end once progress of `stage` is sent."""

    own: Connection
    other: Connection
    stage: str | None

    def poll(self) -> bool:
        return self.own.poll()

    def recv(self) -> object:
        return self.own.recv()

    def send(self, message: object) -> None:
        self.own.send(message)
        if isinstance(message, Progress) and message.stage == self.stage:
            self.other.send(Cancel("job"))


def heard(model: Pipeline, request: Request, cancel_in: str | None = None) -> Heard:
    """Make one output as a worker does; a cancel comes once its hook has told of that stage."""
    params = resolve(request, model.info).params
    ours, theirs = Pipe()
    with ours, theirs:
        context = RunContext("job", Mesh.solo(), Cancelling(theirs, ours, cancel_in))  # type: ignore[arg-type]
        frames = None
        try:
            frames, _ = sample(model, params, context)
        except Stopped:
            assert cancel_in is not None
        events = []
        while ours.poll():
            events.append(ours.recv())
    stages = [(e.stage, e.step, e.total) for e in events if isinstance(e, Progress)]
    return Heard(frames, stages, [e.text for e in events if isinstance(e, Note)], context)


def refusal(model: Pipeline, kind: type[BadRequest] = BadRequest, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        picture(model, REQUEST | changes)
    return caught.value.message


# ------------------------------------------------------------------------------------------- the pipeline's picture


def test_ovis_image_is_what_diffusers_makes(twin: Callable[[str], Path], ovis: Pipeline, ovis_picture: Tensor) -> None:
    from diffusers import OvisImagePipeline

    expected = theirs(quiet(OvisImagePipeline.from_pretrained(twin("ovis-image"))), REQUEST)
    assert ovis_picture.shape == (1, 32, 48, 3)
    assert apart(ovis_picture, expected) == 0
    assert apart(ovis_picture, picture(ovis, REQUEST | {"seed": 8})) > 20
    assert apart(ovis_picture, picture(ovis, REQUEST)) == 0, "a call leaves something behind"


def test_what_it_says_of_itself(ovis: Pipeline) -> None:
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


def test_a_folder_s_own_defaults_stand_above(twin: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"num_inference_steps": 3, "height": 64}')
    defaults = pipeline(folder).info.defaults
    assert (defaults["num_inference_steps"], defaults["height"], defaults["width"]) == (3, 64, 1024)
    (folder / "generation_config.json").write_text('{"steps": 3}')
    with pytest.raises(ModelError, match=r"generation_config.json: unknown key 'steps'"):
        pipeline(folder)


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
    made = heard(model, CLIP)
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
    made = heard(model, request | {"image_path": [file]})
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


# --------------------------------------------------------------------------------------------- on the way, and cancel


def test_progress_and_timings_are_told_as_of_any_model(ovis: Pipeline) -> None:
    made = heard(ovis, REQUEST)
    assert made.stages[0] == ("encode", 0, 1) and made.stages[-1] == ("decode", 1, 1)
    assert ("denoise", 0, 3) in made.stages and ("denoise", 3, 3) in made.stages
    assert set(made.context.stages_ms) == {"encode", "denoise", "decode"}
    assert len(made.context.steps_ms) == 3


@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_a_cancel_is_heard_on_the_way(ovis: Pipeline, ovis_picture: Tensor, stage: str) -> None:
    stopped = heard(ovis, REQUEST | {"num_inference_steps": 50}, cancel_in=stage)
    assert stopped.frames is None
    assert len(stopped.context.steps_ms) <= 1
    assert apart(picture(ovis, REQUEST), ovis_picture) == 0, "a stopped call leaves something behind"


def test_a_pipeline_without_callbacks_runs_and_can_be_stopped(ovis: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    called = {name: p for name, p in ovis._call.items() if not name.startswith("callback")}
    monkeypatch.setattr(ovis, "_call", called)
    made = heard(ovis, REQUEST)
    assert made.frames is not None and made.context.steps_ms == []
    assert ("denoise", 1, 1) in made.stages
    assert heard(ovis, REQUEST, cancel_in="denoise").frames is None


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_field_that_the_call_does_not_take_is_refused(ovis: Pipeline) -> None:
    told = "this model cannot use it: the call of OvisImagePipeline has no argument"
    assert refusal(ovis, NotBuilt, true_cfg_scale=4.0) == f"true_cfg_scale: {told} true_cfg_scale"
    assert refusal(ovis, NotBuilt, flow_shift=4.0) == f"flow_shift: {told} flow_shift"
    assert refusal(ovis, image_path=["a.png"]).startswith("image_path: 1 given; this model makes pictures from text")
    assert refusal(ovis, num_frames=5).startswith("num_frames: 5: this model makes single pictures")
    assert refusal(ovis, height=40).startswith("height: 40 is not a multiple of 16")
    assert "max_sequence_length" in refusal(ovis, max_sequence_length=300)  # by the pipeline itself, before it begins


def test_diffusers_kwargs_reach_the_call(ovis: Pipeline, ovis_picture: Tensor) -> None:
    changed = heard(ovis, REQUEST | {"diffusers_kwargs": {"sigmas": [1.0, 0.7, 0.2]}})
    assert changed.frames is not None and apart(changed.frames, ovis_picture) > 5
    assert changed.notes == []


def test_attention_arguments_go_by_the_pipeline_s_own_name(ovis: Pipeline, ovis_picture: Tensor) -> None:
    made = heard(ovis, REQUEST | {"diffusers_kwargs": {"cross_attention_kwargs": {"scale": 0.5}}})
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
def test_keys_of_diffusers_kwargs_that_are_refused(ovis: Pipeline, name: str, line: str) -> None:
    assert refusal(ovis, diffusers_kwargs={name: 1}).startswith(line)


def test_native_code_takes_no_diffusers_kwargs(twin: Callable[[str], Path]) -> None:
    native = load(twin("z-image"))
    with pytest.raises(NotBuilt, match="diffusers_kwargs: this model cannot use it: it runs as native code"):
        picture(native, REQUEST | {"diffusers_kwargs": {"sigmas": [1.0]}})
    with pytest.raises(BadRequest, match="diffusers_attention_backend: 'native' is of diffusers pipelines"):
        load(twin("z-image"), diffusers_attention_backend="native")
    with pytest.raises(BadRequest, match="attention_backend: 'sage' is of diffusers pipelines"):
        load(twin("z-image"), attention_backend="sage")


def test_auto_takes_native_code_first_then_diffusers_then_nothing(twin: Callable[[str], Path], tmp_path: Path) -> None:
    assert load(twin("z-image")).info.backend == "native"
    assert load(twin("ovis-image")).info.backend == "diffusers"
    with pytest.raises(ModelError, match="pipeline 'OvisImagePipeline' is not supported; did you mean ZImage"):
        load(twin("ovis-image"), backend="native")
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    set_class(folder, "NoSuchPipeline")
    with pytest.raises(ModelError, match="pipeline 'NoSuchPipeline' is not supported"):
        load(folder)
    with pytest.raises(ModelError, match="diffusers has no pipeline 'NoSuchPipeline'"):
        load(folder, backend="diffusers")
    set_class(folder, "AutoencoderKL")
    with pytest.raises(ModelError, match="pipeline 'AutoencoderKL' is not supported"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"diffusers_attention_backend": "flash"}, "diffusers_attention_backend: flash cannot run here: it needs an "
         "NVIDIA GPU from Ampere on, or an AMD one; this worker computes on a CPU; these can: native"),
        ({"attention_backend": "xformers"}, "attention_backend: xformers cannot run here"),
        ({"attention_backend": "fa"}, "attention_backend: 'fa' is of native code; a diffusers pipeline takes flash, "),
        ({"attention_backend": "sage", "diffusers_attention_backend": "native"},
         "diffusers_attention_backend: 'native' contradicts attention_backend 'sage'"),
        ({"dit_cpu_offload": True}, "dit_cpu_offload: a diffusers pipeline can only be offloaded from a GPU"),
        ({"dit_layerwise_offload": True}, "dit_layerwise_offload: True: a diffusers pipeline is offloaded by whole"),
        ({"component_attention_backends": {"transformer": "fa"}}, "component_attention_backends: {'transformer'"),
        ({"vae_config": {"load_encoder": False}}, "vae_config.load_encoder: false: a diffusers pipeline keeps"),
        ({"vae_tiling": True, "vae_config": {"tile_sample_min_height": 64}},
         "vae_config.tile_sample_min_height: AutoencoderKL takes no such size"),
        ({"text_encoder_precisions": ["fp32", "fp32"]}, "text_encoder_precisions: 2 given; this model has 1 text enc"),
    ],
)  # fmt: skip
def test_settings_that_it_cannot_follow(twin: Callable[[str], Path], settings: dict[str, Any], line: str) -> None:
    structured = settings_of(settings)
    with pytest.raises(BadRequest) as caught:
        pipeline(twin("ovis-image"), **{name: structured.get(name) for name in settings})
    assert caught.value.message.startswith(line)


def test_one_worker_runs_it(twin: Callable[[str], Path]) -> None:
    with pytest.raises(BadRequest, match="num_gpus: 2: a diffusers pipeline runs in one worker"):
        pipeline(twin("ovis-image"), num_gpus=2)


# --------------------------------------------------------------------------------------------------------- settings


def test_settings_that_it_follows(twin: Callable[[str], Path], ovis_picture: Tensor) -> None:
    plain = pipeline(twin("ovis-image"), diffusers_attention_backend="native", vae_slicing=True)
    assert apart(picture(plain, REQUEST), ovis_picture) == 0
    half = pipeline(twin("ovis-image"), precision="bf16", vae_precision="bf16")
    assert {module.dtype for module in (half._pipeline.vae, half._pipeline.transformer)} == {torch.bfloat16}
    assert apart(picture(half, REQUEST), ovis_picture) > 0
    assert pipeline(twin("ovis-image"), dit_precision="bf16")._pipeline.text_encoder.dtype == torch.float32


def test_tiles_change_a_large_picture_a_little(twin: Callable[[str], Path], ovis: Pipeline) -> None:
    tiled = pipeline(twin("ovis-image"), vae_tiling=True)
    assert tiled._pipeline.vae.use_tiling and not ovis._pipeline.vae.use_tiling


def test_a_component_from_elsewhere(twin: Callable[[str], Path], tmp_path: Path, ovis_picture: Tensor) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(twin("ovis-image") / "vae")
    tiny.stir(vae, 0.05)
    vae.save_pretrained(tmp_path / "vae")
    model = pipeline(twin("ovis-image"), {"vae": tmp_path / "vae"})
    assert apart(picture(model, REQUEST), ovis_picture) > 5


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


# ------------------------------------------------------------------------------------------------ folders as they are


def set_class(folder: Path, name: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))


CODE = """
from diffusers import OvisImagePipeline


class Reddened(OvisImagePipeline):
    def __call__(self, prompt=None, height=None, width=None, num_inference_steps=4, generator=None, output_type="np",
                 return_dict=True, redness=0.0):
        made = super().__call__(prompt, height=height, width=width, num_inference_steps=num_inference_steps,
                                generator=generator, output_type="np")
        made.images[..., 0] = made.images[..., 0] * (1 - redness) + redness
        return made
"""


def test_a_repository_s_own_code_runs_where_it_is_trusted(
    twin: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    set_class(folder, ["reddened", "Reddened"])
    for backend in ("auto", "diffusers"):
        with pytest.raises(BadRequest, match=r"trust_remote_code: this model runs code of its own \(reddened.py\)"):
            load(folder, backend=backend)
    with pytest.raises(ModelError, match=r"reddened.py: no such file"):
        pipeline(folder, trust_remote_code=True)
    (folder / "reddened.py").write_text(CODE)
    model = pipeline(folder, trust_remote_code=True)
    assert (model.info.name, model.info.defaults["num_inference_steps"]) == ("Reddened", 4)
    request = {name: REQUEST[name] for name in ("prompt", "height", "width", "seed")}
    plain = picture(model, request)
    red = picture(model, request | {"diffusers_kwargs": {"redness": 1.0}})
    assert bool((red[..., 0] == 255).all()) and not bool((plain[..., 0] == 255).all())
    assert torch.equal(red[..., 1:], plain[..., 1:])


@pytest.mark.parametrize(
    ("component", "change", "line"),
    [
        ("transformer", "pickle", r"transformer: has no .safetensors weights, and others \(.bin, .pt, ...\) are not"),
        ("transformer", "fewer", r"transformer: lacks 1 weights of OvisImageTransformer2DModel: proj_out.bias"),
        ("text_encoder", "fewer", r"text_encoder: lacks 1 weights of Qwen3Model: norm.weight"),
        ("scheduler", "gone", r"cannot be loaded: "),
    ],
)
def test_folders_that_are_not_whole(
    twin: Callable[[str], Path], tmp_path: Path, component: str, change: str, line: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    if change == "gone":
        shutil.rmtree(folder / component)
    else:
        [file] = (folder / component).glob("*.safetensors")
        weights = load_file(file)
        if change == "pickle":
            torch.save(weights, file.with_suffix(".bin"))
            file.unlink()
        else:
            del weights["proj_out.bias" if component == "transformer" else "norm.weight"]
            save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=line):
        pipeline(folder)


def test_an_output_is_told_where_it_is_not_as_asked(ovis: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(ovis._pipeline).__call__

    def smaller(self: Any, *args: Any, **given: Any) -> Any:
        made = original(self, *args, **given)
        made.images = np.asarray(made.images)[:, :16]
        made["images"] = made.images
        return made

    monkeypatch.setattr(type(ovis._pipeline), "__call__", smaller)
    assert heard(ovis, REQUEST).notes == ["size: OvisImagePipeline made 48x16, not 48x32"]
