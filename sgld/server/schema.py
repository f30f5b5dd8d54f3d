"""What crosses the wire: the fields of requests beside `SamplingParams`, and the objects of answers.

Routes read and write these, and the OpenAPI document is made from them.
"""

from __future__ import annotations

from typing import Any

import attrs

from sgld.convert import knob
from sgld.server.queue import PRIORITIES

SIZE_HELP = "WIDTHxHEIGHT; empty or auto is the model's own"
OPENAI_QUALITIES = ("auto", "standard", "hd", "low", "medium", "xhigh", "max")
"""OpenAI's words for how much work to spend; this server always makes its best picture, and says so in `warnings`."""


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
    previews: int = knob(0, "preview events during the generation", min=0, max=3)


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
    status: str
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    fps: int
    num_frames: int
    num_outputs: int
    seeds: list[int]
    stage: str
    step: int
    total: int
    queue_position: int | None
    eta_seconds: float | None
    priority: str
    warnings: list[str]
    urls: list[str]
    url: str | None
    remixed_from_video_id: str | None
    error: Problem | None
    quality: str = "standard"
    object: str = "video"


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

    b64_json: str | None
    url: str | None
    revised_prompt: str


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
    created: int
    data: list[Picture]
    background: str
    output_format: str
    quality: str
    size: str
    seeds: list[int]
    usage: Usage
    warnings: list[str]
    inference_time_s: float


@attrs.frozen
class ModelCard:
    """A model as OpenAI's client reads it."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "sgld"


@attrs.frozen
class ModelList:
    """All models: the one that is served."""

    data: list[ModelCard]
    object: str = "list"


@attrs.frozen
class ErrorDetail:
    """What went wrong, as OpenAI's client reads it."""

    message: str
    type: str
    param: str | None
    code: str


@attrs.frozen
class Error:
    """The body of every error."""

    error: ErrorDetail
    detail: str


def body(answer: Any) -> dict[str, Any]:
    """An answer as JSON values."""
    return attrs.asdict(answer)
