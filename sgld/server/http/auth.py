"""API keys: who calls, and what they may do.

`--api-key` is one key of tier admin, called "default". `--api-key-file` names many in plain YAML: a list of entries,
or a map of names to entries. An entry has `key`, or `key_sha256` so that the file holds no secret, and `tier`:

    - name: studio
      key: 2Vb0c1yQm8sXw4tJ6uZr
      tier: user
    - name: operations
      key_sha256: 5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef  # printf %s "$KEY" | sha256sum
      tier: admin

A key owns its jobs by its name, so a new key under the old name keeps them.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import attrs
import yaml
from aiohttp import hdrs, web

from sgld.config import Settings, user_path
from sgld.convert import shorten
from sgld.errors import BadRequest, Forbidden, Unauthorized, nearest
from sgld.server.http.urls import origin

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_ROUTES = frozenset({"/health", "/liveness", "/openapi.json", "/docs"})
TIERS = ("user", "admin")
DEFAULT_NAME = "default"
MIN_KEY_LENGTH = 16
_FIELDS = ("name", "key", "key_sha256", "tier")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]+")
_KINDS = ("str", "seq", "map")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@attrs.frozen
class Identity:
    """Whose request it is. Without any key everybody is the admin of owner ""."""

    name: str
    admin: bool


NOBODY = Identity("", admin=True)


@attrs.frozen
class Key:
    """A key as it is kept: the SHA-256 of its text."""

    identity: Identity
    digest: bytes = attrs.field(repr=False)


@attrs.frozen
class Keys:
    """All keys of this server; none means that no request needs one."""

    known: tuple[Key, ...] = ()
    hosts: tuple[str, ...] | None = ("localhost",)
    """Without keys: names that requests may call this server by, beside loopback addresses; None: any."""

    def identify(self, key: str) -> Identity | None:
        """Whose key it is. Takes the same time for every key of one length: all are compared, by their digests."""
        digest = digest_of(key)
        found = None
        for known in self.known:
            if hmac.compare_digest(digest, known.digest):
                found = known.identity
        return found


KEYS = web.AppKey("keys", Keys)
IDENTITY = web.RequestKey("identity", Identity)
OWNER = web.RequestKey("owner", str)


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Set `request[IDENTITY]` and `request[OWNER]`, except on open routes. Raises `Unauthorized`, `Forbidden`."""
    resource = request.match_info.route.resource
    if resource is not None and resource.canonical in OPEN_ROUTES:
        return await handler(request)
    keys = request.app[KEYS]
    if not keys.known:
        _refuse_foreign(request, keys.hosts)
    identity = _identify(request, keys) if keys.known else NOBODY
    request[IDENTITY], request[OWNER] = identity, identity.name
    return await handler(request)


