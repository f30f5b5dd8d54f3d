"""`/openapi.json`, written from the attrs classes of the wire, and `/docs`, a static page that shows it."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import attrs
from aiohttp import web

from sgld import __version__
from sgld.convert import Field, default_of, fields_of, knob_of
from sgld.params import SamplingParams
from sgld.server.http.auth import KEYS, OPEN_ROUTES
from sgld.server.http.describe import DESCRIBED, Described, Handler
from sgld.server.http.schema import CommonFields, Error
from sgld.server.http.urls import origin
from sgld.server.routes.json_schema import (
    NULL,
    Schema,
    options_of,
    refused_fields,
    request_fields,
    required,
    type_schema,
    union,
)
from sgld.server.service import MAX_KEY_CHARACTERS, SERVICE, Service

routes = web.RouteTableDef()
ABOUT = "A server for diffusion models that OpenAI's client libraries can talk to."
PAGE = Path(__file__).parent / "docs" / "docs.html"
ADDRESS = {"type": "string", "description": "http, https or data: URL"}
NESTED_ADDRESS = {"type": "object", "properties": {"image_url": ADDRESS}, "required": ["image_url"]}
FILE = {"type": "string", "format": "binary"}
HEADERS: dict[str, tuple[str, Schema]] = {
    "Idempotency-Key": (
        "a request that comes again with this gets the job of the first",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARACTERS},
    ),
    "Last-Event-ID": ("number of the last event that was seen", {"type": "integer", "minimum": 0}),
}
MAX_URLS = 16  # of this server, for which the document is kept


@attrs.define
class _Writer:
    """A writer of operations, which gathers the schemas they refer to."""

    service: Service
    secured: bool
    schemas: dict[str, Schema] = attrs.field(factory=dict)

    def operation(self, path: str, handler: Handler, described: Described) -> Schema:
        """Describe one method of one path."""
        tag = _tag(handler)
        summary, _, more = (handler.__doc__ or "").partition("\n\n")
        written: Schema = {"tags": [tag], "operationId": f"{tag}_{handler.__name__}", "summary": summary}
        if more:
            written["description"] = " ".join(more.split())
        if parameters := [*self._path(path, described), *_query(described.query), *_headers(described)]:
            written["parameters"] = parameters
        if described.body is not None:
            written["requestBody"] = self._body(f"{tag}_{handler.__name__}", described.body, described)
        is_open = path in OPEN_ROUTES
        if self.secured and is_open:
            written["security"] = []
        return {**written, "responses": self._responses(described, is_open)}

    def _path(self, path: str, described: Described) -> Iterator[Schema]:
        for name in re.findall(r"{(\w+)}", path):
            schema = {"type": "string", "minLength": 1}
            yield {"name": name, "in": "path", "required": True, "description": described.id, "schema": schema}

    def _body(self, operation: str, cls: type, described: Described) -> Schema:
        name = operation.title().replace("_", "")
        content = {"application/json": self._content(name, cls, described, form=False)}
        if described.form:
            content["multipart/form-data"] = self._content(f"{name}Form", cls, described, form=True)
        return {"required": bool(described.required), "content": content}

    def _content(self, name: str, cls: type, described: Described, *, form: bool) -> Schema:
        fields = request_fields(cls, self.service, form=form)
        if issubclass(cls, CommonFields):
            fields |= request_fields(SamplingParams, self.service, form=form)
        for field in described.pictures:
            addresses_only = field in fields_of(cls)
            fields |= _picture_form(field, addresses_only) if form else _picture(field)
        fields |= {
            field: {"description": f"here always {json.dumps(value)}", "const": value}
            for field, value in described.fixed.items()
        }
        for field in described.required:
            fields[field] = required(fields[field])
        self.schemas[name] = {
            "type": "object",
            "description": (cls.__doc__ or "").partition("\n")[0],
            "properties": fields,
            "additionalProperties": False,
            **({"required": list(described.required)} if described.required else {}),
        }
        example = {"example": dict(described.example)} if described.example and not form else {}
        return {"schema": {"$ref": f"#/components/schemas/{name}"}, **example}

    def _responses(self, described: Described, is_open: bool) -> Schema:
        statuses = set(described.errors)
        if not is_open:
            statuses.add(401 if self.secured else 403)  # 403: to the pages of other sites
        responses = {"200": {"description": "OK", "content": self._answer(described)}}
        responses |= {str(status): {"description": text} for status, text in described.other.items()}
        if described.unready is not None:
            responses["503"] = _json("Not ready", self.refer(described.unready))
        for status in statuses:
            responses[str(status)] = self._error(status)
        return dict(sorted(responses.items()))

    def _answer(self, described: Described) -> Schema:
        content = {kind: {"schema": _media_schema(kind)} for kind in described.media}
        if described.answer is not None:
            content["application/json"] = {"schema": self.refer(described.answer)}
        if described.events:
            content["text/event-stream"] = {"schema": self._events(described)}
        return content

    def _events(self, described: Described) -> Schema:
        """Describe each event of a stream."""
        events = [_event({"event": {"const": name}}, self.refer(cls)) for name, cls in described.events.items()]
        if described.last is not None:
            events.append({"type": "object", "properties": {"data": {"const": described.last}}, "required": ["data"]})
        return {"description": "each event", "anyOf": events}

    def _error(self, status: int) -> Schema:
        answer = _json(HTTPStatus(status).phrase, self.refer(Error))
        if status in (429, 503):
            answer["headers"] = {
                "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}, "required": True}
            }
        return answer

    def refer(self, cls: type) -> Schema:
        """Refer to the schema of an answer by its name. Write it at the first time, with every field required."""
        name = cls.__name__
        if name not in self.schemas:
            self.schemas[name] = {}
            properties = {field.name: self._answer_field(field) for field in fields_of(cls).values()}
            self.schemas[name] = {
                "type": "object",
                "description": (cls.__doc__ or "").partition("\n")[0],
                "properties": properties,
                "required": list(properties),
            }
        return {"$ref": f"#/components/schemas/{name}"}

    def _answer_field(self, field: Field) -> Schema:
        constant = {"const": default_of(field)} if field.name in ("object", "deleted") else {}
        return {**type_schema(field.type, self.refer), **constant}


def _tag(handler: Handler) -> str:
    """Name the module of the handler."""
    return handler.__module__.rpartition(".")[2]


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _event(name: Schema, data: Schema) -> Schema:
    """Describe a server-sent event whose data is JSON."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {**name, "data": text}, "required": ["event", "data"]}


