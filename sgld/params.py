"""SamplingParams: every knob of one request. Flags, config keys and request fields share these names."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from sgld.convert import MAX_CHARACTERS, default_of, fields_of, knob, refuse_unbuilt, structure
from sgld.errors import BadRequest, NotBuilt, TooLarge

PROMPT, SIZE, SAMPLING, OUTPUT = "prompt", "size", "sampling", "output"
POST, SPEED, DEBUG = "post-processing", "speed-ups", "debugging"

VIDEO_FORMATS = ("mp4", "webm", "gif")
IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp")
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = MAX_CHARACTERS
MAX_SIDE = 16384
STRENGTH = 0.8
LORA_TARGETS = ("all", "transformer", "transformer_2")
PRIORITIES = ("low", "normal", "high")  # of a job, rising
MAX_LORAS, MAX_LORA_STRENGTH = 16, 100


@attrs.frozen
class LoraUse:
    """A LoRA adapter, by a name that was given before, or by where it lies."""

    nickname: str | None = knob(None, "name of an adapter that was loaded before, or a name for the one at `path`")
    path: str | None = knob(None, "file, folder, Hugging Face id, or id:file")
    strength: float = knob(
        1.0, "weight of what it adds; 0 is without it", min=-MAX_LORA_STRENGTH, max=MAX_LORA_STRENGTH
    )
    target: str = knob("all", "part of the model that it changes", choices=LORA_TARGETS)
    alpha: float | None = knob(None, "for layers that bring no alpha of their own", above=0)
    strict: bool = knob(True, "refuse an adapter of which some keys do not fit; false leaves those out")

    def __attrs_post_init__(self) -> None:
        if not (self.nickname or self.path):
            raise BadRequest("nickname: it names no adapter; give a nickname or a path", "nickname")


@attrs.frozen
class SamplingParams:
    """What to make. A knob marked `per_model` takes the model's own value when absent."""

    prompt: str = knob("", "what the picture or video shows", group=PROMPT)
    negative_prompt: str | None = knob(None, "what it must not show", group=PROMPT, per_model=True)
    max_sequence_length: int = knob(
        512, "prompt tokens; a longer prompt is cut, with a warning", group=PROMPT, per_model=True, min=1, max=4096
    )
    image_path: list[str] | None = knob(
        None, "pictures to start from, upright and cut to the size", group=PROMPT, aliases=("image_paths",)
    )
    mask_path: str | None = knob(
        None, "where the picture changes: transparent, or white without any transparency", group=PROMPT
    )
    strength: float | None = knob(
        None,
        "how far from the picture: the share of the steps that is run",
        group=PROMPT,
        min=0.001,
        max=1,
        shown_default=f"{STRENGTH} with a picture",
    )
    enhance_prompt: bool = knob(
        False, "let a language model write the prompt out", group=PROMPT, pending="prompt enhancement"
    )
    video_path: list[str] | None = knob(None, "input videos", group=PROMPT, pending="video input")
    condition_inputs: dict[str, Any] | None = knob(
        None, "further inputs of a model", group=PROMPT, pending="conditioning beside the prompt"
    )
    task_type: str | None = knob(None, "task of a model that has several", group=PROMPT, pending="choosing a task")

    height: int = knob(480, "pixels", group=SIZE, per_model=True, min=1, max=MAX_SIDE)
    width: int = knob(832, "pixels", group=SIZE, per_model=True, min=1, max=MAX_SIDE)
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
    guidance_scale: float = knob(
        1.0, "classifier-free guidance; 1 turns it off", group=SAMPLING, per_model=True, min=0, max=1000
    )
    guidance_scale_2: float | None = knob(
        None, "guidance of the second expert", group=SAMPLING, per_model=True, min=0, max=1000
    )
    true_cfg_scale: float | None = knob(
        None,
        "classifier-free guidance where guidance_scale is the model's input",
        group=SAMPLING,
        min=0,
        max=1000,
        per_model=True,
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
        0.0,
        "bound the guided prediction's norm to that many times the unguided one's; 0: no bound",
        group=SAMPLING,
        min=0,
        max=1000,
        per_model=True,
    )
    cfg_gate_step: int | None = knob(None, "last step with guidance", group=SAMPLING, min=0, pending="gated guidance")
    boundary_ratio: float | None = knob(
        None, "share of the schedule of the first expert's hand-over", group=SAMPLING, per_model=True, min=0, max=1
    )
    flow_shift: float | None = knob(
        None, "time shift of the flow schedule", group=SAMPLING, per_model=True, above=0, max=1000
    )
    generator_device: str = knob(
        "cpu",
        "where noise is drawn; cpu gives the same picture everywhere",
        group=SAMPLING,
        choices=("cpu", "cuda", "musa"),
        pending="drawing noise elsewhere",
        built=("cpu",),
    )
    loras: list[LoraUse] = knob([], "LoRA adapters for this output, in place of those that are set", group=SAMPLING)
    diffusers_kwargs: dict[str, Any] | None = knob(
        None, "further arguments of a diffusers pipeline's call", group=SAMPLING
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
    skip_softmax_params: dict[str, Any] | None = knob(
        None, "parameters of attention that skips small scores", group=SPEED, pending="skip-softmax attention"
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

    @property
    def first_step(self) -> int:
        """The step of the schedule to begin with: 0 without a picture, later the lower the strength."""
        if not self.image_path or self.strength is None:
            return 0
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)

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
class Memory:
    """What one output takes beside the weights that stay, estimated linearly, and what there is; all in bytes.

    Text encoder, denoiser and decoder run one after the other, so the largest of them counts.
    """

    free: int  # for the workers, measured once the model was loaded
    base: int = 0  # whatever is asked for
    text_weights: int = 0  # that come only while they are needed, as do the next two
    denoiser_weights: int = 0
    decoder_weights: int = 0
    text_pair: int = 0  # of the text encoder, for each pair of prompt tokens
    token: int = 0  # of the denoiser, for `size_multiple`^2 pixels of `frame_multiple` frames
    paired_tokens: int = 0  # up to so many tokens, guidance doubles them
    picture: int = 0  # of the denoiser, for each picture that it looks at
    picture_pixels: int = 0  # of such a picture at most, which are encoded for what they would be decoded for
    pixel: int = 0  # of the frames, for each pixel of each
    chunk_pixel: int = 0  # of the decoder, for each pixel of the frames that it decodes at once
    chunk_pixels: int = 0  # as many it decodes at once, unless one latent frame has more
    tile_pixels: int | None = None  # of a frame, when tiles are decoded one by one


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
    tasks: tuple[str, ...] = ()  # such as text-to-video and, from a video model that makes single frames, text-to-image
    max_tokens: int | None = None  # of a prompt, at most; None: as many as max_sequence_length takes
    memory: Memory | None = None
    max_pictures: int = 0  # of `image_path`
    min_pictures: int = 0
    starts_from_picture: bool = True  # denoising begins in the middle, at the picture; else the model looks at it
    takes_picture_size: bool = True  # a request without a size takes the picture's shape
    enlarges_picture: bool = True  # to the area of the size that stands; else that is only the most
    shape_from: int = 0  # which of several pictures gives the shape
    picture_multiple: int | None = None  # the sides are the nearest multiples of it; None: cut to `size_multiple`
    unguided: float = 1.0  # guidance_scale, or true_cfg_scale where it is given, up to which there is no guidance
    fixed_steps: int | None = None  # num_inference_steps, where no other number works
    audio: bool = False  # its videos have sound
    lora_targets: tuple[str, ...] = ()  # components that take LoRA adapters
    degrees: dict[str, int] = attrs.field(factory=dict)  # how many workers share what, such as ulysses
    attention: dict[str, str] = attrs.field(factory=dict)  # kernels by use, such as transformer.self
    left_open: tuple[str, ...] = ()  # fields whose value the pipeline's own code settles, unless somebody gives one
    backend: str = "sglang"  # what makes it: native code ("sglang"), or a pipeline of "diffusers"

    def memory_needs(self, params: SamplingParams) -> dict[str, int]:
        """Bytes that one output takes at its peak, by the field to lower when they are too many."""
        if (m := self.memory) is None:
            return {}
        area = params.height * params.width
        tokens = area // self.size_multiple**2 * ((params.num_frames - 1) // self.frame_multiple + 1)
        denoise = m.denoiser_weights + m.token * max(tokens, min(2 * tokens, m.paired_tokens))
        denoise += m.picture * len(params.image_path or ())
        tile = min(area, m.tile_pixels or area)
        chunk = min(params.num_frames * tile, max(m.chunk_pixels, self.frame_multiple * tile))
        decode = m.decoder_weights + m.pixel * params.num_frames * area + m.chunk_pixel * chunk
        if params.image_path:
            decode = max(decode, m.decoder_weights + m.chunk_pixel * m.picture_pixels)
        longest = max(len((text or "").encode()) for text in (params.prompt, params.negative_prompt))
        return {
            "num_frames" if params.num_frames > 1 else "height": m.base + max(denoise, decode),
            "max_sequence_length": m.base
            + m.text_weights
            + m.text_pair * min(params.max_sequence_length, longest + 1) ** 2,
        }


def check_loras(loras: Sequence[LoraUse], info: ModelInfo, param: str, target: str = "target") -> None:
    """Raise `NotBuilt` or `BadRequest` for adapters that this model cannot take, before any of them is sought."""
    if loras and not info.lora_targets:
        reason = f": {told}" if (told := info.unsupported.get("loras")) else ""
        raise NotBuilt(f"{param}: this model takes no LoRA adapters{reason}", param)
    if len(loras) > MAX_LORAS:
        raise BadRequest(f"{param}: {len(loras)} adapters are too many; at most {MAX_LORAS} are allowed", param)
    for lora in loras:
        check_lora_target(lora.target, info, target)


def check_lora_target(target: str, info: ModelInfo, param: str = "target") -> None:
    """Raise `BadRequest` for a part that this model has not."""
    allowed = ("all", *info.lora_targets)
    if target not in allowed:
        raise BadRequest(f"{param}: {target!r}: this model has only {', '.join(allowed)}", param)


def resolve(
    given: Mapping[str, Any],
    info: ModelInfo,
    *,
    base: Mapping[str, Any] | None = None,
    picture: tuple[int, int] | None = None,
) -> tuple[SamplingParams, list[str]]:
    """The request's own values over the operator's (`base`) over the model's, structured once and fitted to the model.

    `picture` is the first picture's width and height: without a size of its own a request takes its shape. The second
    value are warnings for the user.

    Raises:
        BadRequest: a wrong type, range or size, or values that contradict each other.
        NotBuilt: a field this model, or this version, has no use for.
        TooLarge: more memory than there is.
    """
    own = {name: value for name, value in given.items() if value is not None}
    asked = {**(base or {}), **own}
    for name, reason in info.unsupported.items():
        if name in asked and asked[name] != default_of(fields_of(SamplingParams)[name]):
            raise NotBuilt(f"{name}: this model cannot use it: {reason}", name)
    params = structure({**info.defaults, **asked}, SamplingParams)
    refuse_unbuilt(params)
    params.seeds()
    check_loras(params.loras, info, "loras", "loras.target")
    _check_steps(params, info)
    if not info.starts_from_picture and info.backend == "sglang":  # a pipeline's call tells which of them it lacks
        _refuse_start(asked)
    params = _with_picture(params, own, info)
    notes: list[str] = []
    if picture is not None and info.takes_picture_size and not {"height", "width"} & own.keys():
        params, notes = _shaped(params, picture, info)
        asked |= {"height": params.height, "width": params.width}
    params = _left_open(params, asked, info)
    _check_size(params, info)
    _check_tokens(params, info)
    params, more = _fit_frames(params, info)
    _check_memory(params, info)
    return params, notes + more


def _left_open(params: SamplingParams, asked: Mapping[str, Any], info: ModelInfo) -> SamplingParams:
    """What nobody settled is None among the arguments of the pipeline's call, which then settles it itself."""
    if not (left := [name for name in info.left_open if name not in asked]):
        return params
    return attrs.evolve(params, diffusers_kwargs=dict.fromkeys(left) | (params.diffusers_kwargs or {}))


def check_picture(given: Mapping[str, Any]) -> None:
    """Raise `BadRequest` for what has no effect without a picture to start from."""
    for name in ("strength", "mask_path"):
        if given.get(name) is not None and not given.get("image_path"):
            raise BadRequest(f"{name}: it needs a picture to start from", name)


def _refuse_start(asked: Mapping[str, Any]) -> None:
    """Raise `NotBuilt` for what only a model that starts from its picture can use."""
    for name in ("strength", "mask_path"):
        if name in asked:
            reason = "it looks at pictures and begins with noise, not with one of them"
            raise NotBuilt(f"{name}: this model cannot use it: {reason}", name)


def _with_picture(params: SamplingParams, own: Mapping[str, Any], info: ModelInfo) -> SamplingParams:
    """Its strength, where it is the start; none elsewhere. Raises for pictures that this model does not take."""
    count, least, most = len(params.image_path or ()), info.min_pictures, info.max_pictures
    if not least <= count <= most:
        takes = f"takes {least} to {most}" if 0 < least < most else f"takes {most}"
        takes = takes if most else "makes pictures from text alone and takes none"
        raise BadRequest(f"image_path: {count or 'none'} given; this model {takes}", "image_path")
    check_picture(own)
    if not count or not info.starts_from_picture:
        return attrs.evolve(params, strength=None, mask_path=params.mask_path if count else None)
    params = attrs.evolve(params, strength=STRENGTH if params.strength is None else params.strength)
    steps = params.num_inference_steps
    if params.first_step == steps:
        raise BadRequest(
            f"strength: {params.strength} of {steps} steps is less than one step; give {_least(steps)} or more",
            "strength",
        )
    return params


def _least(steps: int) -> float:
    """The lowest strength, to three places, that runs a step."""
    return -(-1000 // steps) / 1000


def _shaped(params: SamplingParams, picture: tuple[int, int], info: ModelInfo) -> tuple[SamplingParams, list[str]]:
    """The picture's shape, in an area not above that of the size that stands, or near it."""
    area, multiple = params.width * params.height, info.picture_multiple
    area = area if info.enlarges_picture else min(area, math.prod(picture))
    width, height = near(area, picture, multiple) if multiple else _within(area, picture, info.size_multiple)
    if (width, height) == (params.width, params.height):
        return params, []
    shown = "x".join(map(str, picture))
    note = f"size: {params.width}x{params.height} becomes {width}x{height}, after the picture's {shown} pixels"
    return attrs.evolve(params, width=width, height=height), [note]


def near(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height of the picture's shape in about that area, each the nearest multiple."""
    ratio, longest = picture[0] / picture[1], MAX_SIDE // multiple
    width = math.sqrt(area * ratio)
    width, height = (min(longest, max(1, round(side / multiple))) * multiple for side in (width, width / ratio))
    return width, height


def _within(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height of the picture's shape in at most that area, cut to multiples, at least one of each."""
    sides = (math.isqrt(area * a // b) for a, b in (picture, picture[::-1]))
    width, height = (max(1, side // multiple) * multiple for side in sides)
    longest = max(multiple, min(MAX_SIDE, area // min(width, height)) // multiple * multiple)
    return min(width, longest), min(height, longest)


def _check_steps(params: SamplingParams, info: ModelInfo) -> None:
    if info.fixed_steps not in (None, params.num_inference_steps):
        raise BadRequest(
            f"num_inference_steps: {params.num_inference_steps}: this model takes {info.fixed_steps} steps and no "
            "other number",
            "num_inference_steps",
        )


def _check_tokens(params: SamplingParams, info: ModelInfo) -> None:
    if info.max_tokens is not None and params.max_sequence_length > info.max_tokens:
        raise BadRequest(
            f"max_sequence_length: {params.max_sequence_length} is more than this model takes; "
            f"allowed is 1 to {info.max_tokens}",
            "max_sequence_length",
        )


def _check_memory(params: SamplingParams, info: ModelInfo) -> None:
    for name, needed in info.memory_needs(params).items():
        if info.memory is not None and needed > info.memory.free:
            raise TooLarge(
                f"{name}: {getattr(params, name)}: {params.num_frames} frames of {params.width}x{params.height} with "
                f"max_sequence_length {params.max_sequence_length} need about {needed / 2**30:.1f} GiB of memory; "
                f"there are {info.memory.free / 2**30:.1f} GiB; ask for less",
                name,
            )


def _check_size(params: SamplingParams, info: ModelInfo) -> None:
    multiple = info.size_multiple
    if params.height % multiple or params.width % multiple:
        name = "height" if params.height % multiple else "width"
        longest = MAX_SIDE // multiple * multiple
        width, height = (
            min(longest, max(multiple, _nearest(side, multiple))) for side in (params.width, params.height)
        )
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
    if info.kind == "image" and asked != 1:
        raise BadRequest(f"num_frames: {asked}: this model makes single pictures; allowed is 1", "num_frames")
    fitted = 1 + ((asked - 1) // multiple * multiple if params.num_frames_round_down else _nearest(asked - 1, multiple))
    if fitted == asked:
        return params, []
    rule = f"this model makes {multiple}k+1 frames"
    if not params.adjust_frames:
        raise BadRequest(f"num_frames: {asked} cannot be made: {rule}; the nearest is {fitted}", "num_frames")
    return attrs.evolve(params, num_frames=fitted), [f"num_frames: {asked} becomes {fitted}: {rule}"]
