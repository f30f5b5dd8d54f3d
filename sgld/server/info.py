"""Probes, models, and what the model can do."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sgld import __version__
from sgld.convert import plain
from sgld.errors import NotFound
from sgld.server.schema import ModelCard, ModelList, body
from sgld.server.state import SERVICE, Service

routes = web.RouteTableDef()


@routes.get("/liveness")
async def liveness(_: web.Request) -> web.Response:
    """200 as long as the process answers."""
    return web.json_response({"status": "ok"})


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    """200 once the model is loaded and warm, 503 before, while the workers restart, and while the server stops."""
    service = request.app[SERVICE]
    state = service.engine.state if service.warm else "loading"
    ready = service.ready and not service.jobs.draining
    state = "stopping" if service.jobs.draining else "ok" if ready else state
    return web.json_response(
        {"status": state, "version": __version__, "restarts": service.engine.group.restarts},
        status=200 if ready else 503,
    )


@routes.get("/v1/models")
async def models(request: web.Request) -> web.Response:
    """The one model that is served."""
    return web.json_response(body(ModelList([_card(request.app[SERVICE])])))


@routes.get("/v1/models/{id:.+}")
async def model(request: web.Request) -> web.Response:
    """That model, by the id it is listed under or the path it was loaded from; a slash may be written as %2F."""
    service = request.app[SERVICE]
    if request.match_info["id"] not in (service.model_id, service.settings.model_path):
        raise NotFound(f"model: {request.match_info['id']!r} is not served here; {service.model_id!r} is", "model")
    return web.json_response(body(_card(service)))


@routes.get("/models")
async def loaded_model(request: web.Request) -> web.Response:
    """What is loaded, by the names of the replaced system."""
    service = request.app[SERVICE]
    settings, info = service.settings, service.loaded()
    return web.json_response(
        {
            "model_path": settings.model_path,
            "num_gpus": settings.num_gpus,
            "task_type": "T2V" if info.kind == "video" else "T2I",
            "dit_precision": settings.dit_precision or settings.precision,
            "vae_precision": settings.vae_precision or settings.precision,
            "pipeline_name": info.name,
            "pipeline_class": info.name,
        }
    )


@routes.get("/server_info")
async def server_info(request: web.Request) -> web.Response:
    """The process: version, model and workers; no path, no secret."""
    service = request.app[SERVICE]
    return web.json_response(
        {
            "model_path": service.settings.model_path,
            "served_model_name": service.model_id,
            "tp_size": service.settings.tp_size,
            "num_gpus": service.settings.num_gpus,
            "version": __version__,
            "state": service.engine.state,
            "started_at": service.started_at,
            "restarts": service.engine.group.restarts,
            "queue_depth": service.jobs.waiting,
            "max_queue": service.settings.max_queue,
        }
    )


@routes.get("/v1/capabilities")
async def capabilities(request: web.Request) -> web.Response:
    """What this model takes: tasks, defaults, limits, and which fields it has no use for."""
    service = request.app[SERVICE]
    info = service.loaded()
    described: dict[str, Any] = plain(info)
    limits = {"max_queue": service.settings.max_queue, "max_request_bytes": service.settings.max_request_mb * 2**20}
    return web.json_response({"model": service.model_id, **described, "limits": limits, "sampling": service.sampling})


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_id, service.started_at)
