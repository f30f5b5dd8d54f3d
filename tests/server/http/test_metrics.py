"""Metrics: what is counted, under which labels, and how it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sgld.errors import QueueFull
from sgld.messages import Timings
from sgld.server.http.errors import answer_errors
from sgld.server.http.files import send_file
from sgld.server.http.metrics import METRICS, Metrics, count_requests, routes

Client = TestClient[web.Request, web.Application]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    """An application with a route of each fate; a client that goes away cancels its handler."""

    async def video(request: web.Request) -> web.Response:
        return web.Response(text=request.match_info["id"])

    async def full(_: web.Request) -> web.Response:
        raise QueueFull("full")

    async def broken(_: web.Request) -> web.Response:
        raise ZeroDivisionError

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    async def file(request: web.Request) -> web.StreamResponse:
        return await send_file(request, tmp_path / request.match_info["name"], "video/mp4")

    app = web.Application(middlewares=[count_requests, answer_errors])
    app[METRICS] = Metrics()
    app.add_routes(routes)
    app.add_routes([web.get("/v1/videos/{id}", video), web.post("/v1/videos", full)])
    app.add_routes([web.get("/files/{name}", file)])
    app.add_routes([web.get("/broken", broken), web.get("/endless", endless)])
    async with TestClient(TestServer(app)) as client:
        yield client


async def scrape(client: Client) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status == 200 and answer.content_type == "text/plain"
    families = parse_text(await answer.text())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def requests(samples: Samples) -> dict[tuple[str, str, str], float]:
    return {
        (labels["route"], labels["method"], labels["status"]): count
        for (name, pairs), count in samples.items()
        if name == "sgld_http_requests_total" and (labels := dict(pairs))
    }


async def test_requests_are_counted_by_declared_route_method_and_status(client: Client) -> None:
    for i in range(3):
        await client.get(f"/v1/videos/video_{i}")
    await client.post("/v1/videos")
    await client.get("/broken")
    samples = await scrape(client)
    assert requests(samples) == {
        ("/v1/videos/{id}", "GET", "200"): 3,
        ("/v1/videos", "POST", "429"): 1,
        ("/broken", "GET", "500"): 1,
    }
    name = "sgld_http_request_duration_seconds"
    assert value(samples, f"{name}_count", route="/v1/videos/{id}", method="GET") == 3
    assert 0 < (value(samples, f"{name}_sum", route="/v1/videos/{id}", method="GET") or 0) < 5
    assert requests(await scrape(client))["/metrics", "GET", "200"] == 1, "a scrape counts itself afterwards"


async def test_files_are_counted_by_what_was_sent(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(range(100)) * 10_000)
    whole = await client.get("/files/a.mp4")
    assert len(await whole.read()) == 1_000_000
    conditions = {
        206: {"Range": "bytes=5-9"},
        304: {"If-None-Match": whole.headers["ETag"]},
        412: {"If-Match": '"another"'},
        416: {"Range": "bytes=1000000-"},
    }
    for status, headers in conditions.items():
        assert (await client.get("/files/a.mp4", headers=headers)).status == status
    assert (await client.get("/files/b.mp4")).status == 404
    head = await client.head("/files/a.mp4")
    assert (head.status, head.headers["Content-Length"]) == (200, "1000000")
    counted = requests(await scrape(client))
    assert counted == {("/files/{name}", "GET", str(status)): 1 for status in (200, *conditions, 404)} | {
        ("/files/{name}", "HEAD", "200"): 1
    }


async def test_a_file_whose_client_leaves(client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is neither a failure of the server nor answered twice."""
    with (tmp_path / "long.mp4").open("wb") as long:
        long.truncate(2**30)
    answer = await client.get("/files/long.mp4")
    await answer.content.read(10)
    answer.close()
    async with asyncio.timeout(10):
        while ("/files/{name}", "GET", "499") not in requests(await scrape(client)):
            await asyncio.sleep(0.01)
    assert caplog.text == ""


