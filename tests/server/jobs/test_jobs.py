"""Jobs over HTTP, in this process, over real ranks whose family is as slow as the prompt says."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from sgld.engine.engine import Engine
from sgld.engine.group import WorkerGroup
from sgld.server.app import load, make_app
from sgld.server.http.auth import Identity, Key, Keys, digest_of
from sgld.server.jobs import thumbnails
from sgld.server.jobs.repository import SqliteJobRepository
from sgld.server.jobs.service import JobService
from sgld.server.jobs.sqlite import Journal
from sgld.server.service import SERVICE
from sgld.settings import Settings
from tests.engine.ranks import run_faulty
from tests.engine.test_group import PATIENCE
from tests.server.jobs.test_sqlite import full_disk

SLOW = {"step_s": 0.1}  # 0.4 s a job
ALICE, BOB, ROOT = "alice-0123456789abcdef", "bob-0123456789abcdef", "root-0123456789abcdef"
KEYS = Keys(
    tuple(Key(Identity(key.split("-")[0], admin=key is ROOT), digest_of(key)) for key in (ALICE, BOB, ROOT)),
)


class Client:
    """JSON in and out of the application under test."""

    def __init__(self, app: web.Application, url: str, session: aiohttp.ClientSession):
        self.app, self.url, self.session = app, url, session

    async def call(self, method: str, path: str, key: str | None = None, **options: Any) -> tuple[int, Any]:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        async with self.session.request(method, self.url + path, headers=headers, **options) as answer:
            return answer.status, await answer.json() if answer.content_type == "application/json" else answer

    async def create(self, fault: dict[str, Any] | None = None, key: str | None = None, **fields: Any) -> Any:
        headers = fields.pop("headers", {})
        body = {"prompt": json.dumps(fault or {}), **fields}
        status, video = await self.call("POST", "/v1/videos", key, json=body, headers=headers)
        assert status == 200, video
        return video

    async def until(self, video: Any, *statuses: str, key: str | None = None) -> Any:
        async with asyncio.timeout(60):
            while video["status"] not in statuses:
                await asyncio.sleep(0.01)
                _, video = await self.call("GET", f"/v1/videos/{video['id']}", key)
        return video

    async def events(self, path: str, **headers: str) -> AsyncIterator[tuple[str, dict[str, Any], str | None]]:
        """Name, data and number of each event."""
        async with self.session.get(self.url + path, headers=headers) as answer:
            assert answer.status == 200
            async for event in _read_events(answer):
                yield event


async def _read_events(
    answer: aiohttp.ClientResponse,
) -> AsyncIterator[tuple[str, dict[str, Any], str | None]]:
    fields: dict[str, str] = {}
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields and fields["data"] != "[DONE]":
            yield fields.get("event", ""), json.loads(fields["data"]), fields.get("id")
            fields = {}


def journal_of(jobs: JobService) -> Journal:
    assert isinstance(jobs.ends.repository, SqliteJobRepository)
    return jobs.ends.repository.journal


Serve = Callable[..., Awaitable[TestServer]]
Start = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start(aiohttp_server: Serve, tmp_path: Path) -> AsyncIterator[Start]:
    """Start the application with these settings, its model loaded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    async with aiohttp.ClientSession() as session:

        async def run(keys: Keys | None = None, **own: Any) -> Client:
            names = {"model_path": "model", "output_path": "out", "input_save_path": "uploads"}
            given = {option: str(tmp_path / name) for option, name in names.items()}
            settings = Settings.of(**{**given, "warmup": "off", **own})
            engine = Engine(settings, WorkerGroup(1, run_faulty, patience=PATIENCE))
            app = make_app(settings, {}, engine, keys)
            server = await aiohttp_server(app)
            await load(app[SERVICE])
            return Client(app, str(server.make_url("")).rstrip("/"), session)

        yield run