def _identify(request: web.Request, keys: Keys) -> Identity:
    given = request.headers.getall(hdrs.AUTHORIZATION, [])
    if len(given) != 1:
        raise Unauthorized(f"Authorization: {'given twice' if given else 'missing'}; send `Authorization: Bearer KEY`")
    scheme, _, key = given[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("Authorization: not of the form `Bearer KEY`")
    identity = keys.identify(key.strip())
    if identity is None:
        raise Unauthorized("Authorization: this API key is not known here")
    return identity


def _refuse_foreign(request: web.Request, hosts: tuple[str, ...] | None) -> None:
    """Keep out what pages of other sites make a browser send: where no key is needed, nothing else does.

    A page cannot forge these headers. `Host` shows DNS rebinding, where the page's own name leads here.
    Raises `Forbidden`.
    """
    instead = "; call it from a page of this server, or give it an API key"
    site = request.headers.get("Sec-Fetch-Site")
    if site == "cross-site":
        raise Forbidden(f"Sec-Fetch-Site: cross-site: pages of other sites may not use this server{instead}")
    source = request.headers.get(hdrs.ORIGIN)
    if source is not None and site != "same-origin" and _host(source) != origin(request).host.lower():
        raise Forbidden(f"Origin: {shorten(source)}: pages of other sites may not use this server{instead}")
    if hosts is None:
        return
    for host in request.headers.getall(hdrs.HOST, []):
        if not _names_this_machine(_host(f"//{host}"), hosts):
            raise Forbidden(
                f"Host: {shorten(host)}: this server has no API key and answers only to {', '.join(hosts)} and "
                "loopback addresses; call it by one of these, or give it --api-key or --allow-unauthenticated"
            )


def _host(url: str) -> str | None:
    """The host of a URL in lower case; None where it has none, as `null`, the origin of a page without one."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _names_this_machine(host: str | None, names: tuple[str, ...]) -> bool:
    if host is None:
        return False
    if host in names or host.endswith(".localhost"):
        return True
    try:
        return _address(host).is_loopback
    except ValueError:
        return False


def require_admin(request: web.Request) -> None:
    """Let only admins pass. Raises `Forbidden`."""
    identity = request[IDENTITY]
    if not identity.admin:
        raise Forbidden(f"key {identity.name!r} is of tier user; {request.method} {request.path} needs tier admin")


def may_see(identity: Identity, owner: str) -> bool:
    """Whether a job of `owner` exists for this caller: its own do, and all for an admin."""
    return identity.admin or identity.name == owner


def check_exposure(settings: Settings, keys: Keys) -> None:
    """Refuse to listen beyond this machine without a key. Blocks, for it resolves the host. Raises `BadRequest`."""
    if keys.known:
        if settings.allow_unauthenticated:
            raise BadRequest(
                "allow_unauthenticated: there are API keys, so every request needs one; leave one of them out",
                "allow_unauthenticated",
            )
        return
    if _is_loopback(settings.host):
        return
    if not settings.allow_unauthenticated:
        raise BadRequest(
            f"host: {settings.host!r} can be reached from other machines and there is no API key; give --api-key or "
            "--api-key-file, or --allow-unauthenticated to let everybody in",
            "host",
        )
    log.warning("everybody who can reach %r may use this server: it has no API key", settings.host)


def _is_loopback(host: str) -> bool:
    """Whether every address of the host is one of this machine alone; the empty host means all interfaces."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"host: {host!r} is no address of this machine: {error}", "host") from None
    return all(_address(str(sockaddr[0])).is_loopback for *_, sockaddr in found)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def load_keys(settings: Settings) -> Keys:
    """The keys of the settings and of their file. Blocks. Raises `BadRequest`, which tells the entry but no key."""
    known: list[Key] = []
    if settings.api_key is not None:
        known.append(_single(settings.api_key))
    if settings.api_key_file is not None:
        known += _read_file(settings.api_key_file, known)
    return Keys(tuple(known), None if settings.allow_unauthenticated else _names(settings.host))


def _names(host: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("localhost", host.lower())))


def _single(key: str) -> Key:
    if not _KEY.fullmatch(key):
        raise BadRequest("api_key: it is empty or has characters other than visible ASCII", "api_key")
    if len(key) < MIN_KEY_LENGTH:
        log.warning("api_key: it is shorter than %d characters and may be guessed", MIN_KEY_LENGTH)
    return Key(Identity(DEFAULT_NAME, admin=True), digest_of(key))


def _read_file(path: str, others: list[Key]) -> list[Key]:
    """The keys of one file, each unlike the others by name and by key."""
    names = {key.identity.name: "--api-key" for key in others}
    digests = {key.digest: "--api-key" for key in others}
    keys = []
    for number, fields in enumerate(_entries(path), 1):
        where = f"entry {number}"
        if _NAME.fullmatch(name := fields.get("name", "")):
            where = f"{where} ({name})"
        try:
            key = _key(fields)
            if name in names:
                raise ValueError(f"name {name!r} is that of {names[name]}")
            if key.digest in digests:
                raise ValueError(f"its key is that of {digests[key.digest]}")
        except ValueError as error:
            raise _wrong(path, f"{where}: {error}") from None
        names[name] = digests[key.digest] = where
        keys.append(key)
    return keys


