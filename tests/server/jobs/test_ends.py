"""Whose turn it is, and who hears of a job's end, over HTTP and real ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sgld.server.service import SERVICE
from tests.server.jobs.test_jobs import SLOW, Client, Start, start

__all__ = ["start"]


async def test_who_is_urgent_goes_first(start: Start) -> None:
    client = await start()
    running = await client.until(await client.create(SLOW, num_inference_steps=30), "in_progress")
    waiting = {priority: await client.create(priority=priority) for priority in ("low", "normal", "high")}
    shown = [(await client.call("GET", f"/v1/videos/{video['id']}"))[1] for video in waiting.values()]
    assert [video["queue_position"] for video in shown] == [3, 2, 1]
    began: dict[str, float] = {}
    for name, video in waiting.items():
        await client.until(video, "completed")
        job = client.app[SERVICE].jobs.index.get(video["id"])
        assert job is not None and job.record.started_at is not None
        began[name] = job.record.started_at
    assert sorted(began, key=began.__getitem__) == ["high", "normal", "low"]
    await client.until(running, "completed")


Receiver = tuple[str, asyncio.Queue[tuple[bytes, dict[str, str]]]]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """An address, and what is posted to it."""
    got: asyncio.Queue[tuple[bytes, dict[str, str]]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        got.put_nowait((await request.read(), dict(request.headers)))
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/", take)])
    async with TestServer(app) as server:
        yield str(server.make_url("/")), got


async def test_webhooks_hear_of_both_ends(start: Start, receiver: Receiver) -> None:
    """Signed, so that the stock client accepts them; a cancelled video has failed too."""
    address, got = receiver
    client = await start(allow_private_urls=True)
    body = {"name": "mine", "url": address, "event_types": ["video.completed", "video.failed"]}
    _, endpoint = await client.call("POST", "/v1/webhook_endpoints", json=body)
    told = {}
    for fault, end in (({}, "completed"), ({"fault": "raise", "step": 1}, "failed")):
        video = await client.until(await client.create(fault), "completed", "failed")
        async with asyncio.timeout(10):
            data, headers = await got.get()
        event = openai.OpenAI(api_key="x").webhooks.unwrap(data, headers, secret=endpoint["signing_secret"])
        told[end] = event.type, event.data.id == video["id"] and video["status"] == end
    assert told == {"completed": ("video.completed", True), "failed": ("video.failed", True)}


async def metric(client: Client, name: str) -> float:
    async with client.session.get(f"{client.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)


async def test_metrics_hear_of_cancels_and_restarts(start: Start) -> None:
    client = await start()
    names = 'sgld_jobs_cancelled_total{kind="video"}', "sgld_worker_restarts_total", "sgld_jobs_failed_total{"
    assert [await metric(client, name) for name in names] == [0, 0, 0]
    video = await client.until(await client.create(SLOW), "in_progress")
    assert (await client.call("POST", f"/v1/videos/{video['id']}/cancel"))[0] == 200
    video = await client.until(await client.create(SLOW, num_inference_steps=100), "in_progress")
    os.kill(client.app[SERVICE].engine.status.pids[0], signal.SIGKILL)
    failed = await client.until(video, "failed")
    assert failed["error"]["code"] == "worker_died"
    assert (await client.until(await client.create(), "completed"))["progress"] == 100
    assert [await metric(client, name) for name in names] == [1, 1, 1]
