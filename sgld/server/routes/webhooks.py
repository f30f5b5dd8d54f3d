"""`/v1/webhook_endpoints`: endpoints that are told when a video is completed or has failed."""

from __future__ import annotations

from typing import Any, TypeVar

import attrs
from aiohttp import web

from sgld.convert import knob, structure, unstructure
from sgld.errors import BadRequest
from sgld.server.http.auth import OWNER
from sgld.server.http.body import read_body, read_query
from sgld.server.http.describe import BODY_ERRORS, Described
from sgld.server.jobs.webhooks import EVENT_TYPES, KIND, NAME_CHARACTERS, SECRET_PREFIX, Endpoint, Webhooks

T = TypeVar("T")


@attrs.frozen
class EndpointFields:
    """`POST /v1/webhook_endpoints`, and `/{id}`, where what is absent stays."""

    name: str | None = knob(None, f"what you call it, up to {NAME_CHARACTERS} characters")
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
    object: str = KIND
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


@attrs.frozen(kw_only=True)
class WebhookEndpointWithSecret(WebhookEndpoint):
    """The answer to create and rotate_secret, the only ones with the secret."""

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


WEBHOOKS = web.AppKey("webhooks", Webhooks)
ID = "id of the endpoint"
routes = web.RouteTableDef()


def _visible(endpoint: Endpoint) -> dict[str, Any]:
    """Return the fields of an endpoint that every answer holds."""
    names = ("id", "created_at", "updated_at", "name", "url", "event_types")
    hint = f"{SECRET_PREFIX}...{endpoint.secret[-4:]}"
    return {**{name: getattr(endpoint, name) for name in names}, "signing_secret_hint": hint}


def _view(endpoint: Endpoint) -> WebhookEndpoint:
    return WebhookEndpoint(**_visible(endpoint))


def view_with_secret(endpoint: Endpoint) -> WebhookEndpointWithSecret:
    """Return an endpoint with its secret."""
    return WebhookEndpointWithSecret(**_visible(endpoint), signing_secret=endpoint.secret)


async def _fields(request: web.Request, cls: type[T]) -> T:
    """Read the body, which may be missing."""
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
    """Create an endpoint. Only this answer holds its secret."""
    fields = await _fields(request, EndpointFields)
    for name, value in attrs.asdict(fields).items():
        if value is None:
            raise BadRequest("is missing; a webhook endpoint needs name, url and event_types", field=name)
    endpoint = await request.app[WEBHOOKS].create(request[OWNER], **attrs.asdict(fields))
    return web.json_response(unstructure(view_with_secret(endpoint)))


@routes.get("/v1/webhook_endpoints")
@Described(answer=WebhookEndpointList, query=ListFields, errors=(400, 404))
async def list_all(request: web.Request) -> web.Response:
    """List the endpoints of the caller, the newest first."""
    endpoints, more = request.app[WEBHOOKS].page(request[OWNER], **attrs.asdict(read_query(request, ListFields)))
    data = [_view(endpoint) for endpoint in endpoints]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return web.json_response(unstructure(WebhookEndpointList(data=data, first_id=first, last_id=last, has_more=more)))


@routes.get("/v1/webhook_event_types")
@Described(answer=EventTypes)
async def event_types(request: web.Request) -> web.Response:
    """List the events that endpoints can receive."""
    return web.json_response({"object": "list", "data": list(EVENT_TYPES)})


@routes.get("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=WebhookEndpoint, errors=(404,))
async def retrieve(request: web.Request) -> web.Response:
    """Return an endpoint."""
    endpoint = request.app[WEBHOOKS].get(request[OWNER], request.match_info["id"])
    return web.json_response(unstructure(_view(endpoint)))


@routes.post("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=WebhookEndpoint, body=EndpointFields, example={"name": "ours"}, errors=(*BODY_ERRORS, 404))
async def update(request: web.Request) -> web.Response:
    """Change its name, URL or events."""
    fields = await _fields(request, EndpointFields)
    endpoint = await request.app[WEBHOOKS].update(request[OWNER], request.match_info["id"], **attrs.asdict(fields))
    return web.json_response(unstructure(_view(endpoint)))


@routes.delete("/v1/webhook_endpoints/{id}")
@Described(id=ID, answer=DeletedWebhookEndpoint, errors=(404,))
async def delete(request: web.Request) -> web.Response:
    """Remove an endpoint."""
    await request.app[WEBHOOKS].delete(request[OWNER], request.match_info["id"])
    return web.json_response(unstructure(DeletedWebhookEndpoint(request.match_info["id"])))


@routes.post("/v1/webhook_endpoints/{id}/rotate_secret")
@Described(
    id=ID,
    answer=WebhookEndpointWithSecret,
    body=RotateFields,
    example={"keep_old_secret_active_for_24_hours": True},
    errors=(*BODY_ERRORS, 404),
)
async def rotate_secret(request: web.Request) -> web.Response:
    """Replace the secret of an endpoint. Only this answer holds it."""
    fields = await _fields(request, RotateFields)
    keep_old = fields.keep_old_secret_active_for_24_hours
    endpoint = await request.app[WEBHOOKS].rotate(request[OWNER], request.match_info["id"], keep_old)
    return web.json_response(unstructure(view_with_secret(endpoint)))


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
    return web.json_response(unstructure(WebhookTestResult(id, type, status)))
