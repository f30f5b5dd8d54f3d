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
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

import attrs
import yaml
from aiohttp import hdrs, web

from sgld.config import user_path
from sgld.convert import fields_of, knob, shorten, structure
from sgld.errors import BadRequest, Forbidden, Unauthorized
from sgld.server.http.urls import origin
from sgld.settings import Settings

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN_ROUTES = frozenset({"/health", "/liveness", "/openapi.json", "/docs"})
TIERS = ("user", "admin")
DEFAULT_NAME = "default"
MIN_KEY_LENGTH = 16
SECRETS = ("key", "key_sha256")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]+")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@attrs.frozen
class Identity:
    """The caller of a request. Without any key everybody is the admin of owner ""."""

    name: str
    admin: bool

    @property
    def visible_owner(self) -> str | None:
        """Return the owner whose jobs the caller may see; None for everybody's."""
        return None if self.admin else self.name


NOBODY = Identity("", admin=True)


@attrs.frozen
class Key:
    """A key, stored as the SHA-256 of its text."""

    identity: Identity
    digest: bytes = attrs.field(repr=False)


@attrs.frozen
class KeyEntry:
    """An entry of the key file."""

    name: str = knob("", "owner of the jobs made with the key")
    key: str | None = knob(None, "the key itself", secret=True)
    key_sha256: str | None = knob(None, "SHA-256 of the key, in hexadecimal", secret=True)
    tier: str = knob("", "rights of the key", choices=TIERS)


@attrs.frozen
class Keys:
    """All keys of this server; none means that no request needs one."""

    known: tuple[Key, ...] = ()
    hosts: tuple[str, ...] | None = ("localhost",)
    """Names by which requests may call this server without keys, beside loopback addresses; None: any."""

    def identify(self, key: str) -> Identity | None:
        """Find the identity of a key. Compare the digests of all keys, so that the time tells nothing."""
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
    """Refuse requests that pages of other sites make a browser send, where no key protects this server.

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
    """Return the host of a URL in lower case; None for `null`, the origin of a page without one."""
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


def check_exposure(settings: Settings, keys: Keys) -> None:
    """Refuse to listen beyond this machine without a key. Blocks to resolve the host. Raises `BadRequest`."""
    if keys.known:
        if settings.server.allow_unauthenticated:
            raise BadRequest(
                "there are API keys, so every request needs one; leave one of them out",
                field="allow_unauthenticated",
            )
        return
    if _is_loopback(settings.server.host):
        return
    if not settings.server.allow_unauthenticated:
        raise BadRequest(
            f"{settings.server.host!r} can be reached from other machines and there is no API key; give --api-key or "
            "--api-key-file, or --allow-unauthenticated to let everybody in",
            field="host",
        )
    log.warning("everybody who can reach %r may use this server: it has no API key", settings.server.host)


def _is_loopback(host: str) -> bool:
    """Check that every address of the host is a loopback one; the empty host means all interfaces."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"{host!r} is no address of this machine: {error}", field="host") from None
    return all(_address(str(sockaddr[0])).is_loopback for *_, sockaddr in found)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def load_keys(settings: Settings) -> Keys:
    """Load the keys of the settings and of their file. Blocks. Raises `BadRequest`, which tells no key."""
    known: list[Key] = []
    if settings.server.api_key is not None:
        known.append(_single(settings.server.api_key))
    if settings.server.api_key_file is not None:
        known += _read_file(settings.server.api_key_file, known)
    return Keys(tuple(known), None if settings.server.allow_unauthenticated else _names(settings.server.host))


def _names(host: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("localhost", host.lower())))


def _single(key: str) -> Key:
    if not _KEY.fullmatch(key):
        raise BadRequest("it is empty or has characters other than visible ASCII", field="api_key")
    if len(key) < MIN_KEY_LENGTH:
        log.warning("api_key: it is shorter than %d characters and may be guessed", MIN_KEY_LENGTH)
    return Key(Identity(DEFAULT_NAME, admin=True), digest_of(key))


