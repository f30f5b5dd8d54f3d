"""Webhooks: signed POSTs to the endpoints of clients when a video is completed or has failed.

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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import attrs

from sgld.convert import shorten
from sgld.errors import BadRequest, NotFound, SgldError
from sgld.server.jobs.sqlite import Journal

log = logging.getLogger(__name__)
DELIVERY = "webhook_delivery"  # its kind in the journal
EVENT_TYPES = ("video.completed", "video.failed")
DELAYS_S = (1.0, 5.0, 25.0, 125.0)  # before the second try, the third, ...
MAX_ENDPOINTS = 50  # of one owner
OLD_SECRET_S = 24 * 3600
CLOSING_S = 5.0

KIND = "webhook_endpoint"
SECRET_PREFIX, _SECRET_BYTES = "whsec_", 24
NAME_CHARACTERS = 200


@attrs.frozen
class Endpoint:
    """An endpoint of one owner. Times are Unix seconds."""

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

    def signed(self, event_id: str, body: str) -> dict[str, str]:
        """Return the headers of a delivery that is sent now."""
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
    """Return one signature, `v1,` and base64 (Standard Webhooks 1.0, section "Signature scheme")."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.digest(key, b".".join((event_id.encode(), str(timestamp).encode(), body)), hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def _new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _event(type: str, object_id: str) -> tuple[str, str]:
    """Return the id and the body of a new event."""
    id = f"evt_{uuid.uuid4().hex}"
    fields = {"id": id, "object": "event", "created_at": int(time.time()), "type": type, "data": {"id": object_id}}
    return id, json.dumps(fields)


class Poster(Protocol):
    """Sends requests to the addresses of clients."""

    def check(self, text: str, param: str) -> object:
        """Refuse an address that may not be called. Raises BadRequest."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a body and return the status of the answer. Raises BadRequest."""

    async def close(self) -> None:
        """Close the connections."""


