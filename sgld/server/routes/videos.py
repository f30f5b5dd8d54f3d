"""`/v1/videos`: jobs to follow by polling or by events, and their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
from aiohttp import web
from aiohttp_sse import sse_response

from sgld.convert import knob, structure
from sgld.errors import BadRequest
from sgld.resolve import values_of
from sgld.server.http.auth import IDENTITY
from sgld.server.http.body import read_query, require_prompt, split
from sgld.server.http.describe import FILE_STATUSES, MAKING_ERRORS, Described
from sgld.server.http.pictures import PictureSource
from sgld.server.http.schema import (
    DeletedVideo,
    Problem,
    Video,
    VideoEvent,
    VideoFields,
    VideoList,
    VideoPreview,
    VideoQuery,
    body,
)
from sgld.server.http.urls import absolute
from sgld.server.jobs.events import event_text
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import PICTURES, JobRecord
from sgld.server.routes.images import KEEP_ALIVE_S, artifact_of, send_result
from sgld.server.service import SERVICE, ParsedRequest, RequestSpec, Service

routes = web.RouteTableDef()
PICTURE_FIELDS = ("input_reference", "reference_url")
FORMAT = "mp4"
ID = "id of the video"
EVENTS = ("queued", "progress", "completed", "failed", "deleted")
_EVENT_NUMBER = re.compile(r"[0-9]{1,18}")
POLL_MS = (250, 5000)  # how often a client is told to ask: a tenth of what is left, within these


@attrs.frozen
class Remix:
    """`POST /v1/videos/{id}/remix`."""

    prompt: str = knob("", "what the new video shows; everything else stays")


@attrs.frozen
class Page:
    """The query of `GET /v1/videos`."""

    after: str | None = knob(None, "id of the last job of the page before; it may have been deleted since")
    limit: int = knob(20, "jobs on a page", min=1, max=100)
    order: str = knob("desc", "by age", choices=("asc", "desc"))


@routes.post("/v1/videos")
@Described(
    answer=Video,
    body=VideoFields,
    form=True,
    pictures=PICTURE_FIELDS,
    required=("prompt",),
    example={"prompt": "a yellow square moving left on a black background", "seed": 7},
    headers=("Idempotency-Key",),
    errors=MAKING_ERRORS,
)
async def create(request: web.Request) -> web.Response:
    """Queue a video and answer at once."""
    job, _ = await request.app[SERVICE].submit(request, CREATION)
    return _answer(request, job)


@routes.post("/v1/videos/{id}/remix")
@Described(
    id=ID,
    answer=Video,
    body=Remix,
    form=True,
    required=("prompt",),
    example={"prompt": "a green square moving left on a black background"},
    headers=("Idempotency-Key",),
    errors=(*MAKING_ERRORS, 404),
)
async def remix(request: web.Request) -> web.Response:
    """Queue the same video, seeds included, with another prompt."""
    before = _find(request).record
    priority = before.priority if request[IDENTITY].admin else "normal"
    spec = RequestSpec("video", Remix, partial(_parse_remix, before, priority), before=before)
    job, _ = await request.app[SERVICE].submit(request, spec)
    return _answer(request, job)


@routes.get("/v1/videos")
@Described(answer=VideoList, query=Page, errors=(400,))
async def list_jobs(request: web.Request) -> web.Response:
    """List jobs, the newest first by default."""
    page = read_query(request, Page)
    jobs, more = request.app[SERVICE].jobs.index.page(
        "video", request[IDENTITY].visible_owner, after=page.after, limit=page.limit, newest_first=page.order == "desc"
    )
    shown = [_video(request, job) for job in jobs]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return web.json_response(body(VideoList(shown, first, last, has_more=more)))


@routes.get("/v1/videos/{id}")
@Described(id=ID, answer=Video, errors=(404,))
async def retrieve(request: web.Request) -> web.Response:
    """Return the state of a job."""
    return _answer(request, _find(request))


@routes.delete("/v1/videos/{id}")
@Described(id=ID, answer=DeletedVideo, errors=(404,))
async def delete(request: web.Request) -> web.Response:
    """Cancel the job if it has not ended, and remove it with its files."""
    job = _find(request)
    await request.app[SERVICE].jobs.delete(job)
    gone = {"id": job.id, "object": "video.deleted", "deleted": True}
    return web.json_response({**body(_video(request, job)), **gone})


@routes.post("/v1/videos/{id}/cancel")
@Described(id=ID, answer=Video, errors=(404,))
async def cancel(request: web.Request) -> web.Response:
    """Cancel the job. A job that has ended does not change."""
    job = _find(request)
    await request.app[SERVICE].jobs.cancel(job)
    return _answer(request, job)


@routes.get("/v1/videos/{id}/events")
@Described(
    id=ID,
    events=dict.fromkeys(EVENTS, VideoEvent) | {"preview": VideoPreview},
    headers=("Last-Event-ID",),
    errors=(400, 404),
    other={204: "The job has ended, and Last-Event-ID was its last event"},
)
async def events(request: web.Request) -> web.StreamResponse:
    """Stream server-sent events until the job ends. `Last-Event-ID` resumes; 204 means that nothing follows."""
    job = _find(request)
    last = request.headers.get("Last-Event-ID")
    if last is not None and not _EVENT_NUMBER.fullmatch(last):
        raise BadRequest(f"{last!r} is not the number of an event", field="Last-Event-ID")
    seen = int(last) if last is not None else max(0, job.events.number - 1)  # a newcomer gets the latest
    if last is not None and job.ended and 0 < seen == job.events.number:  # 0: this server has told nothing of it
        return web.Response(status=204)
    if seen > job.events.number:  # of the server before this one
        seen = 0
    async with sse_response(request, ping_interval=KEEP_ALIVE_S, sep="\n") as stream:
        if job.ended and not job.events.number:  # ended before this server started
            await stream.send(event_text(job.status, request.app[SERVICE].jobs.scheduler.state(job)), event=job.status)
        async for event in job.follow(seen):
            await stream.send(event.text, id=str(event.number), event=event.name)
    return stream


@routes.get("/v1/videos/{id}/content")
@Described(
    id=ID, media=("video/mp4", "image/webp"), query=VideoQuery, errors=(400, 404, 412, 416, 500), other=FILE_STATUSES
)
async def content(request: web.Request) -> web.StreamResponse:
    """Send the file, with ranges; `variant` is video, thumbnail, spritesheet or an output's number."""
    job, store = _find(request), request.app[SERVICE].jobs
    variant = read_query(request, VideoQuery).variant
    artifact = artifact_of(job, "0" if variant in ("video", *PICTURES) else variant)
    if variant in PICTURES:
        return await send_result(request, await store.picture(job, variant), "image/webp")
    return await send_result(request, artifact.name, artifact.media_type)