async def test_a_queued_and_a_running_job_are_cancelled(start: Start, tmp_path: Path) -> None:
    client = await start()
    running = await client.create({"step_s": 0.1}, num_inference_steps=1000)
    queued, last = await client.create(), await client.create()
    running = await client.until(running, "in_progress")
    assert (await client.call("GET", f"/v1/videos/{last['id']}"))[1]["queue_position"] == 2
    async with client.session.get(f"{client.url}/v1/videos/{running['id']}") as answer:
        assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    for job in (queued, running):
        status, answer = await client.call("POST", f"/v1/videos/{job['id']}/cancel")
        assert (status, answer["status"], answer["error"]["code"]) == (200, "failed", "cancelled")
    assert (await client.until(last, "completed", "failed"))["status"] == "completed", "nobody else is touched"
    status, answer = await client.call("POST", f"/v1/videos/{last['id']}/cancel")
    assert (status, answer["status"]) == (200, "completed"), "an ended job stays as it is"
    assert [path.name for path in (tmp_path / "out").glob("video_*")] == [f"{last['id']}.mp4"]


async def test_delete_cancels_and_removes_the_files(start: Start, tmp_path: Path) -> None:
    client = await start()
    done = await client.until(await client.create(), "completed")
    running = await client.until(await client.create(SLOW, num_inference_steps=1000), "in_progress")
    for video in (done, running):
        status, gone = await client.call("DELETE", f"/v1/videos/{video['id']}")
        assert (status, gone["object"], gone["deleted"]) == (200, "video.deleted", True)
        assert gone["status"] == "deleted"
        assert (await client.call("GET", f"/v1/videos/{video['id']}"))[0] == 404
        assert (await client.call("DELETE", f"/v1/videos/{video['id']}"))[0] == 404
    assert list((tmp_path / "out").glob("video_*")) == []
    assert (await client.until(await client.create(), "completed"))["progress"] == 100


async def test_completion_and_cancel_have_one_winner(start: Start) -> None:
    """Cancels at every moment around the end: each job is either completed with a file or cancelled without one."""
    client = await start()
    ends = []
    for moment in range(24):
        video = await client.create()
        await asyncio.sleep(0.004 * moment)
        _, answer = await client.call("POST", f"/v1/videos/{video['id']}/cancel")
        status, _ = await client.call("GET", f"/v1/videos/{video['id']}/content")
        assert (answer["status"], status) in (("completed", 200), ("failed", 404))
        ends.append(answer["status"])
        assert (await client.call("GET", f"/v1/videos/{video['id']}"))[1]["status"] == answer["status"]
    assert set(ends) == {"completed", "failed"}, "the moments do not reach over both ends"


async def test_listing_pages(start: Start) -> None:
    client = await start()
    ids = [(await client.create())["id"] for _ in range(5)]
    status, page = await client.call("GET", "/v1/videos?limit=2")
    assert (status, page["object"], page["has_more"]) == (200, "list", True)
    assert [video["id"] for video in page["data"]] == [ids[4], ids[3]]
    assert (page["first_id"], page["last_id"]) == (ids[4], ids[3])
    _, rest = await client.call("GET", f"/v1/videos?limit=3&after={page['last_id']}")
    assert [video["id"] for video in rest["data"]] == ids[2::-1] and not rest["has_more"]
    _, oldest = await client.call("GET", "/v1/videos?order=asc&limit=1")
    assert oldest["data"][0]["id"] == ids[0]
    _, unknown = await client.call("GET", "/v1/videos?after=no")
    assert (unknown["data"], unknown["has_more"]) == ([], False)
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        status, error = await client.call("GET", f"/v1/videos?{query}")
        assert (status, error["error"]["param"]) == (400, param)
    assert (await client.call("GET", "/v1/videos?limt=3"))[1]["error"]["code"] == "unknown_parameter"


