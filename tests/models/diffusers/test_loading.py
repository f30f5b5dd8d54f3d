"""Loading of diffusers pipelines: folders, code, settings, and the choice of a backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sgld.config import settings_of
from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.models.diffusers.running import DiffusersPipeline
from sgld.params import LoraUse, check_loras
from tests.models.diffusers.pipelines import REQUEST, load, pipeline, refusal, set_class
from tests.models.parity import apart, picture
from tools import tiny


def test_a_folder_s_own_defaults_stand_above(twin: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"num_inference_steps": 3, "height": 64}')
    defaults = pipeline(folder).info.defaults
    assert (defaults["num_inference_steps"], defaults["height"], defaults["width"]) == (3, 64, 1024)
    (folder / "generation_config.json").write_text('{"steps": 3}')
    with pytest.raises(ModelError, match=r"generation_config.json: unknown key 'steps'"):
        pipeline(folder)


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


def test_settings_that_it_follows(twin: Callable[[str], Path], ovis_picture: Tensor) -> None:
    plain = pipeline(twin("ovis-image"), diffusers_attention_backend="native", vae_slicing=True)
    assert apart(picture(plain, REQUEST), ovis_picture) == 0
    half = pipeline(twin("ovis-image"), precision="bf16", vae_precision="bf16")
    assert {module.dtype for module in (half.pipeline.vae, half.pipeline.transformer)} == {torch.bfloat16}
    assert apart(picture(half, REQUEST), ovis_picture) > 0
    assert pipeline(twin("ovis-image"), dit_precision="bf16").pipeline.text_encoder.dtype == torch.float32


def test_tiles_change_a_large_picture_a_little(twin: Callable[[str], Path], ovis: DiffusersPipeline) -> None:
    tiled = pipeline(twin("ovis-image"), vae_tiling=True)
    assert tiled.pipeline.vae.use_tiling and not ovis.pipeline.vae.use_tiling


def test_a_component_from_elsewhere(twin: Callable[[str], Path], tmp_path: Path, ovis_picture: Tensor) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(twin("ovis-image") / "vae")
    tiny.stir(vae, 0.05)
    vae.save_pretrained(tmp_path / "vae")
    model = pipeline(twin("ovis-image"), {"vae": tmp_path / "vae"})
    assert apart(picture(model, REQUEST), ovis_picture) > 5


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


def test_adapters_that_are_not_taken(twin: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    line = "loras: this model cannot use it: only transformers take adapters, and StableDiffusionPipeline has none"
    adapters = [{"path": "a.safetensors"}]
    with pytest.raises(NotBuilt, match=line):
        picture(pipeline(twin("stable-diffusion")), REQUEST | {"loras": adapters})
    monkeypatch.setattr("sgld.models.diffusers.running.place", lambda *_: "dit_cpu_offload")
    model = pipeline(twin("ovis-image"))
    told = "components that are offloaded take no adapters; leave dit_cpu_offload out to use them"
    assert refusal(model, NotBuilt, loras=adapters).endswith(told)
    with pytest.raises(NotBuilt, match=f"lora_path: this model takes no LoRA adapters: {told}"):
        check_loras([LoraUse(path="a.safetensors")], model.info, "lora_path")


def test_a_package_that_is_missing_is_named(twin: Callable[[str], Path], tmp_path: Path) -> None:
    name = "OnnxStableDiffusionPipeline"
    assert isinstance(getattr(diffusers, name), diffusers.utils.DummyObject)
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    set_class(folder, name)
    for backend in ("auto", "diffusers"):
        with pytest.raises(ModelError, match=f"^{name} requires .*pip install onnxruntime"):
            load(folder, backend=backend)


@pytest.mark.parametrize("name", [[], ["a"], ["a", 1], {}, 3])
def test_names_of_classes_that_are_none(twin: Callable[[str], Path], tmp_path: Path, name: Any) -> None:
    folder = shutil.copytree(twin("ovis-image"), tmp_path / "model")
    set_class(folder, name)
    with pytest.raises(ModelError, match="diffusers has no pipeline"):
        load(folder, backend="diffusers")


def test_parallel_decode_is_refused_under_either_name(twin: Callable[[str], Path]) -> None:
    config = settings_of({"vae_config": {"use_parallel_decode": True}}).memory.vae_config
    with pytest.raises(
        BadRequest, match="^vae_config.use_parallel_decode: true: a diffusers pipeline runs in one work"
    ):
        pipeline(twin("ovis-image"), vae_config=config)
