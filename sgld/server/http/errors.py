"""Every error as the client expects it: an OpenAI `error` object, and `detail` for users of the replaced system."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from sgld.convert import cut
from sgld.errors import INTERNAL, NotReady, OutputError, QueueFull, SgldError, Unauthorized, WorkerDied

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RETRY_AFTER_S = 5
CLIENT_GONE = 499
_MESSAGE_CHARACTERS = 2000
RETRY = "x-should-retry"  # what OpenAI's client goes by, whatever the status


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, object]:
    """Return the JSON of an error, without long texts that the client sent."""
    message, param = cut(message, _MESSAGE_CHARACTERS), param and cut(param)
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}, "detail": message}


def error_of(error: SgldError) -> dict[str, object]:
    """Return the JSON of a typed error."""
    return error_body(error.status, error.code, error.message, error.param)


def error_response(error: SgldError) -> web.Response:
    """Answer an error with its status, and with `Retry-After` where it will pass by itself.

    Clients repeat every status from 500 on, and so generate three times, unless they are told what a repeat is worth.
    """
    headers = {}
    if isinstance(error, NotReady | QueueFull):
        headers["Retry-After"] = str(error.retry_after if isinstance(error, QueueFull) else RETRY_AFTER_S)
        headers[RETRY] = "true"
    elif error.status >= 500 and not isinstance(error, WorkerDied):
        headers[RETRY] = "false"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(error_of(error), status=error.status, headers=headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Convert typed errors to their status, aiohttp's to JSON of one form, and others to a logged 500."""
    try:
        return await handler(request)
    except OutputError as error:
        log.error("%s %s failed: %s", request.method, request.path, error)
        return error_response(_without_path(error))
    except SgldError as error:
        return error_response(error)
    except web.HTTPException as refused:
        if refused.status < 400:
            raise
        return refusal(refused, request)
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError) and _has_gone(request):
            return web.Response(status=CLIENT_GONE)  # which nobody reads
        log.exception("%s %s failed", request.method, request.path)
        return error_response(SgldError(INTERNAL))


def _without_path(error: OutputError) -> OutputError:
    """Hide the folder and the setting that an error names; they are the operator's."""
    return error if error.param is None else OutputError("it cannot be stored; the server's log has the reason")


def _has_gone(request: web.Request) -> bool:
    """Check that the client's connection is closed."""
    return request.transport is None or request.transport.is_closing()


def name_request(response: web.StreamResponse) -> None:
    """Add the header that OpenAI's client shows in its errors."""
    response.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"


def refusal(refused: web.HTTPException, request: web.BaseRequest) -> web.Response:
    """Convert an answer of aiohttp (no such route, wrong method, body too large) to our form."""
    reasons = {
        404: ("not_found", f"no route {request.method} {request.path}"),
        405: ("method_not_allowed", f"{request.path} does not take {request.method}"),
        413: ("too_large", refused.text or refused.reason),  # too many bytes, or too many fields of a form
        417: ("expectation_failed", "Expect: only 100-continue is allowed"),
    }
    code, message = reasons.get(refused.status, ("http_error", refused.reason))
    headers = {"Allow": refused.headers["Allow"]} if "Allow" in refused.headers else {}
    return web.json_response(error_body(refused.status, code, message), status=refused.status, headers=headers)