async def test_events_tell_the_whole_job_and_resume(start: Start) -> None:
    client = await start()
    before = await client.until(await client.create(SLOW), "in_progress")
    video = await client.create(SLOW)
    seen = [event async for event in client.events(f"/v1/videos/{video['id']}/events")]
    names = [name for name, _, _ in seen]
    assert names[0] == "queued" and names[-1] == "completed" and "progress" in names
    assert seen[0][1]["queue_position"] == 1
    percents = [data["progress"] for _, data, _ in seen]
    assert percents == sorted(percents) and percents[-1] == 100 and max(percents[:-1]) < 100
    numbers = [int(number or 0) for _, _, number in seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert all(data["type"] == f"video.{name}" and data["id"] == video["id"] for name, data, _ in seen)
    stages = [data["stage"] for name, data, _ in seen if name == "progress"]
    assert set(stages) >= {"encode", "denoise", "decode"}
    assert seen[-2][1]["eta_seconds"] is not None, "the first job has told how fast this machine is"

    path = f"/v1/videos/{video['id']}/events"
    again = [event async for event in client.events(path, **{"Last-Event-ID": str(numbers[-2])})]
    assert [(name, number) for name, _, number in again] == [("completed", str(numbers[-1]))]
    assert (await client.call("GET", path, headers={"Last-Event-ID": str(numbers[-1])}))[0] == 204
    assert (await client.call("GET", path, headers={"Last-Event-ID": "x"}))[0] == 400
    assert (await client.call("GET", f"/v1/videos/{before['id']}"))[1]["status"] == "completed"


async def test_resuming_in_the_middle_misses_and_repeats_nothing(start: Start) -> None:
    client = await start()
    video = await client.create(SLOW, num_inference_steps=10)
    path = f"/v1/videos/{video['id']}/events"
    got: list[int] = []
    while True:
        headers = {"Last-Event-ID": str(got[-1])} if got else {}
        name = ""
        async with asyncio.timeout(30), client.session.get(client.url + path, headers=headers) as answer:
            count = 0
            async for told, _, number in _read_events(answer):
                name = told
                got.append(int(number or 0))
                count += 1
                if count == 3:
                    break
        if name == "completed":
            break
    assert got == list(range(got[0], got[0] + len(got)))
    assert len(got) > 9


async def test_a_full_queue_is_refused_with_a_time(start: Start) -> None:
    client = await start(max_queue=2)
    first = await client.until(await client.create(SLOW, num_inference_steps=1000), "in_progress")
    for _ in range(2):
        await client.create()
    async with client.session.post(f"{client.url}/v1/videos", json={"prompt": "{}"}) as answer:
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await answer.json())["error"]["code"] == "queue_full"
    async with client.session.post(f"{client.url}/v1/images/generations", json={"prompt": "{}"}) as answer:
        assert answer.status == 429
    await client.call("DELETE", f"/v1/videos/{first['id']}")
    for _ in range(100):
        status, _ = await client.call("POST", "/v1/videos", json={"prompt": "{}"})
        if status == 200:
            break
        await asyncio.sleep(0.05)
    assert status == 200


async def test_an_idempotency_key_makes_one_job(start: Start) -> None:
    client = await start()
    key = {"Idempotency-Key": "order-1"}
    first, second = [await client.create(headers=key, seed=3) for _ in range(2)]
    assert first["id"] == second["id"]
    assert (await client.create(seed=3))["id"] != first["id"]
    body = {"prompt": "{}", "seed": 4}
    status, error = await client.call("POST", "/v1/videos", json=body, headers=key)
    assert (status, error["error"]["param"]) == (400, "Idempotency-Key")
    status, _ = await client.call("POST", "/v1/videos", json=body, headers={"Idempotency-Key": "x" * 256})
    assert status == 400


async def test_an_idempotency_key_belongs_to_one_address(start: Start) -> None:
    client = await start()
    first, other = [await client.create(seed=seed) for seed in (1, 2)]
    options: dict[str, Any] = {"json": {"prompt": "{}"}, "headers": {"Idempotency-Key": "remix"}}
    status, remix = await client.call("POST", f"/v1/videos/{first['id']}/remix", **options)
    assert (status, remix["remixed_from_video_id"]) == (200, first["id"])
    assert (await client.call("POST", f"/v1/videos/{first['id']}/remix", **options))[1]["id"] == remix["id"]
    for path in (f"/v1/videos/{other['id']}/remix", "/v1/videos"):
        status, error = await client.call("POST", path, **options)
        assert (status, error["error"]["param"]) == (400, "Idempotency-Key"), path


