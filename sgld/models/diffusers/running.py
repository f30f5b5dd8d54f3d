"""Running of diffusers pipelines: one call per output, with progress, cancellation, warnings and typed errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Generator, Tensor, nn

from sgld import inputs
from sgld.errors import BadRequest, ModelError, first_line
from sgld.messages import Load
from sgld.models.base import OpaquePipeline, Sound, Watch
from sgld.models.diffusers.call import FRAME_RATES, REQUEST_FIELDS, CallSignature
from sgld.models.diffusers.introspection import Introspection, config_value
from sgld.models.diffusers.loading import DENOISERS, check_settings, load_pipeline, place, set_kernel, set_vae_modes
from sgld.nn.lora import LoraLayers
from sgld.nn.parallel import Mesh
from sgld.params import OutputParams
from sgld.platform import Platform

CALL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
OUTPUTS = ("images", "frames", "video", "sample")  # fields of an output, the first that is there


class DiffusersPipeline(OpaquePipeline):
    """A pipeline of diffusers in one worker.

    Raises:
        BadRequest: a setting that it cannot run with.
        ModelError: a component that is missing or broken, or a call that makes no picture or clip.
    """

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        check_settings(load.settings)
        self._platform = platform
        self.pipeline = load_pipeline(load, platform, progress)
        self.call = CallSignature.of(type(self.pipeline))
        self.call.check()
        self.pipeline.set_progress_bar_config(disable=True)
        self._denoisers = {n: m for n in DENOISERS if isinstance(m := getattr(self.pipeline, n, None), nn.Module)}
        offload = place(self.pipeline, load.settings, mesh.device, platform)
        set_kernel(self._denoisers, load.settings, platform)
        set_vae_modes(getattr(self.pipeline, "vae", None), load.settings)
        self.lora = {} if offload else {n: LoraLayers(m, (), n) for n, m in self._denoisers.items() if n != "unet"}
        introspection = Introspection(self.pipeline, self.call, self._denoisers)
        self.info = introspection.describe(load.folder, tuple(self.lora), offload)

    def after_output(self) -> None:
        """Move offloaded components off the device; a stopped call leaves them there."""
        self.pipeline.maybe_free_model_hooks()

    @torch.no_grad()
    def make(self, params: OutputParams, context: Watch) -> tuple[Tensor, Sound | None]:
        """Make one output. A cancel is noticed at each call of the denoiser and at the end of each step.

        Raises:
            BadRequest: arguments that the call does not take, or that it rejects before it denoises.
            ModelError: an output that is no picture or clip.
        """
        arguments = self._arguments(params, context)
        torch.manual_seed(params.seed)  # for pipelines that draw noise without the generator
        generator = torch.Generator("cpu").manual_seed(params.seed)
        progress = CallProgress(context, self._denoisers, self._step_count(params))
        with progress.track():
            try:
                output = self.pipeline(**arguments, **self._engine_arguments(progress, generator))
            except CALL_ERRORS as error:
                self._raise_bad_request(error, progress, params)
                raise
        frames = _frames(self.call.name, output)
        self._compare(params, frames, context)
        if isinstance(output, dict) and any(output.get("nsfw_content_detected") or ()):
            reason = "has blackened the picture; another seed or prompt may pass"
            context.note(f"the safety checker of {self.call.name} {reason}")
        return frames, self._sound(output)

    def _step_count(self, params: OutputParams) -> Callable[[], int] | None:
        """Return a function that counts the steps of a call which denoises; None where no callback reports steps."""
        if not {"callback_on_step_end", "callback"} & self.call.arguments.keys():
            return None
        return lambda: getattr(self.pipeline, "_num_timesteps", None) or params.num_inference_steps

    def _engine_arguments(self, progress: CallProgress, generator: Generator) -> dict[str, Any]:
        """Return the arguments that sgld fills itself, as far as the call has them. Each step is reported once."""
        own: dict[str, Any] = {"generator": generator, "output_type": "np", "return_dict": True}
        if "callback_on_step_end" in self.call.arguments:
            own |= {"callback_on_step_end": progress.on_step_end, "callback_on_step_end_tensor_inputs": []}
        else:
            own["callback"] = progress.after_step
        return {name: value for name, value in own.items() if name in self.call.arguments}

    def _raise_bad_request(self, error: Exception, progress: CallProgress, params: OutputParams) -> None:
        """Raise `BadRequest` where the arguments are at fault. `diffusers_kwargs` may be at any time."""
        if self._platform.is_out_of_memory(error):
            return
        if self._extra(params):
            reason = f"{self.call.name} cannot run with them: {type(error).__name__}: {first_line(error)}"
            raise BadRequest(reason, field="diffusers_kwargs") from error
        if isinstance(error, ValueError | TypeError) and not progress.denoises:
            raise BadRequest(f"{self.call.name} refuses the request: {first_line(error)}") from error

    def _arguments(self, params: OutputParams, context: Watch) -> dict[str, Any]:
        """Return the arguments that the request fills, `diffusers_kwargs` included."""
        values: dict[str, Any] = {name: getattr(params, name) for name in REQUEST_FIELDS}
        values |= dict.fromkeys(FRAME_RATES, params.fps) | {"prompt": params.prompt} | self._pictures(params)
        taken = self.call.arguments
        if "prompt" not in taken:
            context.note(f"prompt: it has no effect: the call of {self.call.name} takes none")
        extra = self._extra(params)
        left_open = (params.diffusers_kwargs or {}).keys() - extra.keys()
        values = {n: v for n, v in values.items() if n in taken and n not in left_open and v is not None}
        return values | self.call.extra_arguments(extra, context)

    def _extra(self, params: OutputParams) -> dict[str, Any]:
        """Return `diffusers_kwargs` without the fields that are left to the call: they are None there."""
        given = params.diffusers_kwargs or {}
        return {name: value for name, value in given.items() if name not in self.info.left_open or value is not None}

    def _pictures(self, params: OutputParams) -> dict[str, Any]:
        """Read `image` and `mask_image`, cut to the output's size where the output starts from the picture."""
        if not params.image_path:
            return {}
        if self.info.pictures.starts_denoising and self.info.pictures.sets_size:
            source = inputs.read(params.image_path[0], params.mask_path, params.width, params.height)
            mask = None if source.mask is None else fromarray(source.mask)
            return {"image": fromarray(source.picture), "mask_image": mask}
        whole = [inputs.upright(path) for path in params.image_path]
        image: Image | list[Image] = whole[0] if len(whole) == 1 else whole
        mask = None if params.mask_path is None else inputs.read_mask(params.mask_path, whole[0].size)
        return {"image": image, "mask_image": mask}

    def _compare(self, params: OutputParams, frames: Tensor, context: Watch) -> None:
        """Warn of an output that differs from the request. Raise `ModelError` for several pictures."""
        count, height, width = frames.shape[:3]
        name = self.call.name
        if self.info.kind == "image" and count != 1:
            raise ModelError(f"{name} made {count} pictures; one is needed")
        if self.info.pictures.sets_size and (width, height) != (params.width, params.height):
            context.note(f"size: {name} made {width}x{height}, not {params.width}x{params.height}")
        if count != params.num_frames:
            context.note(f"num_frames: {name} made {count}, not {params.num_frames}")

    def _sound(self, output: Any) -> Sound | None:
        audio = output.get("audio") if isinstance(output, dict) else None
        if audio is None:
            return None
        rate = config_value(getattr(self.pipeline, "vocoder", None), "output_sampling_rate")
        if rate is None:
            raise ModelError(f"{self.call.name} made sound, but its vocoder does not say at what rate")
        samples = torch.as_tensor(audio[0]).float().cpu().clamp(-1, 1)  # [channels, samples]
        return Sound(samples, int(rate))


