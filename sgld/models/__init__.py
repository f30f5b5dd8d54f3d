"""The registry: pipeline class of model_index.json -> `module:class`, imported when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from sgld.errors import ModelError, nearest

if TYPE_CHECKING:
    from sgld.messages import Load
    from sgld.models.family import Family
    from sgld.nn.parallel import Mesh
    from sgld.platform import Platform

REGISTRY = {
    "WanPipeline": "wan:Wan",
}


def load_family(load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]) -> Family:
    """The model in `load.folder`; `progress(done, total)` is called as its parts are loaded.

    Raises:
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
            raise ModelError(
                f"component_paths: {component!r} is not in {file}{nearest(component, index)}", "component_paths"
            )
    name = str(index.get("_class_name"))
    if name not in REGISTRY:
        raise ModelError(
            f"{file}: pipeline {name!r} is not supported{nearest(name, REGISTRY)}; known: {', '.join(REGISTRY)}"
        )
    module, cls = REGISTRY[name].split(":")
    family: Family = getattr(importlib.import_module(f"sgld.models.{module}"), cls)(load, mesh, platform, progress)
    return family