def _media_schema(kind: str) -> Schema:
    if kind == "application/json":
        return {"type": "object"}
    return {"type": "string"} if "text" in kind else FILE


def _query(cls: type | None) -> Iterator[Schema]:
    for name, field in fields_of(cls).items() if cls is not None else ():
        schema, default = union(options_of(field)), default_of(field)
        if default is not None:
            schema = {**schema, "default": default}
        yield {"name": name, "in": "query", "description": knob_of(field).help, "schema": schema}


def _headers(described: Described) -> Iterator[Schema]:
    for name in described.headers:
        text, schema = HEADERS[name]
        yield {"name": name, "in": "header", "description": text, "schema": schema}


def _picture(name: str) -> dict[str, Schema]:
    """Describe a field of JSON that takes the addresses of pictures: one or several."""
    one = [ADDRESS, NESTED_ADDRESS]
    several = {"type": "array", "items": {"anyOf": one}}
    return {name: {"description": "picture by address, or several", "anyOf": [*one, several, NULL]}}


def _picture_form(name: str, addresses_only: bool) -> dict[str, Schema]:
    """Describe a field of a form that takes pictures: addresses, and files unless `addresses_only`."""
    item = ADDRESS if addresses_only else {"anyOf": [FILE, ADDRESS]}
    one, several = "address of a picture", "addresses of pictures"
    if not addresses_only:
        one, several = "picture, as a file or by its address", "pictures, as files or by their addresses"
    return {
        name: {**item, "description": one},
        f"{name}[]": {"description": several, "type": "array", "items": item},
    }


def document(app: web.Application, url: str) -> Schema:
    """Write the OpenAPI 3.1 document of the described routes; `url` is this server's, as its client calls it."""
    secured = bool(app[KEYS].known)
    writer = _Writer(app[SERVICE], secured)
    paths: dict[str, Schema] = {}
    tags: dict[str, str] = {}
    for route in app.router.routes():
        described = DESCRIBED.get(route.handler)
        if described is None or route.resource is None or route.method == "HEAD":
            continue
        handler, path = route.handler, route.resource.canonical
        paths.setdefault(path, {})[route.method.lower()] = writer.operation(path, handler, described)
        tags[_tag(handler)] = (sys.modules[handler.__module__].__doc__ or "").partition("\n")[0]
    components: Schema = {"schemas": dict(sorted(writer.schemas.items()))}
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sgld", "version": __version__, "description": ABOUT},
        "servers": [{"url": url}],
        "tags": [{"name": name, "description": text} for name, text in tags.items()],
        **({"security": [{"key": []}]} if secured else {}),
        "paths": paths,
        "components": components,
        "x-refused-fields": refused_fields(SamplingParams, app[SERVICE].info),
    }


def encode(written: Schema, url: str) -> bytes:
    """Encode a document as JSON, with another URL of the server."""
    return json.dumps({**written, "servers": [{"url": url}]}).encode()


class DocumentCache:
    """The encoded document of an application, for each of the last URLs that clients call it by.

    One thread of its own writes it: many clients may ask at once, and choose the URL by their headers.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "openapi")
        self._state: object = None  # all that the document depends on, beside the URL
        self._document: Schema = {}
        self._encoded: dict[str, bytes] = {}

    async def encoded(self, app: web.Application, url: str) -> bytes:
        """Return the document as JSON. Write it anew only after a change of the application."""
        service = app[SERVICE]
        state = (service.info, service.sampling, service.settings, bool(app[KEYS].known))
        found = self._encoded.get(url) if state == self._state else None
        if found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._encode, app, state, url)
        return found

    def _encode(self, app: web.Application, state: object, url: str) -> bytes:
        if state != self._state:
            self._state, self._document, self._encoded = state, document(app, url), {}
        if url not in self._encoded:
            if len(self._encoded) >= MAX_URLS:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[url] = encode(self._document, url)
        return self._encoded[url]


DOCUMENT = web.AppKey("document", DocumentCache)


@routes.get("/openapi.json")
@Described(media=("application/json",))
async def show_document(request: web.Request) -> web.Response:
    """Describe this interface in OpenAPI 3.1; once the model is loaded, with its defaults."""
    url = origin(request).url("/").removesuffix("/")
    body = await request.app[DOCUMENT].encoded(request.app, url)
    return web.Response(body=body, content_type="application/json", charset="utf-8")


@routes.get("/docs")
@Described(media=("text/html",))
async def show_page(_: web.Request) -> web.Response:
    """Show this interface as a page, which reads `openapi.json`."""
    text, policy = page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return web.Response(text=text, content_type="text/html", headers=headers)


@functools.cache
def page() -> tuple[str, str]:
    """Return the HTML and its Content-Security-Policy, which allows its own style and script and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in _INLINE.findall(text)]
    style, script = (f"'sha256-{digest}'" for digest in digests)
    return text, (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


_INLINE = re.compile(r"<(?:style|script)>(.*?)</(?:style|script)>", re.DOTALL)
