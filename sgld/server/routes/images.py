"""`/v1/images`: pictures, as base64 or as addresses, at once or streamed with previews."""

from __future__ import annotations

import base64
import json
import logging
import time
from typing import Any

import anyio.to_thread
from aiohttp import web
from aiohttp_sse import EventSourceResponse, sse_response

from sgld import media
from sgld.convert import shorten
from sgld.errors import BadRequest, NotFound, SgldError
from sgld.server.http.auth import IDENTITY
from sgld.server.http.body import as_sent, read_body, read_query, require_prompt, split
from sgld.server.http.describe import FILE_STATUSES, MAKING_ERRORS, Described
from sgld.server.http.errors import INTERNAL, error_of
from sgld.server.http.files import send_file
from sgld.server.http.schema import (
    CompletedImage,
    EditFields,
    Error,
    ImageFields,
    Images,
    InputTokensDetails,
    PartialImage,
    Picture,
    PictureQuery,
    Usage,
    body,
)
from sgld.server.http.urls import absolute
from sgld.server.jobs.inputs import MASK
from sgld.server.jobs.job import Artifact, Job
from sgld.server.routes import pictures
from sgld.server.service import SERVICE, Service

log = logging.getLogger(__name__)
routes = web.RouteTableDef()
KEEP_ALIVE_S = 5.0
PICTURE_FIELDS = ("image", "images", "url", "mask")
GENERATION_EVENTS, EDIT_EVENTS = (
    {f"{name}.partial_image": PartialImage, f"{name}.completed": CompletedImage, "error": Error}
    for name in ("image_generation", "image_edit")
)


@routes.post("/v1/images/generations")
@Described(
    answer=Images,
    events=GENERATION_EVENTS,
    last="[DONE]",
    body=ImageFields,
    required=("prompt",),
    fixed={"num_frames": 1},
    example={"prompt": "a red circle on a blue background", "n": 2, "seed": 7},
    headers=("Idempotency-Key",),
    errors=MAKING_ERRORS,
)
async def generate(request: web.Request) -> web.StreamResponse:
    """Make `n` pictures; the answer waits for them. A client that goes away cancels the job."""
    return await _make(request, ImageFields, "image_generation")


@routes.post("/v1/images/edits")
@Described(
    answer=Images,
    events=EDIT_EVENTS,
    last="[DONE]",
    body=EditFields,
    form=True,
    pictures=PICTURE_FIELDS,
    required=("prompt",),
    fixed={"num_frames": 1},
    example={"prompt": "the circle becomes green", "image": "@picture.png"},
    headers=("Idempotency-Key",),
    errors=MAKING_ERRORS,
)
async def edit(request: web.Request) -> web.StreamResponse:
    """Make `n` pictures from pictures and a prompt."""
    return await _make(request, EditFields, "image_edit")


@routes.post("/v1/images/variations")
@Described(
    answer=Images,
    events=EDIT_EVENTS,
    last="[DONE]",
    body=EditFields,
    form=True,
    pictures=PICTURE_FIELDS,
    fixed={"num_frames": 1},
    example={"image": "@picture.png", "n": 2},
    headers=("Idempotency-Key",),
    errors=MAKING_ERRORS,
)
async def vary(request: web.Request) -> web.StreamResponse:
    """Make `n` pictures from one picture."""
    return await _make(request, EditFields, "image_edit", prompted=False)


@routes.get("/v1/images/{id}/content")
@Described(
    id="id of the answer to an image request",
    media=("image/png", "image/jpeg", "image/webp"),
    query=PictureQuery,
    errors=(400, 404, 412, 416, 500),
    other=FILE_STATUSES,
)
async def content(request: web.Request) -> web.StreamResponse:
    """The file of one output; `variant` is its number."""
    service = request.app[SERVICE]
    job = service.jobs.get("image", request.match_info["id"], request[IDENTITY])
    artifact = artifact_of(job, read_query(request, PictureQuery).variant)
    return await send_file(request, service.jobs.outputs.root / artifact.name, artifact.media_type)


def artifact_of(job: Job, variant: str) -> Artifact:
    """An output by its number. Raises NotFound."""
    if job.status != "completed":
        reason = job.error.message if job.error is not None else f"it is {job.status}, {job.progress} %"
        raise NotFound(f"{job.kind} {job.id!r} has no content: {reason}", "id")
    numbers = [str(i) for i in range(len(job.artifacts))]
    if variant not in numbers:
        raise NotFound(f"variant: {variant!r} is not one of {', '.join(numbers)}", "variant")
    return job.artifacts[int(variant)]


async def _make(
    request: web.Request, cls: type[ImageFields], event: str, *, prompted: bool = True
) -> web.StreamResponse:
    service = request.app[SERVICE]
    job, fields = await _submit(request, cls, prompted)
    async with service.jobs.attend(job):
        if fields.stream:
            return await _stream(request, job, fields, event)
        await job.wait()
        if job.error is not None:
            raise job.error
        return await _answer(request, job, fields)


