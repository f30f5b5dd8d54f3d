"""Webhooks between a real server, a real receiver on loopback and the real `openai` client."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sgld.errors import BadRequest, NotFound, OutputError
from sgld.server.http.auth import KEYS, Identity, Key, Keys, authenticate
from sgld.server.http.errors import answer_errors
from sgld.server.http.fetch import Fetcher
from sgld.server.jobs.sqlite import Journal
from sgld.server.jobs.webhooks import DELAYS_S, DELIVERY, EVENT_TYPES, MAX_ENDPOINTS, Webhooks
from sgld.server.routes.webhooks import WEBHOOKS, routes, view_with_secret

ALICE, BOB = "alice-secret-key-1", "bob-secret-key-22"
COMPLETED, FAILED = EVENT_TYPES


@attrs.frozen
class Delivery:
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """A user's server; it answers `statuses` in turn, then 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: asyncio.Queue[Delivery] = asyncio.Queue()
        self.hold: asyncio.Event | None = None

    async def take(self, request: web.Request) -> web.Response:
        self.got.put_nowait(Delivery(request.path, dict(request.headers), await request.read()))
        if self.hold is not None:
            await self.hold.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else {})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.take)
        return app

    async def next(self) -> Delivery:
        async with asyncio.timeout(10):
            return await self.got.get()


@attrs.frozen
class World:
    webhooks: Webhooks
    receiver: Receiver
    hook: str  # the receiver's URL
    api: str

    def client(self, key: str = ALICE) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.api}/v1", max_retries=0)


async def serve(app: web.Application) -> TestServer:
    server = TestServer(app)
    await server.start_server(shutdown_timeout=0.1)
    return server


def make_app(webhooks: Webhooks) -> web.Application:
    app = web.Application(middlewares=[answer_errors, authenticate])
    digests = {key.partition("-")[0]: hashlib.sha256(key.encode()).digest() for key in (ALICE, BOB)}
    app[KEYS] = Keys(tuple(Key(Identity(name, admin=False), digest) for name, digest in digests.items()))
    app[WEBHOOKS] = webhooks
    app.add_routes(routes)
    return app


@pytest.fixture
async def world() -> AsyncIterator[World]:
    receiver = Receiver()
    async with Fetcher(True) as fetcher:
        webhooks = Webhooks(fetcher, delays_s=(0.01, 0.02, 0.03, 0.04))
        theirs, ours = await serve(receiver.app()), await serve(make_app(webhooks))
        yield World(webhooks, receiver, str(theirs.make_url("/hook")), str(ours.make_url("")).rstrip("/"))
        await webhooks.close(0)
        await ours.close()
        await theirs.close()


def tell(webhooks: Webhooks, owner: str, type: str, object_id: str) -> None:
    """As a job's end does it, less the journal."""
    webhooks.send(webhooks.due(owner, type, object_id))


async def refused(call: Awaitable[Any], status: int = 400) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as error:
        await call
    assert error.value.status_code == status
    body: dict[str, Any] = dict(error.value.body)  # type: ignore[call-overload]
    return body


async def test_the_client_creates_changes_and_deletes(world: World) -> None:
    async with world.client() as client:
        before = int(time.time())
        made = await client.webhooks.create(name="mine", url=world.hook, event_types=[COMPLETED])
        assert made.object == "webhook_endpoint" and before <= made.created_at <= time.time()
        assert (made.name, made.url, made.event_types) == ("mine", world.hook, [COMPLETED])
        assert made.signing_secret.startswith("whsec_")
        assert len(base64.b64decode(made.signing_secret[6:], validate=True)) == 24
        assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"

        seen = await client.webhooks.retrieve(made.id)
        assert seen.to_dict() == {key: value for key, value in made.to_dict().items() if key != "signing_secret"}
        changed = await client.webhooks.update(made.id, event_types=[FAILED, COMPLETED])
        assert (changed.name, changed.url, changed.event_types) == ("mine", world.hook, [FAILED, COMPLETED])
        assert "signing_secret" not in changed.to_dict()

        rotated = await client.webhooks.rotate_secret(made.id)
        assert rotated.signing_secret != made.signing_secret
        assert (await client.webhooks.event_types.list()).data == list(EVENT_TYPES)

        gone = await client.webhooks.delete(made.id)
        assert gone.to_dict() == {"id": made.id, "object": "webhook_endpoint.deleted", "deleted": True}
        for call in (
            client.webhooks.retrieve,
            client.webhooks.delete,
            client.webhooks.rotate_secret,
            client.webhooks.update,
        ):
            assert (await refused(call(made.id), 404))["code"] == "not_found"
        await refused(client.webhooks.test(made.id, event_type=COMPLETED), 404)


