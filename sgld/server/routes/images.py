"""`/v1/images`: pictures as base64 or addresses, at once or streamed with previews."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from aiohttp import web
from aiohttp_sse import EventSourceResponse, sse_response

from sgld.convert import shorten
from sgld.errors import INTERNAL, BadRequest, NotFound, SgldError
from sgld.server.http.auth import IDENTITY
from sgld.server.http.body import read_query, require_prompt, split
from sgld.server.http.describe import FILE_STATUSES, MAKING_ERRORS, Described
from sgld.server.http.errors import error_of
from sgld.server.http.files import send_file
from sgld.server.http.pictures import MASK, PictureSource
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
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import Artifact
from sgld.server.service import SERVICE, ParsedRequest, RequestSpec, Service

log = logging.getLogger(__name__)
routes = web.RouteTableDef()
F = TypeVar("F", bound=ImageFields)
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
    return await _make(request, GENERATION, "image_generation")


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
    return await _make(request, EDIT, "image_edit")


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
    return await _make(request, VARIATION, "image_edit")


@routes.get("/v1/images/{id}/content")
@Described(
    id="id of the answer to an image request",
    media=("image/png", "image/jpeg", "image/webp"),
    query=PictureQuery,
    errors=(400, 404, 412, 416, 500),
    other=FILE_STATUSES,
)
async def content(request: web.Request) -> web.StreamResponse:
    """Send the file of one output; `variant` is its number."""
    service = request.app[SERVICE]
    job = service.jobs.get("image", request.match_info["id"], request[IDENTITY].visible_owner)
    artifact = artifact_of(job, read_query(request, PictureQuery).variant)
    return await send_result(request, artifact.name, artifact.media_type)


async def send_result(request: web.Request, name: str, media_type: str) -> web.StreamResponse:
    """Send a result from the store, or redirect to its address."""
    found = await request.app[SERVICE].jobs.outputs.store.serve(name)
    if isinstance(found, str):
        raise web.HTTPFound(found)
    return await send_file(request, found, media_type)


def artifact_of(job: Job, variant: str) -> Artifact:
    """Return an output by its number. Raises NotFound."""
    if job.status != "completed":
        reason = (
            job.record.error.message
            if job.record.error is not None
            else f"it is {job.status}, {job.record.progress.percent} %"
        )
        raise NotFound(f"{job.kind} {job.id!r} has no content: {reason}", "id")
    numbers = [str(i) for i in range(len(job.record.artifacts))]
    if variant not in numbers:
        raise NotFound(f"{variant!r} is not one of {', '.join(numbers)}", field="variant")
    return job.record.artifacts[int(variant)]


def _parse(
    cls: type[F], service: Service, values: dict[str, Any], sources: Sequence[PictureSource], *, prompted: bool = True
) -> ParsedRequest[F]:
    """Read the body of an image request. Raises BadRequest, UnknownModel."""
    fields, sampling, notes = split(values, cls)
    if prompted:
        require_prompt(sampling)
    if cls is EditFields and all(source.field == MASK for source in sources):
        raise BadRequest("a picture is needed: a file, or an http(s) or data: URL in url", field="image")
    service.check_model(fields.model)
    if sampling.get("num_frames") not in (None, 1):
        frames = shorten(sampling["num_frames"])
        raise BadRequest(f"{frames} frames are a video; POST /v1/videos makes those", field="num_frames")
    if fields.partial_images and not fields.stream:
        raise BadRequest("partial_images: previews come in a stream; give stream true, or leave it out", "stream")
    return ParsedRequest(
        fields,
        {**sampling, "num_frames": 1},
        fields.output_format,
        fields.partial_images if fields.stream else 0,
        notes + _without_effect(fields, sampling),
    )


GENERATION = RequestSpec("image", ImageFields, partial(_parse, ImageFields))
EDIT = RequestSpec("image", EditFields, partial(_parse, EditFields), PICTURE_FIELDS)
VARIATION = RequestSpec("image", EditFields, partial(_parse, EditFields, prompted=False), PICTURE_FIELDS)


async def _make(request: web.Request, spec: RequestSpec[F], event: str) -> web.StreamResponse:
    service = request.app[SERVICE]
    job, fields = await service.submit(request, spec)
    in_memory = job.record.file_names if fields.stream or fields.response_format == "b64_json" else ()
    with service.jobs.outputs.retain(in_memory):
        async with service.jobs.attend(job):
            if fields.stream:
                return await _stream(request, job, fields, event)
            await job.wait()
            if job.record.error is not None:
                raise job.record.error
            return await _answer(request, job, fields)


def _without_effect(fields: ImageFields, sampling: dict[str, object]) -> list[str]:
    """Return warnings for settings without effect on this kind of picture."""
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
        created=int(job.record.created_at),
        data=[await _picture(request, job, i, fields) for i in range(len(job.record.artifacts))],
        background="opaque",
        output_format=fields.output_format,
        quality="high",
        size=job.record.spec.size,
        seeds=job.record.seeds,
        usage=usage(job),
        warnings=list(job.record.notes),
        inference_time_s=round(
            (job.record.completed_at or time.time()) - (job.record.started_at or job.record.created_at), 3
        ),
    )
    text = await anyio.to_thread.run_sync(lambda: json.dumps(body(answer)))  # megabytes of base64
    return web.Response(text=text, content_type="application/json")


async def _picture(request: web.Request, job: Job, index: int, fields: ImageFields) -> Picture:
    if fields.response_format == "url":
        return Picture(
            None, absolute(request, f"/v1/images/{job.id}/content?variant={index}"), job.record.params.prompt
        )
    return Picture(await _base64(request.app[SERVICE], job, index), None, job.record.params.prompt)


async def _base64(service: Service, job: Job, index: int) -> str:
    data = await service.jobs.outputs.read(job.record.artifacts[index])
    return (await anyio.to_thread.run_sync(base64.b64encode, data)).decode()


def usage(job: Job, outputs: int | None = None) -> Usage:
    """Count the tokens of the prompt and of the denoised latents, for some of the outputs or for all."""
    details = InputTokensDetails(text_tokens=job.record.prompt_tokens, image_tokens=0)
    made = (
        job.record.output_tokens if outputs is None else job.record.output_tokens * outputs // len(job.record.artifacts)
    )
    return Usage(job.record.prompt_tokens, details, made, job.record.prompt_tokens + made)


async def _stream(request: web.Request, job: Job, fields: ImageFields, event: str) -> web.StreamResponse:
    """Stream previews and pictures in OpenAI's form. An error is an event, and `[DONE]` ends the stream."""
    async with sse_response(request, ping_interval=KEEP_ALIVE_S, allow_all_methods=True, sep="\n") as stream:
        try:
            await _send_events(request.app[SERVICE], stream, job, fields, event)
        except SgldError as error:
            await stream.send(json.dumps(error_of(error)), event="error")
        except (ConnectionError, TimeoutError):  # the client has gone, or reads nothing
            raise
        except Exception:
            log.exception("the stream of %s failed", job.id)
            await stream.send(json.dumps(error_of(SgldError(INTERNAL))), event="error")
        await stream.send("[DONE]")
    return stream


async def _send_events(
    service: Service, stream: EventSourceResponse, job: Job, fields: ImageFields, event: str
) -> None:
    """Send the events of a job until its end. Raises the error of the job."""
    common = {
        "background": "opaque",
        "created_at": int(job.record.created_at),
        "output_format": fields.output_format,
        "quality": "high",
        "size": job.record.spec.size,
    }

    async def send(name: str, **own: Any) -> None:
        data = {"type": f"{event}.{name}", **common, **own}
        await stream.send(await anyio.to_thread.run_sync(json.dumps, data), event=f"{event}.{name}")

    async for change in job.follow():
        if change.name == "preview":
            index = {"partial_image_index": change.data["index"], "output_index": change.data["output"]}
            await send("partial_image", b64_json=change.data["b64_json"], **index)
    if job.record.error is not None:
        raise job.record.error
    for i in range(len(job.record.artifacts)):
        own = {"usage": body(usage(job, 1)), "id": job.id, "seed": job.record.seeds[i], "output_index": i}
        await send("completed", b64_json=await _base64(service, job, i), warnings=job.record.notes, **own)
