"""Parameters of a request, of one output and of a model. Flags, config keys and request fields share their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from sgld.convert import MAX_CHARACTERS, fields_of, knob
from sgld.errors import BadRequest, NotBuilt

PROMPT, SIZE, SAMPLING, OUTPUT = "prompt", "size", "sampling", "output"
POST, SPEED, DEBUG = "post-processing", "speed-ups", "debugging"

VIDEO_FORMATS = ("mp4", "webm", "gif")
IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp")
X264_PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo",
)  # fmt: skip
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = MAX_CHARACTERS
MAX_SIDE = 16384
STRENGTH = 0.8
LORA_TARGETS = ("all", "transformer", "transformer_2")
PRIORITIES = ("low", "normal", "high")  # of a job, rising
MAX_LORAS, MAX_LORA_STRENGTH = 16, 100


@attrs.frozen
class LoraUse:
    """A LoRA adapter, by its registered nickname or by its path."""

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
            raise BadRequest("it names no adapter; give a nickname or a path", field="nickname")


@attrs.frozen
class SamplingParams:
    """Every knob of a request. A knob marked `per_model` takes the model's own value when absent."""

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
        choices=X264_PRESETS,
    )

    profile: bool = knob(False, "write a torch trace", group=DEBUG, pending="profiling")
    num_profiled_timesteps: int = knob(5, "steps in the trace", group=DEBUG, min=1, pending="profiling")
    profile_all_stages: bool = knob(False, "trace every stage", group=DEBUG, pending="profiling")

    @property
    def first_step(self) -> int:
        """Return the step that denoising starts from: 0 without a picture, later the lower the strength."""
        if not self.image_path or self.strength is None:
            return 0
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)


@attrs.frozen(kw_only=True)
class OutputParams(SamplingParams):
    """The parameters of one output: one prompt and one seed, fitted to the model."""

    seed: int = knob(attrs.NOTHING, "noise seed", group=SAMPLING, min=0, max=MAX_SEED)

    @classmethod
    def of(cls, params: SamplingParams, seed: int) -> OutputParams:
        """Return the parameters of the output with this seed."""
        values = {name: getattr(params, name) for name in fields_of(SamplingParams)}
        return cls(**{**values, "seed": seed, "num_outputs_per_prompt": 1})


STAGES = {"encode": 5, "denoise": 85, "decode": 9}
"""Stages of an output, in order, with their shares of the progress. The last percent is for the files."""


@attrs.frozen
class OutputSpec:
    """The shape of one finished output."""

    width: int  # pixels
    height: int
    frames: int
    fps: int
    audio: bool = False
    stages: tuple[str, ...] = tuple(STAGES)

    @classmethod
    def of(cls, params: SamplingParams, *, audio: bool = False) -> OutputSpec:
        """Return the shape of an output made with `params`; a single frame has no sound."""
        return cls(params.width, params.height, params.num_frames, params.fps, audio and params.num_frames > 1)

    @property
    def size(self) -> str:
        """Return `WIDTHxHEIGHT`."""
        return f"{self.width}x{self.height}"

    @property
    def seconds(self) -> float:
        """Return the length of the video."""
        return self.frames / self.fps

    @property
    def pixels(self) -> int:
        """Return the number of pixels in all frames."""
        return self.width * self.height * self.frames

    def percent(self, stage: str, step: int, total: int) -> float:
        """Return the progress, 0 to 99, after `step` of `total` steps of a stage."""
        weights = [STAGES[name] for name in self.stages]
        at = self.stages.index(stage)
        return 99 * (sum(weights[:at]) + weights[at] * step / total) / sum(weights)


