"""Every error a user can meet: one tree, each with its HTTP status and code.

SgldError                      500 internal_error      exit 1
|- BadRequest                  400 invalid_value       exit 2
|  |- UnknownField             400 unknown_parameter
|  `- NotBuilt                 400 not_supported
|- Unauthorized                401 invalid_api_key
|- Forbidden                   403 forbidden
|- NotFound                    404 not_found
|  `- UnknownModel             404 model_not_found
|- TooLarge                    413 too_large           exit 2
|- QueueFull                   429 queue_full
|- ModelError                  500 model_error         exit 1
|- OutputError                 500 output_error        exit 1
|- OutOfMemory                 500 out_of_memory       exit 1
|- WorkerDied                  500 worker_died         exit 1
|- NotReady                    503 not_ready           exit 1
`- Cancelled                   499 cancelled           exit 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

_HINT_CHARACTERS = 64  # of a name; comparing takes their square, and ours are shorter


class SgldError(Exception):
    """The root. `param` is the field at fault, where there is one."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[SgldError], tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class BadRequest(SgldError):
    """A value of the wrong type, range or shape."""

    status = 400
    code = "invalid_value"
    exit_code = 2


class UnknownField(BadRequest):
    """A flag, key or parameter that does not exist."""

    code = "unknown_parameter"


class NotBuilt(BadRequest):
    """A documented knob whose feature does not stand yet, or that this model cannot use."""

    code = "not_supported"


class Unauthorized(SgldError):
    """No API key, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class Forbidden(SgldError):
    """A key that may not do this."""

    status = 403
    code = "forbidden"


class NotFound(SgldError):
    """No such model, job or file."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """A model that this server does not run."""

    code = "model_not_found"


class TooLarge(SgldError):
    """More bytes or pixels than the server takes, or more memory than it has."""

    status = 413
    code = "too_large"
    exit_code = 2


class QueueFull(SgldError):
    """Too many jobs wait; the client may try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, param: str | None = None, retry_after: int = 5):
        super().__init__(message, param)
        self.retry_after = retry_after


class ModelError(SgldError):
    """A folder that is no model, a corrupt file, missing or extra tensors."""

    code = "model_error"


class OutputError(SgldError):
    """The result could not be written."""

    code = "output_error"


class OutOfMemory(SgldError):
    """The device or the host ran out of memory; the next job may fit."""

    code = "out_of_memory"


class WorkerDied(SgldError):
    """A rank crashed, was killed, or disagreed with its peers; the group was restarted."""

    code = "worker_died"


class NotReady(SgldError):
    """The server is loading or shutting down."""

    status = 503
    code = "not_ready"


class Cancelled(SgldError):
    """The caller asked for the job to stop."""

    status = 499
    code = "cancelled"
    exit_code = 130


def _tree(root: type[SgldError]) -> Iterable[type[SgldError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def from_code(code: str, message: str, param: str | None = None) -> SgldError:
    """The error that a rank reported by its code."""
    by_code = {kind.code: kind for kind in _tree(SgldError)}
    return by_code.get(code, SgldError)(message, param)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known name, or nothing when none is close."""
    if len(name) > _HINT_CHARACTERS:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """What a library says is wrong, without the lines behind that."""
    return (str(error).strip().splitlines() or [""])[0]
