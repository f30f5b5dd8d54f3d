"""Prometheus metrics: one registry for each application, shown at `/metrics`. Labels take values of ours alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import anyio.to_thread
from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from sgld.messages import Timings
from sgld.server.http.describe import Described
from sgld.server.http.errors import CLIENT_GONE

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KINDS = ("image", "video")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED, OTHER_METHOD = "unmatched", "other"
REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)


class Metrics:
    """What the server counts. Touched by the loop alone; only rendering runs in a thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "sgld_http_requests", "Requests by route, method and status; 499: the client went away.",
            ("route", "method", "status"), registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "sgld_http_request_duration_seconds", "Seconds until a request was answered, streams until their end.",
            ("route", "method"), buckets=REQUEST_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._queued = Gauge("sgld_queue_depth", "Jobs that wait.", registry=registry)
        self._running = Gauge("sgld_jobs_running", "Jobs that the workers run.", registry=registry)
        self._restarts = Counter("sgld_worker_restarts", "Restarts of the group of workers.", registry=registry)
        self._finished = Counter("sgld_jobs_finished", "Jobs that completed, by kind.", ("kind",), registry=registry)
        self._cancelled = Counter("sgld_jobs_cancelled", "Jobs that were cancelled.", ("kind",), registry=registry)
        self._failed = Counter(
            "sgld_jobs_failed", "Jobs that failed, by error code.", ("kind", "code"), registry=registry
        )
        self._stage_seconds = Histogram(
            "sgld_stage_seconds", "Seconds of each stage of an output: encode, denoise, decode, save.", ("stage",),
            buckets=STAGE_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._upload_seconds = Histogram(
            "sgld_upload_seconds", "Seconds to encode a result and put it where it is kept.", ("destination",),
            buckets=STAGE_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._step_seconds = Histogram(
            "sgld_step_seconds", "Seconds of a denoising step; steps per second are rate(_count) / rate(_sum).",
            buckets=STEP_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._peak_memory = Gauge(
            "sgld_worker_peak_memory_bytes", "Peak memory of worker 0, as its last output told.", registry=registry
        )
        self._sources: dict[Gauge, Callable[[], int]] = {}
        self._count_restarts: Callable[[], int] = lambda: 0
        self._counted_restarts = 0
        for kind in KINDS:  # a counter that starts at 0 has a rate at its first event
            self._finished.labels(kind)
            self._cancelled.labels(kind)

    def watch(self, queued: Callable[[], int], running: Callable[[], int], restarts: Callable[[], int]) -> None:
        """Set the sources of the live values, read on the loop at every scrape; `restarts` never falls."""
        self._sources = {self._queued: queued, self._running: running}
        self._count_restarts = restarts

    def job_finished(self, kind: str) -> None:
        self._finished.labels(kind).inc()

    def job_failed(self, kind: str, code: str) -> None:
        """Count a failed job by the `code` of its SgldError."""
        self._failed.labels(kind, code).inc()

    def job_cancelled(self, kind: str) -> None:
        self._cancelled.labels(kind).inc()

    def stages(self, timings: Timings) -> None:
        """Record the timings that rank 0 measured of one output."""
        for name, milliseconds in timings.stages_ms.items():
            self.stage(name, milliseconds / 1e3)
        for milliseconds in timings.steps_ms:
            self._step_seconds.observe(milliseconds / 1e3)
        self._peak_memory.set(timings.peak_memory_bytes)

    def stage(self, name: str, seconds: float) -> None:
        """Record the time of one stage of an output."""
        self._stage_seconds.labels(name).observe(seconds)

    def saved(self, destination: str, seconds: float) -> None:
        """Record the time to save an output; `destination` is a kind of place, such as local."""
        self.stage("save", seconds)
        self._upload_seconds.labels(destination).observe(seconds)

    def requested(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, status).inc()
        self._request_seconds.labels(route, method).observe(seconds)

    def read_live(self) -> None:
        """Take over the values that others own."""
        for gauge, source in self._sources.items():
            gauge.set(source())
        restarts = self._count_restarts()
        self._restarts.inc(restarts - self._counted_restarts)
        self._counted_restarts = restarts


METRICS = web.AppKey("metrics", Metrics)
routes = web.RouteTableDef()


@routes.get("/metrics")
@Described(media=("text/plain", "application/openmetrics-text"))
async def show(request: web.Request) -> web.Response:
    """Show all metrics, in the text format of Prometheus or of OpenMetrics, as `Accept` asks."""
    metrics = request.app[METRICS]
    metrics.read_live()
    encode, content_type = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
    body = await anyio.to_thread.run_sync(encode, metrics.registry)  # reads /proc
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})


@web.middleware
async def count_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count and time every request; the outermost middleware, so that it sees what the client gets."""
    started = time.perf_counter()
    status = 500
    try:
        response = await handler(request)
        status = response.status
        return response
    except web.HTTPException as refused:
        status = refused.status
        raise
    except asyncio.CancelledError:
        status = CLIENT_GONE
        raise
    finally:
        method = request.method if request.method in METHODS else OTHER_METHOD
        request.app[METRICS].requested(_route(request), method, status, time.perf_counter() - started)


def _route(request: web.Request) -> str:
    """Return the route as declared, `/v1/videos/{id}`, never as called."""
    resource = request.match_info.route.resource
    return UNMATCHED if resource is None else resource.canonical
