"""`/openapi.json`, made from the attrs classes that read and write the wire, and `/docs`, a page of the same."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Annotated, Any, Union

import attrs
import jinja2
from aiohttp import web
from markupsafe import Markup, escape

from sgld import __version__
from sgld.convert import Knob, default_of, fields_of, knob_of, plain
from sgld.params import MAX_LORAS, MAX_PROMPT_CHARACTERS, LoraUse, ModelInfo, SamplingParams
from sgld.server.http.auth import KEYS, OPEN_ROUTES
from sgld.server.http.body import LOCAL_FILES
from sgld.server.http.describe import DESCRIBED, Described, Handler
from sgld.server.http.schema import OPENAI_QUALITIES, CommonFields, Doc, Error
from sgld.server.http.urls import origin
from sgld.server.service import MAX_KEY_CHARACTERS, SERVICE, Service

routes = web.RouteTableDef()
Schema = dict[str, Any]
Answer = tuple[bytes, dict[str, str]]  # body and headers
ABOUT = "A server for diffusion models that OpenAI's client libraries can talk to."
SIZE = r"^$|^auto$|^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
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
ANSWERS_KEPT = 16
SPELLINGS: dict[str, Schema] = {
    "seconds": {"type": "string", "pattern": "^[0-9]{1,4}$"},
    "output_format": {"enum": ["jpg"]},
    "quality": {"enum": list(OPENAI_QUALITIES)},
}
"""What else a field takes, for OpenAI's client and the replaced system's."""


# Fields


def request_fields(cls: type, service: Service, *, form: bool = False) -> dict[str, Schema]:
    """The JSON Schema of every field that works today, and of its aliases; of a form, lists are `name[]`.

    Fields that are not built, or that the loaded model has no use for, are left out: see `refused_fields`.
    """
    refused = refused_fields(cls, service.info)
    found: dict[str, Schema] = {}
    for name, field in fields_of(cls).items():
        if name in refused:
            continue
        default = _default(field, cls, service)
        if name == "loras":
            found |= _adapter_fields(service, form)
            continue
        options = [{**option, **_model_rules(name, service, option)} for option in _options(field)]
        own = _form_fields(name, options) if form else {name: _nullable(_union(options))}
        for spelling, schema in own.items():
            found[spelling] = {"description": _told_help(field, service, cls), **schema}
            if default is not None and not spelling.endswith("[]"):
                found[spelling]["default"] = plain(default)
        for alias in knob_of(field).aliases:
            same = {spelling.replace(name, alias): schema for spelling, schema in own.items()}
            found |= {spelling: {"description": f"the same as {name}", **schema} for spelling, schema in same.items()}
    return found


def _adapter_fields(service: Service, form: bool) -> dict[str, Schema]:
    """`loras` and `lora`: adapters by nickname, or as objects; a form brings objects as JSON text."""
    whole = {"type": "object", "properties": request_fields(LoraUse, service), "additionalProperties": False}
    told = "nickname, or an adapter as JSON text" if form else "nickname"
    text = {"type": "string", "minLength": 1, "description": told}
    one = {"anyOf": [text] if form else [text, whole]}
    help = knob_of(fields_of(SamplingParams)["loras"]).help
    several = {"type": "array", "items": one, "maxItems": MAX_LORAS}
    if form:
        several = {**several, "items": text}
        return {
            "lora": {**text, "description": "the same as loras, for one"},
            "loras[]": {"description": help, **several},
        }
    return {
        "lora": {"description": "the same as loras, for one", "anyOf": [*one["anyOf"], {"type": "null"}]},
        "loras": {"description": help, **_nullable(several)},
    }


def refused_fields(cls: type, info: ModelInfo | None) -> dict[str, str]:
    """Fields of a request that get 400, and why: this version, or this model, cannot use them."""
    unbuilt = {
        name: f"not built yet: {knob_of(field).pending}"
        for name, field in fields_of(cls).items()
        if knob_of(field).pending and not knob_of(field).built
    }
    if cls is not SamplingParams:
        return unbuilt
    return {**unbuilt, **LOCAL_FILES, **(info.unsupported if info is not None else {})}


def _default(field: attrs.Attribute[Any], cls: type, service: Service) -> Any:
    """What a request gets that leaves the field out; None where only the model knows, or nothing is set."""
    if cls is not SamplingParams:
        return default_of(field)
    unknown = knob_of(field).per_model and service.info is None and field.name not in service.sampling
    return None if unknown else service.default(field.name)


def _told_help(field: attrs.Attribute[Any], service: Service, cls: type) -> str:
    meta = knob_of(field)
    default = meta.shown_default
    if meta.per_model and _default(field, cls, service) is None:
        default = "the model's own"
    return f"{meta.help}; default: {default}" if default else meta.help


def _model_rules(name: str, service: Service, option: Schema) -> Schema:
    """What the loaded model allows of a field, beside the field's own range."""
    if service.info is None:
        return {}
    if name in ("height", "width"):
        return {"multipleOf": service.info.size_multiple}
    if name == "max_sequence_length" and service.info.max_tokens is not None:
        return {"maximum": min(option["maximum"], service.info.max_tokens)}
    return {}