class CallProgress:
    """The stages of one call: encode, denoise step by step, decode.

    `count_steps` is called once the call denoises. None: the pipeline reports no steps.
    """

    def __init__(self, context: Watch, denoisers: Mapping[str, nn.Module], count_steps: Callable[[], int] | None):
        self._context, self._denoisers, self._count_steps = context, denoisers, count_steps
        self._stage, self._step = ExitStack(), ExitStack()
        self._remaining = 0
        self.denoises = False

    @contextmanager
    def track(self) -> Iterator[None]:
        """Follow the denoisers by forward hooks. A call that fails ends no stage."""
        hooks = [module.register_forward_pre_hook(self.before_denoiser) for module in self._denoisers.values()]
        self._stage.enter_context(self._context.stage("encode"))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._step.close()
        self._stage.close()

    def before_denoiser(self, *_: object) -> None:
        """Stop a cancelled call, and begin the denoise stage at the first call of a denoiser."""
        self._context.raise_if_cancelled()
        if self.denoises:
            return
        self.denoises = True
        self._remaining = self._count_steps() if self._count_steps is not None else 1
        self._enter("denoise", self._remaining)
        if self._count_steps is not None:
            self._step.enter_context(self._context.step())

    def after_step(self, *_: object) -> None:
        """End a step, and begin the next one or the decode."""
        self.before_denoiser()
        self._remaining -= 1
        self._step.close()
        if self._remaining > 0:
            self._step.enter_context(self._context.step())
        elif self._remaining == 0:
            self._enter("decode")

    def on_step_end(self, pipeline: object, step: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """End a step of a pipeline with `callback_on_step_end`. Return its tensors unchanged."""
        self.after_step()
        return tensors

    def _enter(self, stage: str, total: int = 1) -> None:
        self._step.close()
        self._stage.close()
        self._stage.enter_context(self._context.stage(stage, total))


def _frames(name: str, output: Any) -> Tensor:
    """Convert a pipeline's output, floats in [0, 1], to frames u8 [N, H, W, 3].

    Raises:
        ModelError: the output has no pictures, several clips, or pictures that are neither grey nor RGB.
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
