"""`POST /v1/videos`, its status and its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from aiohttp import web

from sgld import media
from sgld.errors import BadRequest, NotFound, SgldError
from sgld.messages import Media
from sgld.params import SamplingParams
from sgld.server.body import VideoFields, read_body, require_prompt, split
from sgld.server.jobs import Job
from sgld.server.state import SERVICE, Service
from sgld.storage.local import LocalStorage, indexed

routes = web.RouteTableDef()


@routes.post("/v1/videos")
async def create(request: web.Request) -> web.Response:
    """Queue a video and answer at once."""
    service = request.app[SERVICE]
    fields, sampling = split(await read_body(request, VideoFields), VideoFields)
    require_prompt(sampling)
    service.check_model(fields.model)
    params, notes = service.params({**sampling, **_length(fields, sampling, service)})

    async def finish(job: Job, each: SamplingParams, result: Media) -> None:
        name = indexed(f"{job.id}.mp4", len(job.paths), params.num_outputs_per_prompt)
        storage = LocalStorage(service.jobs.output_path)
        job.paths.append(await anyio.to_thread.run_sync(_write, each, result, storage, name, service.model_id))

    job = service.jobs.submit("video", params, notes, finish)
    return web.json_response(_video(job, service.model_id))


@routes.get("/v1/videos/{id}")
async def retrieve(request: web.Request) -> web.Response:
    """The job as it stands."""
    service = request.app[SERVICE]
    return web.json_response(_video(service.jobs.get("video", request.match_info["id"]), service.model_id))


@routes.get("/v1/videos/{id}/content")
async def content(request: web.Request) -> web.StreamResponse:
    """The file, with ranges; `variant` is `video` or an output's number."""
    job = request.app[SERVICE].jobs.get("video", request.match_info["id"])
    if job.status != "completed":
        reason = job.error.message if job.error is not None else f"it is {job.status}, {job.progress} %"
        raise NotFound(f"video {job.id!r} has no content: {reason}", "id")
    variant = request.query.get("variant", "video")
    names = {"video": 0, **{str(index): index for index in range(len(job.paths))}}
    if variant not in names:
        raise NotFound(f"variant: {variant!r} is not one of {', '.join(names)}", "variant")
    path = job.paths[names[variant]]
    if not await anyio.Path(path).is_file():
        raise NotFound(f"video {job.id!r}: its file has been removed", "id")
    return web.FileResponse(path, headers={"Content-Type": media.FORMATS["mp4"].media_type})


def _length(fields: VideoFields, sampling: dict[str, Any], service: Service) -> dict[str, int]:
    """Frames for `seconds`, at the request's rate or the one it will get."""
    if fields.seconds is None:
        return {}
    if sampling.get("num_frames") is not None:
        raise BadRequest("seconds: num_frames is given too; give one of them", "seconds")
    fps = sampling.get("fps") or service.default("fps")
    return {"num_frames": fields.seconds * fps} if isinstance(fps, int) else {}  # a wrong fps is told by params


def _write(params: SamplingParams, result: Media, storage: LocalStorage, name: str, model: str) -> Path:
    with storage.create(name) as part:
        media.encode(
            part,
            "mp4",
            result.frames.array,
            fps=result.fps,
            quality=media.file_quality("mp4", params.output_quality, params.output_compression),
            metadata=media.describe(params, model),
            x264_preset=params.x264_preset,
        )
    return storage.path(name)


def _video(job: Job, model: str) -> dict[str, Any]:
    params = job.params
    return {
        "id": job.id,
        "object": "video",
        "model": model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at if job.status == "completed" else None,
        "expires_at": None,
        "prompt": params.prompt,
        "size": f"{params.width}x{params.height}",
        "seconds": f"{params.num_frames / params.fps:g}",
        "fps": params.fps,
        "num_frames": params.num_frames,
        "num_outputs": params.num_outputs_per_prompt,
        "seeds": job.seeds,
        "warnings": job.notes,
        "remixed_from_video_id": None,
        "error": _error(job.error),
    }


def _error(error: SgldError | None) -> dict[str, Any] | None:
    return {"code": error.code, "message": error.message} if error is not None else None