def _form_fields(name: str, options: list[Schema]) -> dict[str, Schema]:
    """A form writes a single value under the field's name, and each one of a list under `name[]`."""
    single = [option for option in options if option.get("type") != "array"]
    lists = [option for option in options if option.get("type") == "array"]
    found = {name: _union(single)} if single else {}
    return found | ({f"{name}[]": _union(lists)} if lists else {})


def _options(field: attrs.Attribute[Any]) -> list[Schema]:
    """What a field of a request takes, beside null."""
    meta = knob_of(field)
    options = [_ruled(_plain_type(kind), meta) for kind in _kinds(field.type) if kind is not types.NoneType]
    if field.name == "size":
        return [{"type": "string", "pattern": SIZE}]
    if field.name in ("prompt", "negative_prompt"):
        return [{"type": "string", "maxLength": MAX_PROMPT_CHARACTERS}]
    return [*options, *([SPELLINGS[field.name]] if field.name in SPELLINGS else [])]


def _ruled(schema: Schema, meta: Knob) -> Schema:
    """The schema of one value, or of each of a list, with the knob's range and choices."""
    if schema["type"] == "array":
        return {**schema, "items": _ruled(schema["items"], meta)}
    if schema["type"] in ("integer", "number"):
        limits = {"minimum": meta.min, "exclusiveMinimum": meta.above, "maximum": meta.max}
        return {**schema, **{name: limit for name, limit in limits.items() if limit is not None}}
    choices = list(meta.built if meta.pending else meta.choices)
    return {**schema, "enum": choices} if choices else schema


def _plain_type(kind: Any) -> Schema:
    """A type without attrs classes in it."""
    return _type(kind, _no_classes)


def _no_classes(cls: type) -> Schema:
    raise TypeError(f"{cls.__name__} cannot stand in a request")


def _kinds(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _type(kind: Any, refer: Callable[[type], Schema]) -> Schema:
    """The JSON Schema of a Python type; `refer` tells how an attrs class is named."""
    if typing.get_origin(kind) is Annotated:
        inner, told = typing.get_args(kind)
        return {"description": told.help, **_chosen(_type(inner, refer), told)}
    kinds = _kinds(kind)
    if len(kinds) > 1:
        schema = _union([_type(each, refer) for each in kinds if each is not types.NoneType])
        return _nullable(schema) if types.NoneType in kinds else schema
    if kind is Any:
        return {}
    if attrs.has(kind):
        return refer(kind)
    if typing.get_origin(kind) in (list, tuple):
        return {"type": "array", "items": _type(typing.get_args(kind)[0], refer)}
    if typing.get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _type(typing.get_args(kind)[1], refer)}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]}


def _chosen(schema: Schema, told: Doc) -> Schema:
    return {**schema, "enum": list(told.choices)} if told.choices else schema


def _union(options: list[Schema]) -> Schema:
    if len(options) == 1:
        return options[0]
    if all("enum" in option for option in options):
        return {"enum": [value for option in options for value in option["enum"]]}
    return {"anyOf": options}


