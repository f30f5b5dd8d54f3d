"""The aiohttp application: routes, and what lives and dies with it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from sgld.config import user_path
from sgld.engine.engine import Engine
from sgld.engine.lora import LoraPlan
from sgld.errors import SgldError, WorkerDied
from sgld.messages import Event, Progress
from sgld.resolve import resolve
from sgld.server.http import metrics
from sgld.server.http.auth import KEYS, Keys, authenticate, load_keys
from sgld.server.http.errors import answer_errors, name_request
from sgld.server.http.fetch import Fetcher
from sgld.server.http.metrics import METRICS, Metrics
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.repository import MemoryJobRepository, SqliteJobRepository
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.service import JobService
from sgld.server.jobs.sqlite import Journal
from sgld.server.jobs.webhooks import Webhooks
from sgld.server.routes import images, info, lora, openapi, videos, webhooks
from sgld.server.routes.openapi import DOCUMENT, DocumentCache
from sgld.server.routes.webhooks import WEBHOOKS
from sgld.server.service import SERVICE, Service
from sgld.settings import Settings
from sgld.storage.local import LocalResultStore

log = logging.getLogger(__name__)
WARMUP_PROMPT = "warm-up"
RESULTS = web.AppKey("results", LocalResultStore)
JOURNAL, ADAPTERS = Path(".sgld") / "journal.db", "adapters"


def make_app(
    settings: Settings,
    sampling: dict[str, Any] | None = None,
    engine: Engine | None = None,
    keys: Keys | None = None,
) -> web.Application:
    """Build the application. `sampling` are the operator's defaults for requests."""
    app = web.Application(
        middlewares=[metrics.count_requests, answer_errors, authenticate],
        client_max_size=settings.server.max_request_mb * 2**20,
    )
    engine = engine or Engine(settings)
    fetcher = Fetcher(settings.server.allow_private_urls)
    app[KEYS], app[METRICS] = keys if keys is not None else load_keys(settings), Metrics()
    app[WEBHOOKS] = Webhooks(Fetcher(settings.server.allow_private_urls))  # slow endpoints hold up nobody's pictures
    model = settings.model.served_model_name or settings.model.model_path
    store = LocalResultStore(_output_folder(settings))
    results = store.root if _has_journal(settings) else None
    upload_folder = uploads.folder(user_path(settings.storage.input_save_path, "input_save_path"), results)
    jobs = JobService(engine, Outputs(store, model, settings), upload_folder, settings, app[METRICS], app[WEBHOOKS])
    app[RESULTS], app[DOCUMENT] = store, DocumentCache()
    app[SERVICE] = Service(settings, sampling or {}, engine, jobs, fetcher, int(time.time()))
    app[METRICS].watch(lambda: jobs.scheduler.waiting, lambda: jobs.scheduler.running, lambda: engine.status.restarts)
    for module in (images, videos, lora, webhooks, info, openapi):
        app.add_routes(module.routes)
    if settings.server.enable_metrics:
        app.add_routes(metrics.routes)
    app.on_response_prepare.append(_name_request)
    app.on_shutdown.append(_release)
    app.cleanup_ctx.append(_running)
    return app


def _has_journal(settings: Settings) -> bool:
    return bool(settings.storage.output_path) and not settings.server.ephemeral


def _output_folder(settings: Settings) -> Path:
    """Return the folder of results: without an `output_path` a temporary one, deleted at the end."""
    if settings.storage.output_path:
        return user_path(settings.storage.output_path, "output_path")
    return Path(tempfile.gettempdir()) / f"sgld-{uuid.uuid4().hex}"


async def _running(app: web.Application) -> AsyncIterator[None]:
    """Open the journal, and at the end stop jobs, deliveries and workers in this order."""
    service, hooks = app[SERVICE], app[WEBHOOKS]
    keeps = _has_journal(service.settings)
    journal = await Journal.open(app[RESULTS].root / JOURNAL) if keeps else None
    async with contextlib.AsyncExitStack() as stack:
        if not service.settings.storage.output_path:
            await app[RESULTS].create_folder()
            stack.push_async_callback(app[RESULTS].delete_folder)
        if journal is not None:
            stack.push_async_callback(journal.close)
            await _keep_adapters(service, journal)
        else:
            stack.push_async_callback(uploads.sweep, (), service.jobs.uploads)
        stack.push_async_callback(service.fetcher.close)
        await hooks.load(journal)
        stack.push_async_callback(hooks.close)
        await stack.enter_async_context(service.engine)
        await service.jobs.restore(SqliteJobRepository(journal) if journal is not None else MemoryJobRepository())
        stack.push_async_callback(service.jobs.close)
        yield


async def _keep_adapters(service: Service, journal: Journal) -> None:
    """Restore the adapters of the server before this one, and store each change."""
    plans = await journal.restore(ADAPTERS, lambda record: LoraPlan.restore(record, service.settings))
    service.engine.adapters.persist(plans[0] if plans else None, partial(journal.put, ADAPTERS, ADAPTERS))


async def _release(app: web.Application) -> None:
    """End the jobs before connections are closed, so that waiting handlers can respond."""
    await app[SERVICE].jobs.close()


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    name_request(response)


async def load(service: Service) -> None:
    """Load the model, make one small output as a warm-up, and start the jobs."""
    started = time.perf_counter()
    service.info = await service.engine.load(_log_progress)
    if service.settings.server.warmup == "server" and service.info.pictures.min:
        log.info("warmup: none, for %s makes nothing without a picture", service.model_id)
    elif service.settings.server.warmup == "server":
        small = {"prompt": WARMUP_PROMPT, "seed": 0, "num_inference_steps": 1, "num_frames": 1}
        params = resolve({**service.sampling, **small}, service.info).params
        try:
            await service.engine.generate("warmup", [params], _log_progress)
        except WorkerDied as error:
            log.warning("%s while it warmed up; it is tried once more", error)
            await service.engine.generate("warmup", [params], _log_progress)
        except SgldError as error:
            if service.info.backend == "native":
                raise
            log.warning("warmup: %s; what clients ask for may work all the same", error)  # a pipeline may want more
    service.warm = True
    service.jobs.start()
    log.info("%s is ready after %.1f s", service.model_id, time.perf_counter() - started)


def _log_progress(event: Event) -> None:
    if isinstance(event, Progress) and event.step == event.total:
        log.debug("%s %d/%d", event.stage, event.step, event.total)
