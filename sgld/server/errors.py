"""Every error as the client expects it: an OpenAI `error` object, and `detail` for users of the replaced system."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from sgld.errors import NotReady, QueueFull, SgldError, Unauthorized

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RETRY_AFTER_S = 5


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, object]:
    """The JSON of one error."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}, "detail": message}


def error_of(error: SgldError) -> dict[str, object]:
    """The JSON of a typed error."""
    return error_body(error.status, error.code, error.message, error.param)


def error_response(error: SgldError) -> web.Response:
    """One error with its status; `Retry-After` where it will pass by itself."""
    headers = {}
    if isinstance(error, NotReady | QueueFull):
        headers["Retry-After"] = str(error.retry_after if isinstance(error, QueueFull) else RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error_of(error), status=error.status, headers=headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Typed errors become their status; aiohttp's own become the same JSON; the rest is a logged 500."""
    try:
        return await handler(request)
    except SgldError as error:
        return error_response(error)
    except web.HTTPException as refused:
        if refused.status < 400:
            raise
        return _refusal(refused, request)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_response(SgldError("internal error; the server's log has the reason"))


def _refusal(refused: web.HTTPException, request: web.Request) -> web.Response:
    """aiohttp's own answer (no such route, wrong method, body too large) in our form."""
    reasons = {
        404: ("not_found", f"no route {request.method} {request.path}"),
        405: ("method_not_allowed", f"{request.path} does not take {request.method}"),
        413: ("too_large", f"the body is larger than {request.client_max_size} bytes"),
    }
    code, message = reasons.get(refused.status, ("http_error", refused.reason))
    headers = {"Allow": refused.headers["Allow"]} if "Allow" in refused.headers else {}
    return web.json_response(error_body(refused.status, code, message), status=refused.status, headers=headers)
