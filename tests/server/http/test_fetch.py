"""Outgoing requests, over real sockets. 127.0.0.2 plays the public internet where a test needs one."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import unused_port

from sgld.errors import BadRequest, SgldError, TooLarge
from sgld.server.http import fetch
from sgld.server.http.fetch import Fetcher, _Resolver, decode_data_url, is_public

PNG = b"\x89PNG not really"
PUBLIC = "127.0.0.2"
PUBLIC_ADDRESSES = """
8.8.8.8 1.1.1.1 100.63.255.255 172.32.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""
OTHER_ADDRESSES = """
127.0.0.1 127.255.0.9 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 100.127.9.9 0.0.0.0
224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 192.0.0.8 192.0.2.1 198.18.0.1 ::1 :: ::7f00:1 ::ffff:10.0.0.1
::ffff:127.0.0.1 64:ff9b::a00:1 64:ff9b:1::1 2002:a00:1::1 2002:7f00:1:: 2001::1 fe80::1 fe80::1%eth0 fec0::1
fc00::1 fdff::1 ff02::1 2001:db8::1 3fff::1 4000::1 127.1 0x7f000001 localhost 1.2.3
"""
PRIVATE_HOSTS = """
127.0.0.1 127.1 127.0.1 0x7f000001 0x7f.1 017700000001 2130706433 0 127.0.0.1. [::1] [::] [::ffff:10.0.0.1]
[::ffff:a00:1] [64:ff9b::7f00:1] [fe80::1%25eth0] localhost LOCALHOST localhost. a.localhost 169.254.169.254
10.1 192.168.0.1 100.64.0.1 ①②⑦.⓪.⓪.① 127。0。0。1
"""
NO_WEB_URLS = """
file:///etc/passwd /etc/passwd ..\\x.png ftp://example.com/x http:// http://h:99999/ http://[:: http://[]@
gopher://127.0.0.1:6379/_ https:example.com
"""
WRONG_DATA_URLS = """
data:,x data:image/png,AAAA data:;base64,AAAA data:text/html;base64,AAAA data:image/svg+xml;base64,AAAA
data:image/png;base64 data:image/png;base64,QUI data:image/png;base64,QUI%3D data:image/png;base64,QUI=QUI= data:
data:image/png;base64,Q_-D data:image/png;base64,QUé=
"""


class Names(AbstractResolver):
    """DNS whose answer to a name may change from one question to the next."""

    def __init__(self, **answers: list[str]):
        self.answers = answers
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        answers = self.answers[host.partition(".")[0]]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)]

    async def close(self) -> None:
        pass


