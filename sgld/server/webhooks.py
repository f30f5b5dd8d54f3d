"""Webhooks: endpoints that are told, by a signed POST, when a video is completed or has failed.

The signature is that of Standard Webhooks 1.0, which `openai.webhooks` verifies. Endpoints are kept in the journal, and
deliveries until their end: those that wait for another try when the server stops go on after its restart.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import attrs
from aiohttp import web

from sgld.convert import knob, plain, shown, structure
from sgld.errors import BadRequest, NotFound, SgldError
from sgld.server.auth import OWNER
from sgld.server.body import read_body, read_query
from sgld.server.describe import BODY_ERRORS, Described
from sgld.server.fetch import Fetcher
from sgld.server.journal import Journal

log = logging.getLogger(__name__)
T = TypeVar("T")
DELIVERY = "webhook_delivery"  # its kind in the journal
EVENT_TYPES = ("video.completed", "video.failed")
DELAYS_S = (1.0, 5.0, 25.0, 125.0)  # before the second try, the third, ...
MAX_ENDPOINTS = 50  # of one owner
OLD_SECRET_S = 24 * 3600
CLOSING_S = 5.0

_KIND = "webhook_endpoint"
_SECRET_PREFIX, _SECRET_BYTES = "whsec_", 24
_NAME_CHARACTERS = 200


# What crosses the wire


@attrs.frozen
class EndpointFields:
    """`POST /v1/webhook_endpoints`, and `/{id}`, where what is absent stays."""

    name: str | None = knob(None, f"what you call it, up to {_NAME_CHARACTERS} characters")
    url: str | None = knob(None, "http or https URL that gets the events")
    event_types: list[str] | None = knob(None, "events to send", choices=EVENT_TYPES)


@attrs.frozen
class RotateFields:
    """`POST /v1/webhook_endpoints/{id}/rotate_secret`."""

    keep_old_secret_active_for_24_hours: bool = knob(False, "sign with the old secret too for a day")


@attrs.frozen
class SampleFields:
    """`POST /v1/webhook_endpoints/{id}/test`."""

    event_type: str = knob(EVENT_TYPES[0], "event to send a sample of", choices=EVENT_TYPES)


@attrs.frozen
class ListFields:
    """The query of `GET /v1/webhook_endpoints`."""

    after: str | None = knob(None, "id of the last endpoint of the page before")
    limit: int = knob(20, "endpoints in a page", min=1, max=100)


@attrs.frozen(kw_only=True)
class WebhookEndpoint:
    """An endpoint as its owner sees it; its secret is only hinted at."""

    id: str
    object: str = _KIND
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


@attrs.frozen(kw_only=True)
class WebhookEndpointWithSecret(WebhookEndpoint):
    """The answer to create and rotate_secret, the only ones that tell the secret."""

    signing_secret: str = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class WebhookEndpointList:
    """A page of endpoints, the newest first."""

    object: str = "list"
    data: list[WebhookEndpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


@attrs.frozen
class DeletedWebhookEndpoint:
    """The answer to DELETE."""

    id: str
    object: str = "webhook_endpoint.deleted"
    deleted: bool = True


@attrs.frozen
class WebhookTestResult:
    """The status that the endpoint answered to a sample."""

    webhook_endpoint_id: str
    event_type: str
    status_code: int
    object: str = "webhook_endpoint.test"
    success: bool = True


@attrs.frozen
class EventTypes:
    """The events that a webhook can be sent."""

    data: list[str]
    object: str = "list"


# The endpoints and their deliveries


@attrs.frozen
class Endpoint:
    """An endpoint as it is kept. Times are Unix seconds."""

    id: str
    owner: str
    created_at: int
    updated_at: int
    name: str
    url: str = attrs.field(repr=False)  # may itself hold a token
    event_types: list[str]
    secret: str = attrs.field(repr=False)
    old_secret: str | None = attrs.field(default=None, repr=False)
    old_secret_until: int = 0

    def view(self) -> WebhookEndpoint:
        return WebhookEndpoint(**self._shown())

    def view_with_secret(self) -> WebhookEndpointWithSecret:
        return WebhookEndpointWithSecret(**self._shown(), signing_secret=self.secret)

    def _shown(self) -> dict[str, Any]:
        names = ("id", "created_at", "updated_at", "name", "url", "event_types")
        hint = f"{_SECRET_PREFIX}...{self.secret[-4:]}"
        return {**{name: getattr(self, name) for name in names}, "signing_secret_hint": hint}

    def signed(self, event_id: str, body: str) -> dict[str, str]:
        """The headers of one delivery, now."""
        now = int(time.time())
        valid = [self.secret, self.old_secret] if now < self.old_secret_until else [self.secret]
        return {
            "Content-Type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(sign(secret, event_id, now, body.encode()) for secret in valid if secret),
        }


@attrs.frozen
class Delivery:
    """An event on its way to one endpoint."""

    endpoint: str
    event: str  # its id, and so the webhook-id of every try
    body: str
    tries: int = 0
    due: float = 0.0  # Unix seconds of the next try

    @property
    def id(self) -> str:
        return f"{self.event} {self.endpoint}"


def sign(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """One signature, `v1,` and base64 (Standard Webhooks 1.0, section "Signature scheme")."""
    key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX))
    digest = hmac.digest(key, b".".join((event_id.encode(), str(timestamp).encode(), body)), hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def _new_secret() -> str:
    return _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _event(type: str, object_id: str) -> tuple[str, str]:
    """The id and the body of a new event."""
    id = f"evt_{uuid.uuid4().hex}"
    fields = {"id": id, "object": "event", "created_at": int(time.time()), "type": type, "data": {"id": object_id}}
    return id, json.dumps(fields)


class Webhooks:
    """The endpoints of all owners, each of whom sees only their own, and the deliveries under way."""

    def __init__(self, fetcher: Fetcher, journal: Journal | None = None, delays_s: Sequence[float] = DELAYS_S) -> None:
        self._fetcher = fetcher
        self._journal = journal  # None: all is forgotten when the server stops
        self._delays_s = delays_s
        self._endpoints: dict[str, Endpoint] = {}
        self._changing = asyncio.Lock()
        self._closing = asyncio.Event()
        self._deliveries: set[asyncio.Task[None]] = set()

    async def load(self, journal: Journal | None = None) -> None:
        """Go on with what an earlier server kept in the journal, this one or the constructor's."""
        self._journal = journal or self._journal
        if self._journal is not None:
            kept = await self._journal.restore(_KIND, lambda body: Endpoint(**body))
            self._endpoints = {endpoint.id: endpoint for endpoint in kept}
            self.send(await self._journal.restore(DELIVERY, lambda body: Delivery(**body)))

    async def close(self, patience_s: float = CLOSING_S) -> None:
        """Stop the retries, give the deliveries on their way `patience_s` to arrive, and close the fetcher.

        Call it after the last job.
        """
        self._closing.set()
        if self._deliveries:
            await asyncio.wait(self._deliveries, timeout=patience_s)
        late = list(self._deliveries)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._fetcher.close()
        if late:
            log.warning("%d webhook deliveries were broken off, for the server stops", len(late))

    async def create(self, owner: str, fields: EndpointFields) -> Endpoint:
        """A new endpoint with a new secret."""
        for name in ("name", "url", "event_types"):
            if getattr(fields, name) is None:
                raise BadRequest(f"{name}: is missing; a webhook endpoint needs name, url and event_types", name)
        self._check(fields)
        now = int(time.time())
        given = attrs.asdict(fields)
        endpoint = Endpoint(f"we_{uuid.uuid4().hex}", owner, now, now, **given, secret=_new_secret())
        async with self._changing:
            if len(self._of(owner)) >= MAX_ENDPOINTS:
                raise BadRequest(f"there are {MAX_ENDPOINTS} webhook endpoints, which is the limit; delete one first")
            return await self._put(endpoint)

    def get(self, owner: str, id: str) -> Endpoint:
        """The owner's endpoint; NotFound if there is none by that id, or if it is another's."""
        endpoint = self._endpoints.get(id)
        if endpoint is None or endpoint.owner != owner:
            raise NotFound(f"webhook endpoint {shown(id)} does not exist", "id")
        return endpoint

    def page(self, owner: str, fields: ListFields) -> tuple[list[Endpoint], bool]:
        """The owner's endpoints, the newest first, and whether more follow."""
        endpoints = self._of(owner)[::-1]
        ids = [endpoint.id for endpoint in endpoints]
        if fields.after is not None and fields.after not in ids:
            raise NotFound(f"after: webhook endpoint {shown(fields.after)} does not exist", "after")
        start = 0 if fields.after is None else ids.index(fields.after) + 1
        end = start + fields.limit
        return endpoints[start:end], end < len(endpoints)

    async def update(self, owner: str, id: str, fields: EndpointFields) -> Endpoint:
        """Change what is given."""
        self._check(fields)
        given = {name: value for name, value in attrs.asdict(fields).items() if value is not None}
        async with self._changing:
            endpoint = self.get(owner, id)
            return await self._put(attrs.evolve(endpoint, **given, updated_at=int(time.time())))

    async def rotate(self, owner: str, id: str, keep_old: bool) -> Endpoint:
        """A new secret; with `keep_old` every delivery of the next day is signed with both."""
        async with self._changing:
            endpoint, now = self.get(owner, id), int(time.time())
            old, until = (endpoint.secret, now + OLD_SECRET_S) if keep_old else (None, 0)
            rotated = attrs.evolve(endpoint, secret=_new_secret(), old_secret=old, old_secret_until=until)
            return await self._put(attrs.evolve(rotated, updated_at=now))

    async def delete(self, owner: str, id: str) -> None:
        """Forget an endpoint; tries that are left of its deliveries are not made."""
        async with self._changing:
            self.get(owner, id)
            if self._journal is not None:
                await self._journal.delete(_KIND, [id])
            del self._endpoints[id]

    async def test(self, owner: str, id: str, type: str) -> int:
        """Send a sample once and return the status that answers; BadRequest if none does."""
        endpoint = self.get(owner, id)
        return await self._post(endpoint, *_event(type, f"video_sample_{uuid.uuid4().hex}"))

    def due(self, owner: str, type: str, object_id: str) -> list[Delivery]:
        """The deliveries of a new event to the owner's endpoints, for the caller to write down and then to `send`."""
        event, body = _event(type, object_id)
        return [Delivery(each.id, event, body) for each in self._of(owner) if type in each.event_types]

    def send(self, deliveries: Iterable[Delivery]) -> None:
        """Deliver them in tasks of their own; returns at once and raises nothing."""
        for delivery in deliveries:
            task = asyncio.create_task(self._deliver(delivery))
            self._deliveries.add(task)
            task.add_done_callback(self._forget)

    def _of(self, owner: str) -> list[Endpoint]:
        return [endpoint for endpoint in self._endpoints.values() if endpoint.owner == owner]

    def _check(self, fields: EndpointFields) -> None:
        """What the fields' own types do not say."""
        if fields.name is not None and not 0 < len(fields.name) <= _NAME_CHARACTERS:
            raise BadRequest(f"name: {len(fields.name)} characters; 1 to {_NAME_CHARACTERS} are allowed", "name")
        if fields.url is not None:
            self._fetcher.check(fields.url, "url")
        types = fields.event_types
        if types is not None and (not types or len(set(types)) < len(types)):
            raise BadRequest(f"event_types: {shown(types)} must name at least one event, and each once", "event_types")

    async def _put(self, endpoint: Endpoint) -> Endpoint:
        if self._journal is not None:
            await self._journal.put(_KIND, endpoint.id, attrs.asdict(endpoint))
        self._endpoints[endpoint.id] = endpoint
        return endpoint

    async def _deliver(self, delivery: Delivery) -> None:
        """Try until the endpoint takes the event or is deleted, the tries are used up, or the server stops."""
        id, event, tries = delivery.endpoint, delivery.event, len(self._delays_s) + 1
        while not (delivery.tries and await self._closes_before(delivery.due)):
            endpoint, n = self._endpoints.get(id), delivery.tries + 1
            failure = await self._failure(endpoint, delivery) if endpoint is not None else None
            if failure is not None:
                log.warning("webhook %s: try %d of %d to deliver %s: %s", id, n, tries, event, failure)
            if failure is None or n >= tries:
                if failure is not None:
                    log.error("webhook %s: %s is not delivered", id, event)
                if self._journal is not None:
                    await self._journal.delete(DELIVERY, [delivery.id])
                return
            due = time.time() + self._delays_s[n - 1] * random.uniform(0.5, 1)
            delivery = attrs.evolve(delivery, tries=n, due=due)
            if self._journal is not None:
                try:
                    await self._journal.put(DELIVERY, delivery.id, attrs.asdict(delivery))
                except SgldError as error:  # the next try is made all the same
                    log.error("webhook %s: the journal does not hear of a try: %s", id, error)
        if self._journal is None:
            log.error("webhook %s: %s is not delivered, for the server stops", id, event)

    async def _failure(self, endpoint: Endpoint, delivery: Delivery) -> str | None:
        """Send once; why it failed, or None."""
        try:
            status = await self._post(endpoint, delivery.event, delivery.body)
        except BadRequest as error:
            return error.message
        return None if 200 <= status < 300 else f"it answered {status}"

    async def _post(self, endpoint: Endpoint, event: str, body: str) -> int:
        return await self._fetcher.post(endpoint.url, body.encode(), endpoint.signed(event, body))

    async def _closes_before(self, moment: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), max(0.0, moment - time.time()))
        return self._closing.is_set()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._deliveries.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a webhook delivery failed", exc_info=error)