async def test_pages_with_the_newest_first(world: World) -> None:
    async with world.client() as client:
        made = [(await client.webhooks.create(name=str(i), url=world.hook, event_types=[FAILED])).id for i in range(5)]
        page = await client.webhooks.list(limit=2)
        assert [endpoint.id for endpoint in page.data] == [made[4], made[3]] and page.has_more
        assert [endpoint.id async for endpoint in client.webhooks.list(limit=2)] == made[::-1]
        assert [endpoint.id async for endpoint in client.webhooks.list(after=made[0])] == []
        assert "signing_secret" not in page.data[0].to_dict()
        await refused(client.webhooks.list(after="we_none"), 404)  # type: ignore[arg-type]
        for query in ({"limit": "0"}, {"limit": "101"}, {"limit": "two"}, {"limit": "1e1"}):
            assert (await refused(client.webhooks.list(extra_query=query)))["param"] == "limit"  # type: ignore[arg-type]
        unknown = await refused(client.webhooks.list(extra_query={"limt": 3}))  # type: ignore[arg-type]
        assert unknown["code"] == "unknown_parameter" and "did you mean limit?" in unknown["message"]


async def test_a_key_sees_only_its_own(world: World) -> None:
    async with world.client(ALICE) as alice, world.client(BOB) as bob:
        hers = await alice.webhooks.create(name="hers", url=f"{world.hook}/alice", event_types=[COMPLETED])
        await bob.webhooks.create(name="his", url=f"{world.hook}/bob", event_types=[COMPLETED])
        absent = await refused(bob.webhooks.retrieve("we_none"), 404)
        for call in (bob.webhooks.retrieve, bob.webhooks.delete, bob.webhooks.rotate_secret, bob.webhooks.update):
            told = await refused(call(hers.id), 404)
            assert told["message"] == absent["message"].replace("we_none", hers.id)
        assert [endpoint.name async for endpoint in bob.webhooks.list()] == ["his"]
        assert [endpoint.name async for endpoint in alice.webhooks.list()] == ["hers"]
        tell(world.webhooks, "bob", COMPLETED, "video_1")
        assert (await world.receiver.next()).path == "/hook/bob"
        assert (await alice.webhooks.retrieve(hers.id)).name == "hers"
    async with world.client("nobody-knows-this-key") as stranger:
        await refused(stranger.webhooks.list(), 401)  # type: ignore[arg-type]
    await world.webhooks.close()
    assert world.receiver.got.empty()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"nmae": "x"}, "nmae", "did you mean name?"),
        ({"signing_secret": "whsec_mine"}, "signing_secret", "unknown"),
        ({"owner": "bob"}, "owner", "unknown"),
        ({"name": 7}, "name", "7 is not a valid text"),
        ({"name": ""}, "name", "1 to 200"),
        ({"name": "x" * 201}, "name", "1 to 200"),
        ({"event_types": "video.completed"}, "event_types", "list of text"),
        ({"event_types": []}, "event_types", "at least one"),
        ({"event_types": [FAILED, FAILED]}, "event_types", "each once"),
        ({"event_types": ["video.complete"]}, "event_types", "did you mean video.completed?"),
        ({"event_types": ["image.completed"]}, "event_types", "is not one of video.completed, video.failed"),
        ({"url": "ftp://example.com/"}, "url", "an http or https URL is needed"),
        ({"url": "file:///etc/passwd"}, "url", "an http or https URL is needed"),
        ({"url": "data:image/png;base64,AAAA"}, "url", "an http or https URL is needed"),
        ({"url": "http://me:hush@example.com/"}, "url", "user name or password"),
    ],
)
async def test_wrong_values_are_named(world: World, body: dict[str, Any], param: str, words: str) -> None:
    async with world.client() as client:
        good = {"name": "mine", "url": world.hook, "event_types": [COMPLETED]}
        path, made = "/webhook_endpoints", await client.webhooks.create(**good)  # type: ignore[arg-type]
        told = await refused(client.post(path, body={**good, **body}, cast_to=object))
        assert told["param"] == param and words in told["message"] and "hush" not in told["message"]
        assert await refused(client.post(f"{path}/{made.id}", body=body, cast_to=object)) == told
        assert len([endpoint async for endpoint in client.webhooks.list()]) == 1
        for name in good:
            lacking = {key: value for key, value in good.items() if key != name}
            told = await refused(client.post(path, body=lacking, cast_to=object))
            assert told["param"] == name and told["message"].startswith(f"{name}: is missing")


