"""What a route takes and answers, said beside its handler; the OpenAPI document is made of it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import attrs
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
H = TypeVar("H", bound=Handler)
BODY_ERRORS = (400, 413)
MAKING_ERRORS = (*BODY_ERRORS, 403, 404, 429, 500, 503)
"""Of routes that read a body, and of those that make pictures or videos with it."""

FILE_STATUSES = {
    206: "The range that was asked for",
    304: "Not modified: the client's copy is the file",
}
"""What else the answer of a file can be, to `Range` and conditional headers."""


@attrs.frozen(kw_only=True)
class Described:
    """Decorates a handler. Its docstring becomes the summary; classes are attrs classes of schema.py or the module."""

    answer: type | None = None  # the JSON of status 200
    media: tuple[str, ...] = ()  # media types of a file that status 200 brings
    events: Mapping[str, type] = attrs.field(factory=dict)  # server-sent events of status 200: name -> JSON of `data`
    last: str | None = None  # `data` of the last event, which has no name
    id: str = ""  # what {id} in the path is
    query: type | None = None
    headers: tuple[str, ...] = ()  # request headers, of `HEADERS` in openapi.py
    body: type | None = None
    form: bool = False  # the body may be multipart/form-data as well as JSON
    pictures: tuple[str, ...] = ()  # fields of the body that take files of a form, or addresses
    required: tuple[str, ...] = ()
    fixed: Mapping[str, object] = attrs.field(factory=dict)  # fields of the body that take one value only
    example: Mapping[str, object] = attrs.field(factory=dict)  # of the body
    errors: tuple[int, ...] = ()  # statuses that bring an `Error`; 401 goes without saying
    unready: type | None = None  # the JSON of status 503, where it is no `Error`
    other: Mapping[int, str] = attrs.field(factory=dict)  # further statuses, which bring no content of ours

    def __call__(self, handler: H) -> H:
        assert inspect.getdoc(handler), handler
        DESCRIBED[handler] = self
        return handler


DESCRIBED: dict[Handler, Described] = {}