@contextmanager
def busy(folder: Path) -> Iterator[None]:
    """Another process holds the journal: writes wait."""
    with closing(sqlite3.connect(folder / "out" / ".sgld" / "journal.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos"])
async def test_a_repeat_does_not_hang_on_a_request_that_was_given_up(start: Start, tmp_path: Path, path: str) -> None:
    """The first client leaves before its job is in the journal; the second one's job is its own, and is made."""
    client = await start()
    store = client.app[SERVICE].jobs
    options: dict[str, Any] = {"json": {"prompt": "{}", "seed": 1}, "headers": {"Idempotency-Key": "given up"}}
    async with asyncio.timeout(20):
        with busy(tmp_path):
            first = asyncio.create_task(client.call("POST", path, **options))
            while not store.admitting:
                await asyncio.sleep(0.01)
            (given_up,) = store.admitting
            second = asyncio.create_task(client.call("POST", path, **options))
            await asyncio.sleep(0.1)
            assert not second.done(), "it is not told of a job that is not yet kept"
            first.cancel()
            while given_up in store.index:
                await asyncio.sleep(0.01)
        status, answer = await second
        assert status == 200 and answer["id"] != given_up.id and given_up.status == "deleted"
        if path == "/v1/videos":
            assert (await client.until(answer, "completed", "failed"))["status"] == "completed"
        while [record["id"] for record in await journal_of(store).all("job")] != [answer["id"]]:
            await asyncio.sleep(0.01)


async def test_repeats_on_a_full_disk_are_all_refused(start: Start) -> None:
    client = await start()
    options: dict[str, Any] = {"json": {"prompt": "{}", "seed": 1}, "headers": {"Idempotency-Key": "full"}}
    with full_disk(1):
        calls = [client.call("POST", "/v1/images/generations", **options) for _ in range(4)]
        async with asyncio.timeout(20):
            assert [status for status, _ in await asyncio.gather(*calls)] == [500] * 4
    assert (await client.call("POST", "/v1/images/generations", **options))[0] == 200


async def test_a_repeat_whose_picture_has_vanished_is_made_anew(start: Start, tmp_path: Path) -> None:
    client = await start()
    options: dict[str, Any] = {"json": {"prompt": "{}", "seed": 1}, "headers": {"Idempotency-Key": "vanished"}}
    path = "/v1/images/generations"
    first, same = [(await client.call("POST", path, **options))[1]["id"] for _ in range(2)]
    next((tmp_path / "out").glob("image_*")).unlink()
    status, answer = await client.call("POST", path, **options)
    assert first == same and status == 200 and answer["id"] != first


async def test_a_job_is_queued_until_a_worker_begins_it(start: Start) -> None:
    client = await start()
    engine, store = client.app[SERVICE].engine, client.app[SERVICE].jobs
    async with engine.steady():  # as a change of adapters does
        held, unwanted, behind = [await client.create() for _ in range(3)]
        await asyncio.sleep(0.2)
        places = [(await client.call("GET", f"/v1/videos/{each['id']}"))[1] for each in (held, unwanted, behind)]
        assert [(each["status"], each["queue_position"]) for each in places] == [("queued", i) for i in (1, 2, 3)]
        assert (store.scheduler.waiting, store.scheduler.running) == (3, 0)
        job = store.index.get(held["id"])
        assert (job.record.started_at, job.record.attempts) == (None, 0)
        await client.call("POST", f"/v1/videos/{unwanted['id']}/cancel")
        assert (await client.call("GET", f"/v1/videos/{behind['id']}"))[1]["queue_position"] == 2
        status, answer = await client.call("POST", f"/v1/videos/{held['id']}/cancel")
        assert (status, answer["error"]["code"]) == (200, "cancelled")
        assert (await client.call("GET", f"/v1/videos/{behind['id']}"))[1]["queue_position"] == 1
    assert (await client.until(behind, "completed", "failed"))["status"] == "completed"
    assert [store.index.get(each["id"]).record.attempts for each in (held, behind)] == [0, 1]


