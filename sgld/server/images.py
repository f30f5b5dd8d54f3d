"""`POST /v1/images/generations`: pictures as base64 in the answer."""

from __future__ import annotations

import base64
import json

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
    media.check_encodable(
        fields.output_format,
        num_frames=1,
        height=params.height,
        width=params.width,
        fps=params.fps,
        metadata=media.describe(params, service.model_id),
    )
    pictures: list[str] = []

    async def finish(_: Job, each: SamplingParams, result: Media) -> None:
        picture = await anyio.to_thread.run_sync(_encode, each, result, fields.output_format, service.model_id)
        pictures.append(picture)

    job = service.jobs.submit("image", params, notes, finish)
    try:
        await service.jobs.result(job)
    finally:
        service.jobs.forget(job)
    answer = {
        "id": job.id,
        "created": job.created_at,
        "data": [{"b64_json": picture, "revised_prompt": params.prompt} for picture in pictures],
        "output_format": fields.output_format,
        "size": f"{params.width}x{params.height}",
        "seeds": job.seeds,
        "warnings": job.notes,
    }
    text = await anyio.to_thread.run_sync(json.dumps, answer)  # megabytes of base64
    return web.Response(text=text, content_type="application/json")


def _check(fields: ImageFields, sampling: dict[str, object]) -> None:
    require_prompt(sampling)
    if fields.response_format == "url":
        raise NotBuilt("response_format: url is not built yet in this version of sgld; b64_json is", "response_format")
    if sampling.get("num_frames") not in (None, 1):
        raise BadRequest(
            f"num_frames: {sampling['num_frames']!r} frames are a video; POST /v1/videos makes those", "num_frames"
        )


def _encode(params: SamplingParams, result: Media, output_format: str, model: str) -> str:
    quality = media.file_quality(output_format, params.output_quality, params.output_compression)
    metadata = media.describe(params, model)
    return base64.b64encode(
        media.encode_image(result.frames.array[0], output_format, quality=quality, metadata=metadata)
    ).decode()
