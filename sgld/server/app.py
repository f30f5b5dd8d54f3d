"""The aiohttp application: routes, and the engine's life around them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from sgld.config import Settings
from sgld.engine.engine import Engine
from sgld.messages import Event, Progress
from sgld.params import resolve
from sgld.server import images, info, videos
from sgld.server.errors import answer_errors
from sgld.server.jobs import JobStore
from sgld.server.state import SERVICE, Service

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 * 2**20
WARMUP_PROMPT = "warm-up"


def make_app(
    settings: Settings, sampling: dict[str, Any] | None = None, engine: Engine | None = None
) -> web.Application:
    """The application for these settings; `sampling` are the operator's defaults for requests."""
    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)
    engine = engine or Engine(settings)
    jobs = JobStore(engine, Path(settings.output_path).expanduser())
    app[SERVICE] = Service(settings, sampling or {}, engine, jobs, int(time.time()))
    for module in (info, images, videos):
        app.add_routes(module.routes)
    app.cleanup_ctx.append(_running)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    """Stop the jobs and the engine when the server ends."""
    service = app[SERVICE]
    async with service.engine:
        yield
        await service.jobs.close()


async def load(service: Service) -> None:
    """Load the model, and make one small output so that the first client does not wait for it."""
    started = time.perf_counter()
    service.info = await service.engine.load(_log_progress)
    if service.settings.warmup == "server":
        small = {"prompt": WARMUP_PROMPT, "seed": 0, "num_inference_steps": 1, "num_frames": 1}
        params, _ = resolve({**service.sampling, **small}, service.info)
        await service.engine.generate("warmup", params, _log_progress)
    service.warm = True
    log.info("%s is ready after %.1f s", service.model_id, time.perf_counter() - started)


def _log_progress(event: Event) -> None:
    if isinstance(event, Progress) and event.step == event.total:
        log.debug("%s %d/%d", event.stage, event.step, event.total)