async def test_a_job_is_queued_while_the_workers_restart(start: Start) -> None:
    client = await start()
    engine = client.app[SERVICE].engine
    engine.kill()
    while engine.state != "restarting":
        await asyncio.sleep(0.001)
    video, seen = await client.create(), []
    while video["status"] not in ("completed", "failed"):
        seen.append((engine.state, video["status"]))
        _, video = await client.call("GET", f"/v1/videos/{video['id']}")
    assert ("restarting", "queued") in seen and ("restarting", "in_progress") not in seen
    assert video["status"] == "completed"


async def test_an_output_that_cannot_be_saved_ends_its_job(start: Start) -> None:
    """The second is broken off, and the journal hears of the end as soon as it can."""
    client = await start()
    store = client.app[SERVICE].jobs
    video = await client.until(await client.create({"step_s": 0.3}, n=3), "in_progress")
    while (await journal_of(store).all("job"))[0]["status"] == "queued":
        await asyncio.sleep(0.01)  # a client may see it before the journal has written it down
    with full_disk(1):
        video = await client.until(video, "completed", "failed")
    assert (video["status"], video["error"]["code"]) == ("failed", "output_error")
    async with client.session.get(f"{client.url}/metrics") as answer:
        assert 'sgld_stage_seconds_count{stage="denoise"} 1.0' in await answer.text()
    assert [record["status"] for record in await journal_of(store).all("job")] == ["in_progress"], "the control"
    await client.until(await client.create(), "completed")
    assert (await journal_of(store).all("job"))[0]["status"] == "failed"


async def test_a_delete_that_fails_removes_nothing(start: Start, tmp_path: Path) -> None:
    client = await start()
    video = await client.until(await client.create(), "completed")
    path = f"/v1/videos/{video['id']}"
    with full_disk(1):
        assert (await client.call("DELETE", path))[0] == 500
    assert (await client.call("GET", f"{path}/content"))[0] == 200
    assert [each["id"] for each in (await client.call("GET", "/v1/videos"))[1]["data"]] == [video["id"]]
    assert (await client.call("DELETE", path))[0] == 200
    assert list((tmp_path / "out").glob("video_*")) == []


async def test_a_silent_stream_says_that_it_lives(start: Start) -> None:
    """A comment comes within 10 s, for proxies that close what is silent."""
    client = await start()
    body = {"prompt": json.dumps(SLOW), "stream": True, "num_inference_steps": 1000}
    async with asyncio.timeout(9), client.session.post(f"{client.url}/v1/images/generations", json=body) as answer:
        assert (await answer.content.readline()).startswith(b":")


async def test_two_calls_with_one_key_wait_for_one_picture(start: Start) -> None:
    """The first of them goes away; the second still gets the picture."""
    client = await start()
    body = {"prompt": json.dumps(SLOW), "seed": 1, "num_inference_steps": 8}
    path, headers = "/v1/images/generations", {"Idempotency-Key": "picture"}
    first, second = [asyncio.create_task(client.call("POST", path, json=body, headers=headers)) for _ in range(2)]
    await asyncio.sleep(0.3)
    first.cancel()
    status, answer = await second
    assert status == 200 and len(answer["data"]) == 1
    status, again = await client.call("POST", path, json=body, headers=headers)
    assert (status, again["id"]) == (200, answer["id"])


