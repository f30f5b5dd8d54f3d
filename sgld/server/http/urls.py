"""Absolute URLs of this server, as its clients name it, through proxies too.

A proxy says how it was called by `Forwarded` (RFC 7239: `host`, `proto`) or by `X-Forwarded-Host`, `-Proto`, `-Port`
and `-Prefix`. Of a list the first value counts, which the proxy next to the client gave. Prefixes are joined. Where
both name the host or the protocol, `Forwarded` wins. `X-Forwarded-Port` counts where the host names no port.

Anybody can send these headers, and so choose the URLs of their own answers, and of no others. If one of them is not
well-formed, all are ignored with a warning, and the URL is made from the request's own `Host`. If that is not a host
either, the URL is made from the address of the connection.
"""

from __future__ import annotations

import ipaddress
import logging
import re

import attrs
from aiohttp import hdrs, web
from yarl import URL

from sgld.convert import shorten

log = logging.getLogger(__name__)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+;=:@-]+)*/?")
_UNQUOTED_PORT = re.compile(r"\bhost=[^\",;]*:", re.IGNORECASE)
_PROTOCOLS = ("http", "https")
_MAX_HOST_LENGTH = 253


@attrs.frozen
class Origin:
    """The base URL of this server for a client. `port` None is the scheme's own; `prefix` ends without a slash."""

    scheme: str
    host: str
    port: int | None
    prefix: str = ""

    def url(self, path: str) -> str:
        """Return the absolute URL of `path`, which begins with a slash and may have a query."""
        assert path.startswith("/") and not path.startswith("//")
        root = URL.build(scheme=self.scheme, host=self.host, port=self.port)
        return str(root.join(URL(self.prefix + path)))


def absolute(request: web.Request, path: str) -> str:
    """Return the URL by which the sender of this request finds `path` (`/v1/...`, not encoded, maybe with a query)."""
    return origin(request).url(path)


def origin(request: web.Request) -> Origin:
    """Find the base URL by which the sender of this request names this server."""
    try:
        return _forwarded(request)
    except ValueError as error:
        log.warning("a request's headers do not tell how this server is named: %s", error)
    try:
        return Origin(request.scheme, *_split_host(hdrs.HOST, request.headers.get(hdrs.HOST, "")))
    except ValueError:
        return _local(request)


def _forwarded(request: web.Request) -> Origin:
    """Read the headers of proxies over the request's own `Host`. Raises ValueError for the first wrong header."""
    if _UNQUOTED_PORT.search(",".join(request.headers.getall(hdrs.FORWARDED, ()))):  # aiohttp would cut it to 4 digits
        raise ValueError("Forwarded: a host with a port needs quotes")
    standard = next(iter(request.forwarded), {})
    proto = (standard.get("proto") or _first(request, "X-Forwarded-Proto") or request.scheme).lower()
    if proto not in _PROTOCOLS:
        raise ValueError(f"the protocol {shorten(proto)} is not one of {', '.join(_PROTOCOLS)}")
    own = _local(request)
    host, port = own.host, own.port
    text = standard.get("host") or _first(request, "X-Forwarded-Host") or request.headers.get(hdrs.HOST)
    if text:
        host, port = _split_host("the host", text)
    text = _first(request, "X-Forwarded-Port")
    behind = _port("X-Forwarded-Port", text) if text else None
    return Origin(proto, host, port or behind, _prefix(request))


def _local(request: web.Request) -> Origin:
    """Return the address of the connection; a client that has gone has none, and reads no answer."""
    address = request.get_extra_info("sockname")
    host, port = address[:2] if address is not None else ("localhost", None)
    return Origin(request.scheme, host, port)


def _first(request: web.Request, name: str) -> str:
    """Return the first value of a header that is a list; empty without the header."""
    return ",".join(request.headers.getall(name, ())).partition(",")[0].strip()


def _split_host(name: str, text: str) -> tuple[str, int | None]:
    """Split `example.com`, `example.com:8443`, `127.0.0.1` or `[::1]:80` into host and port."""
    match = _HOST.fullmatch(text)
    if match is None or not _is_host(match[1]):
        raise ValueError(f"{name}: {shorten(text)} is not a host, nor a host and a port")
    return match[1].strip("[]"), None if match[2] is None else _port(name, match[2])


def _is_host(text: str) -> bool:
    if not text.startswith("[") and not re.fullmatch(r"[0-9.]+", text):
        return len(text) <= _MAX_HOST_LENGTH and _NAME.fullmatch(text) is not None
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _port(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{name}: {shorten(text)} is not a port, 1 to 65535")
    return int(text)


def _prefix(request: web.Request) -> str:
    """Join the prefixes of all proxies, from the client's on, each without the slash at its end."""
    prefixes = ",".join(request.headers.getall("X-Forwarded-Prefix", ())).split(",")
    for prefix in prefixes:
        if not _PREFIX.fullmatch(prefix.strip()):
            raise ValueError(f"X-Forwarded-Prefix: {shorten(prefix)} is not a plain path")
    return "".join(prefix.strip().rstrip("/") for prefix in prefixes)
