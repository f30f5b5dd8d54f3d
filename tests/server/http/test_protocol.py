"""Requests that aiohttp's parser refuses, over real sockets: one form of error, and no byte of the client in it."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from aiohttp import web

from sgld.server.http import protocol
from sgld.server.http.body import read_body
from sgld.server.http.errors import answer_errors
from sgld.server.http.protocol import MALFORMED, UNDECODABLE, Runner
from sgld.server.http.schema import VideoFields

SECRET = b"key-0123456789abcdef"
HOST = b"Host: localhost\r\n"
LONG = b"a" * 8200
MALFORMED_REQUESTS = {
    "a method that is none": b"FOO BAR / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long request line": b"GET /" + LONG + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long header": b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + SECRET + LONG + b"\r\n\r\n",
    "a length that is no number": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: abc\r\n\r\n",
    "NUL in a key": b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + SECRET + b"\0\r\n\r\n",
    "control character in a key": b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + SECRET + b"\x01\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server with one route, which answers with its body."""

    async def show(request: web.Request) -> web.Response:
        return web.json_response((await read_body(request, VideoFields, empty=True)).values)

    app = web.Application(middlewares=[answer_errors])
    app.add_routes([web.route("*", "/", show)])
    runner = Runner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def talk(port: int, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case, and JSON of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        if first.endswith(" 400 Bad Request"):
            assert await reader.read() == b"", "what follows on the connection cannot be told apart"
    writer.close()
    await writer.wait_closed()
    assert headers["content-type"].startswith("application/json"), body
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize("name", MALFORMED_REQUESTS)
async def test_what_the_parser_refuses_tells_nothing(port: int, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    status, headers, body = await talk(port, MALFORMED_REQUESTS[name])
    assert (status, body["error"]["message"]) == (400, MALFORMED)
    assert headers["x-request-id"].startswith("req_")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert SECRET.decode() not in caplog.text and "Traceback" not in caplog.text


async def test_a_coding_that_cannot_be_decoded(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiohttp.http_parser.HAS_BROTLI", False)
    request = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx"
    status, _, body = await talk(port, request)
    assert (status, body["error"]["message"]) == (400, UNDECODABLE)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_body_that_cannot_be_decoded(port: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = HOST + f"Content-Type: {kind}\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n".encode()
    status, _, body = await talk(port, b"POST / HTTP/1.1\r\n" + headers + b"none")
    assert status == 400 and body["error"]["message"].endswith(": Can not decode content-encoding: gzip")
    assert not caplog.records, "a client's fault is no error of the server"


async def test_an_expectation_that_cannot_be_met(port: int) -> None:
    for path in (b"/", b"/none-such"):
        status, _, body = await talk(port, b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Expect: tea\r\n\r\n")
        assert (status, body["error"]["code"]) == (417, "expectation_failed")


async def test_descriptors_are_left_for_jobs(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection after the last that is allowed is closed unanswered; the others go on."""
    monkeypatch.setattr(protocol, "most_connections", lambda: 2)
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    async with asyncio.timeout(10):
        assert await held[2][0].read() == b"" and "a connection is refused" in caplog.text
    held[1][1].write(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}")
    async with asyncio.timeout(10):
        assert b" 200 OK" in await held[1][0].readuntil(b"\r\n\r\n")
    for _, writer in held:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    assert (await talk(port, b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}"))[0] == 200


def test_the_limit_is_below_the_descriptors() -> None:
    assert 0 < protocol.most_connections() < resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def test_what_is_right_passes(port: int) -> None:
    """The negative control: a header just short enough, and a body."""
    request = b"POST / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 8000 + b"\r\nContent-Length: 8\r\n\r\n" + b'{"n": 2}'
    assert (await talk(port, request))[::2] == (200, {"n": 2})