async def test_no_client_invents_a_label(client: Client) -> None:
    for path in ("/a", "/b", "/v1/videos/x/y"):
        await client.get(path)
    for method in ("MKCOL", "PROPFIND", "DELETE"):
        await client.request(method, "/v1/videos")
    assert requests(await scrape(client)) == {
        ("unmatched", "GET", "404"): 3,
        ("unmatched", "other", "405"): 2,
        ("unmatched", "DELETE", "405"): 1,
    }


async def test_a_client_that_goes_away_is_counted_so(client: Client) -> None:
    answer = await client.get("/endless")
    answer.close()
    async with asyncio.timeout(10):
        while ("/endless", "GET", "499") not in requests(await scrape(client)):
            await asyncio.sleep(0.01)


async def test_jobs_by_their_end(client: Client) -> None:
    samples = await scrape(client)
    assert value(samples, "sgld_jobs_finished_total", kind="video") == 0, "it is there before the first event"
    assert client.app is not None
    metrics = client.app[METRICS]
    metrics.job_finished("video")
    metrics.job_finished("video")
    metrics.job_failed("image", "out_of_memory")
    metrics.job_cancelled("image")
    samples = await scrape(client)
    assert value(samples, "sgld_jobs_finished_total", kind="video") == 2
    assert value(samples, "sgld_jobs_finished_total", kind="image") == 0
    assert value(samples, "sgld_jobs_failed_total", kind="image", code="out_of_memory") == 1
    assert value(samples, "sgld_jobs_cancelled_total", kind="image") == 1


async def test_stages_steps_and_memory(client: Client) -> None:
    assert client.app is not None
    metrics = client.app[METRICS]
    metrics.stages(Timings({"encode": 20, "denoise": 900, "decode": 80}, [200, 300, 400], 3 * 2**30))
    metrics.stages(Timings({"encode": 30, "denoise": 100, "decode": 20}, [100], 2**30))
    metrics.stage("save", 0.5)
    samples = await scrape(client)
    sums = {stage: value(samples, "sgld_stage_seconds_sum", stage=stage) for stage in ("encode", "denoise", "decode")}
    assert sums == pytest.approx({"encode": 0.05, "denoise": 1.0, "decode": 0.1})
    assert value(samples, "sgld_stage_seconds_count", stage="denoise") == 2
    assert value(samples, "sgld_stage_seconds_bucket", stage="save", le="0.5") == 1
    assert value(samples, "sgld_stage_seconds_bucket", stage="save", le="0.25") == 0
    assert value(samples, "sgld_step_seconds_count") == 4
    assert value(samples, "sgld_step_seconds_sum") == pytest.approx(1.0)
    assert value(samples, "sgld_worker_peak_memory_bytes") == 2**30


async def test_live_values_are_read_at_every_scrape(client: Client) -> None:
    assert client.app is not None
    state = {"queued": 3, "running": 1, "restarts": 0}
    client.app[METRICS].watch(lambda: state["queued"], lambda: state["running"], lambda: state["restarts"])
    samples = await scrape(client)
    assert value(samples, "sgld_queue_depth") == 3 and value(samples, "sgld_jobs_running") == 1
    state.update(queued=0, restarts=2)
    for _ in range(2):
        samples = await scrape(client)
        assert value(samples, "sgld_queue_depth") == 0 and value(samples, "sgld_jobs_running") == 1
        assert value(samples, "sgld_worker_restarts_total") == 2


async def test_memory_and_descriptors_of_this_process(client: Client) -> None:
    samples = await scrape(client)
    assert (value(samples, "process_resident_memory_bytes") or 0) > 10 * 2**20
    assert (value(samples, "process_open_fds") or 0) > 3


async def test_openmetrics_on_request(client: Client) -> None:
    answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.content_type == "application/openmetrics-text"
    names = {family.name for family in parse_openmetrics(await answer.text())}
    assert {"sgld_http_requests", "sgld_queue_depth", "process_open_fds"} <= names


async def test_applications_count_apart(client: Client) -> None:
    Metrics().job_failed("image", "internal_error")
    samples = await scrape(client)
    assert value(samples, "sgld_jobs_failed_total", kind="image", code="internal_error") is None
    async with aiohttp.ClientSession() as session, session.head(client.make_url("/metrics")) as answer:
        assert answer.status == 200
