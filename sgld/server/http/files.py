"""A result's file as an answer: ranges and conditions as HTTP has them, refusals as our JSON."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import anyio
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from sgld.errors import NotFound, OutputError
from sgld.server.http.errors import error_body

log = logging.getLogger(__name__)


_RANGE = re.compile(r"bytes=(?:([0-9]{1,99})-([0-9]{0,99})|-0*[1-9][0-9]{0,99})", re.IGNORECASE)


class _Refused(Exception):
    """Another status than that of a file, before anything of the answer has left."""


class _File(web.FileResponse):
    """Can be prepared by the handler, and raises `_Refused` in place of an answer without a body."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None if self.prepared else await super().prepare(request)

    def set_status(self, status: int, reason: str | None = None) -> None:
        if status >= 400:
            raise _Refused(status)
        super().set_status(status, reason)


async def send_file(request: web.Request, path: Path, media_type: str) -> web.StreamResponse:
    """Send a file, within the handler, so that its status and its time are those of the request.

    Raises:
        NotFound: the file has gone.
        OutputError: it cannot be read.
    """
    answer = _File(path, headers={hdrs.CONTENT_TYPE: media_type})
    try:
        await answer.prepare(await _readable(request, path))
    except _Refused as refused:
        return _refusal(request, refused.args[0], answer, path)
    except OSError:
        if request.transport is not None:
            request.transport.abort()  # nothing can follow half a file
        raise
    return answer


async def _readable(request: web.Request, path: Path) -> web.Request:
    """Drop a `Range` that brings the whole file (RFC 9110, sections 13.1.5 and 14.2) from the request.

    Such are another unit, several ranges, what is no range, and one for another file than this one. aiohttp refuses
    the first three, and knows no `If-Range` with an entity tag.
    """
    if hdrs.RANGE not in request.headers:
        return request
    ranges, condition = request.headers.getall(hdrs.RANGE), request.headers.get(hdrs.IF_RANGE)
    match = _RANGE.fullmatch(ranges[0])
    is_one = len(ranges) == 1 and match is not None and not (match[2] and int(match[1]) > int(match[2]))
    if is_one and (condition is None or request.if_range is not None or condition == await _entity_tag(path)):
        return request
    headers = request.headers.copy()
    del headers[hdrs.RANGE]
    return request.clone(headers=headers)


async def _entity_tag(path: Path) -> str | None:
    """Compute the `ETag` that aiohttp gives the file; None for a file that has gone."""
    try:
        found = await anyio.Path(path).stat()
    except OSError:
        return None
    return f'"{found.st_mtime_ns:x}-{found.st_size:x}"'


def _refusal(request: web.Request, status: int, file: _File, path: Path) -> web.Response:
    if status == web.HTTPNotFound.status_code:
        raise NotFound(f"{path.name}: the file has been removed", "id")
    if status == web.HTTPForbidden.status_code:
        log.error("cannot read %s", path)
        raise OutputError(f"{path.name}: the file cannot be read; the server's log has the reason")
    headers = {}
    if status == web.HTTPRequestRangeNotSatisfiable.status_code:
        headers[hdrs.CONTENT_RANGE] = held = file.headers[hdrs.CONTENT_RANGE]
        asked, size = request.headers[hdrs.RANGE], held.rpartition("/")[2]
        error = error_body(status, "range_not_satisfiable", f"Range: {asked!r}: the file has {size} bytes", hdrs.RANGE)
    else:
        error = error_body(status, "precondition_failed", "the file is not the one that the request's condition names")
    return web.json_response(error, status=status, headers=headers)
