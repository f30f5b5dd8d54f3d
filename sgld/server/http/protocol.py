"""Answer requests that aiohttp refuses before any route in the form of every other error.

This is the only module that touches private attributes of aiohttp (`_manager`, `_loop`, `_kwargs`, `_make_server`).
It waits for https://github.com/aio-libs/aiohttp/issues/3287, a handler for what the parser refuses.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from sgld.errors import INTERNAL, BadRequest, SgldError
from sgld.server.http.errors import error_response, name_request, refusal

log = logging.getLogger(__name__)
RESERVED_DESCRIPTORS = 200
MAX_LINE = 8190  # bytes of the request line, and of each header
MALFORMED = f"the request is not valid HTTP, or its first line or a header is longer than {MAX_LINE} bytes"
UNDECODABLE = "Content-Encoding: this server cannot decode it; gzip and deflate are allowed"


class _Connection(web.RequestHandler):
    """A connection whose errors hold nothing of the request, for any byte may be part of a key.

    A connection too many is closed at once: descriptors must be left for jobs and files.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._manager is not None
        if len(self._manager.connections) > most_connections():
            log.warning("a connection is refused: there are %d, as many as descriptors allow", most_connections())
            transport.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size:
            raise ConnectionError("half an answer has left; nothing can follow")
        if isinstance(exc, HttpProcessingError):
            log.info("refused a request that is not valid HTTP: %s", type(exc).__name__)
            error: SgldError = BadRequest(UNDECODABLE if isinstance(exc, ContentEncodingError) else MALFORMED)
        else:
            log.error("%s %s failed", request.method, request.path, exc_info=exc)
            error = SgldError(INTERNAL)
        answer = error_response(error)
        name_request(answer)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a failed handler, except for a body that cannot be read, which has been answered."""
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)


def most_connections() -> int:
    """Return the number of connections that leaves descriptors for everything else."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """A runner of an application that gives every error one form."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            _answering(made.request_handler),
            request_factory=made.request_factory,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            **self._kwargs,
        )


def _answering(
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Convert what aiohttp refuses before the middlewares, an unknown `Expect`, to our form."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as refused:
            if refused.status < 400:
                raise
            return refusal(refused, request)

    return answer