# Routes

WEBHOOKS = web.AppKey("webhooks", Webhooks)
ID = "id of the endpoint"
routes = web.RouteTableDef()


async def _fields(request: web.Request, cls: type[T]) -> T:
    """The body; none at all is an empty one."""
    return structure((await read_body(request, cls, empty=True)).values, cls)


@routes.post("/v1/webhook_endpoints")
@Described(
    answer=WebhookEndpointWithSecret,
    body=EndpointFields,
    required=("name", "url", "event_types"),
    example={"name": "mine", "url": "https://example.com/hook", "event_types": list(EVENT_TYPES)},
    errors=BODY_ERRORS,
)
async def create(request: web.Request) -> web.Response:
    """Make an endpoint; its secret is told here, and never again."""
    endpoint = await request.app[WEBHOOKS].create(request[OWNER], await _fields(request, EndpointFields))
    return web.json_response(plain(endpoint.view_with_secret()))


@routes.get("/v1/webhook_endpoints")
@Described(answer=WebhookEndpointList, query=ListFields, errors=(400, 404))
async def list_all(request: web.Request) -> web.Response:
    """The caller's endpoints, the newest first."""
    endpoints, more = request.app[WEBHOOKS].page(request[OWNER], read_query(request, ListFields))
    data = [endpoint.view() for endpoint in endpoints]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return web.json_response(plain(WebhookEndpointList(data=data, first_id=first, last_id=last, has_more=more)))


