"""The diffusers backend: any pipeline of diffusers as it is, as one model that makes its output in one call."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs
import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn

from sgld import inputs
from sgld.convert import default_of, shorten
from sgld.errors import BadRequest, ModelError, first_line
from sgld.messages import Load
from sgld.models.base import OpaquePipeline, Sound, Watch
from sgld.models.components import PRECISIONS, check_precisions, folder_defaults
from sgld.models.diffusers.call import PASSED, RATES, Call
from sgld.nn.attention import BACKENDS
from sgld.nn.lora import LoraLayers
from sgld.nn.parallel import Mesh
from sgld.nn.weights import read_json
from sgld.params import ModelInfo, OutputParams, PictureRule, SamplingParams
from sgld.platform import Platform
from sgld.settings import DIFFUSERS_ATTENTION_BACKENDS, TRANSFORMERS, Settings, settings_fields

GENERIC = {"num_inference_steps": 30, "guidance_scale": 7.5, "height": 1024, "width": 1024, "num_frames": 1}
SETTLED = (*GENERIC, "max_sequence_length")  # those of PASSED that are never None
CLIP_FRAMES = 121  # of a clip whose length neither the call nor a configuration tells before it is made
WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
OUTPUTS = ("images", "frames", "video", "sample")
DENOISERS = (*TRANSFORMERS, "unet")
MAX_PICTURES = 10
NEEDS_PICTURE = re.compile("Img2Img|Image2Image|ImageToImage|ImageToVideo|Inpaint|Edit|Upscale|InstructPix2Pix")
KERNELS = {
    "native": BACKENDS["torch_sdpa"],
    "flash": BACKENDS["fa2"],
    "_flash_3_hub": attrs.evolve(BACKENDS["fa3"], package="kernels"),
    "sage": BACKENDS["sage_attn"],
    "xformers": attrs.evolve(BACKENDS["fa2"], package="xformers"),
}
REFUSED = {
    "num_gpus": "a diffusers pipeline runs in one worker",
    "vae_sp": "a diffusers pipeline runs in one worker",
    "dmd_denoising_steps": "it is of Wan checkpoints that run as native code",
    "component_attention_backends": "a diffusers pipeline has one kernel; use diffusers_attention_backend",
    "attention_backend_config": "the kernels of diffusers pipelines have no settings",
    "dit_layerwise_offload": "a diffusers pipeline is offloaded by whole components",
    "pin_cpu_memory": "a diffusers pipeline leaves that to accelerate",
}


def has_pipeline(name: object) -> bool:
    """Whether `_class_name` of a model_index.json is a class of diffusers, or one of the repository's own code.

    Raises:
        ModelError: a class of diffusers that needs a package which is not installed; says which.
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


