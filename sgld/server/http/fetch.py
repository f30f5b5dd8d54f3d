"""Requests that a client makes the server send: pictures by URL, and webhooks.

A client names the URL, so the URL may aim at what only the server can reach. The rule is applied to the address of
each socket, after DNS and before it connects: a name cannot change its meaning between the check and the connection.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urljoin

import aiohttp
import anyio.to_thread
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from sgld import __version__
from sgld.convert import shorten
from sgld.errors import BadRequest, SgldError, TooLarge

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0
MAX_BYTES = 50 * 2**20
IMAGE_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif")
USER_AGENT = f"sgld/{__version__}"

_WEB_URL = "an http or https URL is needed"
_PICTURE_URL = "an http, https or data URL is needed; a file of your own goes into an upload or a data URL"
_HOST = re.compile(r"[\w.:%-]+", re.ASCII)
_USER_INFO = re.compile("//[^/]*@")
_URL_CHARACTERS = 8192
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECTIONS_PER_HOST = 16
_DNS_THREADS = 4
_DATA_HEADER = re.compile(r"data:([\w.+-]+/[\w.+-]+)((?:;[\w.+-]+=[\w.+-]+)*);base64", re.ASCII | re.IGNORECASE)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))


def is_public(address: str) -> bool:
    """Check that a numeric address, or the IPv4 address that it carries, belongs to the public internet.

    What is no canonical address, is reserved, or belongs to a group is not public.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or _nat64(ip)
        if carried is not None:
            return is_public(str(carried))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


