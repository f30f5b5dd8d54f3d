"""SamplingParams: every knob of one request. Flags, config keys and request fields share these names."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import attrs

from sgld.convert import knob, refuse_unbuilt, structure
from sgld.errors import BadRequest, NotBuilt

PROMPT, SIZE, SAMPLING, OUTPUT = "prompt", "size", "sampling", "output"
POST, SPEED, DEBUG = "post-processing", "speed-ups", "debugging"

VIDEO_FORMATS = ("mp4", "webm", "gif")
IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp")
MAX_SEED = 2**63 - 1


@attrs.frozen
class SamplingParams:
    """What to make. A knob marked `per_model` takes the model's own value when absent."""

    prompt: str = knob("", "what the picture or video shows", group=PROMPT)
    negative_prompt: str | None = knob(None, "what it must not show", group=PROMPT, per_model=True)
    max_sequence_length: int = knob(
        512, "prompt tokens; a longer prompt is cut, with a warning", group=PROMPT, per_model=True, min=1, max=4096
    )
    image_path: list[str] | None = knob(
        None, "input pictures", group=PROMPT, aliases=("image_paths",), pending="image input"
    )
    video_path: list[str] | None = knob(None, "input videos", group=PROMPT, pending="video input")
    condition_inputs: dict[str, Any] | None = knob(
        None, "further inputs of a model", group=PROMPT, pending="conditioning beside the prompt"
    )
    task_type: str | None = knob(None, "task of a model that has several", group=PROMPT, pending="choosing a task")

    height: int = knob(480, "pixels", group=SIZE, per_model=True, min=1, max=16384)
    width: int = knob(832, "pixels", group=SIZE, per_model=True, min=1, max=16384)
    num_frames: int = knob(1, "frames; 1 makes an image", group=SIZE, per_model=True, min=1, max=10000)
    fps: int = knob(24, "frames per second of the file", group=SIZE, per_model=True, min=1, max=240)
    adjust_frames: bool = knob(
        True, "fit num_frames to the model and the number of workers, with a warning", group=SIZE
    )
    num_frames_round_down: bool = knob(False, "round num_frames down, not to the nearest", group=SIZE)
    supported_resolutions: list[str] | None = knob(
        None, "sizes to choose from, in place of the model's own", group=SIZE, pending="a list of sizes"
    )

    seed: int | list[int] | None = knob(
        None,
        "noise seed, or one for each output; output i of one seed uses seed+i",
        group=SAMPLING,
        min=0,
        max=MAX_SEED,
        shown_default="random, and printed",
    )
    num_outputs_per_prompt: int = knob(
        1, "outputs for each prompt", group=SAMPLING, aliases=("num_outputs", "n"), min=1, max=10
    )
    num_inference_steps: int = knob(50, "denoising steps", group=SAMPLING, per_model=True, min=1, max=1000)
    guidance_scale: float = knob(1.0, "classifier-free guidance; 1 turns it off", group=SAMPLING, per_model=True, min=0)
    guidance_scale_2: float | None = knob(None, "guidance of the second expert", group=SAMPLING, per_model=True, min=0)
    true_cfg_scale: float | None = knob(
        None, "real guidance of a guidance-distilled model", group=SAMPLING, min=0, pending="guidance-distilled models"
    )
    guidance_rescale: float = knob(
        0.0,
        "rescale the guided prediction's deviation, 0 to 1",
        group=SAMPLING,
        min=0,
        max=1,
        pending="guidance rescale",
    )
    cfg_normalization: float = knob(
        0.0, "bound the guided prediction's norm", group=SAMPLING, min=0, pending="guidance normalization"
    )
    cfg_gate_step: int | None = knob(None, "last step with guidance", group=SAMPLING, min=0, pending="gated guidance")
    boundary_ratio: float | None = knob(
        None, "share of the schedule of the first expert's hand-over", group=SAMPLING, per_model=True, min=0, max=1
    )
    flow_shift: float | None = knob(None, "time shift of the flow schedule", group=SAMPLING, per_model=True, above=0)
    generator_device: str = knob(
        "cpu",
        "where noise is drawn; cpu gives the same picture everywhere",
        group=SAMPLING,
        choices=("cpu", "cuda", "musa"),
        pending="drawing noise elsewhere",
        built=("cpu",),
    )
    diffusers_kwargs: dict[str, Any] | None = knob(
        None, "extra arguments of a diffusers pipeline", group=SAMPLING, pending="the diffusers backend"
    )

    quality: str = knob(
        "lossless",
        "permission for lossy speed-ups (not the file's quality)",
        group=SPEED,
        choices=("exact", "lossless", "high", "extra-high"),
    )
    enable_teacache: bool = knob(False, "TeaCache step caching", group=SPEED, pending="step caching")
    enable_spectrum: bool = knob(False, "Spectrum step caching", group=SPEED, pending="step caching")
    enable_cache_dit: bool = knob(
        False, "Cache-DiT step caching", group=SPEED, env="SGLANG_CACHE_DIT_ENABLED", pending="step caching"
    )
    cache_dit_params: dict[str, Any] | None = knob(None, "Cache-DiT parameters", group=SPEED, pending="step caching")
    progressive_mode: str = knob(
        "fullres",
        "resolution over the steps",
        group=SPEED,
        choices=("fullres", "dct", "dct_rewind"),
        pending="progressive resolution",
    )
    progressive_levels: int = knob(
        1, "levels of progressive resolution", group=SPEED, min=1, pending="progressive resolution"
    )
    progressive_delta: float = knob(
        0.01, "threshold of progressive resolution", group=SPEED, min=0, pending="progressive resolution"
    )
    attention_backend_override: str | None = knob(
        None,
        "attention kernel for this request",
        group=SPEED,
        choices=("fa", "torch_sdpa", "sage_attn", "sage_attn_3"),
        pending="choosing an attention kernel per request",
    )
    enable_sequence_shard: bool | None = knob(
        None, "shard the sequence over the workers", group=SPEED, pending="switching sharding per request"
    )

    enable_frame_interpolation: bool = knob(False, "insert frames with RIFE", group=POST, pending="frame interpolation")
    frame_interpolation_exp: int = knob(
        1, "rounds; (N-1) x 2^exp + 1 frames", group=POST, min=1, max=4, pending="frame interpolation"
    )
    frame_interpolation_scale: float = knob(
        1.0, "RIFE's working scale", group=POST, min=0.25, max=4, pending="frame interpolation"
    )
    frame_interpolation_model_path: str | None = knob(None, "RIFE weights", group=POST, pending="frame interpolation")
    enable_upscaling: bool = knob(False, "upscale with Real-ESRGAN", group=POST, pending="upscaling")
    upscaling_scale: int = knob(4, "upscaling factor", group=POST, min=1, max=8, pending="upscaling")
    upscaling_model_path: str | None = knob(None, "Real-ESRGAN weights", group=POST, pending="upscaling")

    output_quality: str = knob(
        "default",
        "file quality: 100, 90, 55, 35; default is 50 for video, 75 for images",
        group=OUTPUT,
        choices=("maximum", "high", "medium", "low", "default"),
    )
    output_compression: int | None = knob(
        None, "file quality 0 to 100; beats output_quality", group=OUTPUT, min=0, max=100
    )
    x264_preset: str | None = knob(
        None,
        "encoder effort of mp4 files",
        group=OUTPUT,
        shown_default="fast",
        choices=(
            "ultrafast",
            "superfast",
            "veryfast",
            "faster",
            "fast",
            "medium",
            "slow",
            "slower",
            "veryslow",
            "placebo",
        ),
    )

    profile: bool = knob(False, "write a torch trace", group=DEBUG, pending="profiling")
    num_profiled_timesteps: int = knob(5, "steps in the trace", group=DEBUG, min=1, pending="profiling")
    profile_all_stages: bool = knob(False, "trace every stage", group=DEBUG, pending="profiling")

    def seeds(self) -> list[int]:
        """One seed for each output: given, counted up from the given one, or drawn now."""
        if isinstance(self.seed, list):
            if len(self.seed) != self.num_outputs_per_prompt:
                raise BadRequest(
                    f"seed: {len(self.seed)} seeds for {self.num_outputs_per_prompt} outputs per prompt; "
                    "give one, or one for each",
                    "seed",
                )
            return self.seed
        first = random.SystemRandom().randrange(2**32) if self.seed is None else self.seed
        return [first + i for i in range(self.num_outputs_per_prompt)]

    def outputs(self) -> list[SamplingParams]:
        """One set of parameters for each output, each with a single seed."""
        return [attrs.evolve(self, seed=seed, num_outputs_per_prompt=1) for seed in self.seeds()]