async def test_keys_own_their_jobs(start: Start) -> None:
    client = await start(KEYS)
    assert (await client.call("GET", "/v1/videos"))[0] == 401
    assert (await client.call("GET", "/v1/videos", "nobody-0123456789"))[0] == 401
    assert (await client.call("GET", "/health"))[0] == 200
    video = await client.create(key=ALICE)
    assert (await client.until(video, "completed", key=ALICE))["status"] == "completed"
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/content"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("POST", "/remix"),
    ):
        status, _ = await client.call(method, f"/v1/videos/{video['id']}{path}", BOB, json={"prompt": "{}"})
        assert status == 404, (method, path)
    assert (await client.call("GET", "/v1/videos", BOB))[1]["data"] == []
    status, made = await client.call("POST", "/v1/images/generations", ALICE, json={"prompt": "{}"})
    assert status == 200
    statuses = [(await client.call("GET", f"/v1/images/{made['id']}/content", key))[0] for key in (BOB, ALICE, ROOT)]
    assert statuses == [404, 200, 200]
    assert [each["id"] for each in (await client.call("GET", "/v1/videos", ROOT))[1]["data"]] == [video["id"]]
    status, error = await client.call("POST", "/v1/videos", BOB, json={"prompt": "{}", "priority": "high"})
    assert (status, error["error"]["param"]) == (403, "priority")
    assert (await client.create(key=ROOT, priority="high"))["priority"] == "high"


async def test_keys_take_turns(start: Start) -> None:
    """Ten jobs of one key wait; another key's only one is made second, not eleventh."""
    client = await start(KEYS)
    running = await client.create(SLOW, key=ALICE, num_inference_steps=30)
    await client.until(running, "in_progress", key=ALICE)
    many = [await client.create(key=ALICE) for _ in range(10)]
    one = await client.create(key=BOB)
    assert one["queue_position"] <= 2
    await client.until(running, "completed", key=ALICE)
    await client.until(one, "completed", key=BOB)
    _, last = await client.call("GET", f"/v1/videos/{many[-1]['id']}", ALICE)
    assert last["status"] == "queued"


async def test_jobs_expire_with_their_files(start: Start, tmp_path: Path) -> None:
    client = await start(job_ttl=1)
    video = await client.until(await client.create(), "completed")
    assert video["expires_at"] == video["completed_at"] + 1
    assert list((tmp_path / "out").glob("video_*"))
    async with asyncio.timeout(10):
        while (await client.call("GET", f"/v1/videos/{video['id']}"))[0] != 404:
            await asyncio.sleep(0.1)
        while list((tmp_path / "out").glob("video_*")):
            await asyncio.sleep(0.05)


async def test_remix_keeps_everything_but_the_prompt(start: Start) -> None:
    client = await start()
    video = await client.create(seed=[4, 9], n=2, fps=5)
    status, remix = await client.call("POST", f"/v1/videos/{video['id']}/remix", json={"prompt": '{"step_s": 0.01}'})
    assert (status, remix["remixed_from_video_id"], remix["prompt"]) == (200, video["id"], '{"step_s": 0.01}')
    assert {name: remix[name] for name in ("seeds", "fps", "size")} == {
        name: video[name] for name in ("seeds", "fps", "size")
    }
    assert (await client.call("POST", f"/v1/videos/{video['id']}/remix", json={}))[0] == 400
    assert (await client.until(remix, "completed"))["num_outputs"] == 2


