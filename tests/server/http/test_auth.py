"""Keys: their file, who is let in, what each may see, and when no key is needed."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from sgld.errors import BadRequest
from sgld.server.http import auth
from sgld.server.http.auth import (
    IDENTITY,
    KEYS,
    OWNER,
    Identity,
    Keys,
    authenticate,
    check_exposure,
    load_keys,
    require_admin,
)
from sgld.server.http.errors import answer_errors
from sgld.settings import Settings

Connect = Callable[[web.Application], Awaitable[TestClient[web.Request, web.Application]]]
USER, ADMIN, OTHER = "user-key-0123456789", "admin-key-012345678", "other-key-0123456789"
NO_KEYS = Keys()


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


FILE = f"""
- name: studio
  key: {USER}
  tier: user
- name: operations
  key_sha256: {sha256(ADMIN).upper()}
  tier: admin
"""


def keys_of(tmp_path: Path, text: str, **settings: Any) -> Keys:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    file.chmod(0o600)
    return load_keys(Settings.of(api_key_file=str(file), **settings))


def application(keys: Keys) -> web.Application:
    async def who(request: web.Request) -> web.Response:
        return web.json_response([request[OWNER], request[IDENTITY].admin])

    async def change(request: web.Request) -> web.Response:
        require_admin(request)
        return web.json_response("changed")

    async def probe(request: web.Request) -> web.Response:
        return web.json_response(OWNER in request)

    app = web.Application(middlewares=[answer_errors, authenticate])
    app[KEYS] = keys
    app.add_routes([web.get("/who", who), web.post("/v1/set_lora", change), web.get("/v1/models/{id:.+}", who)])
    app.add_routes([web.get(path, probe) for path in auth.OPEN_ROUTES])
    return app


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return keys_of(tmp_path, FILE)


@pytest.mark.parametrize(
    "text",
    [FILE, f"studio: {{key: {USER}, tier: user}}\noperations: {{key_sha256: {sha256(ADMIN)}, tier: admin}}\n"],
    ids=["list", "map"],
)
def test_a_file_of_keys(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of(tmp_path, text)
    assert keys.identify(USER) == Identity("studio", admin=False)
    assert keys.identify(ADMIN) == Identity("operations", admin=True)
    for wrong in (OTHER, "", USER[:-1], USER + "0", sha256(ADMIN), "ü", "\udcff"):
        assert keys.identify(wrong) is None
    assert caplog.text == ""
    assert USER not in repr(keys) and sha256(ADMIN)[:8] not in repr(keys)


def test_the_single_key_is_an_admin_beside_those_of_the_file(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, FILE, api_key=OTHER)
    assert keys.identify(OTHER) == Identity("default", admin=True)
    assert keys.identify(USER) == Identity("studio", admin=False)
    assert load_keys(Settings()).known == ()


def test_numbers_and_null_are_texts(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, "- {name: null, key: 0012345678901234567, tier: user}")
    assert keys.identify("0012345678901234567") == Identity("null", admin=False)


def test_a_file_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys_of(tmp_path, FILE)
    assert caplog.text == ""
    (tmp_path / "keys.yaml").chmod(0o644)
    assert len(load_keys(Settings.of(api_key_file=str(tmp_path / "keys.yaml"))).known) == 2
    assert "keys.yaml' is open to every user" in caplog.text


LONG = "sk-this-is-a-key-and-must-not-be-told"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"- {{name: a, kee: {LONG}, tier: user}}", "entry 1 (a): an unknown field: it is wrong, and not shown"),
        ("- {name: a, kee: short, tier: user}", "entry 1 (a): unknown key 'kee'; did you mean key?"),
        (f"- {{{LONG}: a}}", "entry 1: an unknown field: it is wrong, and not shown"),
        (f"- {{name: a, key: {LONG}, tier: {LONG}}}", "entry 1 (a): tier: it is wrong, and not shown"),
        (f"- {{name: a, key: {LONG}, tier: root}}", "entry 1 (a): tier: 'root' is not one of user, admin"),
        (f"- {{name: a, key: {LONG}}}", "entry 1 (a): tier: '' is not one of user, admin"),
        (f"- {{key: {LONG}, tier: user}}", "entry 1: name: it is not 1 to 64 letters"),
        (f"- {{name: a b, key: {LONG}, tier: user}}", "entry 1: name: it is not"),
        ("- {name: a, tier: user}", "entry 1 (a): it needs either key or key_sha256"),
        (f"- {{name: a, key: {LONG}, key_sha256: {sha256(LONG)}, tier: user}}", "it needs either key or key_sha256"),
        (f"- {{name: a, key_sha256: {LONG}, tier: user}}", "key_sha256: it is not 64 hexadecimal digits"),
        ("- {name: a, key: '', tier: user}", "key: 0 characters are too few; it needs at least 16"),
        ("- {name: a, key: fifteen-letters, tier: user}", "key: 15 characters are too few"),
        (f"- {{name: a, key: '{LONG} b', tier: user}}", "key: it has characters other than visible ASCII"),
        (f"- {{name: a, key: [{LONG}], tier: user}}", "entry 1 (a): key: its value is not a valid text"),
        (f"- {LONG}", "entry 1: it is not a map of"),
        (LONG, "it must hold a list of entries"),
        ("", "it must hold a list of entries"),
        (f"a: {LONG}", "entry 1: it is not a map of"),
        (f"{FILE}- {{name: third, key: {ADMIN}, tier: user}}", "entry 3 (third): its key is that of entry 2 (operat"),
        (f"{FILE}- {{name: studio, key: {LONG}, tier: user}}", "entry 3 (studio): its name is that of entry 1"),
        (f"- {{name: a, key: {OTHER}, tier: user}}", "entry 1 (a): its key is that of --api-key"),
        (f"- {{name: default, key: {LONG}, tier: user}}", "its name is that of --api-key"),
        (f"a: {{key: {LONG}, tier: user}}\na: {{key: {OTHER}, tier: user}}", "not valid YAML, near line 1"),
        (f"- name: a\n  key: {LONG}\n  key: {OTHER}\n  tier: user", "not valid YAML, near line 1"),
        (f"- name: a\n  key: *{LONG}\n", "not valid YAML, near line 2"),
        (f"- name: a\n  ? [{LONG}]\n  : x", "an unknown field: it is wrong, and not shown"),
        (f"- name: [{LONG}]", "name: it is wrong, and not shown"),
        (f"- 'name: {LONG}", "not valid YAML"),
        ("\x07", "not valid YAML in UTF-8"),
        ("[" * 3000, "not valid YAML in UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_without_telling_a_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        keys_of(tmp_path, text, api_key=OTHER)
    message = caught.value.message
    assert message.startswith("api_key_file: '") and told in message
    assert caught.value.param == "api_key_file"
    assert not any(secret in message for secret in (LONG, ADMIN, OTHER, sha256(LONG)))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be read: No such file"):
        load_keys(Settings.of(api_key_file=str(tmp_path / "none.yaml")))
    (tmp_path / "latin.yaml").write_bytes(b"- name: \xff")
    with pytest.raises(BadRequest, match="not valid YAML in UTF-8"):
        load_keys(Settings.of(api_key_file=str(tmp_path / "latin.yaml")))


def test_a_single_key_that_cannot_be_sent_or_can_be_guessed(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("", "with space and more", "schlüssel-schlüssel", "newline-at-its-end\n"):
        with pytest.raises(BadRequest, match="^api_key: it is empty or has characters other than visible ASCII$"):
            load_keys(Settings.of(api_key=key))
    assert load_keys(Settings.of(api_key="short")).identify("short") == Identity("default", admin=True)
    assert "shorter than 16 characters" in caplog.text and "'short'" not in caplog.text


async def test_a_key_is_needed_but_on_open_routes(aiohttp_client: Connect, keys: Keys) -> None:
    client = await aiohttp_client(application(keys))
    for path in auth.OPEN_ROUTES:
        answer = await client.get(path)
        assert (answer.status, await answer.json()) == (200, False)
    for path in ("/who", "/none", "/health/", "/v1/models/health", "/v1/models/..%2Fhealth"):
        answer = await client.get(path)
        body = await answer.json()
        assert (answer.status, body["error"]["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert body["error"]["message"] == "Authorization: missing; send `Authorization: Bearer KEY`"


async def test_each_key_is_its_owner(aiohttp_client: Connect, keys: Keys) -> None:
    client = await aiohttp_client(application(keys))
    for header, who in (
        (f"Bearer {USER}", ["studio", False]),
        (f"bearer   {ADMIN} ", ["operations", True]),
    ):
        answer = await client.get("/who", headers={"Authorization": header})
        assert (answer.status, await answer.json()) == (200, who)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", f"Basic {USER}", USER, f"Bearer {OTHER}", f"Bearer {USER}x", f"Bearer {USER} {USER}"],
)
async def test_wrong_keys_are_not_told(aiohttp_client: Connect, keys: Keys, header: str) -> None:
    client = await aiohttp_client(application(keys))
    answer = await client.get("/who", headers={"Authorization": header})
    text = await answer.text()
    assert answer.status == 401
    assert USER not in text and OTHER not in text


async def test_two_keys_in_one_request_are_refused(aiohttp_client: Connect, keys: Keys) -> None:
    client = await aiohttp_client(application(keys))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    header = f"Authorization: Bearer {USER}\r\n"
    writer.write(f"GET /who HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{header}{header}\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.split(b" ")[1] in (b"400", b"401")


async def test_only_admins_change_the_model(aiohttp_client: Connect, keys: Keys) -> None:
    client = await aiohttp_client(application(keys))
    answer = await client.post("/v1/set_lora", headers=bearer(USER))
    body = await answer.json()
    assert (answer.status, body["error"]["code"]) == (403, "forbidden")
    assert body["detail"] == "key 'studio' is of tier user; POST /v1/set_lora needs tier admin"
    answer = await client.post("/v1/set_lora", headers=bearer(ADMIN))
    assert (answer.status, await answer.json()) == (200, "changed")


async def test_without_keys_everybody_is_the_admin_of_nobody(aiohttp_client: Connect) -> None:
    client = await aiohttp_client(application(NO_KEYS))
    for headers in ({}, bearer(USER)):  # the stock client always sends a key
        answer = await client.get("/who", headers=headers)
        assert (answer.status, await answer.json()) == (200, ["", True])
    assert (await client.post("/v1/set_lora")).status == 200


FOREIGN: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "{own}"},
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-site"},
    {"Origin": "https://127.0.0.1.evil.example"},
    {"Origin": "null"},
    {"Origin": "http://[::1"},
    {"Host": "evil.example"},
    {"Host": "evil.example:80", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
    {"Host": "192.0.2.1"},
    {"Host": "localhost.evil.example"},
    {"Host": "evil.example", "X-Forwarded-Host": "127.0.0.1"},
]
OWN: list[dict[str, str]] = [
    {"User-Agent": "curl/8"},
    {"Authorization": f"Bearer {USER}", "User-Agent": "OpenAI/Python 3.54.0"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "{own}"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "{own}"},
    {"Host": "localhost:30000", "Origin": "http://localhost:30000"},
    {"Host": "LOCALHOST"},
    {"Host": "api.localhost:1"},
    {"Host": "127.8.9.10:30000"},
    {"Host": "[::1]:30000"},
    {"Host": "[::ffff:127.0.0.1]"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_pages_of_other_sites_are_kept_out(aiohttp_client: Connect, headers: dict[str, str]) -> None:
    client = await aiohttp_client(application(NO_KEYS))
    own = str(client.make_url("")).rstrip("/")
    headers = {name: text.replace("{own}", own) for name, text in headers.items()}
    for call in (client.get("/who", headers=headers), client.post("/v1/set_lora", headers=headers)):
        answer = await call
        body = await answer.json()
        assert (answer.status, body["error"]["code"]) == (403, "forbidden")
        assert body["detail"].partition(":")[0] in headers
    for path in auth.OPEN_ROUTES:
        assert (await client.get(path, headers=headers)).status == 200


@pytest.mark.parametrize("headers", OWN, ids=str)
async def test_own_pages_and_programs_are_let_in(aiohttp_client: Connect, headers: dict[str, str]) -> None:
    client = await aiohttp_client(application(NO_KEYS))
    own = str(client.make_url("")).rstrip("/")
    headers = {name: text.replace("{own}", own) for name, text in headers.items()}
    assert (await client.post("/v1/set_lora", headers=headers)).status == 200


async def test_a_keyless_server_behind_a_proxy(aiohttp_client: Connect) -> None:
    """With --allow-unauthenticated any name will do, but a page must come from the name that was called."""
    client = await aiohttp_client(application(load_keys(Settings.of(allow_unauthenticated=True))))
    proxied = {"Host": "internal:30000", "X-Forwarded-Host": "pictures.example", "X-Forwarded-Proto": "https"}
    for origin, status in (("https://pictures.example", 200), ("https://evil.example", 403)):
        assert (await client.get("/who", headers={**proxied, "Origin": origin})).status == status
    assert (await client.get("/who", headers=proxied)).status == 200
    assert (await client.get("/who", headers={**proxied, "Sec-Fetch-Site": "cross-site"})).status == 403


async def test_a_key_is_all_that_a_page_of_another_site_needs(aiohttp_client: Connect, keys: Keys) -> None:
    client = await aiohttp_client(application(keys))
    headers = {**bearer(USER), "Host": "a.example", "Origin": "https://b.example", "Sec-Fetch-Site": "cross-site"}
    assert (await client.get("/who", headers=headers)).status == 200


async def test_the_name_that_the_operator_chose_is_one_of_this_machine(aiohttp_client: Connect) -> None:
    """As many systems do, which give the machine's own name the address 127.0.1.1."""
    client = await aiohttp_client(application(load_keys(Settings.of(host="Workstation"))))
    for host, status in (("workstation:30000", 200), ("another:30000", 403)):
        assert (await client.get("/who", headers={"Host": host})).status == status