@routes.get("/v1/webhook_event_types")
@Described(answer=EventTypes)
async def event_types(request: web.Request) -> web.Response:
    """The events there are."""
    return web.json_response({"object": "list", "data": list(EVENT_TYPES)})


@routes.get("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=WebhookEndpoint, errors=(404,))
async def retrieve(request: web.Request) -> web.Response:
    """One endpoint."""
    endpoint = request.app[WEBHOOKS].get(request[OWNER], request.match_info["id"])
    return web.json_response(plain(endpoint.view()))


@routes.post("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=WebhookEndpoint, body=EndpointFields, example={"name": "ours"}, errors=(*BODY_ERRORS, 404))
async def update(request: web.Request) -> web.Response:
    """Change its name, URL or events."""
    fields = await _fields(request, EndpointFields)
    endpoint = await request.app[WEBHOOKS].update(request[OWNER], request.match_info["id"], fields)
    return web.json_response(plain(endpoint.view()))


@routes.delete("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=DeletedWebhookEndpoint, errors=(404,))
async def delete(request: web.Request) -> web.Response:
    """Remove an endpoint."""
    await request.app[WEBHOOKS].delete(request[OWNER], request.match_info["id"])
    return web.json_response(plain(DeletedWebhookEndpoint(request.match_info["id"])))


@routes.post("/v1/webhook_endpoints/{id}/rotate_secret")
@Described(
    id=ID,
    answer=WebhookEndpointWithSecret,
    body=RotateFields,
    example={"keep_old_secret_active_for_24_hours": True},
    errors=(*BODY_ERRORS, 404),
)
async def rotate_secret(request: web.Request) -> web.Response:
    """Give an endpoint a new secret, told here and never again."""
    fields = await _fields(request, RotateFields)
    keep_old = fields.keep_old_secret_active_for_24_hours
    endpoint = await request.app[WEBHOOKS].rotate(request[OWNER], request.match_info["id"], keep_old)
    return web.json_response(plain(endpoint.view_with_secret()))


@routes.post("/v1/webhook_endpoints/{id}/test")
@Described(
    id=ID,
    answer=WebhookTestResult,
    body=SampleFields,
    example={"event_type": EVENT_TYPES[0]},
    errors=(*BODY_ERRORS, 404),
)
async def test(request: web.Request) -> web.Response:
    """Send a sample event and wait for its answer, at most ten seconds."""
    type = (await _fields(request, SampleFields)).event_type
    id = request.match_info["id"]
    status = await request.app[WEBHOOKS].test(request[OWNER], id, type)
    return web.json_response(plain(WebhookTestResult(id, type, status)))