@pytest.mark.parametrize("text", [b"{", b"[]", b"null", b"\xff", b"[" * 10_000, b'"x"', b"1"])
async def test_a_body_that_is_no_object(world: World, text: bytes) -> None:
    async with world.client() as client:
        await refused(client.post("/webhook_endpoints", content=text, cast_to=object))
        told = await refused(client.post("/webhook_endpoints", content=b" " * 2**21, cast_to=object), 413)
        assert told["code"] == "too_large"


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "[::1]", "[::ffff:10.0.0.1]", "localhost", "169.254.169.254"])
async def test_private_urls_are_refused_at_creation(host: str) -> None:
    async with Fetcher(False) as fetcher:
        webhooks = Webhooks(fetcher)
        with pytest.raises(BadRequest, match="cannot be reached"):
            await webhooks.create("", "x", f"http://{host}:1234/hook", [COMPLETED])
        endpoint = await webhooks.create("", "x", "https://8.8.8.8/hook", [COMPLETED])
        with pytest.raises(BadRequest, match="cannot be reached"):
            await webhooks.update("", endpoint.id, url=f"http://{host}/")
        assert webhooks.get("", endpoint.id).url == "https://8.8.8.8/hook"


async def test_delivery_obeys_allow_private_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that was made when private addresses were allowed."""
    async with Fetcher(False) as strict:
        made = await world.webhooks.create("", "x", world.hook, [COMPLETED])
        careful = Webhooks(strict, delays_s=())
        careful._endpoints[made.id] = made
        tell(careful, "", COMPLETED, "video_1")
        await careful.close()
        with pytest.raises(BadRequest):
            await careful.test("", made.id, COMPLETED)
    assert "not public" in caplog.text and world.receiver.got.empty()


async def test_the_client_accepts_the_signature(world: World) -> None:
    async with world.client() as client:
        made = await client.webhooks.create(name="x", url=world.hook, event_types=[COMPLETED])
        other = await client.webhooks.create(name="y", url=f"{world.hook}/other", event_types=[FAILED])
        tell(world.webhooks, "alice", COMPLETED, "video_17")
        got = await world.receiver.next()

        client.webhooks.verify_signature(got.body, got.headers, secret=made.signing_secret)
        event = client.webhooks.unwrap(got.body, got.headers, secret=made.signing_secret)
        assert (event.type, event.data.id, event.object) == (COMPLETED, "video_17", "event")  # type: ignore[union-attr, comparison-overlap]
        assert abs(event.created_at - time.time()) < 10
        body = json.loads(got.body)
        assert set(body) == {"id", "object", "created_at", "type", "data"}
        assert got.headers["webhook-id"] == body["id"] and got.headers["Content-Type"] == "application/json"

        for secret, payload in ((other.signing_secret, got.body), (made.signing_secret, got.body + b" ")):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.verify_signature(payload, got.headers, secret=secret)
        later = {**got.headers, "webhook-timestamp": str(int(got.headers["webhook-timestamp"]) + 1)}
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(got.body, later, secret=made.signing_secret)
    await world.webhooks.close()
    assert world.receiver.got.empty(), "the other endpoint did not ask for this event"


async def test_rotation_ends_the_old_secret_or_keeps_it_a_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.client() as client:
        made = await client.webhooks.create(name="x", url=world.hook, event_types=[COMPLETED])

        async def accepted() -> list[bool]:
            tell(world.webhooks, "alice", COMPLETED, "video_1")
            got = await world.receiver.next()
            fits = []
            for secret in secrets:
                try:
                    client.webhooks.verify_signature(got.body, got.headers, secret=secret)
                    fits.append(True)
                except openai.InvalidWebhookSignatureError:
                    fits.append(False)
            return fits

        secrets = [made.signing_secret]
        secrets.append((await client.webhooks.rotate_secret(made.id)).signing_secret)
        assert await accepted() == [False, True]
        kept = await client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        secrets.append(kept.signing_secret)
        assert await accepted() == [False, True, True]
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 24 * 3600 + 1)
        assert await accepted() == [False, False, True]
        bare = client.post(f"/webhook_endpoints/{made.id}/rotate_secret", cast_to=object)
        assert isinstance(await bare, dict), "no body is needed"


@pytest.mark.parametrize("failures", [[500], [302, 404, 429, 503]])
async def test_a_delivery_is_tried_again(world: World, failures: list[int]) -> None:
    """The same event each time, signed anew; redirects are not followed."""
    world.receiver.statuses = [*failures, 200]
    endpoint = await world.webhooks.create("me", "x", world.hook, [FAILED])
    tell(world.webhooks, "me", FAILED, "video_1")
    got = [await world.receiver.next() for _ in range(len(failures) + 1)]
    while world.webhooks._deliveries:
        await asyncio.sleep(0.01)
    assert world.receiver.got.empty()
    assert len({(each.path, each.body, each.headers["webhook-id"]) for each in got}) == 1
    for each in got:
        openai.OpenAI(api_key="x").webhooks.verify_signature(each.body, each.headers, secret=endpoint.secret)


async def test_a_journal_that_fails_costs_no_try(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await Journal.open(tmp_path / "journal.db")
    await world.webhooks.load(journal)
    await world.webhooks.create("me", "x", world.hook, [FAILED])

    async def full(*_: object) -> None:
        raise OutputError("the disk is full", "output_path")

    monkeypatch.setattr(journal, "put", full)
    world.receiver.statuses = [500, 500]
    tell(world.webhooks, "me", FAILED, "video_1")
    for _ in range(3):
        await world.receiver.next()
    while world.webhooks._deliveries:
        await asyncio.sleep(0.01)
    assert caplog.text.count("a try is not in the journal") == 2
    await journal.close()


async def test_five_tries_and_no_more(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The log says which endpoint and why, and neither the secret nor the URL."""
    world.receiver.statuses = [500] * 9
    endpoint = await world.webhooks.create("me", "x", f"{world.hook}/T0K3N", [FAILED])
    caplog.set_level(logging.DEBUG, "sgld")
    tell(world.webhooks, "me", FAILED, "video_1")
    while world.webhooks._deliveries:
        await asyncio.sleep(0.01)
    assert world.receiver.got.qsize() == 5
    assert f"webhook {endpoint.id}: try 5 of 5" in caplog.text and "it answered 500" in caplog.text
    assert "is not delivered" in caplog.text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("sgld"))
    assert endpoint.secret not in ours and endpoint.secret[6:] not in ours and "T0K3N" not in ours
    assert endpoint.secret not in repr(endpoint) and "T0K3N" not in repr(endpoint)
    assert endpoint.secret not in repr(view_with_secret(endpoint))


