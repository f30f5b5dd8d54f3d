"""What crosses the wire: the fields of requests beside `SamplingParams`, and the objects of answers.

Routes read and write these, and the OpenAPI document is made from them.
"""

from __future__ import annotations

from typing import Annotated, Any

import attrs

from sgld.convert import knob, unstructure
from sgld.params import LORA_TARGETS, MAX_LORA_STRENGTH, PRIORITIES

SIZE_HELP = "WIDTHxHEIGHT; empty or auto is the model's own"
OPENAI_QUALITIES = ("auto", "standard", "hd", "low", "medium", "xhigh", "max")
"""OpenAI's words for how much work to spend; this server always makes its best picture, and says so in `warnings`."""


@attrs.frozen
class Doc:
    """What the OpenAPI document says of a field of an answer, beside its type."""

    help: str
    choices: tuple[str, ...] = ()


# Requests


@attrs.frozen
class CommonFields:
    """Fields that every kind of request has."""

    model: str | None = knob(None, "model id")
    size: str | None = knob(None, SIZE_HELP)
    priority: str = knob("normal", "class in the queue; high needs an admin key", choices=PRIORITIES)
    user: str | None = knob(None, "end user, for your own records")
    safety_identifier: str | None = knob(None, "end user, hashed, for your own records")


@attrs.frozen
class ImageFields(CommonFields):
    """`POST /v1/images/generations`."""

    data_type: str = knob("image", "what this route makes", choices=("image",))
    response_format: str = knob("b64_json", "how the picture comes back", choices=("b64_json", "url"))
    output_format: str = knob("png", "file format", choices=("png", "jpeg", "webp"))
    background: str = knob("auto", "always opaque: no model here makes transparency", choices=("auto", "opaque"))
    moderation: str | None = knob(None, "this server does not moderate", choices=("auto", "low"))
    style: str | None = knob(None, "without effect: say it in the prompt", choices=("vivid", "natural"))
    stream: bool = knob(False, "answer with server-sent events")
    partial_images: int = knob(0, "previews during a streamed generation", min=0, max=3)


@attrs.frozen
class EditFields(ImageFields):
    """`POST /v1/images/edits` and `POST /v1/images/variations`, beside their files."""

    url: list[str] | None = knob(None, "pictures to fetch, or data: URLs")
    input_fidelity: str | None = knob(None, "without effect: strength decides", choices=("high", "low"))


@attrs.frozen
class VideoFields(CommonFields):
    """`POST /v1/videos`."""

    data_type: str = knob("video", "what this route makes", choices=("video",))
    seconds: int | None = knob(None, "length; times fps, rounded to a length the model can make", min=1, max=3600)
    reference_url: str | None = knob(None, "picture to start from: http, https or data: URL")
    video_url: str | None = knob(None, "video to start from", pending="video input")
    video_reference: str | None = knob(None, "video to start from", pending="video input")
    previews: int = knob(0, "preview events during the generation", min=0, max=3)


@attrs.frozen
class PictureQuery:
    """The query of `GET /v1/images/{id}/content`."""

    variant: str = knob("0", "number of the output, from 0")


@attrs.frozen
class VideoQuery:
    """The query of `GET /v1/videos/{id}/content`."""

    variant: str = knob("video", "video, thumbnail or spritesheet of the first output, or an output's number, from 0")


@attrs.frozen
class SetLoraFields:
    """`POST /v1/set_lora`."""

    lora_nickname: str | list[str] | None = knob(None, "name of the adapter, or names of several")
    lora_path: str | list[str | None] | None = knob(
        None, "file, folder, Hugging Face id or id:file; null for a name that was given before"
    )
    target: str | list[str] = knob("all", "part of the model that it changes", choices=LORA_TARGETS)
    strength: float | list[float] = knob(
        1.0, "weight of what it adds; 0 is without it", min=-MAX_LORA_STRENGTH, max=MAX_LORA_STRENGTH
    )
    merge_mode: str = knob(
        "auto", "write it into the weights, or compute it beside them", choices=("auto", "merge", "dynamic")
    )
    lora_alpha: float | list[float | None] | None = knob(None, "for layers that bring no alpha of their own", above=0)
    strict: bool = knob(True, "refuse an adapter of which some keys do not fit; false leaves those out")


@attrs.frozen
class MergeLoraFields:
    """`POST /v1/merge_lora_weights`."""

    target: str = knob("all", "part of the model", choices=LORA_TARGETS)
    strength: float = knob(1.0, "of each adapter", min=-MAX_LORA_STRENGTH, max=MAX_LORA_STRENGTH)


@attrs.frozen
class UnmergeLoraFields:
    """`POST /v1/unmerge_lora_weights`."""

    target: str = knob("all", "part of the model", choices=LORA_TARGETS)


# Answers

