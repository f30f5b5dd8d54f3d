"""Logging on standard error: plain lines, or one JSON object a line; each names the job it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from sgld.config import set_default_environment

FORMAT = "%(asctime)s %(levelname)s %(job)s%(message)s"
QUIET = {  # read by libraries as they are imported, in this process and in its workers
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)


def set_up(level: str, format: str = "text") -> None:
    """Log sgld at `level`; libraries only their warnings, and none of their bars but a terminal's download bar.

    `format` is text or json; json takes in Python's own warnings too, so that every line is an object.
    """
    logging.basicConfig(handlers=[handler(format)], level=logging.WARNING)
    logging.captureWarnings(format == "json")
    logging.getLogger("sgld").setLevel(level.upper())
    if level != "debug":
        set_default_environment(**QUIET)
    if sys.stderr is None or not sys.stderr.isatty():
        set_default_environment(HF_HUB_DISABLE_PROGRESS_BARS="1")


def handler(format: str) -> logging.Handler:
    """Make a handler that writes lines of text or json to standard error."""
    made = logging.StreamHandler()
    made.addFilter(_name_job)
    made.setFormatter(JsonLines() if format == "json" else logging.Formatter(FORMAT))
    return made


@contextmanager
def job_context(job_id: str) -> Iterator[None]:
    """Name this job in every line logged inside, in tasks started there and in threads of `anyio.to_thread`."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def _name_job(record: logging.LogRecord) -> bool:
    """Set the `job_id` of a record, unless `extra` has, and its form in a plain line."""
    job_id = record.__dict__.setdefault("job_id", _job_id.get())
    record.job = f"[{job_id}] " if job_id is not None else ""
    return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; job_id, exception and stack where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "job_id": record.__dict__["job_id"],
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
            "stack": record.stack_info,
        }
        return json.dumps({name: value for name, value in line.items() if value is not None})