async def test_content_variants_and_ranges(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = thumbnails.read_tiles
    client = await start()
    video = await client.until(await client.create(n=2, seed=1), "completed")
    path = f"{client.url}/v1/videos/{video['id']}/content"
    async with client.session.get(path) as answer:
        whole, tag = await answer.read(), answer.headers["ETag"]
        assert answer.content_type == "video/mp4"
    async with client.session.get(path, headers={"Range": "bytes=4-11"}) as answer:
        assert (answer.status, await answer.read()) == (206, whole[4:12])
    async with client.session.get(path, headers={"If-None-Match": tag}) as answer:
        assert answer.status == 304
    decoded: list[int] = []

    def counted(*given: Any) -> Iterator[Image.Image]:
        decoded.append(1)
        return tiles(*given)

    monkeypatch.setattr(thumbnails, "read_tiles", counted)
    for variant in ("thumbnail", "spritesheet"):
        small = f"{path}?variant={variant}"
        async with client.session.get(small) as answer:
            assert (answer.status, answer.content_type) == (200, "image/webp")
            picture, tag = await answer.read(), answer.headers["ETag"]
            assert picture[8:12] == b"WEBP" and answer.headers["Accept-Ranges"] == "bytes"
            assert answer.headers["Last-Modified"]
        async with client.session.get(small, headers={"Range": "bytes=8-11"}) as answer:
            assert (answer.status, await answer.read()) == (206, b"WEBP")
        async with client.session.get(small, headers={"If-None-Match": tag}) as answer:
            assert answer.status == 304
    assert len(decoded) == 2, "each is made once"
    assert len(video["urls"]) == 2
    async with client.session.get(video["urls"][1]) as answer:
        assert answer.status == 200
    for variant in ("2", "-1", "../0", "audio"):
        assert (await client.call("GET", f"/v1/videos/{video['id']}/content?variant={variant}"))[0] == 404
    assert len(list((tmp_path / "out").glob("video_*"))) == 4
    await client.call("DELETE", f"/v1/videos/{video['id']}")
    assert list((tmp_path / "out").glob("video_*")) == []


async def test_images_stay_and_have_absolute_addresses(start: Start) -> None:
    client = await start()
    body = {"prompt": "{}", "n": 2, "response_format": "url"}
    headers = {"X-Forwarded-Host": "pictures.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/ai"}
    status, answer = await client.call("POST", "/v1/images/generations", json=body, headers=headers)
    assert status == 200
    path = f"/v1/images/{answer['id']}/content?variant=1"
    assert answer["data"][1]["url"] == f"https://pictures.example/ai{path}"
    status, picture = await client.call("GET", path)
    assert (status, picture.content_type) == (200, "image/png")
    assert (await client.call("GET", path.replace("variant=1", "variant=2")))[0] == 404


async def test_streamed_failures_reach_the_client(start: Start) -> None:
    client = await start()
    body = {"prompt": json.dumps({"fault": "oom", "step": 2}), "stream": True}
    async with client.session.post(f"{client.url}/v1/images/generations", json=body) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        text = await answer.text()
    assert '"code": "out_of_memory"' in text and text.endswith("data: [DONE]\n\n")
    body = {"prompt": "{}", "stream": True, "size": "15x15"}
    status, error = await client.call("POST", "/v1/images/generations", json=body)
    assert (status, error["error"]["param"]) == (400, "size"), "before the first byte an error has its status"


async def test_a_stream_whose_client_leaves_frees_the_workers(start: Start) -> None:
    client = await start()
    body = {"prompt": json.dumps(SLOW), "stream": True, "num_inference_steps": 1000}
    async with client.session.post(f"{client.url}/v1/images/generations", json=body) as answer:
        assert answer.status == 200
    async with asyncio.timeout(20):
        assert (await client.call("POST", "/v1/images/generations", json={"prompt": "{}"}))[0] == 200


async def test_metrics_count_what_happened(start: Start) -> None:
    client = await start()
    await client.until(await client.create(), "completed")
    await client.until(await client.create({"fault": "oom", "step": 1}), "failed")
    async with client.session.get(f"{client.url}/metrics") as answer:
        text = await answer.text()
    assert 'sgld_jobs_finished_total{kind="video"} 1.0' in text
    assert 'sgld_jobs_failed_total{code="out_of_memory",kind="video"} 1.0' in text
    assert 'route="/v1/videos/{id}"' in text
    assert 'sgld_stage_seconds_count{stage="denoise"} 1.0' in text
    assert 'sgld_upload_seconds_count{destination="local"} 1.0' in text


async def drop(client: Client, method: str, path: str) -> None:
    """Send a request and close the connection before its answer."""
    host, _, port = client.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_a_cancel_whose_client_has_gone_is_carried_out(start: Start, tmp_path: Path) -> None:
    client = await start()
    store = client.app[SERVICE].jobs
    running = await client.create(SLOW, num_inference_steps=1000)
    videos = [await client.create() for _ in range(12)]
    for video in videos:
        await drop(client, "POST", f"/v1/videos/{video['id']}/cancel")
    for video in videos:
        assert (await client.until(video, "failed"))["error"]["code"] == "cancelled"
        await drop(client, "DELETE", f"/v1/videos/{video['id']}")
    async with asyncio.timeout(20):
        while [job.id for job in store.index] != [running["id"]]:
            await asyncio.sleep(0.02)
        while len(await journal_of(store).all("job")) != 1:
            await asyncio.sleep(0.02)


async def test_a_cancelled_job_stays_cancelled_when_the_server_stops(start: Start, tmp_path: Path) -> None:
    """Cancels and the stop at the same moment: the journal says what the client was told."""
    client = await start()
    store = client.app[SERVICE].jobs
    await client.create(SLOW, num_inference_steps=1000)
    told = {}
    videos = [await client.create() for _ in range(8)]
    cancels = [asyncio.create_task(client.call("POST", f"/v1/videos/{video['id']}/cancel")) for video in videos]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(30):
        await store.close()
    for task in cancels:
        status, answer = await task
        told[answer.get("id")] = status
    kept = {record["id"]: record for record in await journal_of(store).all("job")}
    for video in videos:
        assert (kept[video["id"]]["status"] == "failed") == (video["id"] in told), kept[video["id"]]["status"]
    assert len(kept) == 9


async def test_a_job_that_is_handed_over_keeps_nobody_waiting(start: Start) -> None:
    client = await start()
    store = client.app[SERVICE].jobs
    video = await client.until(await client.create(SLOW, num_inference_steps=1000), "in_progress")
    await store.close()
    async with asyncio.timeout(5):
        await store.index.get(video["id"]).wait()
        status, error = await client.call("POST", f"/v1/videos/{video['id']}/cancel")
    assert (status, error["error"]["code"]) == (503, "not_ready")


async def test_a_job_ends_though_the_journal_does_not_answer(start: Start) -> None:
    client = await start()
    store = client.app[SERVICE].jobs
    video = await client.until(await client.create(SLOW), "in_progress")
    await journal_of(store).close()
    assert (await client.until(video, "completed", "failed"))["status"] == "completed"
    status, error = await client.call("POST", "/v1/videos", json={"prompt": "{}"})
    assert status == 500 and "journal" in error["detail"], "what cannot be kept is not taken"
    assert (await client.call("GET", "/v1/videos"))[1]["data"][0]["id"] == video["id"]


async def test_a_key_whose_job_failed_brings_a_new_one(start: Start) -> None:
    client = await start()
    key, body = {"Idempotency-Key": "again"}, {"prompt": json.dumps({"fault": "oom", "step": 1}), "seed": 1}
    ids = []
    for _ in range(2):
        _, video = await client.call("POST", "/v1/videos", json=body, headers=key)
        assert (await client.until(video, "failed"))["error"]["code"] == "out_of_memory"
        ids.append(video["id"])
    assert ids[0] != ids[1]


async def test_a_repeat_after_the_client_has_gone_gets_its_picture(start: Start) -> None:
    client = await start()
    body, headers = {"prompt": json.dumps(SLOW), "seed": 1}, {"Idempotency-Key": "gone"}
    path = "/v1/images/generations"
    for pause in (0.0, 0.003, 0.02):
        first = asyncio.create_task(client.call("POST", path, json=body, headers=headers))
        await asyncio.sleep(0.15)
        first.cancel()
        await asyncio.sleep(pause)
        status, answer = await client.call("POST", path, json=body, headers=headers)
        assert status == 200, answer
        headers = {"Idempotency-Key": f"gone {pause}"}


async def test_previews_come_in_order(start: Start) -> None:
    client = await start()
    video = await client.create(SLOW, previews=3)
    seen = [
        data["index"] async for name, data, _ in client.events(f"/v1/videos/{video['id']}/events") if "index" in data
    ]
    assert seen == [0, 1, 2]
