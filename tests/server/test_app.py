"""The application in this process, over real ranks whose family fails on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sgld.engine.engine import Engine
from sgld.engine.group import Emit, WorkerGroup
from sgld.errors import SgldError
from sgld.params import ModelInfo
from sgld.server.app import load, make_app
from sgld.server.service import SERVICE
from sgld.settings import Settings
from tests import media_files
from tests.engine.ranks import run_faulty
from tests.engine.test_group import PATIENCE

Serve = Callable[..., Awaitable[TestServer]]


class Client:
    """JSON in and out of the application under test."""

    def __init__(self, app: web.Application, url: str, session: aiohttp.ClientSession):
        self.app, self.url, self.session = app, url, session

    async def post(self, path: str, fault: dict[str, Any], **fields: Any) -> tuple[int, Any]:
        body = {"prompt": json.dumps(fault), "num_inference_steps": 4, **fields}
        async with self.session.post(self.url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.json()


@pytest.fixture
async def client(aiohttp_server: Serve, tmp_path: Path) -> AsyncIterator[Client]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    names = {"model_path": "model", "output_path": "out", "input_save_path": "uploads"}
    settings = Settings.of(**{option: str(tmp_path / name) for option, name in names.items()}, warmup="off")
    app = make_app(settings, {"fps": 5}, Engine(settings, WorkerGroup(1, run_faulty, patience=PATIENCE)))
    server = await aiohttp_server(app)
    async with aiohttp.ClientSession() as session:
        yield Client(app, str(server.make_url("")).rstrip("/"), session)


async def test_before_the_model_is_loaded(client: Client) -> None:
    assert (await client.get("/health"))[0] == 503
    status, body = await client.post("/v1/images/generations", {})
    assert (status, body["error"]["code"]) == (503, "not_ready")


@pytest.mark.parametrize("warmup", ["server", "off"])
async def test_the_warm_up_is_a_generation_of_the_model(client: Client, warmup: str) -> None:
    """The failing family cannot read the warm-up's prompt: with a warm-up the load fails, without it does not."""
    service = client.app[SERVICE]
    service.settings = service.settings.evolve(warmup=warmup)
    if warmup == "off":
        await load(service)
    else:
        with pytest.raises(SgldError, match="JSONDecodeError"):
            await load(service)
    assert (await client.get("/health"))[0] == (200 if warmup == "off" else 503)


async def test_a_pipeline_that_refuses_the_warm_up_is_served(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """The same family, as a model that is made whole: it may well want more than one step."""
    service = client.app[SERVICE]
    service.settings = service.settings.evolve(warmup="server")
    load_engine = service.engine.load

    async def load_whole(emit: Emit) -> ModelInfo:
        return attrs.evolve(await load_engine(emit), backend="diffusers")

    service.engine.load = load_whole  # type: ignore[method-assign]
    await load(service)
    assert "warmup: JSONDecodeError" in caplog.text
    assert (await client.get("/health"))[0] == 200
    assert (await client.post("/v1/images/generations", {}))[0] == 200


async def test_a_client_that_goes_away_frees_the_workers(client: Client) -> None:
    await load(client.app[SERVICE])
    jobs = client.app[SERVICE].jobs
    endless = asyncio.create_task(client.post("/v1/images/generations", {"step_s": 0.1}, num_inference_steps=1000))
    async with asyncio.timeout(30):
        while not any(job.status == "in_progress" for job in jobs.index):
            await asyncio.sleep(0.01)
    endless.cancel()
    async with asyncio.timeout(30):  # the endless job would take 100 s
        status, body = await client.post("/v1/images/generations", {})
    assert (status, len(body["data"])) == (200, 1)
    assert [job.status for job in jobs.index] == ["completed"], "the job of the client that left is gone"


async def test_failures_are_typed_and_the_next_job_is_correct(client: Client, tmp_path: Path) -> None:
    await load(client.app[SERVICE])
    for fault, code in (("raise", "internal_error"), ("oom", "out_of_memory"), ("exit", "worker_died")):
        status, body = await client.post("/v1/images/generations", {"fault": fault, "step": 2})
        assert (status, body["error"]["code"]) == (500, code)
        assert body["error"]["message"] == body["detail"]
    status, video = await client.post("/v1/videos", {}, seed=5, num_outputs_per_prompt=2)
    assert (status, video["status"], video["fps"]) == (200, "queued", 5)
    async with asyncio.timeout(60):
        while video["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            _, video = await client.get(f"/v1/videos/{video['id']}")
    assert video["seeds"] == [5, 6]
    frames, fps = await asyncio.to_thread(media_files.decode, tmp_path / "out" / f"{video['id']}_1.mp4")
    assert frames.shape == (5, 16, 16, 3) and fps == 5


async def test_seconds_become_frames_the_model_can_make(client: Client) -> None:
    await load(client.app[SERVICE])
    status, video = await client.post("/v1/videos", {}, seconds=2)
    assert (status, video["num_frames"], video["seconds"]) == (200, 9, "1.8")
    assert video["warnings"] == ["num_frames: 10 becomes 9: this model makes 4k+1 frames"]


async def test_a_result_that_cannot_be_written_fails_the_job(client: Client, tmp_path: Path) -> None:
    await load(client.app[SERVICE])
    _, video = await client.post("/v1/videos", {"step_s": 0.1})
    (tmp_path / "out" / f"{video['id']}.mp4").mkdir()
    async with asyncio.timeout(60):
        while video["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            _, video = await client.get(f"/v1/videos/{video['id']}")
    assert video["error"]["code"] == "output_error"
    assert video["progress"] < 100