Time = Annotated[int, Doc("Unix seconds")]
Status = Annotated[str, Doc("where the job stands", ("queued", "in_progress", "completed", "failed", "deleted"))]
Percent = Annotated[int, Doc("percent; never falls, and is 100 only with the file")]
Stage = Annotated[str, Doc("what is being done: queued, encode, denoise, decode, or the status at its end")]
Step = Annotated[int, Doc("step of the stage, of `total`")]
Place = Annotated[int | None, Doc("place in the queue, from 1; null when it does not wait")]
Eta = Annotated[float | None, Doc("seconds until the end, as far as past jobs allow an estimate")]
Seeds = Annotated[list[int], Doc("noise seed of each output")]
Warnings = Annotated[list[str], Doc("what was changed, or has no effect")]
Size = Annotated[str, Doc("WIDTHxHEIGHT in pixels")]
Base64 = Annotated[str, Doc("the file, in base64")]


@attrs.frozen
class Problem:
    """Why a job failed."""

    code: str
    message: str


@attrs.frozen
class Video:
    """A video job."""

    id: str
    model: str
    status: Status
    progress: Percent
    created_at: Time
    completed_at: Time | None
    expires_at: Annotated[int | None, Doc("Unix seconds after which job and files are removed")]
    prompt: str
    size: Size
    seconds: Annotated[str, Doc("length, as a decimal number")]
    fps: Annotated[int, Doc("frames per second")]
    num_frames: int
    num_outputs: int
    seeds: Seeds
    stage: Stage
    step: Step
    total: int
    queue_position: Place
    eta_seconds: Eta
    priority: Annotated[str, Doc("class in the queue", PRIORITIES)]
    warnings: Warnings
    urls: Annotated[list[str], Doc("address of each output, once completed")]
    url: Annotated[str | None, Doc("the first of them")]
    remixed_from_video_id: Annotated[str | None, Doc("the video this one was made from")]
    error: Problem | None
    quality: str = "standard"
    object: str = "video"


@attrs.frozen
class DeletedVideo(Video):
    """The job as it was, and that it is gone."""

    object: str = "video.deleted"
    deleted: bool = True


@attrs.frozen
class VideoEvent:
    """`data` of an event of a video job."""

    type: Annotated[str, Doc("video. and the event's name")]
    id: str
    status: Status
    progress: Percent
    stage: Stage
    step: Step
    total: int
    queue_position: Place
    eta_seconds: Eta


@attrs.frozen
class VideoPreview(VideoEvent):
    """`data` of a preview: the first frame as it would be if the generation ended now."""

    index: Annotated[int, Doc("number of the preview of this output, from 0")]
    output: Annotated[int, Doc("number of the output, from 0")]
    format: str
    b64_json: Base64


@attrs.frozen
class VideoList:
    """A page of video jobs."""

    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


@attrs.frozen
class Picture:
    """One image of an answer: its bytes or its address."""

    b64_json: Base64 | None
    url: str | None
    revised_prompt: Annotated[str, Doc("the prompt as it was used")]


@attrs.frozen
class InputTokensDetails:
    """The parts of `input_tokens`."""

    text_tokens: int
    image_tokens: int


@attrs.frozen
class Usage:
    """Tokens of the prompts, and of the latents that were denoised."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


@attrs.frozen
class Images:
    """The answer to an image request."""

    id: str
    created: Time
    data: list[Picture]
    background: str
    output_format: str
    quality: str
    size: Size
    seeds: Seeds
    usage: Usage
    warnings: Warnings
    inference_time_s: Annotated[float, Doc("seconds from the start of the job to its end")]


@attrs.frozen
class PartialImage:
    """`data` of a preview in a stream: the picture as it would be if the generation ended now."""

    type: Annotated[str, Doc("the event's name")]
    background: str
    created_at: Time
    output_format: str
    quality: str
    size: Size
    b64_json: Base64
    partial_image_index: Annotated[int, Doc("number of the preview of this output, from 0")]
    output_index: Annotated[int, Doc("number of the output, from 0")]


@attrs.frozen
class CompletedImage:
    """`data` of a finished picture in a stream."""

    type: Annotated[str, Doc("the event's name")]
    background: str
    created_at: Time
    output_format: str
    quality: str
    size: Size
    b64_json: Base64
    usage: Usage
    warnings: Warnings
    id: str
    seed: int
    output_index: Annotated[int, Doc("number of the output, from 0")]


@attrs.frozen
class ModelCard:
    """A model as OpenAI's client reads it."""

    id: str
    created: Time
    object: str = "model"
    owned_by: str = "sgld"


@attrs.frozen
class ModelList:
    """All models: the one that is served."""

    data: list[ModelCard]
    object: str = "list"


@attrs.frozen
class Liveness:
    """The process answers."""

    status: str = "ok"