def _key(fields: dict[str, str]) -> Key:
    """One entry as a key. Raises ValueError, whose text holds no key."""
    unknown = [field for field in fields if field not in _FIELDS]
    if unknown:
        raise ValueError(f"{_quoted(unknown[0])} is not one of {', '.join(_FIELDS)}{_nearest(unknown[0])}")
    name, tier = fields.get("name", ""), fields.get("tier")
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {_quoted(name)} is not 1 to 64 letters, digits, '.', '_' or '-'")
    if tier not in TIERS:
        raise ValueError(f"tier: {'missing; it' if tier is None else _quoted(tier)} is not one of {', '.join(TIERS)}")
    return Key(Identity(name, admin=tier == "admin"), _read_digest(fields))


def _read_digest(fields: dict[str, str]) -> bytes:
    key, digest = fields.get("key"), fields.get("key_sha256")
    if (key is None) == (digest is None):
        raise ValueError("it needs either key or key_sha256")
    if digest is not None:
        if not _SHA256.fullmatch(digest):
            raise ValueError("key_sha256: it is not 64 hexadecimal digits")
        return bytes.fromhex(digest)
    assert key is not None
    if len(key) < MIN_KEY_LENGTH:
        raise ValueError(f"key: {len(key)} characters are too few; it needs at least {MIN_KEY_LENGTH}")
    if not _KEY.fullmatch(key):
        raise ValueError("key: it has characters other than visible ASCII")
    return digest_of(key)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _quoted(text: str) -> str:
    """A misplaced text for an error; one as long as a key may be a key, and is not shown."""
    return shorten(text) if len(text) < MIN_KEY_LENGTH else f"a text of {len(text)} characters"


def _nearest(field: str) -> str:
    return nearest(field, _FIELDS) if len(field) < MIN_KEY_LENGTH else ""


def _wrong(path: str, reason: str) -> BadRequest:
    return BadRequest(f"api_key_file: {path!r}: {reason}", "api_key_file")


class _Twice(yaml.MarkedYAMLError):
    """A map that holds a key twice."""


class _Text(yaml.SafeLoader):
    """YAML of maps, lists and text: every scalar is text, `0012` and `null` too, and a map holds each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values: dict[Any, Any] = super().construct_mapping(node, deep=True)
        if len(values) < len(node.value):
            raise _Twice(problem_mark=node.start_mark)
        return values


_Text.yaml_implicit_resolvers = {}
_Text.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*(f"tag:yaml.org,2002:{kind}" for kind in _KINDS), None)
}


def _entries(path: str) -> Iterator[dict[str, str]]:
    """The entries of a list, or of a map by their names; their values are text."""
    content = _parse(path)
    if isinstance(content, dict):
        for number, entry in enumerate(content.values(), 1):
            if not isinstance(entry, dict) or "name" in entry:
                raise _wrong(path, f"entry {number}: under its name it must be a map of key and tier")
        content = [{"name": name, **entry} for name, entry in content.items()]
    if not isinstance(content, list) or not content:
        raise _wrong(path, "it must hold a list of entries, or a map of names to entries, at least one")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or not all(isinstance(text, str) for pair in entry.items() for text in pair):
            raise _wrong(path, f"entry {number}: it is not a map of name, key and tier to text")
        yield entry


def _parse(path: str) -> Any:
    """The file's YAML; the parser's own words are left out of the error, for they quote the file."""
    try:
        with user_path(path, "api_key_file").open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        raise _wrong(path, f"it cannot be read: {error.strerror}") from None
    if mode & stat.S_IRWXO:
        log.warning("api_key_file: %r is open to every user of this machine; chmod 600 closes it", path)
    try:
        return yaml.load(content.decode("utf-8-sig"), _Text)
    except yaml.MarkedYAMLError as error:
        reason = "a map names something twice" if isinstance(error, _Twice) else "it is not valid YAML"
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        raise _wrong(path, f"{reason}, near line {mark.line + 1}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise _wrong(path, "it is not valid YAML in UTF-8") from None