def _find(request: web.Request) -> Job:
    return request.app[SERVICE].jobs.get("video", request.match_info["id"], request[IDENTITY].visible_owner)


def _parse(service: Service, values: dict[str, Any], _: Sequence[PictureSource]) -> ParsedRequest[VideoFields]:
    """Read the body of a video request. Raises BadRequest, UnknownModel, NotReady."""
    fields, sampling, notes = split(values, VideoFields)
    require_prompt(sampling)
    service.check_model(fields.model)
    if service.loaded().kind == "image":
        raise BadRequest(f"{service.model_id!r} makes pictures; POST /v1/images/generations", field="model")
    return ParsedRequest(fields, sampling | _length(fields, sampling, service), FORMAT, fields.previews, notes)


CREATION = RequestSpec("video", VideoFields, _parse, PICTURE_FIELDS)


def _parse_remix(
    before: JobRecord, priority: str, service: Service, values: dict[str, Any], _: Sequence[PictureSource]
) -> ParsedRequest[VideoFields]:
    """Take the values of another job, seeds included, with a new prompt. Raises BadRequest, NotReady."""
    prompt = structure(values, Remix).prompt
    require_prompt({"prompt": prompt})
    info = service.loaded()
    if before.model != service.model_id:
        reason = f"{before.id!r} was made by {before.model!r}, and this server runs {service.model_id!r}"
        raise BadRequest(reason, field="id")
    sampling = {name: value for name, value in values_of(before.outputs).items() if name not in info.unsupported}
    return ParsedRequest(VideoFields(priority=priority), sampling | {"prompt": prompt}, FORMAT, before.previews, [])


def _length(fields: VideoFields, sampling: dict[str, Any], service: Service) -> dict[str, int]:
    """Convert `seconds` into frames, at the request's rate or the default one."""
    if fields.seconds is None:
        return {}
    if sampling.get("num_frames") is not None:
        raise BadRequest("num_frames is given too; give one of them", field="seconds")
    fps = sampling.get("fps") or service.default("fps")
    return {"num_frames": fields.seconds * fps} if isinstance(fps, int) else {}  # resolve refuses a wrong fps


def _answer(request: web.Request, job: Job) -> web.Response:
    eta = request.app[SERVICE].jobs.scheduler.eta(job)
    low, high = POLL_MS
    wait = low if eta is None else min(high, max(low, int(100 * eta)))
    headers = {} if job.ended else {"openai-poll-after-ms": str(wait)}
    return web.json_response(body(_video(request, job)), headers=headers)


def _video(request: web.Request, job: Job) -> Video:
    record, params = job.record, job.record.params
    state = request.app[SERVICE].jobs.scheduler.state(job)
    content = absolute(request, f"/v1/videos/{record.id}/content")
    urls = [f"{content}?variant={i}" for i in range(len(record.artifacts))]
    return Video(
        id=record.id,
        model=record.model,
        status=record.status,
        progress=record.progress.percent,
        created_at=int(record.created_at),
        completed_at=int(record.completed_at) if record.status == "completed" and record.completed_at else None,
        expires_at=int(record.expires_at) if record.expires_at else None,
        prompt=params.prompt,
        size=record.spec.size,
        seconds=f"{record.spec.seconds:g}",
        fps=params.fps,
        num_frames=params.num_frames,
        num_outputs=len(record.outputs),
        seeds=record.seeds,
        stage=record.progress.stage,
        step=record.progress.step,
        total=record.progress.total,
        queue_position=state["queue_position"],
        eta_seconds=state["eta_seconds"],
        priority=record.priority,
        warnings=list(record.notes),
        urls=urls,
        url=urls[0] if urls else None,
        remixed_from_video_id=record.remixed_from,
        error=Problem(record.error.code, record.error.message) if record.error is not None else None,
    )
