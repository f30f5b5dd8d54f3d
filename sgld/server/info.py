"""Probes and models."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sgld import __version__
from sgld.errors import NotFound
from sgld.server.state import SERVICE, Service

routes = web.RouteTableDef()


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    """200 once the model is loaded and warm, 503 before, and while the workers restart."""
    service = request.app[SERVICE]
    state = service.engine.state if service.warm else "loading"
    return web.json_response(
        {"status": "ok" if service.ready else state, "version": __version__, "restarts": service.engine.group.restarts},
        status=200 if service.ready else 503,
    )


@routes.get("/v1/models")
async def models(request: web.Request) -> web.Response:
    """The one model that is served."""
    return web.json_response({"object": "list", "data": [_card(request.app[SERVICE])]})


@routes.get("/v1/models/{id:.+}")
async def model(request: web.Request) -> web.Response:
    """That model, by the id it is listed under; a slash may be written as %2F."""
    service = request.app[SERVICE]
    if request.match_info["id"] != service.model_id:
        raise NotFound(f"model: {request.match_info['id']!r} is not served here; {service.model_id!r} is", "model")
    return web.json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.model_id, "object": "model", "created": service.started_at, "owned_by": "sgld"}
