"""Logging: both forms of a line, the job it belongs to, and what libraries may say."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
import pytest

from sgld import log as logs

log = logging.getLogger("sgld.tests.log")
Lines = Callable[[str], io.StringIO]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Start writing this logger's lines in a format; they are read from what is returned."""
    added: list[logging.Handler] = []

    def start(format: str) -> io.StringIO:
        handler = logs.handler(format)
        assert isinstance(handler, logging.StreamHandler)
        stream = io.StringIO()
        handler.setStream(stream)
        log.addHandler(handler)
        added.append(handler)
        return stream

    log.setLevel("DEBUG")
    yield start
    log.setLevel("NOTSET")
    for handler in added:
        log.removeHandler(handler)


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_plain_line(lines: Lines) -> None:
    stream = lines("text")
    log.info("%d of %d", 1, 2)
    with logs.job_context("video_1"):
        log.warning("%s", "inside")
    log.info("outside")
    first, second, third = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO 1 of 2", first)
    assert second.endswith(" WARNING [video_1] inside")
    assert third.endswith(" INFO outside")


def test_a_json_line(lines: Lines) -> None:
    stream = lines("json")
    before = datetime.now(UTC)
    log.info('two\nlines, "quotes" and ä\u2028\ud800')
    with logs.job_context("image_1"):
        log.debug("inside")
    plain, inside = objects(stream)
    time = plain.pop("time")
    assert plain == {"level": "info", "logger": log.name, "message": 'two\nlines, "quotes" and ä\u2028\ud800'}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert abs((datetime.fromisoformat(time) - before).total_seconds()) < 60
    assert (inside["job_id"], inside["level"]) == ("image_1", "debug")


def test_an_exception_stays_in_its_line(lines: Lines) -> None:
    stream = lines("json")
    try:
        raise ValueError("the reason")
    except ValueError:
        log.exception("it failed", stack_info=True)
    (line,) = objects(stream)
    assert line["message"] == "it failed" and line["level"] == "error"
    assert line["exception"].startswith("Traceback") and line["exception"].endswith("ValueError: the reason")
    assert "test_an_exception_stays_in_its_line" in line["stack"]


def test_one_line_for_several_handlers_names_the_job_once(lines: Lines) -> None:
    plain, structured = lines("text"), lines("json")
    with logs.job_context("video_1"):
        log.info("inside")
        log.info("of another", extra={"job_id": "video_2"})
    assert [line.split(" ", 3)[3] for line in plain.getvalue().splitlines()] == [
        "[video_1] inside",
        "[video_2] of another",
    ]
    assert [line["job_id"] for line in objects(structured)] == ["video_1", "video_2"]


async def test_tasks_and_threads_of_a_job_name_it_and_others_do_not(lines: Lines) -> None:
    stream = lines("json")
    entered = asyncio.Event()

    async def job(name: str) -> None:
        with logs.job_context(name):
            entered.set()
            await asyncio.sleep(0)
            await anyio.to_thread.run_sync(log.info, "thread of %s", name)
            await asyncio.create_task(child(name))

    async def child(name: str) -> None:
        log.info("task of %s", name)

    async with asyncio.TaskGroup() as group:
        group.create_task(job("image_1"))
        group.create_task(job("video_2"))
        await entered.wait()
        log.info("nobody's")
    for line in objects(stream):
        assert line.get("job_id", "nobody's") == line["message"].split(" of ")[-1]
    assert len(objects(stream)) == 5


def test_a_context_inside_another_ends_with_its_own(lines: Lines) -> None:
    stream = lines("json")
    with logs.job_context("outer"):
        with pytest.raises(ZeroDivisionError), logs.job_context("inner"):
            raise ZeroDivisionError
        log.info("outer again")
    assert objects(stream)[0]["job_id"] == "outer"


SCRIPT = """
import logging, os, warnings
from sgld import log
log.set_up({arguments})
for name in ("sgld.server", "library"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)("%s %s", name, level)
warnings.warn("from python")
print(os.environ.get("TRANSFORMERS_VERBOSITY"), os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
"""


def run(arguments: str) -> tuple[list[str], str]:
    """Lines on standard error, and the environment that libraries find."""
    script = SCRIPT.format(arguments=arguments)
    ours = (*logs.QUIET, "HF_HUB_DISABLE_PROGRESS_BARS")  # which another test may have set in this process
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=clean)
    return done.stderr.splitlines(), done.stdout.strip()


def test_sgld_logs_at_its_level_and_libraries_only_warnings() -> None:
    told, environment = run("'info'")
    assert [line.split(" ", 2)[2] for line in told[:3]] == [
        "INFO sgld.server info",
        "WARNING sgld.server warning",
        "WARNING library warning",
    ]
    assert "UserWarning: from python" in told[3]
    assert environment == "error 1"
    told, environment = run("'debug'")
    assert "DEBUG sgld.server debug" in told[0]
    assert not any("library debug" in line for line in told)
    assert environment == "None 1"


def test_every_json_line_is_an_object() -> None:
    told, _ = run("'warning', 'json'")
    assert [json.loads(line)["logger"] for line in told] == ["sgld.server", "library", "py.warnings"]