def _read_file(path: str, others: list[Key]) -> list[Key]:
    """Read the keys of a file. Each must differ from the others by name and by key."""
    names = {key.identity.name: "--api-key" for key in others}
    digests = {key.digest: "--api-key" for key in others}
    keys = []
    for number, fields in enumerate(_entries(path), 1):
        name = fields.get("name")
        where = f"entry {number}" + (f" ({name})" if isinstance(name, str) and _NAME.fullmatch(name) else "")
        try:
            key = _key(fields)
        except BadRequest as error:
            raise _wrong(path, f"{where}: {error.message}") from None
        for known, other in (("name", names.get(key.identity.name)), ("key", digests.get(key.digest))):
            if other is not None:
                raise _wrong(path, f"{where}: its {known} is that of {other}")
        names[key.identity.name] = digests[key.digest] = where
        keys.append(key)
    return keys


def _key(fields: Mapping[str, object]) -> Key:
    """Build the key of an entry. Raises BadRequest, whose message holds no key."""
    try:
        entry = structure(fields, KeyEntry)
    except BadRequest as error:
        others = [text for field, value in fields.items() if field not in SECRETS for text in (field, str(value))]
        if max(map(len, others)) < MIN_KEY_LENGTH:
            raise
        known = error.param if error.param in fields_of(KeyEntry) else "an unknown field"
        raise BadRequest(f"{known}: it is wrong, and not shown, for it may be a key") from None
    if not _NAME.fullmatch(entry.name):
        raise BadRequest("name: it is not 1 to 64 letters, digits, '.', '_' or '-'")
    return Key(Identity(entry.name, admin=entry.tier == "admin"), _read_digest(entry))


def _read_digest(entry: KeyEntry) -> bytes:
    if (entry.key is None) == (entry.key_sha256 is None):
        raise BadRequest("it needs either key or key_sha256")
    if entry.key is None:
        if not _SHA256.fullmatch(entry.key_sha256 or ""):
            raise BadRequest("key_sha256: it is not 64 hexadecimal digits")
        return bytes.fromhex(entry.key_sha256 or "")
    if len(entry.key) < MIN_KEY_LENGTH:
        raise BadRequest(f"key: {len(entry.key)} characters are too few; it needs at least {MIN_KEY_LENGTH}")
    if not _KEY.fullmatch(entry.key):
        raise BadRequest("key: it has characters other than visible ASCII")
    return digest_of(entry.key)


def digest_of(key: str) -> bytes:
    """Return the SHA-256 by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _wrong(path: str, reason: str) -> BadRequest:
    return BadRequest(f"{path!r}: {reason}", field="api_key_file")


def _entries(path: str) -> list[dict[str, object]]:
    """Read the entries of a list, or of a map by their names."""
    content = _parse(path)
    entries = content if isinstance(content, list) else []
    if isinstance(content, dict):
        entries = [{"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in content.items()]
    if not entries:
        raise _wrong(path, "it must hold a list of entries, or a map of names to entries, at least one")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise _wrong(path, f"entry {number}: it is not a map of name, key and tier")
    return entries


def _parse(path: str) -> object:
    """Parse the YAML of the file. Errors leave out the parser's own words, for they quote the file."""
    try:
        with user_path(path, "api_key_file").open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        raise _wrong(path, f"it cannot be read: {error.strerror}") from None
    if mode & stat.S_IRWXO:
        log.warning("api_key_file: %r is open to every user of this machine; chmod 600 closes it", path)
    try:
        return _texts(yaml.compose(content.decode("utf-8-sig"), yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        near = f", near line {mark.line + 1}" if mark is not None else ""
        raise _wrong(path, f"it is not valid YAML{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise _wrong(path, "it is not valid YAML in UTF-8") from None


def _texts(node: yaml.Node | None) -> object:
    """Build lists and maps of text: every scalar is text, `0012` and `null` too, and a map holds each key once."""
    if isinstance(node, yaml.MappingNode):
        values = {str(_texts(key)): _texts(value) for key, value in node.value}
        if len(values) < len(node.value):
            raise yaml.MarkedYAMLError(problem_mark=node.start_mark)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_texts(item) for item in node.value]
    return node.value if node is not None else None
