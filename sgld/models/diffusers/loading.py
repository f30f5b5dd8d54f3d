"""Loading of diffusers pipelines: components from safetensors, and the settings that apply to them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from sgld.convert import default_of, shorten
from sgld.errors import BadRequest, ModelError, first_line
from sgld.messages import Load
from sgld.models.components import PRECISIONS, check_precisions
from sgld.nn.attention import BACKENDS
from sgld.nn.weights import read_json
from sgld.platform import Platform
from sgld.settings import DIFFUSERS_ATTENTION_BACKENDS, TRANSFORMERS, Settings, settings_fields

DENOISERS = (*TRANSFORMERS, "unet")
KERNELS = {
    "native": BACKENDS["torch_sdpa"],
    "flash": BACKENDS["fa2"],
    "_flash_3_hub": attrs.evolve(BACKENDS["fa3"], package="kernels"),
    "sage": BACKENDS["sage_attn"],
    "xformers": attrs.evolve(BACKENDS["fa2"], package="xformers"),
}
UNSUPPORTED = {
    "num_gpus": "a diffusers pipeline runs in one worker",
    "vae_sp": "a diffusers pipeline runs in one worker",
    "dmd_denoising_steps": "it is of Wan checkpoints that run as native code",
    "component_attention_backends": "a diffusers pipeline has one kernel; use diffusers_attention_backend",
    "attention_backend_config": "the kernels of diffusers pipelines have no settings",
    "dit_layerwise_offload": "a diffusers pipeline is offloaded by whole components",
    "pin_cpu_memory": "a diffusers pipeline leaves that to accelerate",
}


def has_pipeline(name: object) -> bool:
    """Return true where `_class_name` of a model_index.json names a class of diffusers or of the repository.

    Raises:
        ModelError: a class of diffusers whose package is not installed. The message names the package.
    """
    import diffusers

    if isinstance(name, list):
        return len(name) == 2 and all(isinstance(part, str) for part in name)
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(found, diffusers.utils.DummyObject):
        try:
            found()
        except ImportError as error:
            raise ModelError(" ".join(str(error).split())) from None
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def load_pipeline(load: Load, platform: Platform, progress: Callable[[int, int], None]) -> Any:
    """Load the pipeline of a folder on the CPU.

    Raises:
        BadRequest: code of the repository that is not trusted, or precisions that do not fit.
        ModelError: a component that is missing or broken, or that lacks weights.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    loader = PipelineLoader(load, platform)
    loader.check_code()
    check_precisions(load.settings, len(loader.encoders))
    made: dict[str, Any] = {}
    for i, name in enumerate(loader.components, 1):
        if (component := loader.component(name)) is not None:
            made[name] = component
        progress(i, len(loader.components))
    options = {"local_files_only": True, "use_safetensors": True, "dtype": loader.dtype("")}
    trusted = load.settings.model.trust_remote_code
    with _as_model_error(load.folder):
        return diffusers.DiffusionPipeline.from_pretrained(load.folder, trust_remote_code=trusted, **made, **options)