def test_the_back_off_is_exponential_and_outlives_a_restart_of_the_receiver() -> None:
    assert len(DELAYS_S) == 4 and all(b / a == 5 for a, b in pairwise(DELAYS_S))
    assert sum(DELAYS_S) / 2 > 60


async def test_nobody_listens(world: World, unused_tcp_port: int, caplog: pytest.LogCaptureFixture) -> None:
    await world.webhooks.create("me", "x", f"http://127.0.0.1:{unused_tcp_port}/", [FAILED])
    tell(world.webhooks, "me", FAILED, "video_1")
    while world.webhooks._deliveries:
        await asyncio.sleep(0.01)
    assert "try 5 of 5" in caplog.text and "cannot be reached" in caplog.text


async def test_a_job_does_not_wait_for_a_slow_receiver(world: World) -> None:
    world.receiver.hold = asyncio.Event()
    for i in range(3):
        await world.webhooks.create("me", str(i), f"{world.hook}/{i}", [COMPLETED])
    started = time.perf_counter()
    tell(world.webhooks, "me", COMPLETED, "video_1")
    assert time.perf_counter() - started < 0.1
    assert {(await world.receiver.next()).path for _ in range(3)} == {"/hook/0", "/hook/1", "/hook/2"}
    world.receiver.hold.set()


