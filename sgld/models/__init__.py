"""The registry: pipeline class of model_index.json -> `module:class`, imported when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from sgld.errors import BadRequest, ModelError, nearest
from sgld.settings import DIFFUSERS_ATTENTION_BACKENDS, Settings

if TYPE_CHECKING:
    from sgld.messages import Load
    from sgld.models.base import DiffusionModel, OpaquePipeline
    from sgld.nn.parallel import Mesh
    from sgld.platform import Platform

REGISTRY = {
    "QwenImageEditPipeline": "qwen_image:QwenImage",
    "QwenImageEditPlusPipeline": "qwen_image:QwenImage",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "HunyuanVideo15Pipeline": "hunyuan_video15:HunyuanVideo15",
    "HunyuanVideoPipeline": "hunyuan_video:HunyuanVideo",
    "FluxKontextPipeline": "flux:Flux",
    "FluxPipeline": "flux:Flux",
    "Flux2KleinPipeline": "flux2:Flux2",
    "Flux2Pipeline": "flux2:Flux2",
    "LTX2ImageToVideoPipeline": "ltx2:LTX2",
    "LTX2Pipeline": "ltx2:LTX2",
    "WanDMDPipeline": "wan:Wan",
    "WanImageToVideoDmdPipeline": "wan:Wan",
    "WanImageToVideoPipeline": "wan:Wan",
    "WanPipeline": "wan:Wan",
    "ZImagePipeline": "z_image:ZImage",
}


def load_family(
    load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]
) -> DiffusionModel | OpaquePipeline:
    """Load the model in `load.folder`. `progress(done, total)` is called after each component.

    Raises:
        BadRequest: settings that it cannot run with.
        ModelError: no model, an unknown pipeline, or a part that is missing or broken; names the file.
        NotBuilt: a variant of a known pipeline that does not stand yet.
    """
    from sgld.nn.weights import read_json

    file = load.folder / "model_index.json"
    if not file.is_file():
        raise ModelError(f"{load.folder}: no model; it has no model_index.json")
    index = read_json(file)
    for component in load.component_folders:
        if component not in index:
            raise ModelError(f"{component!r} is not in {file}{nearest(component, index)}", field="component_paths")
    name, backend = index.get("_class_name"), load.settings.model.backend
    native = REGISTRY.get(name) if isinstance(name, str) else None
    if backend == "diffusers" or (backend == "auto" and native is None):
        from sgld.models.diffusers.loading import has_pipeline
        from sgld.models.diffusers.running import DiffusersPipeline

        if has_pipeline(name):
            return DiffusersPipeline(load, mesh, platform, progress)
        if backend == "diffusers":
            raise ModelError(f"{file}: diffusers has no pipeline {name!r}")
    if native is None:
        known = ", ".join(REGISTRY)
        raise ModelError(
            f"{file}: pipeline {str(name)!r} is not supported{nearest(str(name), REGISTRY)}; known: {known}"
        )
    _refuse_kernels(load.settings)
    module, cls = native.split(":")
    family: DiffusionModel = getattr(importlib.import_module(f"sgld.models.{module}"), cls)(
        load, mesh, platform, progress
    )
    return family


def _refuse_kernels(settings: Settings) -> None:
    """Raise `BadRequest` for an attention kernel that only a diffusers pipeline has."""
    for param in ("diffusers_attention_backend", "attention_backend"):
        if (name := settings.get(param)) in DIFFUSERS_ATTENTION_BACKENDS:
            reason = "is of diffusers pipelines, and this model runs as native code"
            raise BadRequest(f"{name!r} {reason}; use attention_backend torch_sdpa, or backend diffusers", field=param)