class PipelineLoader:
    """A loader of one folder's components. It reads weights from safetensors alone."""

    def __init__(self, load: Load, platform: Platform):
        self._folder, self._settings, self._replaced = load.folder, load.settings, load.component_folders
        self._platform = platform
        self._index = read_json(load.folder / "model_index.json")
        named = {n: v for n, v in self._index.items() if isinstance(v, list) and not n.startswith("_")}
        self.components = {n: (v[0], v[1]) for n, v in named.items() if len(v) == 2 and isinstance(v[0], str)}
        self.encoders = [name for name in self.components if name.startswith("text_encoder")]

    def check_code(self) -> None:
        """Raise `BadRequest` for untrusted code of the repository, `ModelError` for a code file that is missing."""
        name = self._index["_class_name"]
        files = [f"{n}/{library}.py" for n, (library, _) in self.components.items()]
        code = [f"{name[0]}.py"] * isinstance(name, list) + [f for f in files if (self._folder / f).is_file()]
        if code and not self._settings.model.trust_remote_code:
            reason = f"this model runs code of its own ({', '.join(code)}); read it, and set this if you trust it"
            raise BadRequest(reason, field="trust_remote_code")
        if code and not (file := self._folder / code[0]).is_file():
            raise ModelError(f"{file}: no such file, but model_index.json names it")

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of a component: its own setting, else `precision`, else the platform's."""
        s = self._settings
        own = {"vae": s.dtypes.vae_precision} | dict.fromkeys(DENOISERS, s.dtypes.dit_precision)
        own |= dict(zip(self.encoders, s.dtypes.text_encoder_precisions or (), strict=False))
        named = own.get(name) or s.dtypes.precision
        return PRECISIONS[named] if named else self._platform.dtype

    def component(self, name: str) -> Any:
        """Load a model of diffusers or transformers, or a replaced component. Return None for all others."""
        library, cls = self.components[name]
        folder = self._replaced.get(name, self._folder / name)
        if name in self._replaced and (file := folder / "config.json").is_file():
            cls = read_json(file).get("_class_name", cls)
        module = importlib.import_module(library) if library in ("diffusers", "transformers") else None
        kind: Any = getattr(module, cls, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return _load_model(kind, folder, self.dtype(name))
        if name not in self._replaced:
            return None
        if kind is None:
            raise ModelError(f"component_paths.{name}: {folder} holds no {cls} of {library}", "component_paths")
        with _as_model_error(folder):
            return kind.from_pretrained(folder, local_files_only=True)


def _load_model(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    if not any(folder.glob("*.safetensors")):
        reason = "has no .safetensors weights, and others (.bin, .pt, ...) are not read: they may run code"
        raise ModelError(f"{folder}: {reason}")
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    with _as_model_error(folder):
        model, report = kind.from_pretrained(folder, dtype=dtype, **options)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder}: lacks {len(missing)} weights of {kind.__name__}: {', '.join(missing[:5])}")
    return model


@contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """Raise `ModelError` for any error of the libraries about a folder: their types change with their versions."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


# ----------------------------------------------------------------------------------------------------- settings


def check_settings(settings: Settings) -> None:
    """Raise `BadRequest` for a setting that a diffusers pipeline cannot follow."""
    for name, reason in UNSUPPORTED.items():
        if (value := settings.get(name)) != default_of(settings_fields()[name]):
            raise BadRequest(f"{shorten(value)}: {reason}; leave it out", field=name)
    if settings.memory.parallel_decode:
        path = "vae_config.use_parallel_decode"
        raise BadRequest(f"true: {UNSUPPORTED['vae_sp']}; leave it out", field=path)
    if not settings.memory.vae_config.load_encoder:
        path = "vae_config.load_encoder"
        raise BadRequest("false: a diffusers pipeline keeps its whole VAE; leave it out", field=path)


def place(pipeline: Any, settings: Settings, device: torch.device, platform: Platform) -> str | None:
    """Move the pipeline to the device, or offload its components. Return the setting that asks for offload."""
    asked = [name for name in settings_fields() if name.endswith("_cpu_offload") and settings.get(name)]
    if not asked:
        pipeline.to(device)
        return None
    if platform.name != "cuda":
        reason = "a diffusers pipeline can only be offloaded from a GPU; this worker computes on a CPU"
        raise BadRequest(f"{reason}; leave it out", field=asked[0])
    try:
        pipeline.enable_model_cpu_offload(device=device)
    except ImportError as error:
        raise BadRequest(f"{first_line(error)}", field=asked[0]) from None
    return asked[0]


def set_kernel(denoisers: Mapping[str, nn.Module], settings: Settings, platform: Platform) -> None:
    """Set the attention kernel. Raise `BadRequest` where it cannot run; the message lists the ones that can."""
    given = {n: v for n in ("diffusers_attention_backend", "attention_backend") if (v := settings.get(n))}
    for param, name in given.items():
        if name not in KERNELS:
            allowed = ", ".join(DIFFUSERS_ATTENTION_BACKENDS)
            raise BadRequest(f"{name!r} is of native code; a diffusers pipeline takes {allowed}", field=param)
    if len(set(given.values())) > 1:
        param, other = given
        raise BadRequest(f"{given[param]!r} contradicts {other} {given[other]!r}; give one of them", field=param)
    for param, name in list(given.items())[:1]:
        for module in denoisers.values():
            dtype = next(module.parameters()).dtype
            if reason := KERNELS[name].obstacle(platform, dtype, 0):
                runs = ", ".join(n for n, kernel in KERNELS.items() if kernel.obstacle(platform, dtype, 0) is None)
                raise BadRequest(f"{name} cannot run here: {reason}; these can: {runs}", field=param)
            _use_kernel(module, name, param)


def _use_kernel(module: Any, name: str, param: str) -> None:
    follows = any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules())
    if not follows and name != "native":
        reason = f"{type(module).__name__} chooses its attention itself"
        raise BadRequest(f"{name!r} has no effect: {reason}; leave it out", field=param)
    try:
        module.set_attention_backend(name)
    except (RuntimeError, ValueError) as error:
        raise BadRequest(f"{name} cannot run here: {first_line(error)}", field=param) from None


def set_vae_modes(vae: Any, settings: Settings) -> None:
    """Enable tiles and slices of the VAE. Raise `BadRequest` for a mode or a size that it lacks."""
    sizes = {n: v for n, v in attrs.asdict(settings.memory.vae_config).items() if n.startswith("tile_sample_") and v}
    if settings.memory.tiles():
        takes = inspect.signature(vae.enable_tiling).parameters if hasattr(vae, "enable_tiling") else {}
        for name in sizes:
            if name not in takes:
                path = f"vae_config.{name}"
                raise BadRequest(f"{type(vae).__name__} takes no such size; leave it out", field=path)
        _enable(vae, "vae_tiling", "enable_tiling", sizes)
    if settings.memory.vae_slicing:
        _enable(vae, "vae_slicing", "enable_slicing", {})


def _enable(vae: Any, param: str, method: str, options: Mapping[str, object]) -> None:
    try:
        getattr(vae, method)(**options)
    except (AttributeError, NotImplementedError):
        reason = "this pipeline has no VAE" if vae is None else f"{type(vae).__name__} has no such mode"
        raise BadRequest(f"{reason}; leave it out", field=param) from None