async def test_a_deleted_endpoint_gets_no_further_tries(world: World) -> None:
    world.receiver.hold, world.receiver.statuses = asyncio.Event(), [500]
    endpoint = await world.webhooks.create("me", "x", world.hook, [COMPLETED])
    tell(world.webhooks, "me", COMPLETED, "video_1")
    await world.receiver.next()
    await world.webhooks.delete("me", endpoint.id)
    world.receiver.hold.set()
    while world.webhooks._deliveries:
        await asyncio.sleep(0.01)
    assert world.receiver.got.empty()


async def test_closing_lets_deliveries_arrive_and_drops_retries(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with Fetcher(True) as fetcher:
        webhooks = Webhooks(fetcher, delays_s=(600.0,))
        for path in ("waiting", "slow"):
            await webhooks.create(path, "x", f"{world.hook}/{path}", [COMPLETED])
        world.receiver.statuses = [500]
        tell(webhooks, "waiting", COMPLETED, "video_1")
        await world.receiver.next()
        while "try 1 of 2" not in caplog.text:
            await asyncio.sleep(0.01)
        tell(webhooks, "slow", COMPLETED, "video_2")
        async with asyncio.timeout(5):
            await webhooks.close()
        assert (await world.receiver.next()).path == "/hook/slow"
        assert "broken off" not in caplog.text

        stuck = Webhooks(fetcher)
        world.receiver.hold = asyncio.Event()
        await stuck.create("", "x", world.hook, [COMPLETED])
        tell(stuck, "", COMPLETED, "video_3")
        await world.receiver.next()
        await stuck.close(0.1)
        assert "1 webhook deliveries were broken off" in caplog.text
        world.receiver.hold.set()


async def test_the_test_route_sends_a_sample(world: World) -> None:
    async with world.client() as client:
        made = await client.webhooks.create(name="x", url=world.hook, event_types=[COMPLETED])
        for status in (200, 500):
            world.receiver.statuses = [status]
            result = await client.webhooks.test(made.id, event_type=FAILED)
            assert (result.webhook_endpoint_id, result.event_type) == (made.id, FAILED)
            assert (result.status_code, result.success, result.object) == (status, True, "webhook_endpoint.test")
            got = await world.receiver.next()
            event = client.webhooks.unwrap(got.body, got.headers, secret=made.signing_secret)
            assert event.type == FAILED  # type: ignore[comparison-overlap]
        assert world.receiver.got.empty(), "a sample is sent once"
        assert (await refused(client.webhooks.test(made.id, event_type="video.done")))["param"] == "event_type"  # type: ignore[arg-type]


async def test_a_test_that_reaches_nobody(world: World, unused_tcp_port: int) -> None:
    async with world.client() as client:
        made = await client.webhooks.create(
            name="x", url=f"http://127.0.0.1:{unused_tcp_port}/", event_types=[COMPLETED]
        )
        told = await refused(client.webhooks.test(made.id, event_type=COMPLETED))
        assert told["param"] == "url" and "cannot be reached" in told["message"]


async def test_an_owner_has_a_limit(world: World) -> None:
    fields = ("x", world.hook, [COMPLETED])
    for _ in range(MAX_ENDPOINTS):
        await world.webhooks.create("me", *fields)
    with pytest.raises(BadRequest, match="which is the limit"):
        await world.webhooks.create("me", *fields)
    await world.webhooks.create("you", *fields)


@pytest.mark.parametrize("end", ["stopped", "killed"])
async def test_a_delivery_that_waits_goes_on_after_a_restart(world: World, tmp_path: Path, end: str) -> None:
    """With its webhook-id, its body and the tries it has left."""
    path = tmp_path / "journal.db"
    world.receiver.statuses = [500, 500, 500]
    async with Fetcher(True) as fetcher:
        journal = await Journal.open(path)
        first = Webhooks(fetcher, journal, delays_s=(0.01, 600.0, 0.01))
        await first.create("me", "x", world.hook, [FAILED])
        due = first.due("me", FAILED, "video_1")
        await journal.put_many({(DELIVERY, each.id): attrs.asdict(each) for each in due})
        first.send(due)
        tries = [await world.receiver.next(), await world.receiver.next()]
        while (await journal.all(DELIVERY))[0]["tries"] < 2:
            await asyncio.sleep(0.01)
        if end == "stopped":
            await first.close()
        for task in first._deliveries:
            task.cancel()
        await journal.close()

        journal = await Journal.open(path)
        (left,) = await journal.all(DELIVERY)
        assert left["tries"] == 2 and left["due"] > time.time() + 100, "it is not due yet"
        await journal.put(DELIVERY, due[0].id, {**left, "due": time.time() + 0.05})
        second = Webhooks(fetcher, delays_s=(0.01, 600.0, 0.01))
        await second.load(journal)
        tries += [await world.receiver.next(), await world.receiver.next()]
        while second._deliveries:
            await asyncio.sleep(0.01)
        assert world.receiver.got.empty(), "it was taken at the fourth try"
        assert len({(each.body, each.headers["webhook-id"]) for each in tries}) == 1
        assert await journal.all(DELIVERY) == []
        await journal.close()


async def test_a_try_that_a_kill_cuts_off_is_made_again(world: World, tmp_path: Path) -> None:
    world.receiver.hold = asyncio.Event()
    async with Fetcher(True) as fetcher:
        journal = await Journal.open(tmp_path / "journal.db")
        first = Webhooks(fetcher, journal)
        await first.create("me", "x", world.hook, [FAILED])
        due = first.due("me", FAILED, "video_1")
        await journal.put_many({(DELIVERY, each.id): attrs.asdict(each) for each in due})
        first.send(due)
        cut = await world.receiver.next()
        await first.close(0)
        second = Webhooks(fetcher)
        await second.load(journal)
        again = await world.receiver.next()
        assert (again.body, again.headers["webhook-id"]) == (cut.body, cut.headers["webhook-id"])
        world.receiver.hold.set()
        await second.close()
        assert await journal.all(DELIVERY) == []
        await journal.close()


async def test_what_comes_to_an_end_leaves_the_journal(world: World, tmp_path: Path) -> None:
    """Taken, used up, or its endpoint deleted: nothing is sent again after a restart."""
    async with Fetcher(True) as fetcher:
        journal = await Journal.open(tmp_path / "journal.db")
        webhooks = Webhooks(fetcher, journal, delays_s=(0.01,))
        for owner, statuses in (("taken", []), ("used up", [500, 500]), ("deleted", [500])):
            endpoint = await webhooks.create(owner, "x", world.hook, [COMPLETED])
            world.receiver.statuses = statuses
            due = webhooks.due(owner, COMPLETED, "video_1")
            await journal.put_many({(DELIVERY, each.id): attrs.asdict(each) for each in due})
            assert len(await journal.all(DELIVERY)) == 1
            webhooks.send(due)
            await world.receiver.next()
            if owner == "deleted":
                await webhooks.delete(owner, endpoint.id)
            while webhooks._deliveries:
                await asyncio.sleep(0.01)
            assert await journal.all(DELIVERY) == [], owner
        await journal.close()


async def test_endpoints_survive_in_the_journal(world: World, tmp_path: Path) -> None:
    async with Fetcher(True) as fetcher:
        journal = await Journal.open(tmp_path / "journal.db")
        first = Webhooks(fetcher, journal)
        a, b, c = [await first.create("me", name, world.hook, [FAILED]) for name in "abc"]
        await first.delete("me", b.id)
        a = await first.update("me", a.id, name="A")
        c = await first.rotate("me", c.id, keep_old=True)
        await journal.close()

        journal = await Journal.open(tmp_path / "journal.db")
        second = Webhooks(fetcher)
        await second.load(journal)
        assert second._of("me") == [a, c]
        tell(second, "me", FAILED, "video_1")
        await second.close()
        assert world.receiver.got.qsize() == 2
        await second.delete("me", a.id)
        await journal.close()
        with pytest.raises(Exception, match="closed"):
            await second.rotate("me", c.id, keep_old=False)
        assert second.get("me", c.id) == c, "what is not written down has not happened"
        with pytest.raises(NotFound):
            second.get("me", a.id)