class Pipeline(OpaquePipeline):
    """A pipeline of diffusers, and what its call takes.

    Raises:
        BadRequest: a setting that it cannot run with.
        ModelError: a component that is missing or broken, or code of the repository's own that is not trusted.
    """

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        _refuse(load.settings)
        self._platform = platform
        self._pipeline = Loader(load, platform, progress).pipeline()
        self._signature = Call.of(type(self._pipeline))
        self._signature.check()
        self._name, self._call = self._signature.name, self._signature.arguments
        self._pipeline.set_progress_bar_config(disable=True)
        self._denoisers = {n: m for n in DENOISERS if isinstance(m := getattr(self._pipeline, n, None), nn.Module)}
        offload = _place(self._pipeline, load.settings, mesh, platform)
        _set_kernel(self._denoisers, load.settings, platform)
        _set_vae(getattr(self._pipeline, "vae", None), load.settings)
        self.lora = {} if offload else {n: LoraLayers(m, (), n) for n, m in self._denoisers.items() if n != "unet"}
        self.info = self._describe(load.folder, offload)

    def after_output(self) -> None:
        """Offloaded components that a call left on the device, as one that was stopped does, go."""
        self._pipeline.maybe_free_model_hooks()

    # ---------------------------------------------------------------------------------------------- what it is

    def _describe(self, folder: Path, offload: str | None) -> ModelInfo:
        own, unsupported, defaults = folder_defaults(folder), self._unsupported(offload), self._defaults()
        for name in own.keys() & unsupported.keys():
            raise ModelError(f"{folder / 'generation_config.json'}: {name}: {unsupported[name]}; leave it out")
        video = "num_frames" in self._call
        needed, most = self._pictures_taken()
        kind = "video" if video else "image"
        sources = ["text"] * (needed == 0) + ["image"] * (most > 0)
        return ModelInfo(
            name=self._name,
            kind=kind,
            defaults=defaults | own,
            left_open=tuple(name for name in SETTLED if self._signature.leaves(name) and name not in own),
            size_multiple=self._size_multiple() if self._sized else 1,
            frame_multiple=self._frame_multiple(defaults["num_frames"]) if video else 1,
            components=tuple(name for name, part in self._pipeline.components.items() if part is not None),
            unsupported=unsupported,
            tasks=tuple(f"{source}-to-{kind}" for source in sources),
            pictures=PictureRule(needed, most, starts_denoising="strength" in self._call, sets_size=self._sized),
            audio="audio_latents" in self._call,
            lora_targets=tuple(self.lora),
            backend="diffusers",
        )

    @property
    def _sized(self) -> bool:
        return {"height", "width"} <= self._call.keys()

    def _pictures_taken(self) -> tuple[int, int]:
        """How many pictures a request must bring, and how many it may."""
        argument = self._call.get("image")
        if argument is None:
            return 0, 0
        needed = argument.default is argument.empty or NEEDS_PICTURE.search(self._name) is not None
        told = str(argument.annotation)
        several = "Plus" in self._name or (re.search(r"[lL]ist\[", told) is not None and "Tensor" not in told)
        return int(needed), MAX_PICTURES if several else 1

    def _unsupported(self, offload: str | None) -> dict[str, str]:
        lacks = {field: field for field in PASSED} | {"mask_path": "mask_image"}
        found = {
            field: f"the call of {self._name} has no argument {argument}"
            for field, argument in lacks.items()
            if argument not in self._call and field != "num_frames"  # which is 1 for whatever makes pictures
        }
        if offload:
            found["loras"] = f"components that are offloaded take no adapters; leave {offload} out to use them"
        elif not self.lora:
            found["loras"] = f"only transformers take adapters, and {self._name} has none"
        return found

    def _defaults(self) -> dict[str, Any]:
        """Those of the call's signature, over what its denoiser was trained for, over the generic ones."""
        found: dict[str, Any] = {name: value for name, value in GENERIC.items() if name in self._call}
        if self._sized:
            found |= self._size()
        if self._signature.leaves("num_frames"):
            lengths = [
                self._config(m, key) for m in self._denoisers.values() for key in ("num_frames", "sample_frames")
            ]
            found["num_frames"] = next((n for n in lengths if isinstance(n, int)), CLIP_FRAMES)
        for name in (*PASSED, *RATES):
            value = self._call[name].default if name in self._call else None
            if name in RATES and isinstance(value, int | float):
                found["fps"] = round(value)
            elif isinstance(value, int | float | str):
                found[name] = float(value) if isinstance(value, bool) else value
        return found

    def _config(self, component: Any, key: str) -> Any:
        return getattr(getattr(component, "config", None), key, None)

    def _size(self) -> dict[str, int]:
        """Pixels of the sides that the denoiser was trained for, where it says so."""
        squares = [getattr(self._pipeline, "default_sample_size", None)]
        squares += [self._config(module, "sample_size") for module in self._denoisers.values()]
        pairs = [(size, size) for size in squares]
        pairs += [(self._config(m, "sample_height"), self._config(m, "sample_width")) for m in self._denoisers.values()]
        latents = next(((h, w) for h, w in pairs if isinstance(h, int) and isinstance(w, int)), ())
        return {name: side * self._latent_pixels() for name, side in zip(("height", "width"), latents, strict=False)}

    def _latent_pixels(self) -> int:
        """Pixels of a side that one latent stands for."""
        names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
        return next((f for name in names if isinstance(f := getattr(self._pipeline, name, None), int)), 1)

    def _size_multiple(self) -> int:
        """What the denoiser's patches and the pipeline's own processor of pictures agree on."""
        patches = [self._config(module, "patch_size") for module in self._denoisers.values()]
        patches = [size[-1] if isinstance(size, list | tuple) else size for size in patches]
        found = [self._latent_pixels() * (size if isinstance(size, int) else 1) for size in (*patches, 1)]
        for name in ("image_processor", "video_processor"):
            factor = self._config(getattr(self._pipeline, name, None), "vae_scale_factor")
            found += [factor] if isinstance(factor, int) else []
        return math.lcm(*found)

    def _frame_multiple(self, own: int) -> int:
        """Frames that one latent stands for, unless the pipeline's own length shows that it counts otherwise."""
        names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
        factor = next((f for name in names if isinstance(f := getattr(self._pipeline, name, None), int)), 1)
        return factor if (own - 1) % factor == 0 else 1

    # -------------------------------------------------------------------------------------------- what it makes

    @torch.no_grad()
    def make(self, params: OutputParams, watch: Watch) -> tuple[Tensor, Sound | None]:
        """One output. A cancel is heard whenever the denoiser is called, and at the end of each step.

        Raises:
            BadRequest: what the call does not take, or refuses before it denoises.
            ModelError: an output that is no picture.
        """
        given = self._arguments(params, watch)
        torch.manual_seed(params.seed)  # for what a pipeline draws without the generator
        generator = torch.Generator("cpu").manual_seed(params.seed)
        counts = bool({"callback_on_step_end", "callback"} & self._call.keys())
        with Course(watch, self._steps(params) if counts else None) as course, self._watched(course):
            own = {"generator": generator, "output_type": "np", "return_dict": True, "callback": course.after_step}
            if "callback_on_step_end" in self._call:
                del own["callback"]
                own |= {"callback_on_step_end": course.at_step_end, "callback_on_step_end_tensor_inputs": []}
            taken = {name: value for name, value in own.items() if name in self._call}
            try:
                output = self._pipeline(**given, **taken)
            except WRONG as error:
                self._blame(error, course, params)
                raise
        frames = _frames(self._name, output)
        self._compare(params, frames, watch)
        if isinstance(output, dict) and any(output.get("nsfw_content_detected") or ()):
            watch.note(f"the safety checker of {self._name} has blackened the picture; another seed or prompt may pass")
        return frames, self._sound(output)

    def _blame(self, error: Exception, course: Course, params: SamplingParams) -> None:
        """Raise `BadRequest` where the arguments are at fault, as those of the pipeline's own may be at any time."""
        if self._platform.is_out_of_memory(error):
            return
        if self._own(params):
            told = f"{self._name} cannot run with them: {type(error).__name__}: {first_line(error)}"
            raise BadRequest(f"{told}", field="diffusers_kwargs") from error
        if isinstance(error, ValueError | TypeError) and not course.denoises:
            raise BadRequest(f"{self._name} refuses the request: {first_line(error)}") from error

    def _arguments(self, params: SamplingParams, watch: Watch) -> dict[str, Any]:
        values: dict[str, Any] = {name: getattr(params, name) for name in PASSED}
        values |= dict.fromkeys(RATES, params.fps) | {"prompt": params.prompt} | self._pictures(params)
        if "prompt" not in self._call:
            watch.note(f"prompt: it has no effect: the call of {self._name} takes none")
        own = self._own(params)
        left = (params.diffusers_kwargs or {}).keys() - own.keys()
        values = {name: value for name, value in values.items() if name not in left and value is not None}
        return {name: value for name, value in values.items() if name in self._call} | self._signature.further(
            own, watch
        )

    def _own(self, params: SamplingParams) -> dict[str, Any]:
        """`diffusers_kwargs` without the fields that are left to the call, which stand there as None."""
        given = params.diffusers_kwargs or {}
        return {name: value for name, value in given.items() if name not in self.info.left_open or value is not None}

    def _pictures(self, params: SamplingParams) -> dict[str, Any]:
        """`image` and `mask_image`: cut to the size where the output starts from the picture, else as they are."""
        if not params.image_path:
            return {}
        if self.info.pictures.starts_denoising and self._sized:
            source = inputs.read(params.image_path[0], params.mask_path, params.width, params.height)
            mask = None if source.mask is None else fromarray(source.mask)
            return {"image": fromarray(source.picture), "mask_image": mask}
        whole = [inputs.upright(path) for path in params.image_path]
        image: Image | list[Image] = whole[0] if len(whole) == 1 else whole
        mask = None if params.mask_path is None else inputs.read_mask(params.mask_path, whole[0].size)
        return {"image": image, "mask_image": mask}

    def _steps(self, params: SamplingParams) -> Callable[[], int]:
        """How many steps a call that has begun to denoise will run."""
        return lambda: getattr(self._pipeline, "_num_timesteps", None) or params.num_inference_steps

    @contextmanager
    def _watched(self, course: Course) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(course.before_denoiser) for module in self._denoisers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, params: SamplingParams, frames: Tensor, watch: Watch) -> None:
        """Tell of an output that is not as it was asked for; several pictures are a `ModelError`."""
        count, height, width = frames.shape[:3]
        if self.info.kind == "image" and count != 1:
            raise ModelError(f"{self._name} made {count} pictures; one is needed")
        if self._sized and (width, height) != (params.width, params.height):
            watch.note(f"size: {self._name} made {width}x{height}, not {params.width}x{params.height}")
        if count != params.num_frames:
            watch.note(f"num_frames: {self._name} made {count}, not {params.num_frames}")

    def _sound(self, output: Any) -> Sound | None:
        audio = output.get("audio") if isinstance(output, dict) else None
        if audio is None:
            return None
        rate = self._config(getattr(self._pipeline, "vocoder", None), "output_sampling_rate")
        if rate is None:
            raise ModelError(f"{self._name} made sound, but its vocoder does not say at what rate")
        samples = torch.as_tensor(audio[0]).float().cpu().clamp(-1, 1)  # [channels, samples]
        return Sound(samples, int(rate))


