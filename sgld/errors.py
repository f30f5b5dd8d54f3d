"""The errors that users meet: one tree, each with its HTTP status and code.

SgldError                      500 internal_error      exit 1
|- BadRequest                  400 invalid_value       exit 2
|  |- MissingFile              400 invalid_value
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

import copy
import difflib
from collections.abc import Iterable
from typing import ClassVar, Self

INTERNAL = "internal error; the server's log has the reason"  # the message of an unexpected error
_HINT_CHARACTERS = 64  # longest name to compare; the time grows with the square


class SgldError(Exception):
    """The root. `param` is the field at fault, `file` the input file at fault.

    The message of an error with a `field` is `field: reason`. The reason of an error with a `file` follows the quoted
    file name directly: " is damaged", ": no such file".
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(self, reason: str, param: str | None = None, *, field: str | None = None, file: str | None = None):
        super().__init__(reason, param)
        self.reason, self.field, self.file = reason, field, file
        self.param = field if param is None else param

    @property
    def text(self) -> str:
        """Return the message without its field."""
        return self.reason if self.file is None else repr(self.file) + self.reason

    @property
    def message(self) -> str:
        """Return the whole message, one line."""
        return self.text if self.field is None else f"{self.field}: {self.text}"

    def __str__(self) -> str:
        return self.message

    def renamed(self, field: str | None, text: str | None = None) -> Self:
        """Return a copy that names another field, with another text after it where one is given."""
        other = copy.copy(self)
        other.field = other.param = field
        if text is not None:
            other.reason, other.file = text, None
        return other


class BadRequest(SgldError):
    """A value of the wrong type, range or shape."""

    status = 400
    code = "invalid_value"
    exit_code = 2


class MissingFile(BadRequest):
    """An input file that does not exist."""


class UnknownField(BadRequest):
    """A flag, key or parameter that does not exist. `hint` names the nearest known one."""

    code = "unknown_parameter"

    def __init__(self, reason: str, param: str | None = None, *, hint: str = ""):
        super().__init__(reason + hint, param)
        self.hint = hint


class NotBuilt(BadRequest):
    """A documented knob whose feature is not built yet, or that this model cannot use."""

    code = "not_supported"


class Unauthorized(SgldError):
    """A missing or unknown API key."""

    status = 401
    code = "invalid_api_key"


class Forbidden(SgldError):
    """An API key without this permission."""

    status = 403
    code = "forbidden"


class NotFound(SgldError):
    """A model, job or file that does not exist."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """A model that this server does not serve."""

    code = "model_not_found"


class TooLarge(SgldError):
    """More bytes, pixels or memory than the server allows."""

    status = 413
    code = "too_large"
    exit_code = 2


class QueueFull(SgldError):
    """A full queue. The client may try again after `retry_after` seconds."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, param: str | None = None, retry_after: int = 5):
        super().__init__(message, param)
        self.retry_after = retry_after


class ModelError(SgldError):
    """A folder without a model, a corrupt file, missing or extra tensors."""

    code = "model_error"


class OutputError(SgldError):
    """A result that could not be stored."""

    code = "output_error"


class OutOfMemory(SgldError):
    """A device or host without enough memory. The next job may fit."""

    code = "out_of_memory"


class WorkerDied(SgldError):
    """A rank that crashed, was killed, or disagreed with its peers. The group was restarted."""

    code = "worker_died"


class NotReady(SgldError):
    """A server that is loading or shutting down."""

    status = 503
    code = "not_ready"


class JobCancelled(SgldError):
    """A job that its caller stopped."""

    status = 499
    code = "cancelled"
    exit_code = 130


def _tree(root: type[SgldError]) -> Iterable[type[SgldError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def from_code(code: str, message: str, param: str | None = None) -> SgldError:
    """Return the error that a record describes."""
    kinds = (kind for kind in _tree(SgldError) if kind.code == code)
    return next(kinds, SgldError)(message, param)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest known name, or nothing if none is close."""
    if len(name) > _HINT_CHARACTERS:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message."""
    return (str(error).strip().splitlines() or [""])[0]