class Webhooks:
    """The endpoints of all owners, each of whom sees only their own, and the deliveries under way."""

    def __init__(self, poster: Poster, journal: Journal | None = None, delays_s: Sequence[float] = DELAYS_S) -> None:
        self._poster = poster
        self._journal = journal  # None: all is forgotten when the server stops
        self._delays_s = delays_s
        self._endpoints: dict[str, Endpoint] = {}
        self._changing = asyncio.Lock()
        self._closing = asyncio.Event()
        self._deliveries: set[asyncio.Task[None]] = set()

    async def load(self, journal: Journal | None = None) -> None:
        """Load the endpoints from the journal, this one or the constructor's, and resume the deliveries."""
        self._journal = journal or self._journal
        if self._journal is not None:
            stored = await self._journal.restore(KIND, lambda body: Endpoint(**body))
            self._endpoints = {endpoint.id: endpoint for endpoint in stored}
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
        await self._poster.close()
        if late:
            log.warning("%d webhook deliveries were broken off, for the server stops", len(late))

    async def create(self, owner: str, name: str, url: str, event_types: list[str]) -> Endpoint:
        """Add an endpoint with a new secret. Raises BadRequest for a value or one endpoint too many."""
        self._check(name, url, event_types)
        now = int(time.time())
        endpoint = Endpoint(f"we_{uuid.uuid4().hex}", owner, now, now, name, url, event_types, secret=_new_secret())
        async with self._changing:
            if len(self._of(owner)) >= MAX_ENDPOINTS:
                raise BadRequest(f"there are {MAX_ENDPOINTS} webhook endpoints, which is the limit; delete one first")
            return await self._put(endpoint)

    def get(self, owner: str, id: str) -> Endpoint:
        """Return an endpoint of the owner. Raises NotFound."""
        endpoint = self._endpoints.get(id)
        if endpoint is None or endpoint.owner != owner:
            raise NotFound(f"webhook endpoint {shorten(id)} does not exist", "id")
        return endpoint

    def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Endpoint], bool]:
        """Return at most `limit` of the owner's endpoints, the newest first, and whether more follow."""
        endpoints = self._of(owner)[::-1]
        ids = [endpoint.id for endpoint in endpoints]
        if after is not None and after not in ids:
            raise NotFound(f"webhook endpoint {shorten(after)} does not exist", field="after")
        start = 0 if after is None else ids.index(after) + 1
        end = start + limit
        return endpoints[start:end], end < len(endpoints)

    async def update(
        self,
        owner: str,
        id: str,
        name: str | None = None,
        url: str | None = None,
        event_types: list[str] | None = None,
    ) -> Endpoint:
        """Change the values that are not None. Raises NotFound, BadRequest."""
        self._check(name, url, event_types)
        values: dict[str, Any] = {"name": name, "url": url, "event_types": event_types}
        given = {key: value for key, value in values.items() if value is not None}
        async with self._changing:
            endpoint = self.get(owner, id)
            return await self._put(attrs.evolve(endpoint, **given, updated_at=int(time.time())))

    async def rotate(self, owner: str, id: str, keep_old: bool) -> Endpoint:
        """Replace the secret. With `keep_old` every delivery of the next day is signed with both."""
        async with self._changing:
            endpoint, now = self.get(owner, id), int(time.time())
            old, until = (endpoint.secret, now + OLD_SECRET_S) if keep_old else (None, 0)
            rotated = attrs.evolve(endpoint, secret=_new_secret(), old_secret=old, old_secret_until=until)
            return await self._put(attrs.evolve(rotated, updated_at=now))

    async def delete(self, owner: str, id: str) -> None:
        """Delete an endpoint and give up its deliveries. Raises NotFound."""
        async with self._changing:
            self.get(owner, id)
            if self._journal is not None:
                await self._journal.delete(KIND, [id])
            del self._endpoints[id]

    async def test(self, owner: str, id: str, type: str) -> int:
        """Send a sample once and return the status that answers; BadRequest if none does."""
        endpoint = self.get(owner, id)
        return await self._post(endpoint, *_event(type, f"video_sample_{uuid.uuid4().hex}"))

    def due(self, owner: str, type: str, object_id: str) -> list[Delivery]:
        """Make the deliveries of a new event to the owner's endpoints. The caller stores them, then calls `send`."""
        event, body = _event(type, object_id)
        return [Delivery(each.id, event, body) for each in self._of(owner) if type in each.event_types]

    def send(self, deliveries: Iterable[Delivery]) -> None:
        """Start the deliveries and return at once. Raises nothing."""
        for delivery in deliveries:
            task = asyncio.create_task(self._deliver(delivery))
            self._deliveries.add(task)
            task.add_done_callback(self._forget)

    def _of(self, owner: str) -> list[Endpoint]:
        return [endpoint for endpoint in self._endpoints.values() if endpoint.owner == owner]

    def _check(self, name: str | None, url: str | None, event_types: list[str] | None) -> None:
        """Check the values beyond their types. Raises BadRequest."""
        if name is not None and not 0 < len(name) <= NAME_CHARACTERS:
            raise BadRequest(f"{len(name)} characters; 1 to {NAME_CHARACTERS} are allowed", field="name")
        if url is not None:
            self._poster.check(url, "url")
        if event_types is not None and (not event_types or len(set(event_types)) < len(event_types)):
            problem = f"event_types: {shorten(event_types)} must name at least one event, and each once"
            raise BadRequest(problem, "event_types")

    async def _put(self, endpoint: Endpoint) -> Endpoint:
        if self._journal is not None:
            await self._journal.put(KIND, endpoint.id, attrs.asdict(endpoint))
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
                    log.error("webhook %s: a try is not in the journal: %s", id, error)
        if self._journal is None:
            log.error("webhook %s: %s is not delivered, for the server stops", id, event)

    async def _failure(self, endpoint: Endpoint, delivery: Delivery) -> str | None:
        """Send a delivery once. Return the reason of a failure, or None."""
        try:
            status = await self._post(endpoint, delivery.event, delivery.body)
        except BadRequest as error:
            return error.message
        return None if 200 <= status < 300 else f"it answered {status}"

    async def _post(self, endpoint: Endpoint, event: str, body: str) -> int:
        return await self._poster.post(endpoint.url, body.encode(), endpoint.signed(event, body))

    async def _closes_before(self, moment: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), max(0.0, moment - time.time()))
        return self._closing.is_set()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._deliveries.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a webhook delivery failed", exc_info=error)
