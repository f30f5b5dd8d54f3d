"""`POST /v1/images/generations`: pictures as base64 in the answer."""

from __future__ import annotations

import base64

import anyio.to_thread
from aiohttp import web

from sgld import media
from sgld.errors import BadRequest, NotBuilt
from sgld.messages import Media
from sgld.params import SamplingParams
from sgld.server.body import ImageFields, read_body, require_prompt, split
from sgld.server.jobs import Job
from sgld.server.state import SERVICE

routes = web.RouteTableDef()


@routes.post("/v1/images/generations")
async def generate(request: web.Request) -> web.Response:
    """Make `n` pictures; the answer waits for them. A client that goes away cancels the job."""
    service = request.app[SERVICE]
    fields, sampling = split(await read_body(request, ImageFields), ImageFields)
    _check(fields, sampling)
    service.check_model(fields.model)
    params, notes = service.params({**sampling, "num_frames": 1})
    pictures: list[str] = []

    async def finish(job: Job) -> None:
        for made in job.made:
            pictures.append(await anyio.to_thread.run_sync(_encode, made, fields.output_format, service.model_id))

    job = service.jobs.submit("image", params, notes, finish)
    try:
        await service.jobs.result(job)
    finally:
        service.jobs.forget(job)
    return web.json_response(
        {
            "id": job.id,
            "created": job.created_at,
            "data": [{"b64_json": picture, "revised_prompt": params.prompt} for picture in pictures],
            "output_format": fields.output_format,
            "size": f"{params.width}x{params.height}",
            "seeds": job.seeds,
            "warnings": job.notes,
        }
    )


def _check(fields: ImageFields, sampling: dict[str, object]) -> None:
    require_prompt(sampling)
    if fields.response_format == "url":
        raise NotBuilt("response_format: url is not built yet in this version of sgld; b64_json is", "response_format")
    if sampling.get("num_frames") not in (None, 1):
        raise BadRequest(
            f"num_frames: {sampling['num_frames']!r} frames are a video; POST /v1/videos makes those", "num_frames"
        )


def _encode(made: tuple[SamplingParams, Media], output_format: str, model: str) -> str:
    params, result = made
    quality = media.file_quality(output_format, params.output_quality, params.output_compression)
    metadata = media.describe(params, model)
    return base64.b64encode(
        media.encode_image(result.frames.array[0], output_format, quality=quality, metadata=metadata)
    ).decode()
