"""Absolute URLs of this server, as its clients see it, through proxies too.

A proxy tells how it was called by `Forwarded` (RFC 7239: `host`, `proto`) or by `X-Forwarded-Host`, `-Proto`, `-Port`
and `-Prefix`. Of a list the first value counts, which the proxy next to the client gave; prefixes are joined. Where
both name the host or the protocol, `Forwarded` wins. The port of `X-Forwarded-Port` is used where the host names none.

Anybody can send these headers, and so choose the URLs of their own answers, and of no others. When one that would be
used is not well-formed none is believed, and a warning is logged: the URL is made of the request's own `Host`, and
when that is not a host either, of the address that the request came in on.
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
_PORT = re.compile(r"[0-9]{1,5}")
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+;=:@-]+)*/?")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = rf'({_TOKEN})=("(?:[^"\\]|\\.)*"|[^\s;,"]+)'
_ELEMENT = re.compile(rf"[ \t]*{_PAIR}(?:[ \t]*;[ \t]*{_PAIR})*[ \t]*;?[ \t]*(?:,|\Z)")
_PROTOCOLS = ("http", "https")
_MAX_HOST_LENGTH = 253


@attrs.frozen
class Origin:
    """How a client names this server; `port` None is the default of the scheme, and the prefix ends without slash."""

    scheme: str
    host: str
    port: int | None
    prefix: str = ""

    def url(self, path: str) -> str:
        """`path`, which begins with a slash and may have a query, as an absolute URL."""
        assert path.startswith("/") and not path.startswith("//")
        root = URL.build(scheme=self.scheme, host=self.host, port=self.port)
        return str(root.join(URL(self.prefix + path)))


def absolute(request: web.Request, path: str) -> str:
    """The URL under which the sender of this request finds `path` (`/v1/...`, not encoded, maybe with a query)."""
    return origin(request).url(path)


def origin(request: web.Request) -> Origin:
    """How the sender of this request names this server."""
    try:
        return _forwarded(request)
    except ValueError as error:
        log.warning("a request's headers do not tell how this server is named: %s", error)
    try:
        return Origin(request.scheme, *_host(hdrs.HOST, request.headers.get(hdrs.HOST, "")))
    except ValueError:
        return _local(request)


def _forwarded(request: web.Request) -> Origin:
    """What the proxies say, over the request's own `Host`. Raises ValueError for the first wrong header."""
    standard = _standard(request)
    proto = standard.get("proto", _first(request, "X-Forwarded-Proto", request.scheme)).lower()
    if proto not in _PROTOCOLS:
        raise ValueError(f"the protocol {shorten(proto)} is not one of {', '.join(_PROTOCOLS)}")
    host, port = _host("the host", standard.get("host", _first(request, "X-Forwarded-Host", _own_host(request))))
    if "X-Forwarded-Port" in request.headers:
        forwarded_port = _port("X-Forwarded-Port", _first(request, "X-Forwarded-Port", ""))
        port = port or forwarded_port
    return Origin(proto, host, port, _prefix(request))


def _own_host(request: web.Request) -> str:
    """The `Host` header; without one the address the request came in on."""
    return request.headers[hdrs.HOST] if hdrs.HOST in request.headers else URL(_local(request).url("/")).authority


def _local(request: web.Request) -> Origin:
    """The address the request came in on; a client that has gone has none, and reads no answer."""
    address = request.get_extra_info("sockname")
    host, port = address[:2] if address is not None else ("localhost", None)
    return Origin(request.scheme, host, port)


def _standard(request: web.Request) -> dict[str, str]:
    """The first element of `Forwarded`, names in lower case; empty without that header."""
    text = _list(request, hdrs.FORWARDED)
    if text is None:
        return {}
    element = _ELEMENT.match(text)
    pairs = re.findall(_PAIR, element[0]) if element is not None else []
    found = {name.lower(): _unquoted(value) for name, value in pairs}
    if not found or len(found) < len(pairs):
        raise ValueError(f"Forwarded: {shorten(text)} is not in the form of RFC 7239")
    return found


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _first(request: web.Request, name: str, otherwise: str) -> str:
    """The first value of a header that is a list."""
    text = _list(request, name)
    return otherwise if text is None else text.partition(",")[0].strip()


def _list(request: web.Request, name: str) -> str | None:
    lines = request.headers.getall(name, [])
    return ",".join(lines) if lines else None


def _host(name: str, text: str) -> tuple[str, int | None]:
    """`example.com`, `example.com:8443`, `127.0.0.1` or `[::1]:80` as host and port."""
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
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{name}: {shorten(text)} is not a port, 1 to 65535")
    return int(text)


def _prefix(request: web.Request) -> str:
    """The prefixes of all proxies, from the client's on, each without the slash at its end."""
    text = _list(request, "X-Forwarded-Prefix")
    prefixes = [] if text is None else [prefix.strip() for prefix in text.split(",")]
    for prefix in prefixes:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"X-Forwarded-Prefix: {shorten(prefix)} is not a plain path")
    return "".join(prefix.rstrip("/") for prefix in prefixes)