def _nullable(schema: Schema) -> Schema:
    """The schema of a value that may be null too, which for a request is the same as leaving it out."""
    if "enum" in schema:
        kind = {"type": [schema["type"], "null"]} if "type" in schema else {}
        return {**schema, **kind, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    own = {key: value for key, value in schema.items() if key == "description"}
    options = schema.get("anyOf") or [{key: value for key, value in schema.items() if key != "description"}]
    return {**own, "anyOf": [*options, {"type": "null"}]}


def _required(schema: Schema) -> Schema:
    """The schema of a field that must be there, and not be null or empty."""
    if "anyOf" in schema:
        options = [_required(option) for option in schema["anyOf"] if option["type"] != "null"]
        return {**{key: value for key, value in schema.items() if key != "default"}, "anyOf": options}
    kind = next(kind for kind in (schema["type"], *schema["type"]) if kind in ("string", "array"))
    least = {"minLength": 1} if kind == "string" else {"minItems": 1}
    return {**{key: value for key, value in schema.items() if key != "default"}, "type": kind, **least}


# The document


@attrs.define
class _Writer:
    """Writes operations, and gathers the schemas they refer to."""

    service: Service
    secured: bool
    schemas: dict[str, Schema] = attrs.field(factory=dict)

    def operation(self, path: str, handler: Handler, described: Described) -> Schema:
        """One method of one path."""
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
            fields[field] = _required(fields[field])
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
        """The schema of each event of a stream."""
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
        """The name of an answer's schema, which is made at the first time. Every field is always there."""
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

    def _answer_field(self, field: attrs.Attribute[Any]) -> Schema:
        schema = _type(field.type, self.refer)
        if field.name in ("object", "deleted"):
            return {**schema, "const": default_of(field)}
        return schema


def _tag(handler: Handler) -> str:
    """The module of the handler."""
    return handler.__module__.rpartition(".")[2]


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _event(name: Schema, data: Schema) -> Schema:
    """A server-sent event whose data is JSON."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {**name, "data": text}, "required": ["event", "data"]}


def _media_schema(kind: str) -> Schema:
    if kind == "application/json":
        return {"type": "object"}
    return {"type": "string"} if "text" in kind else FILE


def _query(cls: type | None) -> Iterator[Schema]:
    for name, field in fields_of(cls).items() if cls is not None else ():
        schema, default = _union(_options(field)), default_of(field)
        if default is not None:
            schema = {**schema, "default": default}
        yield {"name": name, "in": "query", "description": knob_of(field).help, "schema": schema}


def _headers(described: Described) -> Iterator[Schema]:
    for name in described.headers:
        text, schema = HEADERS[name]
        yield {"name": name, "in": "header", "description": text, "schema": schema}


def _picture(name: str) -> dict[str, Schema]:
    """A field of JSON that takes the addresses of pictures: one or several."""
    one = [ADDRESS, NESTED_ADDRESS]
    several = {"type": "array", "items": {"anyOf": one}}
    return {name: {"description": "picture by address, or several", "anyOf": [*one, several, {"type": "null"}]}}


def _picture_form(name: str, addresses_only: bool) -> dict[str, Schema]:
    """The same field of a form, which may bring files too."""
    item = ADDRESS if addresses_only else {"anyOf": [FILE, ADDRESS]}
    one, several = "address of a picture", "addresses of pictures"
    if not addresses_only:
        one, several = "picture, as a file or by its address", "pictures, as files or by their addresses"
    return {
        name: {**item, "description": one},
        f"{name}[]": {"description": several, "type": "array", "items": item},
    }


def document(app: web.Application, url: str) -> Schema:
    """The OpenAPI 3.1 document of the routes that are described. `url` is the server's, as its client names it."""
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


class _Press:
    """Answers that anybody may ask for: made one at a time, in a thread that nothing else needs, and kept.

    A client chooses the URL, by its headers; for another one the document is not written anew.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "openapi")
        self._written: tuple[Any, Schema] | None = None  # what it was made of, and the document
        self._answers: dict[tuple[Callable[[Schema], Answer], str], tuple[Any, Answer]] = {}

    async def answer(self, request: web.Request, make: Callable[[Schema], Answer]) -> web.Response:
        """What `make` makes of the document, under the URL that this client uses."""
        app, url, service = request.app, origin(request).url("/").removesuffix("/"), request.app[SERVICE]
        state = (service.info, service.sampling, service.settings, bool(app[KEYS].known))
        made = self._find(state, make, url)
        if made is None:
            made = await asyncio.get_running_loop().run_in_executor(self._thread, self._print, app, state, make, url)
        body, headers = made
        return web.Response(body=body, headers=headers)

    def _find(self, state: Any, make: Callable[[Schema], Answer], url: str) -> Answer | None:
        kept, answer = self._answers.get((make, url), (None, None))
        return answer if kept == state else None

    def _print(self, app: web.Application, state: Any, make: Callable[[Schema], Answer], url: str) -> Answer:
        if (made := self._find(state, make, url)) is not None:  # who waited for the same one finds it
            return made
        if self._written is None or self._written[0] != state:
            self._written = state, document(app, url)
        answer = make({**self._written[1], "servers": [{"url": url}]})
        if len(self._answers) >= ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]
        self._answers[make, url] = state, answer
        return answer


_PRESS = _Press()


@routes.get("/openapi.json")
@Described(media=("application/json",))
async def show_document(request: web.Request) -> web.Response:
    """This interface in OpenAPI 3.1; once the model is loaded, with its defaults."""
    return await _PRESS.answer(request, _as_json)


def _as_json(written: Schema) -> Answer:
    return json.dumps(written).encode(), {"Content-Type": "application/json; charset=utf-8"}


# The page


@routes.get("/docs")
@Described(media=("text/html",))
async def show_page(request: web.Request) -> web.Response:
    """The same as a page to read."""
    return await _PRESS.answer(request, page)


@functools.cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("sgld.server.routes", "docs"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"type": type_text, "limits": limits_text, "schema_name": _schema_name, "prose": _prose}
    return templates


def page(written: Schema) -> Answer:
    """The document as HTML, with a Content-Security-Policy that allows its style and nothing else."""
    style = _templates().get_template("docs.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = _templates().get_template("docs.html").render(document=written, style=style, curl=curl)
    return text.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _prose(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _schema_name(schema: Schema) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def type_text(schema: Schema) -> str:
    """A schema's type for a reader: `integer`, `string or null`, `list of integer`."""
    if "$ref" in schema:
        return _schema_name(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_text(option) for option in schema["anyOf"]))
    kinds = schema.get("type", "any")
    if kinds == "array":
        return f"list of {type_text(schema['items'])}"
    if "const" in schema or (kinds == "any" and "enum" in schema):
        return "string" if isinstance(schema.get("const", ""), str) else "any"
    kinds = "file" if schema.get("format") == "binary" else kinds
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def limits_text(schema: Schema) -> str:
    """What of its type is allowed: `1 to 10`, `one of png, jpeg`; empty where everything is."""
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(str(value) for value in schema['enum'] if value is not None)}"
    for option in [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]:
        if text := limits_text(option):
            return text
    words = [_range_text(schema), f"multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""]
    return ", ".join(word for word in words if word)


def _range_text(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        return f"more than {schema['exclusiveMinimum']}"
    if "maxLength" in schema:
        return f"at most {schema['maxLength']} characters"
    if low is None:
        return "" if high is None else f"at most {high}"
    return f"at least {low}" if high is None else f"{low} to {high}"


def curl(written: Schema, path: str, method: str) -> str:
    """A command that calls an operation with the example of its body."""
    operation = written["paths"][path][method]
    words = ["curl", f"{written['servers'][0]['url']}{path}"]
    if method != "get":
        words += ["-X", method.upper()]
    if operation.get("security", written.get("security")):
        words += ["-H", "Authorization: Bearer YOUR_KEY"]
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {})
    example = body.get("example")
    if example and "image" in example:
        words += [word for name, value in example.items() for word in ("-F", f"{name}={value}")]
    elif example:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(example)]
    kinds = operation["responses"]["200"]["content"]
    if any(schema["schema"].get("format") == "binary" for schema in kinds.values()):
        words += ["-o", "file"]
    return shlex.join(words)