async def _submit(request: web.Request, cls: type[ImageFields], prompted: bool) -> tuple[Job, ImageFields]:
    """Queue what is asked for. While it waits, nothing of the body is held."""
    service = request.app[SERVICE]
    content = await read_body(request, cls)
    sources = pictures.find_sources(content, PICTURE_FIELDS if cls is EditFields else ())
    fields, sampling, notes = split(content.values, cls)
    if prompted:
        require_prompt(sampling)
    if cls is EditFields and not any(source.field != MASK for source in sources):
        raise BadRequest("image: a picture is needed: a file, or an http(s) or data: URL in url", "image")
    service.check_model(fields.model)
    _check(fields, sampling)
    pictures.check(sources, service.loaded().pictures.max, service.model_id)
    async with pictures.kept(sources, service.uploads, service.fetcher, service.loaded().pictures.shape_from) as kept:
        with as_sent(content.values):
            resolved = service.params({**sampling, "num_frames": 1, **kept.sampling}, kept.size)
            media.check_encodable(
                fields.output_format,
                resolved.spec,
                metadata=service.jobs.outputs.describe(resolved.params),
            )
        job = await service.new_job(
            request,
            "image",
            fields,
            await service.adapted(resolved),
            content,
            output_format=fields.output_format,
            previews=fields.partial_images if fields.stream else 0,
            notes=notes + _without_effect(fields, sampling) + [*resolved.notes],
            inputs=kept.names,
        )
        job = await service.submit(job)
    return job, fields


def _check(fields: ImageFields, sampling: dict[str, object]) -> None:
    if sampling.get("num_frames") not in (None, 1):
        raise BadRequest(
            f"num_frames: {shorten(sampling['num_frames'])} frames are a video; POST /v1/videos makes those",
            "num_frames",
        )
    if fields.partial_images and not fields.stream:
        raise BadRequest("partial_images: previews come in a stream; give stream true, or leave it out", "stream")


def _without_effect(fields: ImageFields, sampling: dict[str, object]) -> list[str]:
    """Warnings of settings that this kind of picture does not have."""
    reasons = dict.fromkeys(("fps", "x264_preset", "adjust_frames", "num_frames_round_down"), "a picture has one frame")
    if fields.output_format == "png":
        reasons |= dict.fromkeys(("output_quality", "output_compression"), "a png loses nothing")
    given = {name: sampling[name] for name in reasons if sampling.get(name) is not None}
    notes = [f"{name}: {shorten(value)} changes nothing: {reasons[name]}" for name, value in given.items()]
    if fields.stream and fields.response_format == "url":
        notes.append("response_format: 'url' changes nothing: the events of a stream bring base64")
    return notes


async def _answer(request: web.Request, job: Job, fields: ImageFields) -> web.Response:
    answer = Images(
        id=job.id,
        created=int(job.created_at),
        data=[await _picture(request, job, i, fields) for i in range(len(job.artifacts))],
        background="opaque",
        output_format=fields.output_format,
        quality="high",
        size=job.spec.size,
        seeds=job.seeds,
        usage=usage(job),
        warnings=list(job.notes),
        inference_time_s=round((job.completed_at or time.time()) - (job.started_at or job.created_at), 3),
    )
    text = await anyio.to_thread.run_sync(lambda: json.dumps(body(answer)))  # megabytes of base64
    return web.Response(text=text, content_type="application/json")


async def _picture(request: web.Request, job: Job, index: int, fields: ImageFields) -> Picture:
    if fields.response_format == "url":
        return Picture(None, absolute(request, f"/v1/images/{job.id}/content?variant={index}"), job.params.prompt)
    return Picture(await _base64(request.app[SERVICE], job, index), None, job.params.prompt)


async def _base64(service: Service, job: Job, index: int) -> str:
    data = await service.jobs.outputs.read(job.artifacts[index])
    return (await anyio.to_thread.run_sync(base64.b64encode, data)).decode()


def usage(job: Job, outputs: int | None = None) -> Usage:
    """Tokens of the prompt, and of the latents that were denoised: for so many of the equal outputs, or for all."""
    details = InputTokensDetails(text_tokens=job.prompt_tokens, image_tokens=0)
    made = job.output_tokens if outputs is None else job.output_tokens * outputs // len(job.artifacts)
    return Usage(job.prompt_tokens, details, made, job.prompt_tokens + made)


async def _stream(request: web.Request, job: Job, fields: ImageFields, event: str) -> web.StreamResponse:
    """Previews and pictures as OpenAI's client reads them; an error is an event, and `[DONE]` ends the stream."""
    async with sse_response(request, ping_interval=KEEP_ALIVE_S, allow_all_methods=True, sep="\n") as stream:
        try:
            await _tell(request.app[SERVICE], stream, job, fields, event)
        except SgldError as error:
            await stream.send(json.dumps(error_of(error)), event="error")
        except (ConnectionError, TimeoutError):  # the client has gone, or reads nothing
            raise
        except Exception:
            log.exception("the stream of %s failed", job.id)
            await stream.send(json.dumps(error_of(SgldError(INTERNAL))), event="error")
        await stream.send("[DONE]")
    return stream


async def _tell(service: Service, stream: EventSourceResponse, job: Job, fields: ImageFields, event: str) -> None:
    """Send what happens to a job until its end. Raises its error."""
    common = {
        "background": "opaque",
        "created_at": int(job.created_at),
        "output_format": fields.output_format,
        "quality": "high",
        "size": job.spec.size,
    }

    async def send(name: str, **own: Any) -> None:
        data = {"type": f"{event}.{name}", **common, **own}
        await stream.send(await anyio.to_thread.run_sync(json.dumps, data), event=f"{event}.{name}")

    async for told in job.follow():
        if told.name == "preview":
            shown = {"partial_image_index": told.data["index"], "output_index": told.data["output"]}
            await send("partial_image", b64_json=told.data["b64_json"], **shown)
    if job.error is not None:
        raise job.error
    for index in range(len(job.artifacts)):
        picture = await _base64(service, job, index)
        last = {"usage": body(usage(job, 1)), "id": job.id, "seed": job.seeds[index], "output_index": index}
        await send("completed", b64_json=picture, warnings=job.notes, **last)