def test_a_key_sees_its_own_jobs_and_an_admin_all() -> None:
    assert Identity("studio", admin=False).visible_owner == "studio"
    assert Identity("operations", admin=True).visible_owner is None, "even of jobs from a time without keys"


def test_every_key_is_compared(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time tells nothing of which key it was: each compare runs, and it is the constant-time one."""
    compared: list[bool] = []
    compare = auth.hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(compare(a, b))
        return compared[-1]

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    for key, found in ((USER, [True, False]), (ADMIN, [False, True]), (OTHER, [False, False])):
        compared.clear()
        keys.identify(key)
        assert compared == found


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "127.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_key(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(Settings.of(host=host), NO_KEYS)
    check_exposure(Settings.of(host=host, allow_unauthenticated=True), NO_KEYS)
    assert caplog.text == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::", "", "192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"])
def test_beyond_loopback_a_key_is_needed(host: str, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadRequest, match="^host: .* give --api-key or --api-key-file, or --allow-unauthenticated"):
        check_exposure(Settings.of(host=host), NO_KEYS)
    check_exposure(Settings.of(host=host), keys)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        check_exposure(Settings.of(host=host, allow_unauthenticated=True), NO_KEYS)
    assert "it has no API key" in caplog.text


def test_a_name_is_judged_by_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for DNS, which these tests do not have."""
    addresses = {"here.test": ["127.0.0.1", "::1"], "both.test": ["127.0.0.1", "192.0.2.1"]}

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, 0)) for address in addresses[host]]

    monkeypatch.setattr(auth.socket, "getaddrinfo", resolve)
    check_exposure(Settings.of(host="here.test"), NO_KEYS)
    with pytest.raises(BadRequest, match=r"'both\.test' can be reached"):
        check_exposure(Settings.of(host="both.test"), NO_KEYS)


@pytest.mark.parametrize("host", ["[::1]", "a" * 70, "no.such.invalid"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(BadRequest, match="^host: .* is no address of this machine"):
        check_exposure(Settings.of(host=host), NO_KEYS)


def test_keys_and_everybody_contradict_each_other(keys: Keys) -> None:
    with pytest.raises(BadRequest, match="^allow_unauthenticated: there are API keys"):
        check_exposure(Settings.of(allow_unauthenticated=True), keys)


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    """The example in the module's docstring loads."""
    text = inspect.getdoc(auth) or ""
    example = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    assert [key.identity.admin for key in keys_of(tmp_path, example).known] == [False, True]
