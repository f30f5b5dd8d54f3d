"""Probes, models, and what the model can do."""

from __future__ import annotations

from aiohttp import web

from sgld import __version__, inputs
from sgld.convert import fields_of, unstructure
from sgld.params import MAX_PROMPT_CHARACTERS, ModelInfo, SamplingParams
from sgld.server.http import fetch
from sgld.server.http.describe import Described
from sgld.server.http.schema import (
    Capabilities,
    Health,
    Limits,
    Liveness,
    LoadedModel,
    ModelCard,
    ModelList,
    ServerInfo,
    body,
)
from sgld.server.routes.json_schema import refused_fields, request_fields
from sgld.server.service import SERVICE, Service

routes = web.RouteTableDef()
LEGACY_TASKS = {
    "text-to-video": "T2V",
    "text-to-image": "T2I",
    "image-to-video": "I2V",
    "image-to-image": "I2I",
}


@routes.get("/liveness")
@Described(answer=Liveness)
async def liveness(_: web.Request) -> web.Response:
    """Answer 200 as long as the process lives."""
    return web.json_response(body(Liveness()))


@routes.get("/health")
@Described(answer=Health, unready=Health)
async def health(request: web.Request) -> web.Response:
    """Answer 200 once the model is loaded and warm; 503 before, during a restart of the workers, and at the end."""
    service = request.app[SERVICE]
    state: str = service.engine.state if service.warm else "loading"
    ready = service.ready and not service.jobs.draining
    state = "stopping" if service.jobs.draining else "ok" if ready else state
    answer = Health(state, __version__, service.engine.status.restarts)
    return web.json_response(body(answer), status=200 if ready else 503)


@routes.get("/v1/models")
@Described(answer=ModelList)
async def models(request: web.Request) -> web.Response:
    """List the one model that is served."""
    return web.json_response(body(ModelList([_card(request.app[SERVICE])])))


@routes.get("/v1/models/{id:.+}")
@Described(answer=ModelCard, id="id of the model, or the path it was loaded from; a slash may be %2F", errors=(404,))
async def model(request: web.Request) -> web.Response:
    """Return the model, by the id it is listed under or the path it was loaded from; a slash may be %2F."""
    service = request.app[SERVICE]
    service.check_model(request.match_info["id"])
    return web.json_response(body(_card(service)))


@routes.get("/models")
@Described(answer=LoadedModel, errors=(503,))
async def loaded_model(request: web.Request) -> web.Response:
    """Describe the loaded model by the names of the replaced system."""
    service = request.app[SERVICE]
    settings, info = service.settings, service.loaded()
    tasks = _tasks(info)
    answer = LoadedModel(
        model_path=settings.model.model_path,
        num_gpus=settings.parallel.num_gpus,
        task_type=tasks[0],
        supported_task_types=tasks,
        dit_precision=settings.dtypes.dit_precision or settings.dtypes.precision,
        vae_precision=settings.dtypes.vae_precision or settings.dtypes.precision,
        pipeline_name=info.name,
        pipeline_class=info.name,
    )
    return web.json_response(body(answer))


@routes.get("/server_info")
@Described(answer=ServerInfo)
async def server_info(request: web.Request) -> web.Response:
    """Describe the process: version, model and workers; no secret."""
    service = request.app[SERVICE]
    answer = ServerInfo(
        model_path=service.settings.model.model_path,
        served_model_name=service.model_id,
        tp_size=service.settings.parallel.tp_size,
        num_gpus=service.settings.parallel.num_gpus,
        degrees=service.engine.info.degrees if service.engine.info else {},
        attention=service.engine.info.attention if service.engine.info else {},
        version=__version__,
        state=service.engine.state,
        started_at=service.started_at,
        restarts=service.engine.status.restarts,
        queue_depth=service.jobs.scheduler.waiting,
        max_queue=service.settings.server.max_queue,
    )
    return web.json_response(body(answer))


@routes.get("/v1/capabilities")
@Described(answer=Capabilities, errors=(503,))
async def capabilities(request: web.Request) -> web.Response:
    """Describe the model: tasks, fields with defaults and ranges, limits, and refused fields with the reason."""
    service = request.app[SERVICE]
    info = service.loaded()
    refused = refused_fields(SamplingParams, info)
    hidden = refused.keys() | set(info.left_open) - service.sampling.keys()
    answer = Capabilities(
        model=service.model_id,
        name=info.name,
        kind=info.kind,
        audio=info.audio,
        tasks=list(info.tasks),
        size_multiple=info.size_multiple,
        frame_multiple=info.frame_multiple,
        components=list(info.components),
        lora_targets=list(info.lora_targets),
        defaults={name: unstructure(service.default(name)) for name in fields_of(SamplingParams) if name not in hidden},
        sampling=unstructure(service.sampling),
        fields=request_fields(SamplingParams, service),
        unsupported=refused,
        limits=_limits(service, info),
    )
    return web.json_response(body(answer))


def _tasks(info: ModelInfo) -> list[str]:
    """List the tasks by the names of the replaced system, the model's main task first."""
    own = [LEGACY_TASKS[task] for task in info.tasks if task in LEGACY_TASKS]
    return own or ["T2V" if info.kind == "video" else "T2I"]


def _limits(service: Service, info: ModelInfo) -> Limits:
    return Limits(
        max_queue=service.settings.server.max_queue,
        max_request_bytes=service.settings.server.max_request_mb * 2**20,
        max_prompt_characters=MAX_PROMPT_CHARACTERS,
        max_prompt_tokens=info.max_tokens,
        max_output_memory_bytes=info.memory.free if info.memory is not None else None,
        max_pictures=info.pictures.max,
        max_picture_pixels=inputs.MAX_PIXELS,
        max_fetched_bytes=fetch.MAX_BYTES,
        job_ttl_seconds=service.settings.server.job_ttl or None,
    )


def _card(service: Service) -> ModelCard:
    return ModelCard(service.model_id, service.started_at)