@attrs.frozen
class ModelInfo:
    """What a model says of itself; rank 0 sends it once, as the answer to `Load`."""

    name: str  # pipeline class, such as WanPipeline
    kind: str  # "video" or "image": what it makes by default
    defaults: dict[str, Any]  # its own values of SamplingParams
    size_multiple: int  # height and width are multiples of this
    frame_multiple: int  # num_frames is 1 more than a multiple of this
    components: tuple[str, ...]  # keys of model_index.json
    unsupported: dict[str, str] = attrs.field(factory=dict)  # sampling field -> why this model has no use for it


def resolve(given: Mapping[str, Any], info: ModelInfo) -> tuple[SamplingParams, list[str]]:
    """The request's own values over the model's, structured once and fitted to it; and warnings for the user.

    Raises:
        BadRequest: a wrong type, range or size.
        NotBuilt: a field this model, or this version, has no use for.
    """
    own = {name: value for name, value in given.items() if value is not None}
    for name, reason in info.unsupported.items():
        if name in own:
            raise NotBuilt(f"{name}: this model cannot use it: {reason}", name)
    params = structure({**info.defaults, **own}, SamplingParams)
    refuse_unbuilt(params)
    params.seeds()
    _check_size(params, info)
    return _fit_frames(params, info)


def _check_size(params: SamplingParams, info: ModelInfo) -> None:
    multiple = info.size_multiple
    if params.height % multiple or params.width % multiple:
        name = "height" if params.height % multiple else "width"
        width, height = (max(multiple, _nearest(side, multiple)) for side in (params.width, params.height))
        raise BadRequest(
            f"{name}: {getattr(params, name)} is not a multiple of {multiple}; the nearest valid size is "
            f"{width}x{height} (width x height)",
            name,
        )


def _nearest(value: int, multiple: int) -> int:
    """The nearest multiple, upwards from the middle."""
    return (value + multiple // 2) // multiple * multiple


def _fit_frames(params: SamplingParams, info: ModelInfo) -> tuple[SamplingParams, list[str]]:
    multiple, asked = info.frame_multiple, params.num_frames
    fitted = 1 + ((asked - 1) // multiple * multiple if params.num_frames_round_down else _nearest(asked - 1, multiple))
    if fitted == asked:
        return params, []
    rule = f"this model makes {multiple}k+1 frames"
    if not params.adjust_frames:
        raise BadRequest(f"num_frames: {asked} cannot be made: {rule}; the nearest is {fitted}", "num_frames")
    return attrs.evolve(params, num_frames=fitted), [f"num_frames: {asked} becomes {fitted}: {rule}"]