class Course:
    """Where a call is, as its denoiser and its callbacks tell: it encodes, denoises step by step, decodes.

    `steps` tells how many there will be once the first has begun; None: the pipeline tells of no steps.
    """

    def __init__(self, watch: Watch, steps: Callable[[], int] | None):
        self._watch, self._steps = watch, steps
        self._stage, self._step = ExitStack(), ExitStack()
        self._left = 0
        self.denoises = False

    def __enter__(self) -> Course:
        self._stage.enter_context(self._watch.stage("encode"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._step.close()
            self._stage.close()

    def before_denoiser(self, *_: object) -> None:
        """The denoiser is about to be called."""
        self._watch.raise_if_cancelled()
        if not self.denoises:
            self.denoises = True
            self._left = self._steps() if self._steps is not None else 1
            self._to("denoise", self._left)
            if self._steps is not None:
                self._step.enter_context(self._watch.step())

    def after_step(self, *_: object) -> None:
        """A step has ended."""
        self.before_denoiser()
        self._left -= 1
        self._step.close()
        if self._left > 0:
            self._step.enter_context(self._watch.step())
        elif self._left == 0:
            self._to("decode")

    def at_step_end(self, pipeline: object, step: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """The same, as newer pipelines tell it; nothing is changed."""
        self.after_step()
        return tensors

    def _to(self, stage: str, total: int = 1) -> None:
        self._step.close()
        self._stage.close()
        self._stage.enter_context(self._watch.stage(stage, total))


class Loader:
    """A folder's pipeline. Weights are read from safetensors alone; a model that lacks some of its own is refused."""

    def __init__(self, load: Load, platform: Platform, progress: Callable[[int, int], None]):
        self._folder, self._settings, self._replaced = load.folder, load.settings, load.component_folders
        self._platform, self._progress = platform, progress
        self._index = read_json(load.folder / "model_index.json")
        named = {n: v for n, v in self._index.items() if isinstance(v, list) and not n.startswith("_")}
        self._components = {n: (v[0], v[1]) for n, v in named.items() if len(v) == 2 and isinstance(v[0], str)}
        self._encoders = [name for name in self._components if name.startswith("text_encoder")]

    def pipeline(self) -> Any:
        """The pipeline on the CPU. Raises `BadRequest` and `ModelError` as `Pipeline` does."""
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self._check_code()
        check_precisions(self._settings, len(self._encoders))
        made: dict[str, Any] = {}
        for i, name in enumerate(self._components, 1):
            part = self._component(name)
            made |= {} if part is None else {name: part}
            self._progress(i, len(self._components))
        options = {"local_files_only": True, "use_safetensors": True, "dtype": self._dtype("")}
        trusted = self._settings.model.trust_remote_code
        with _as_model_error(self._folder):
            return diffusers.DiffusionPipeline.from_pretrained(
                self._folder, trust_remote_code=trusted, **made, **options
            )

    def _check_code(self) -> None:
        """Raise `BadRequest` for code of the repository that is not trusted, `ModelError` where it is not there."""
        name = self._index["_class_name"]
        files = [f"{n}/{library}.py" for n, (library, _) in self._components.items()]
        code = [f"{name[0]}.py"] * isinstance(name, list) + [f for f in files if (self._folder / f).is_file()]
        if code and not self._settings.model.trust_remote_code:
            reason = f"this model runs code of its own ({', '.join(code)}); read it, and set this if you trust it"
            raise BadRequest(f"{reason}", field="trust_remote_code")
        if code and not (file := self._folder / code[0]).is_file():
            raise ModelError(f"{file}: no such file, but model_index.json names it")

    def _dtype(self, name: str) -> torch.dtype:
        """The precision of a component: its own, else the one for all, else the platform's."""
        s = self._settings
        own = {"vae": s.dtypes.vae_precision} | dict.fromkeys(DENOISERS, s.dtypes.dit_precision)
        own |= dict(zip(self._encoders, s.dtypes.text_encoder_precisions or (), strict=False))
        named = own.get(name) or s.dtypes.precision
        return PRECISIONS[named] if named else self._platform.dtype

    def _component(self, name: str) -> Any:
        """A model of diffusers or transformers, or whatever replaces a component; None leaves it to the pipeline."""
        library, cls = self._components[name]
        folder = self._replaced.get(name, self._folder / name)
        if name in self._replaced and (file := folder / "config.json").is_file():
            cls = read_json(file).get("_class_name", cls)
        module = importlib.import_module(library) if library in ("diffusers", "transformers") else None
        kind: Any = getattr(module, cls, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return self._model(kind, folder, self._dtype(name))
        if name not in self._replaced:
            return None
        if kind is None:
            raise ModelError(f"component_paths.{name}: {folder} holds no {cls} of {library}", "component_paths")
        with _as_model_error(folder):
            return kind.from_pretrained(folder, local_files_only=True)

    def _model(self, kind: Any, folder: Path, dtype: torch.dtype) -> Any:
        if not any(folder.glob("*.safetensors")):
            reason = "has no .safetensors weights, and others (.bin, .pt, ...) are not read: they may run code"
            raise ModelError(f"{folder}: {reason}")
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        with _as_model_error(folder):
            made, told = kind.from_pretrained(folder, dtype=dtype, **options)
        if missing := sorted(told["missing_keys"]):
            raise ModelError(f"{folder}: lacks {len(missing)} weights of {kind.__name__}: {', '.join(missing[:5])}")
        return made


@contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """What the libraries raise about a folder's files, which changes with their versions."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


def _refuse(settings: Settings) -> None:
    """Raise `BadRequest` for a setting that nothing here would follow."""
    for name, reason in REFUSED.items():
        if (value := settings.get(name)) != default_of(settings_fields()[name]):
            raise BadRequest(f"{shorten(value)}: {reason}; leave it out", field=name)
    if settings.memory.parallel_decode:
        path = "vae_config.use_parallel_decode"
        raise BadRequest(f"true: {REFUSED['vae_sp']}; leave it out", field=path)
    if not settings.memory.vae_config.load_encoder:
        path = "vae_config.load_encoder"
        raise BadRequest("false: a diffusers pipeline keeps its whole VAE; leave it out", field=path)


def _place(pipeline: Any, settings: Settings, mesh: Mesh, platform: Platform) -> str | None:
    """Bring the pipeline to the device, or let its components come in turns; the setting that asks for these."""
    asked = [name for name in settings_fields() if name.endswith("_cpu_offload") and settings.get(name)]
    if not asked:
        pipeline.to(mesh.device)
        return None
    if platform.name != "cuda":
        reason = "a diffusers pipeline can only be offloaded from a GPU; this worker computes on a CPU"
        raise BadRequest(f"{reason}; leave it out", field=asked[0])
    try:
        pipeline.enable_model_cpu_offload(device=mesh.device)
    except ImportError as error:
        raise BadRequest(f"{first_line(error)}", field=asked[0]) from None
    return asked[0]


def _set_kernel(denoisers: Mapping[str, nn.Module], settings: Settings, platform: Platform) -> None:
    """The attention kernel that is asked for. Raises `BadRequest` where it cannot run, and tells which can."""
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
    chosen = any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules())
    if not chosen and name != "native":
        reason = f"{type(module).__name__} chooses its attention itself"
        raise BadRequest(f"{name!r} has no effect: {reason}; leave it out", field=param)
    try:
        module.set_attention_backend(name)
    except (RuntimeError, ValueError) as error:
        raise BadRequest(f"{name} cannot run here: {first_line(error)}", field=param) from None


def _set_vae(vae: Any, settings: Settings) -> None:
    """Tiles and slices, as the VAE has them. Raises `BadRequest` where it has not."""
    tiles = {n: v for n, v in attrs.asdict(settings.memory.vae_config).items() if n.startswith("tile_sample_") and v}
    if settings.memory.tiles():
        takes = inspect.signature(vae.enable_tiling).parameters if hasattr(vae, "enable_tiling") else {}
        for name in tiles:
            if name not in takes:
                path = f"vae_config.{name}"
                raise BadRequest(f"{type(vae).__name__} takes no such size; leave it out", field=path)
        _switch(vae, "vae_tiling", "enable_tiling", tiles)
    if settings.memory.vae_slicing:
        _switch(vae, "vae_slicing", "enable_slicing", {})


def _switch(vae: Any, param: str, method: str, options: Mapping[str, Any]) -> None:
    try:
        getattr(vae, method)(**options)
    except (AttributeError, NotImplementedError):
        told = "this pipeline has no VAE" if vae is None else f"{type(vae).__name__} has no such mode"
        raise BadRequest(f"{told}; leave it out", field=param) from None


def _frames(name: str, output: Any) -> Tensor:
    """A pipeline's output as frames u8 [N, H, W, 3]; its floats are in [0, 1].

    Raises:
        ModelError: it has no pictures, more than one output, or pictures that are not grey or RGB.
    """
    fields = output if isinstance(output, dict) else {}
    found = next((fields[key] for key in OUTPUTS if fields.get(key) is not None), None)
    if found is None:
        raise ModelError(f"{name} made no picture; its output has {', '.join(fields) or 'no name'}")
    frames = np.stack([np.asarray(each) for each in found])
    if frames.ndim == 5 and len(frames) == 1:  # a batch of clips
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[-1] not in (1, 3):
        shape = "x".join(map(str, frames.shape))
        raise ModelError(f"{name} made an array of {shape}; one picture or clip in grey or RGB is needed")
    if frames.dtype != np.uint8:
        frames = (frames.astype(np.float32) * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(frames).expand(-1, -1, -1, 3)