@attrs.frozen
class Health:
    """Whether requests are served now."""

    status: Annotated[str, Doc("ok, loading, stopping, or the state of the workers")]
    version: str
    restarts: Annotated[int, Doc("of the workers, since the start")]


@attrs.frozen
class LoadedModel:
    """What is loaded, by the names of the replaced system."""

    model_path: str
    num_gpus: int
    task_type: str
    supported_task_types: list[str]
    dit_precision: Annotated[str | None, Doc("null: chosen by the device")]
    vae_precision: Annotated[str | None, Doc("null: fp32; of a diffusers pipeline, precision")]
    pipeline_name: str
    pipeline_class: str


@attrs.frozen
class ServerInfo:
    """The process and its workers."""

    model_path: str
    served_model_name: str
    tp_size: int
    num_gpus: int
    degrees: Annotated[dict[str, int], Doc("how many workers share what; empty until the model is loaded")]
    attention: Annotated[
        dict[str, str], Doc("kernels of the transformers; empty of a diffusers pipeline, or while it loads")
    ]
    version: str
    state: Annotated[str, Doc("of the workers")]
    started_at: Time
    restarts: Annotated[int, Doc("of the workers, since the start")]
    queue_depth: Annotated[int, Doc("jobs that wait")]
    max_queue: Annotated[int, Doc("jobs that may wait")]


@attrs.frozen
class Limits:
    """What is refused beyond these."""

    max_queue: Annotated[int, Doc("jobs that may wait; one more gets 429")]
    max_request_bytes: Annotated[int, Doc("of a body, its files included")]
    max_prompt_characters: int
    max_prompt_tokens: Annotated[int | None, Doc("more are cut, with a warning; null: as max_sequence_length says")]
    max_output_memory_bytes: Annotated[int | None, Doc("one output that needs more gets 413; null: not known")]
    max_pictures: Annotated[int, Doc("of one request, beside a mask; 0: this model takes none")]
    max_picture_pixels: Annotated[int, Doc("of one picture")]
    max_fetched_bytes: Annotated[int, Doc("of a picture given by its address")]
    job_ttl_seconds: Annotated[int | None, Doc("after its end a job is kept so long; null: until it is deleted")]


@attrs.frozen
class Capabilities:
    """What this model takes and makes."""

    model: str
    name: Annotated[str, Doc("pipeline class")]
    kind: Annotated[str, Doc("what it makes by default", ("image", "video"))]
    audio: Annotated[bool, Doc("its videos have sound")]
    tasks: Annotated[list[str], Doc("text-to-video, text-to-image and so on")]
    size_multiple: Annotated[int, Doc("height and width are multiples of this many pixels")]
    frame_multiple: Annotated[int, Doc("num_frames is 1 more than a multiple of this")]
    components: Annotated[list[str], Doc("parts of the model")]
    lora_targets: Annotated[list[str], Doc("those that take LoRA adapters")]
    defaults: Annotated[dict[str, Any], Doc("what a request gets that does not say otherwise")]
    sampling: Annotated[dict[str, Any], Doc("those of the defaults that the operator has set")]
    fields: Annotated[dict[str, Any], Doc("JSON Schema of each sampling field of a request")]
    unsupported: Annotated[dict[str, str], Doc("fields that are refused, and why")]
    limits: Limits


@attrs.frozen
class LoraChanged:
    """The adapters hold, or are gone."""

    message: str
    status: str = "ok"


@attrs.frozen
class LoadedLora:
    """An adapter that has a name."""

    nickname: str
    path: Annotated[str, Doc("as it was given")]


@attrs.frozen
class ActiveLora:
    """An adapter that holds in one part of the model."""

    nickname: str
    nicknames: Annotated[list[str], Doc("of all adapters that hold there")]
    path: Annotated[str, Doc("as it was given")]
    merged: Annotated[bool, Doc("whether it is written into the weights")]
    mode: Annotated[str, Doc("how it holds", ("merge", "dynamic"))]
    strength: float
    strengths: Annotated[list[float], Doc("of all adapters that hold there")]


@attrs.frozen
class LoraList:
    """Adapters with a name, and those that hold, by part of the model."""

    loaded_adapters: list[LoadedLora]
    active: dict[str, list[ActiveLora]]


@attrs.frozen
class ErrorDetail:
    """What went wrong, as OpenAI's client reads it."""

    message: str
    type: Annotated[str, Doc("kind of fault", ("invalid_request_error", "server_error"))]
    param: Annotated[str | None, Doc("field at fault, where there is one")]
    code: Annotated[str, Doc("what programs read: invalid_value, not_found, queue_full and so on")]


@attrs.frozen
class Error:
    """The body of every error."""

    error: ErrorDetail
    detail: Annotated[str, Doc("the message once more")]


def body(answer: Any) -> dict[str, Any]:
    """Turn an answer into plain JSON values."""
    values: dict[str, Any] = unstructure(answer)
    return values