class Site:
    """A server on every loopback address, which notes what it was asked."""

    def __init__(self) -> None:
        self.port = unused_port()
        self.seen: list[web.BaseRequest] = []
        self.answers: dict[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {}

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(request)
        return await self.answers[request.path](request)

    def at(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def says(self, path: str, status: int = 200, body: bytes = PNG, **headers: str) -> None:
        async def answer(_: web.BaseRequest) -> web.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(status=status, body=body, headers={"Content-Type": "image/png", **named})

        self.answers[path] = answer

    def leads(self, path: str, to: str) -> None:
        self.says(path, 302, b"", Location=to, Set_Cookie="taste=good")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    runner = web.ServerRunner(web.Server(site, keepalive_timeout=0.1), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", site.port).start()
    yield site
    await runner.cleanup()


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    """One that takes every address."""
    async with Fetcher(True) as fetcher:
        yield fetcher


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: address == PUBLIC or is_public(address))


async def refusal(call: Awaitable[Any], kind: type[SgldError] = BadRequest) -> str:
    with pytest.raises(kind) as refused:
        await call
    assert refused.value.param is not None and refused.value.message.startswith(f"{refused.value.param}: ")
    return refused.value.message


@pytest.mark.parametrize(
    "address",
    PUBLIC_ADDRESSES.split(),
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    OTHER_ADDRESSES.split(),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    PRIVATE_HOSTS.split(),
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_private_address_is_refused_however_it_is_spelled(scheme: str, host: str) -> None:
    async with Fetcher(False) as fetcher:
        for call in (
            fetcher.get(f"{scheme}://{host}/x.png", param="image"),
            fetcher.post(f"{scheme}://{host}/x.png", b"", {}),
        ):
            assert (await refusal(call)).endswith("cannot be reached: no such host, no answer, or not public")
        with pytest.raises(BadRequest, match="cannot be reached"):
            fetcher.check(f"{scheme}://{host}/", "url")
        fetcher.check(f"{scheme}://8.8.8.8/", "url")


@pytest.mark.parametrize("answer", ["127.0.0.1", "10.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "0.0.0.0"])
async def test_a_name_that_resolves_to_a_private_address_is_refused(site: Site, answer: str) -> None:
    site.says("/x.png")
    names = Names(pictures=[answer])
    async with Fetcher(False, resolver=names) as fetcher:
        told = await refusal(fetcher.get(site.at("/x.png", "pictures.example"), param="url[0]"))
        assert told == "url[0]: 'pictures.example' cannot be reached: no such host, no answer, or not public"
        await refusal(fetcher.post(site.at("/x.png", "pictures.example"), b"", {}))
    assert names.asked and not site.seen
    async with Fetcher(True, resolver=Names(pictures=["127.0.0.1"])) as fetcher:
        assert await fetcher.get(site.at("/x.png", "pictures.example"), param="url") == PNG


async def test_slow_names_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads, of ours and of the loop."""
    look_up, answer = socket.getaddrinfo, threading.Event()

    def slow(host: Any, *rest: Any) -> Any:
        if host == "slow.example":
            answer.wait(60)
        return look_up("127.0.0.1" if host == "slow.example" else host, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    async with Fetcher(True, timeout_s=0.2) as fetcher:
        calls = [fetcher.get("http://slow.example/", param="url") for _ in range(64)]
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert all("gave no full answer" in str(error) for error in told)
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().run_in_executor(None, int, "7") == 7
        answer.set()


async def test_names_are_resolved_as_aiohttp_does() -> None:
    ours, theirs = _Resolver(), aiohttp.ThreadedResolver()
    for family in (socket.AF_INET, socket.AF_UNSPEC):
        asked: list[set[Any]] = []
        for resolver in (ours, theirs):
            found = await resolver.resolve("localhost", 80, family)
            asked.append({(each["host"], each["port"], each["family"], each["hostname"]) for each in found})
        assert asked[0] == asked[1] != set()
    await ours.close()


async def test_the_systems_resolver_is_watched_too(site: Site) -> None:
    """The name of this machine: no literal, so only the check at connect time can refuse it."""
    name = await asyncio.to_thread(socket.gethostname)
    addresses = await asyncio.to_thread(socket.getaddrinfo, name, site.port, type=socket.SOCK_STREAM)
    if any(is_public(str(address[4][0])) for address in addresses):
        pytest.skip("this machine's own name is a public address")
    async with Fetcher(False) as fetcher:
        await refusal(fetcher.get(site.at("/x.png", name), param="url"))
    assert not site.seen


@pytest.mark.usefixtures("internet")
async def test_a_name_cannot_change_its_address_after_the_check(site: Site) -> None:
    site.says("/x.png")
    async with Fetcher(False, resolver=Names(changing=[PUBLIC])) as fetcher:
        assert await fetcher.get(site.at("/x.png", "changing.example"), param="url") == PNG
    site.leads("/hop", f"http://changing.example.:{site.port}/x.png")  # asks DNS again, for the name is spelled anew
    names = Names(changing=[PUBLIC, "127.0.0.1"])
    async with Fetcher(False, resolver=names) as fetcher:
        assert "not public" in await refusal(fetcher.get(site.at("/hop", "changing.example"), param="url"))
    assert len(names.asked) == 2
    assert [request.path for request in site.seen] == ["/x.png", "/hop"]


@pytest.mark.usefixtures("internet")
@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/x.png", "http://inside.example:{port}/x.png", "http://[::1]/"]
)
async def test_a_redirect_into_the_private_network_is_refused(site: Site, target: str) -> None:
    site.says("/x.png")
    site.leads("/outside", site.at("/x.png", PUBLIC))
    site.leads("/inside", target.format(port=site.port))
    async with Fetcher(False, resolver=Names(inside=["127.0.0.1"])) as fetcher:
        assert await fetcher.get(site.at("/outside", PUBLIC), param="url") == PNG
        assert "not public" in await refusal(fetcher.get(site.at("/inside", PUBLIC), param="url"))
    assert [request.path for request in site.seen] == ["/outside", "/x.png", "/inside"]


async def test_refused_unknown_and_closed_read_the_same() -> None:
    """Nothing can be learnt of the network inside."""
    async with Fetcher(False, resolver=Names(host=["10.0.0.1"])) as fetcher:
        inside = await refusal(fetcher.get("http://host.example/", param="url"))

    class Nobody(Names):
        async def resolve(self, *_: Any, **__: Any) -> list[ResolveResult]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with Fetcher(False, resolver=Nobody()) as fetcher:
        assert await refusal(fetcher.get("http://host.example/", param="url")) == inside


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "http://[::"])
async def test_a_redirect_to_another_scheme_is_refused(site: Site, fetcher: Fetcher, to: str) -> None:
    site.leads("/hop", to)
    assert "an http or https URL is needed" in await refusal(fetcher.get(site.at("/hop"), param="url"))


async def test_three_redirects_and_no_more(site: Site, fetcher: Fetcher) -> None:
    site.says("/0")
    for i in range(1, 5):
        site.leads(f"/{i}", f"/{i - 1}")
    assert await fetcher.get(site.at("/3"), param="url") == PNG
    assert "more than 3 redirects" in await refusal(fetcher.get(site.at("/4"), param="url"))
    site.leads("/loop", "/loop")
    assert "more than 3 redirects" in await refusal(fetcher.get(site.at("/loop"), param="url"))


@pytest.mark.parametrize("url", [*NO_WEB_URLS.split(), "", "http://\0/", "http://" + "a" * 9000])
async def test_what_is_no_web_url_is_refused(fetcher: Fetcher, url: str) -> None:
    told = await refusal(fetcher.read(url, param="input_reference"))
    assert "an http, https or data URL is needed" in told and len(told) < 400
    with pytest.raises(BadRequest, match="an http or https URL is needed"):
        fetcher.check(url, "url")


@pytest.mark.parametrize("url", ["http://exa%20mple/", "http://a..b/", f"http://{'a' * 70}.example/", "http://a_b:1/"])
async def test_a_host_that_cannot_be(fetcher: Fetcher, url: str) -> None:
    assert "cannot be reached: no such host, or no answer" in await refusal(fetcher.get(url, param="url"))


@pytest.mark.parametrize(
    "url", ["http://me:hush@8.8.8.8/", "http://:hush@8.8.8.8/", "http://me:hush@h:99999/?hush=hush"]
)
async def test_user_names_and_passwords_are_neither_taken_nor_told(fetcher: Fetcher, url: str) -> None:
    assert "hush" not in await refusal(fetcher.get(url, param="url"))


async def test_nothing_of_ours_is_sent(site: Site, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither cookies from an earlier answer, nor a proxy or a password of the environment."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
    site.says("/x.png")
    site.leads("/hop", "/x.png")
    for _ in range(2):
        assert await fetcher.get(site.at("/hop"), param="url") == PNG
    for request in site.seen:
        assert set(request.headers) - {"Connection"} == {"Host", "Accept", "Accept-Encoding", "User-Agent"}
        assert request.headers["User-Agent"].startswith("sgld/")
        assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [404, 500, 204, 206, 304])
async def test_only_200_will_do(site: Site, fetcher: Fetcher, status: int) -> None:
    site.says("/x.png", status, b"" if status in (204, 304) else PNG)
    assert f"answered {status}" in await refusal(fetcher.get(site.at("/x.png"), param="url"))


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "image/svg+xml", "application/json"])
async def test_another_media_type_is_refused(site: Site, fetcher: Fetcher, kind: str) -> None:
    site.says("/x.png", Content_Type=kind)
    assert kind in await refusal(fetcher.get(site.at("/x.png"), param="url"))
    assert await fetcher.get(site.at("/x.png"), param="url", media_types=(kind,)) == PNG


async def test_the_limit_counts_what_comes(site: Site, fetcher: Fetcher) -> None:
    """A body without Content-Length, which would never end."""
    sent = 0

    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent
        answer = web.StreamResponse(headers={"Content-Type": "image/png"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        while True:
            await answer.write(bytes(65536))
            sent += 65536

    site.answers["/endless.png"] = endless
    told = await refusal(fetcher.get(site.at("/endless.png"), param="url", max_bytes=1_000_000), TooLarge)
    assert "more than 1000000 bytes" in told and sent < 20_000_000
    site.says("/x.png", body=bytes(1000))
    assert len(await fetcher.get(site.at("/x.png"), param="url", max_bytes=1000)) == 1000
    await refusal(fetcher.get(site.at("/x.png"), param="url", max_bytes=999), TooLarge)


async def test_a_compressed_body_is_refused(site: Site, fetcher: Fetcher) -> None:
    site.says("/x.png", body=gzip.compress(bytes(10**6)), Content_Encoding="gzip")
    assert "encoded as 'gzip'" in await refusal(fetcher.get(site.at("/x.png"), param="url"))


async def test_a_body_that_breaks_off(fetcher: Fetcher) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nshort")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert "broke off" in await refusal(fetcher.get(f"http://127.0.0.1:{port}/", param="url"))
    server.close()


@pytest.mark.parametrize("drip", [True, False])
async def test_a_slow_answer_is_given_up(site: Site, drip: bool) -> None:
    """The limit is on the whole, so bytes that drip do not extend it."""

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "image/png"})
        if drip:
            await answer.prepare(request)
        while True:
            if drip:
                await answer.write(b"x")
            await asyncio.sleep(0.01)

    site.answers["/slow.png"] = slow
    async with Fetcher(True, timeout_s=0.3) as fetcher:
        async with asyncio.timeout(5):
            assert "no full answer in 0.3 s" in await refusal(fetcher.get(site.at("/slow.png"), param="url"))
            if not drip:
                assert "no full answer in 0.3 s" in await refusal(fetcher.post(site.at("/slow.png"), b"", {}))


async def test_a_server_that_speaks_no_tls(site: Site, fetcher: Fetcher) -> None:
    told = await refusal(fetcher.get(f"https://127.0.0.1:{site.port}/x.png", param="url"))
    assert "has no certificate that is trusted" in told


async def test_post_tells_the_status_and_follows_nothing(site: Site, fetcher: Fetcher) -> None:
    bodies = []

    async def take(request: web.BaseRequest) -> web.Response:
        bodies.append((await request.read(), request.headers["webhook-id"], request.headers["Content-Type"]))
        return web.Response(status=201, body=bytes(10**6))

    site.answers["/hook"] = take
    site.leads("/hop", "/hook")
    headers = {"webhook-id": "evt_1", "Content-Type": "application/json"}
    assert await fetcher.post(site.at("/hook"), b"{}", headers) == 201
    assert await fetcher.post(site.at("/hop"), b"{}", headers) == 302
    assert bodies == [(b"{}", "evt_1", "application/json")]


async def test_data_urls_are_read_without_the_network(fetcher: Fetcher) -> None:
    text = base64.b64encode(PNG).decode()
    for header in ("data:image/png;base64", "DATA:image/JPEG;base64", "data:image/webp;name=a.webp;base64"):
        assert await fetcher.read(f"{header},{text}", param="url") == PNG
    assert decode_data_url("data:image/png;base64,", "url") == b""


@pytest.mark.parametrize(
    "text", [*WRONG_DATA_URLS.split(), "data:image/png;base64,A A=", "data:image/png;base64,QUJD\n"]
)
def test_a_data_url_is_strict(text: str) -> None:
    with pytest.raises(BadRequest, match="^mask: "):
        decode_data_url(text, "mask")


@pytest.mark.parametrize("size", [8, 9, 10, 11])
def test_a_data_url_has_a_limit(size: int) -> None:
    text = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
    assert decode_data_url(text, "url", size) == bytes(size)
    with pytest.raises(TooLarge, match=f"more than {size - 1} bytes"):
        decode_data_url(text, "url", size - 1)
