"""Absolute URLs: as the client named the server, through proxies, and with headers nobody should believe."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from sgld.server.http.urls import absolute

Connect = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]
PATH = "/v1/images/image_1/content"


@pytest.fixture
async def client(aiohttp_client: Connect) -> TestClient[web.Request, web.Application]:
    async def show(request: web.Request) -> web.Response:
        return web.Response(text=absolute(request, request.query.get("path", PATH)))

    app = web.Application()
    app.router.add_get("/", show)
    return await aiohttp_client(app)


async def raw(client: TestClient[web.Request, web.Application], *lines: str, version: str = "1.1") -> str:
    """The body of the answer to a request of exactly these header lines."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    head = "\r\n".join([f"GET / HTTP/{version}", *lines, "Connection: close", "", ""])
    writer.write(head.encode("latin-1"))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.partition(b"\r\n\r\n")[2].decode()


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({}, "http://own.test:30010"),
        ({"Host": "own.test"}, "http://own.test"),
        ({"Host": "own.test:80"}, "http://own.test"),
        ({"Host": "127.0.0.1:8000"}, "http://127.0.0.1:8000"),
        ({"Host": "[::1]:8000"}, "http://[::1]:8000"),
        ({"Host": "my_host"}, "http://my_host"),
        ({"X-Forwarded-Proto": "https"}, "https://own.test:30010"),
        ({"X-Forwarded-Proto": "HTTPS", "X-Forwarded-Host": "api.test"}, "https://api.test"),
        ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "api.test:8443"}, "https://api.test:8443"),
        ({"X-Forwarded-Host": "api.test", "X-Forwarded-Port": "8080"}, "http://api.test:8080"),
        ({"X-Forwarded-Proto": "https", "X-Forwarded-Host": "a.test", "X-Forwarded-Port": "443"}, "https://a.test"),
        ({"X-Forwarded-Host": "api.test:8443", "X-Forwarded-Port": "443"}, "http://api.test:8443"),
        ({"Host": "own.test", "X-Forwarded-Port": "8080"}, "http://own.test:8080"),
        ({"X-Forwarded-Host": "first.test, second.test", "X-Forwarded-Proto": "https,http"}, "https://first.test"),
        ({"X-Forwarded-Host": "[2001:db8::1]:8443"}, "http://[2001:db8::1]:8443"),
        ({"X-Forwarded-Prefix": "/gpu"}, "http://own.test:30010/gpu"),
        ({"X-Forwarded-Prefix": "/team-a/sgld.v1/"}, "http://own.test:30010/team-a/sgld.v1"),
        ({"X-Forwarded-Prefix": "/"}, "http://own.test:30010"),
        ({"X-Forwarded-Prefix": ""}, "http://own.test:30010"),
        ({"X-Forwarded-Prefix": "/outer, /inner/"}, "http://own.test:30010/outer/inner"),
        ({"Forwarded": "for=192.0.2.1;proto=https;host=api.test"}, "https://api.test"),
        ({"Forwarded": 'For="[2001:db8::1]:4711"; Proto=https; Host="api.test:8443"'}, "https://api.test:8443"),
        ({"Forwarded": "proto=https;host=a.test, proto=http;host=b.test"}, "https://a.test"),
        ({"Forwarded": "for=192.0.2.1"}, "http://own.test:30010"),
        ({"Forwarded": "host=a.test", "X-Forwarded-Host": "b.test", "X-Forwarded-Proto": "https"}, "https://a.test"),
        ({"Forwarded": "host=a.test", "X-Forwarded-Prefix": "/p"}, "http://a.test/p"),
        ({"Forwarded": 'host="api.test:30443";proto=https;'}, "https://api.test:30443"),
        ({"X-Forwarded-Host": ""}, "http://own.test:30010"),
        ({"X-Forwarded-Host": ", evil.test"}, "http://own.test:30010"),
        ({"X-Forwarded-Proto": ""}, "http://own.test:30010"),
        ({"Forwarded": ""}, "http://own.test:30010"),
        ({"Forwarded": "host"}, "http://own.test:30010"),
        ({"Forwarded": 'host="evil.test'}, "http://own.test:30010"),
    ],
)
async def test_the_server_is_named_as_its_client_does(
    client: TestClient[web.Request, web.Application],
    headers: dict[str, str],
    base: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = await client.get("/", headers={"Host": "own.test:30010", **headers})
    assert await answer.text() == base + PATH
    assert caplog.text == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-Host": "evil.test/path"},
        {"X-Forwarded-Host": "user@evil.test"},
        {"X-Forwarded-Host": "evil.test?x"},
        {"X-Forwarded-Host": "evil.test#x"},
        {"X-Forwarded-Host": "evil test"},
        {"X-Forwarded-Host": "evil.test\\x"},
        {"X-Forwarded-Host": ":80"},
        {"X-Forwarded-Host": "evil.test:"},
        {"X-Forwarded-Host": "evil.test:0"},
        {"X-Forwarded-Host": "evil.test:65536"},
        {"X-Forwarded-Host": "evil.test:80:80"},
        {"X-Forwarded-Host": "-evil.test"},
        {"X-Forwarded-Host": "evil..test"},
        {"X-Forwarded-Host": "a" * 64},
        {"X-Forwarded-Host": "a." * 127 + "a"},
        {"X-Forwarded-Host": "ä.test"},
        {"X-Forwarded-Host": "999.1.1.1"},
        {"X-Forwarded-Host": "[evil]"},
        {"X-Forwarded-Host": "[::1"},
        {"X-Forwarded-Host": "::1"},
        {"X-Forwarded-Proto": "javascript"},
        {"X-Forwarded-Proto": "https:"},
        {"X-Forwarded-Port": "http"},
        {"X-Forwarded-Port": "0"},
        {"X-Forwarded-Port": "-1"},
        {"X-Forwarded-Port": "99999"},
        {"X-Forwarded-Prefix": "//evil.test"},
        {"X-Forwarded-Prefix": "gpu"},
        {"X-Forwarded-Prefix": "/a/../b"},
        {"X-Forwarded-Prefix": "/a/."},
        {"X-Forwarded-Prefix": "/a//b"},
        {"X-Forwarded-Prefix": "/a?b"},
        {"X-Forwarded-Prefix": "/a#b"},
        {"X-Forwarded-Prefix": "/a%2fb"},
        {"X-Forwarded-Prefix": "/a b"},
        {"X-Forwarded-Prefix": "/\\evil.test"},
        {"X-Forwarded-Prefix": "https://evil.test"},
        {"Forwarded": 'host="evil\\\\.test"'},
        {"Forwarded": "proto=ftp"},
        {"Forwarded": "host=api.test:30443;proto=https"},
        {"X-Forwarded-Host": "good.test", "X-Forwarded-Proto": "gopher", "X-Forwarded-Prefix": "/p"},
    ],
)
async def test_headers_that_are_not_well_formed_are_not_believed(
    client: TestClient[web.Request, web.Application], headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await raw(client, "Host: own.test:30010", *(f"{k}: {v}" for k, v in headers.items())) == (
            f"http://own.test:30010{PATH}"
        )
    assert "headers do not tell how this server is named: " in caplog.text


@pytest.mark.parametrize("lines", [(), ("Host: evil/..?x",), ("Host: user@own.test",), ("Host: ",)])
async def test_without_a_host_the_url_is_the_address_of_the_connection(
    client: TestClient[web.Request, web.Application], lines: tuple[str, ...]
) -> None:
    assert await raw(client, *lines, version="1.0") == f"http://127.0.0.1:{client.port}{PATH}"


async def test_a_path_is_encoded_and_keeps_its_query(client: TestClient[web.Request, web.Application]) -> None:
    headers = {"Host": "own.test", "X-Forwarded-Prefix": "/p"}
    answer = await client.get("/", params={"path": "/v1/a b/ä?variant=thumb nail"}, headers=headers)
    assert await answer.text() == "http://own.test/p/v1/a%20b/%C3%A4?variant=thumb+nail"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Forwarded", "a=b;" * 1900 + "!!"),
        ("Forwarded", 'a="' + "\\\\" * 3500),
        ("X-Forwarded-Host", "a" * 7900 + "!"),
        ("X-Forwarded-Prefix", "/a" * 3900 + "?"),
    ],
)
async def test_long_headers_cost_no_time(
    client: TestClient[web.Request, web.Application], name: str, text: str
) -> None:
    async with asyncio.timeout(2):
        assert await raw(client, "Host: own.test", f"{name}: {text}") == f"http://own.test{PATH}"