@attrs.frozen
class Memory:
    """A linear estimate of the memory of one output, beside the weights that stay loaded. All values are in bytes.

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
class PictureRule:
    """How many input pictures a model takes, and what it does with them."""

    min: int = 0
    max: int = 0
    starts_denoising: bool = True  # denoising starts from the noised picture; else the picture is conditioning
    sets_size: bool = True  # a request without a size takes the shape of its picture
    may_enlarge: bool = True  # to the area of the default size; else that area is only the limit
    shape_from: int = 0  # index of the picture that gives the shape
    multiple: int | None = None  # sides are rounded to it; None: they are cut to the model's `size_multiple`

    def size(self, picture: tuple[int, int], area: int, size_multiple: int) -> tuple[int, int]:
        """Return the width and height of an output with the shape of a picture of that width and height.

        `area` is the area of the size that holds otherwise, in pixels.
        """
        area = area if self.may_enlarge else min(area, math.prod(picture))
        return near(area, picture, self.multiple) if self.multiple else _within(area, picture, size_multiple)


def near(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return width and height of about that area with the picture's shape, each rounded to the multiple."""
    ratio, longest = picture[0] / picture[1], MAX_SIDE // multiple
    width = math.sqrt(area * ratio)
    width, height = (min(longest, max(1, round(side / multiple))) * multiple for side in (width, width / ratio))
    return width, height


def _within(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return width and height of at most that area with the picture's shape, each at least one multiple."""
    sides = (math.isqrt(area * a // b) for a, b in (picture, picture[::-1]))
    width, height = (max(1, side // multiple) * multiple for side in sides)
    longest = max(multiple, min(MAX_SIDE, area // min(width, height)) // multiple * multiple)
    return min(width, longest), min(height, longest)


@attrs.frozen
class ModelInfo:
    """The description of a loaded model. Rank 0 sends it once, as the answer to `Load`."""

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
    pictures: PictureRule = PictureRule()
    unguided: float = 1.0  # guidance_scale, or true_cfg_scale where it is given, up to which there is no guidance
    fixed_steps: int | None = None  # num_inference_steps, where no other number works
    audio: bool = False  # videos have sound
    lora_targets: tuple[str, ...] = ()  # components that take LoRA adapters
    degrees: dict[str, int] = attrs.field(factory=dict)  # how many workers share what, such as ulysses
    attention: dict[str, str] = attrs.field(factory=dict)  # kernels by use, such as transformer.self
    left_open: tuple[str, ...] = ()  # fields whose value the pipeline's own code settles, unless somebody gives one
    backend: str = "native"  # "native" code, or a pipeline of "diffusers"

    def memory_needs(self, params: SamplingParams) -> dict[str, int]:
        """Return the peak bytes of one output, by the field to lower when they are too many."""
        if (m := self.memory) is None:
            return {}
        spec = OutputSpec.of(params)
        area = params.height * params.width
        tokens = area // self.size_multiple**2 * ((params.num_frames - 1) // self.frame_multiple + 1)
        denoise = m.denoiser_weights + m.token * max(tokens, min(2 * tokens, m.paired_tokens))
        denoise += m.picture * len(params.image_path or ())
        tile = min(area, m.tile_pixels or area)
        chunk = min(params.num_frames * tile, max(m.chunk_pixels, self.frame_multiple * tile))
        decode = m.decoder_weights + m.pixel * spec.pixels + m.chunk_pixel * chunk
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
    """Refuse adapters that this model cannot take, before any of them is looked up. Raises NotBuilt, BadRequest."""
    if loras and not info.lora_targets:
        reason = f": {why}" if (why := info.unsupported.get("loras")) else ""
        raise NotBuilt(f"this model takes no LoRA adapters{reason}", field=param)
    if len(loras) > MAX_LORAS:
        raise BadRequest(f"{len(loras)} adapters are too many; at most {MAX_LORAS} are allowed", field=param)
    for lora in loras:
        check_lora_target(lora.target, info, target)


def check_lora_target(target: str, info: ModelInfo, param: str = "target") -> None:
    """Refuse a component that this model does not have. Raises BadRequest."""
    allowed = ("all", *info.lora_targets)
    if target not in allowed:
        raise BadRequest(f"{target!r}: this model has only {', '.join(allowed)}", field=param)


def check_picture(given: Mapping[str, object]) -> None:
    """Refuse fields that have no effect without an input picture. Raises BadRequest."""
    for name in ("strength", "mask_path"):
        if given.get(name) is not None and not given.get("image_path"):
            raise BadRequest("it needs a picture to start from", field=name)