def _nat64(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None


def _plainly_private(host: str) -> bool:
    """Check for a private host without DNS: `localhost`, or an address in any spelling that `connect` takes."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if ":" in name:
        return not is_public(name)
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(name)))  # 127.1, 0x7f000001
    except OSError:
        return False


def _public_socket(addr_info: tuple[Any, ...]) -> socket.socket:
    """Make a socket for aiohttp to connect. Raises OSError for an address that is not public."""
    family, kind, protocol, _, address = addr_info
    if not is_public(address[0]):
        raise OSError("not a public address")
    return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """DNS in threads of its own: a name server that is slow holds up no file and no other work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_DNS_THREADS, "sgld-dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        ask = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=int(address[1]), family=kind, proto=protocol, flags=numeric
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """GET of pictures and POST of webhooks, within limits. Neither cookies nor proxies of the environment are used."""

    def __init__(
        self, allow_private: bool, *, resolver: AbstractResolver | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._allow_private = allow_private
        self._resolver = resolver
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def check(self, text: str, param: str, needed: str = _WEB_URL) -> URL:
        """Parse a URL and refuse it by its text. The address behind a name is checked when connecting.

        Raises:
            BadRequest: not http or https, a user name or password, or an address that is not public.
        """
        try:
            url = URL(text) if len(text) <= _URL_CHARACTERS else URL()
            host, _ = url.raw_host or "", url.port
        except (ValueError, IndexError):  # IndexError: yarl, of "http://[]@"
            url, host = URL(), ""
        if url.scheme not in ("http", "https") or not _HOST.fullmatch(host):
            harmless = _USER_INFO.sub("//", text[:_URL_CHARACTERS].partition("?")[0])
            raise BadRequest(f"{shorten(harmless)} is not taken: {needed}", field=param)
        if url.raw_user is not None or url.raw_password is not None:
            raise BadRequest("a URL with a user name or password is not taken; leave them out", field=param)
        if not self._allow_private and _plainly_private(host):
            raise self._unreachable(param, host)
        return url

    async def read(
        self, text: str, *, param: str, max_bytes: int = MAX_BYTES, media_types: Collection[str] = IMAGE_TYPES
    ) -> bytes:
        """Read the bytes of an http, https or data URL. Raises as `get` and `decode_data_url` do."""
        if text[:5].lower() == "data:":
            return await anyio.to_thread.run_sync(decode_data_url, text, param, max_bytes, media_types)
        return await self.get(text, param=param, max_bytes=max_bytes, media_types=media_types)

    async def get(
        self, url: str, *, param: str, max_bytes: int = MAX_BYTES, media_types: Collection[str] = IMAGE_TYPES
    ) -> bytes:
        """Fetch the body at `url`.

        Raises:
            BadRequest: a URL or address that is refused, no answer in time, another status than 200 or another media
                type. A refused address, an unknown name and a closed port read the same.
            TooLarge: more than `max_bytes` came.
        """
        target = self.check(url, param, _PICTURE_URL)
        with self._map_os_errors(param, target):
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(target, param, max_bytes, media_types)

    async def _follow(self, url: URL, param: str, max_bytes: int, media_types: Collection[str]) -> bytes:
        """Follow redirects to a body. Check each URL like the first."""
        for _ in range(MAX_REDIRECTS + 1):
            async with self._open().get(url, allow_redirects=False) as answer:
                location = answer.headers.get("Location")
                if answer.status not in _REDIRECTS or location is None:
                    return await _body(answer, param, max_bytes, media_types)
                url = self.check(_joined(url, location), param)
        raise BadRequest(f"more than {MAX_REDIRECTS} redirects; give the final URL", field=param)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post a body and return the status. Follow no redirect. Raises BadRequest as `get`, naming `url`."""
        target = self.check(url, "url")
        with self._map_os_errors("url", target):
            async with (
                asyncio.timeout(self._timeout_s),
                self._open().post(target, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                return answer.status

    def _open(self) -> aiohttp.ClientSession:
        """Return the session, made at first use, for it needs a running loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver or _Resolver(),
                socket_factory=None if self._allow_private else _public_socket,
                limit_per_host=_CONNECTIONS_PER_HOST,
                force_close=True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                auto_decompress=False,  # a compressed body would escape the limit on its size
                timeout=aiohttp.ClientTimeout(),
                trust_env=False,
            )
        return self._session

    @contextmanager
    def _map_os_errors(self, param: str, url: URL) -> Iterator[None]:
        """Convert network errors to a BadRequest that tells nothing of the network."""
        try:
            yield
        except TimeoutError:
            raise BadRequest(f"{url.host} gave no full answer in {self._timeout_s:g} s", field=param) from None
        except aiohttp.ClientPayloadError:
            raise BadRequest(f"{url.host} broke off its answer", field=param) from None
        except aiohttp.ClientSSLError:
            raise BadRequest(f"{url.host} has no certificate that is trusted here", field=param) from None
        except (aiohttp.ClientError, OSError, UnicodeError):  # UnicodeError: a name that DNS cannot hold
            raise self._unreachable(param, str(url.host)) from None

    def _unreachable(self, param: str, host: str) -> SgldError:
        reasons = "no such host, or no answer" if self._allow_private else "no such host, no answer, or not public"
        return BadRequest(f"{shorten(host)} cannot be reached: {reasons}", field=param)


def _joined(url: URL, location: str) -> str:
    """Resolve the location of a redirect. Text that is no URL stays as it is, to be refused."""
    try:
        return urljoin(str(url), location)
    except ValueError:
        return location


async def _body(answer: aiohttp.ClientResponse, param: str, max_bytes: int, media_types: Collection[str]) -> bytes:
    """Read the body up to a limit, whatever length it claims."""
    host = answer.url.host
    if answer.status != 200:
        raise BadRequest(f"{host} answered {answer.status}; 200 is needed", field=param)
    if answer.content_type not in media_types:
        allowed = ", ".join(media_types)
        raise BadRequest(f"{host} sent {shorten(answer.content_type)}; allowed are {allowed}", field=param)
    coding = answer.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise BadRequest(f"{host} sent it encoded as {shorten(coding)}, which was not asked for", field=param)
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(param, max_bytes)
    return bytes(body)


def _too_large(param: str, max_bytes: int) -> TooLarge:
    return TooLarge(f"more than {max_bytes} bytes, which is the limit", field=param)


def decode_data_url(
    text: str, param: str, max_bytes: int = MAX_BYTES, media_types: Collection[str] = IMAGE_TYPES
) -> bytes:
    """Decode `data:TYPE;base64,...`. Call it in a thread, for megabytes take a while.

    Raises:
        BadRequest: another form or media type, or anything in the base64 text that does not belong there.
        TooLarge: more than `max_bytes`.
    """
    header, comma, payload = text.partition(",")
    match = _DATA_HEADER.fullmatch(header)
    if match is None or not comma:
        raise BadRequest(f"{shorten(header)} is not of the form data:image/png;base64,...", field=param)
    if match[1].lower() not in media_types:
        raise BadRequest(f"{shorten(match[1])} is not one of {', '.join(media_types)}", field=param)
    if len(payload) > (max_bytes + 2) // 3 * 4:
        raise _too_large(param, max_bytes)
    try:
        data = binascii.a2b_base64(payload, strict_mode=True)
    except ValueError as error:
        raise BadRequest(f"the data URL is not valid base64: {error}", field=param) from None
    if len(data) > max_bytes:
        raise _too_large(param, max_bytes)
    return data
