"""The OpenAPI document: valid, complete, true of the real server, and a page that holds no surprise."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import positive_data_acceptance

from sgld import __version__
from sgld.convert import fields_of, structure
from sgld.errors import BadRequest
from sgld.params import ModelInfo, SamplingParams
from sgld.server.app import make_app
from sgld.server.http.auth import Identity, Key, Keys, digest_of
from sgld.server.http.body import split
from sgld.server.http.describe import DESCRIBED
from sgld.server.http.schema import ImageFields
from sgld.server.routes import openapi
from sgld.server.routes.info import LEGACY_TASKS
from sgld.server.routes.json_schema import refused_fields, request_fields
from sgld.server.routes.openapi import document
from sgld.server.service import SERVICE
from sgld.settings import Settings
from tests.server.http.test_auth import Connect
from tests.server.test_server import Server

KEYS = Keys((Key(Identity("alice", admin=False), digest_of("alice-0123456789abcdef")),))
INFO = ModelInfo(
    name="Made",
    kind="video",
    defaults={"height": 64, "width": 96, "fps": 8, "num_frames": 5, "max_sequence_length": 77},
    size_multiple=16,
    frame_multiple=4,
    components=("vae",),
    unsupported={"flow_shift": "fixed"},
    max_tokens=77,
)
SMALL = {"num_inference_steps": 1, "height": 48, "width": 48, "num_frames": 5}


def make(sampling: dict[str, Any] | None = None, keys: Keys | None = None, info: ModelInfo | None = INFO) -> Any:
    app = make_app(Settings(), sampling, keys=keys)
    app[SERVICE].info = info
    return app


@pytest.mark.parametrize(("info", "keys"), [(None, None), (INFO, KEYS)], ids=["loading", "loaded, with keys"])
def test_the_document_is_valid(info: ModelInfo | None, keys: Keys | None) -> None:
    written = document(make(info=info, keys=keys), "http://example.com/prefix")
    assert list(OpenAPIV31SpecValidator(written).iter_errors()) == []
    assert written["servers"] == [{"url": "http://example.com/prefix"}]
    wrong = {**written, "paths": {"/x": {"get": {"responses": {"200": {}}}}}}
    assert list(OpenAPIV31SpecValidator(wrong).iter_errors()), "the validator does see what is wrong"


def test_every_route_is_described() -> None:
    app = make()
    paths = document(app, "http://x")["paths"]
    ours = [route for route in app.router.routes() if route.handler.__module__.startswith("sgld.")]
    assert len(ours) > 20
    for route in ours:
        assert route.handler in DESCRIBED, f"{route.method} {route.resource.canonical} has no @Described"
        if route.method != "HEAD":
            assert route.method.lower() in paths[route.resource.canonical]
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(names) == len(set(names))


def test_keys_are_part_of_the_document() -> None:
    written = document(make(keys=KEYS), "http://x")
    assert written["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert written["paths"]["/health"]["get"]["security"] == []
    listing = written["paths"]["/v1/videos"]["get"]
    assert "security" not in listing and "401" in listing["responses"]
    assert "401" not in written["paths"]["/health"]["get"]["responses"]
    assert "security" not in document(make(), "http://x")


def test_every_knob_is_described_or_refused() -> None:
    service = make()[SERVICE]
    described, refused = request_fields(SamplingParams, service), refused_fields(SamplingParams, INFO)
    assert set(fields_of(SamplingParams)) == (set(described) & set(fields_of(SamplingParams))) | set(refused)
    assert not set(described) & set(refused)
    assert refused["flow_shift"] == "fixed" and refused["enable_teacache"].startswith("not built yet")
    assert described["n"]["description"] == "the same as num_outputs_per_prompt"


def test_ranges_and_choices_are_those_of_the_converter() -> None:
    """At the edge of every range the schema and the converter say the same."""
    seen = 0
    for name, schema in request_fields(SamplingParams, make(info=None)[SERVICE]).items():
        if name not in fields_of(SamplingParams) or "anyOf" in schema:
            continue
        for value in edges(schema):
            valid = not list(jsonschema.Draft202012Validator(schema).iter_errors(value))
            assert accepts({name: value}) == valid, (name, value)
            seen += 1
    assert seen > 50


def edges(schema: dict[str, Any]) -> Iterator[Any]:
    yield from (None, True, "what nobody chose", 0.5, {})
    for limit in (schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")):
        if limit is not None:
            yield from (limit - 1, limit, limit + 1)
    yield from schema.get("enum", ())


def accepts(values: dict[str, Any]) -> bool:
    try:
        _, sampling, _ = split(values, ImageFields)
        structure(sampling, SamplingParams)
    except BadRequest:
        return False
    return True


def test_defaults_are_the_models_and_the_operators() -> None:
    loading = request_fields(SamplingParams, make({"height": 32}, info=None)[SERVICE])
    assert loading["height"]["default"] == 32 and "default" not in loading["width"]
    assert loading["width"]["description"].endswith("the model's own")
    loaded = request_fields(SamplingParams, make({"height": 32})[SERVICE])
    assert (loaded["height"]["default"], loaded["width"]["default"]) == (32, 96)
    assert (loaded["height"]["multipleOf"], loaded["max_sequence_length"]["maximum"]) == (16, 77)


def test_a_form_names_its_lists() -> None:
    fields = request_fields(SamplingParams, make()[SERVICE], form=True)
    assert (fields["seed"]["type"], fields["seed[]"]["type"]) == ("integer", "array")


# The page


@attrs.frozen
class Shown:
    """An element that the page has made: its own text, and that of its children, in order."""

    tag: str
    attributes: dict[str, str]
    children: list[Shown | str]

    @classmethod
    def read(cls, node: dict[str, Any]) -> Shown:
        children = [child if isinstance(child, str) else cls.read(child) for child in node["children"]]
        return cls(node["tag"], node["attributes"], children)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator[Shown]:
        yield self
        for child in self.children:
            if isinstance(child, Shown):
                yield from child.walk()

    def find(self, tag: str) -> list[Shown]:
        return [each for each in self.walk() if each.tag == tag]

    def by_id(self, name: str) -> Shown:
        [found] = [each for each in self.walk() if each.attributes.get("id") == name]
        return found


@pytest.fixture
def show(tmp_path: Path) -> Callable[[dict[str, Any]], Shown]:
    """Run the script of the page on a document, in Node with a small DOM of our own."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node runs the script of the page; it is not installed here")

    def run(written: dict[str, Any]) -> Shown:
        (tmp_path / "openapi.json").write_text(json.dumps(written))
        script = str(Path(__file__).with_name("page.js"))
        command = [node, script, str(openapi.PAGE), str(tmp_path / "openapi.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        made = json.loads(done.stdout)
        assert made["title"] == f"sgld {__version__}"
        return Shown.read(made["body"])

    return run


def test_the_page_shows_the_whole_document(show: Callable[[dict[str, Any]], Shown]) -> None:
    app = make({"negative_prompt": "</code><script>alert(1)</script>", "x264_preset": "fast"}, KEYS)
    written = document(app, "http://x")
    page = show(written)
    ids = [each.attributes["id"] for each in page.walk() if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    links = {each.attributes["href"] for each in page.find("a")}
    assert links - {f"#{name}" for name in ids} == {"openapi.json"}
    assert set(ids) >= written["components"]["schemas"].keys()
    for methods in written["paths"].values():
        assert set(ids) >= {operation["operationId"] for operation in methods.values()}
    summary = written["paths"]["/v1/images/generations"]["post"]["summary"]
    assert "`n`" in summary and "`" not in page.text
    shown = page.by_id("images_generate").find("p")[0]
    assert shown.text.startswith(summary.replace("`", "")) and shown.find("code")[0].text == "n"
    assert "alert(1)" in page.text and "script" not in {each.tag for each in page.walk()}, "text stays text"
    assert "No key is needed." in page.by_id("info_health").text
    assert "No key is needed." not in page.by_id("info_models").text
    answer = next(each.text for each in page.by_id("images_generate").find("li") if each.text.startswith("200 OK"))
    assert ", event image_generation.completed: CompletedImage" in answer
    assert answer.endswith(", at last data: [DONE]")


def test_an_example_is_a_shell_command(show: Callable[[dict[str, Any]], Shown]) -> None:
    written = document(make(keys=KEYS), "http://x")
    page, path = show(written), "/v1/images/generations"

    def command(operation: str) -> str:
        return page.by_id(operation).find("pre")[0].text

    body = written["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    key = ["-H", "Authorization: Bearer YOUR_KEY"]
    sent = ["-H", "Content-Type: application/json", "-d", json.dumps(body["example"], separators=(",", ":"))]
    assert shlex.split(command("images_generate")) == ["curl", f"http://x{path}", "-X", "POST", *key, *sent]
    assert " -F image=@picture.png" in command("images_edit")
    assert command("videos_content").endswith(" -o file")
    assert command("info_health") == "curl http://x/health"
    body["example"] = {"prompt": "it's"}
    assert shlex.split(show(written).by_id("images_generate").find("pre")[0].text)[-1] == '{"prompt":"it\'s"}'


@pytest.mark.parametrize(
    ("schema", "kind", "limits"),
    [
        ({"type": ["integer", "null"], "minimum": 1, "maximum": 10}, "integer or null", "1 to 10"),
        ({"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}, "list of number", "more than 0"),
        ({"enum": ["a", "b", None]}, "string", "one of a, b"),
        ({"anyOf": [{"$ref": "#/components/schemas/Problem"}, {"type": "null"}]}, "Problem or null", ""),
        ({"const": 1}, "number", "1"),
        ({"const": "jpg"}, "string", '"jpg"'),
        ({"type": "string", "format": "binary"}, "file", ""),
        ({"type": "integer", "minimum": 0}, "integer", "at least 0"),
        ({"type": "integer", "maximum": 0}, "integer", "at most 0"),
        ({"type": "integer", "minimum": 1, "maximum": 9, "multipleOf": 3}, "integer", "1 to 9, multiple of 3"),
        ({"type": "string", "maxLength": 3}, "string", "at most 3 characters"),
    ],
)
def test_a_schema_in_words(
    schema: dict[str, Any], kind: str, limits: str, show: Callable[[dict[str, Any]], Shown]
) -> None:
    written = document(make(), "http://x")
    written["components"]["schemas"]["Problem"]["properties"]["code"] = schema
    row = show(written).by_id("Problem").find("tr")[1]
    assert [cell.text for cell in row.find("td")][1:3] == [kind, limits]


def test_the_page_may_load_nothing_but_the_document() -> None:
    text, policy = openapi.page()
    inline = re.findall(r"<(style|script)>(.*?)</", text, re.DOTALL)
    assert [name for name, _ in inline] == ["style", "script"]
    for name, content in inline:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy
    assert not re.search(r"https?://|innerHTML|\bon\w+=", text)


# What many may ask for at the same time


@pytest.fixture
def loading() -> Any:
    """An application whose model is not loaded yet, without workers."""
    app = make(info=None)
    app.cleanup_ctx.clear()
    return app


async def test_it_is_written_once_for_all_who_ask(
    aiohttp_client: Connect, loading: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again for another URL, whose document is the same, and anew when the model has been loaded."""
    builds: Counter[str] = Counter()

    def count(name: str) -> None:
        build = getattr(openapi, name)

        def counted(*given: Any) -> Any:
            builds[name] += 1
            return build(*given)

        monkeypatch.setattr(openapi, name, counted)

    count("document")
    count("encode")
    client = await aiohttp_client(loading)

    async def read(host: str = "first.example") -> Any:
        answer = await client.get("/openapi.json", headers={"X-Forwarded-Host": host})
        assert answer.status == 200 and answer.headers["Content-Type"] == "application/json; charset=utf-8"
        return await answer.json()

    first, *others = await asyncio.gather(*[read() for _ in range(32)])
    assert builds == {"document": 1, "encode": 1}
    assert all(other == first for other in others) and first["servers"] == [{"url": "http://first.example"}]
    assert await read("second.example") == {**first, "servers": [{"url": "http://second.example"}]}
    assert builds == {"document": 1, "encode": 2}

    loading[SERVICE].info = INFO
    after = await asyncio.gather(*[read() for _ in range(32)])
    assert builds == {"document": 2, "encode": 3}
    assert "flow_shift" not in first["x-refused-fields"] and after[-1]["x-refused-fields"]["flow_shift"] == "fixed"
    assert after[-1] == document(loading, "http://first.example")

    for number in range(openapi.MAX_URLS):
        await read(f"{number}.example.org")
    before = builds["encode"]
    await read(f"{number}.example.org")
    assert builds["encode"] == before
    await read()
    assert builds["encode"] == before + 1, "the oldest URL has been forgotten"


# The real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, whose outputs are small unless a request says otherwise."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    flags = ("--config", str(folder / "small.yaml"), "--input-save-path", str(folder / "uploads"))
    server = Server(folder / "results", *flags)
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def schema(server: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_page_of_the_real_server(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/docs", timeout=30) as answer:
        text, headers = answer.read().decode(), answer.headers
    assert (text, headers["Content-Security-Policy"]) == openapi.page()
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_capabilities(server: Server) -> None:
    status, told = server.get("/v1/capabilities")
    assert status == 200
    assert (told["model"], told["kind"], told["sampling"]) == ("sgld/demo", "video", SMALL)
    assert told["defaults"]["height"] == told["fields"]["height"]["default"] == 48
    assert told["unsupported"]["enable_teacache"] == "not built yet: step caching"
    assert told["limits"]["max_queue"] == 64
    status, again = server.get("/models")
    legacy = [LEGACY_TASKS[task] for task in told["tasks"]]
    assert (status, again["task_type"], again["supported_task_types"]) == (200, "T2V", legacy)
    assert told["tasks"][:2] == ["text-to-video", "text-to-image"]


def events(answer: requests.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields.get("data", "[DONE]") != "[DONE]":
            yield fields["event"], json.loads(fields["data"])


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_events_are_as_the_document_says(server: Server, kind: str) -> None:
    written = server.get("/openapi.json")[1]
    prompt = {"prompt": "a red circle", "num_inference_steps": 3}
    if kind == "images":
        body, path = {**prompt, "stream": True, "partial_images": 2}, "/v1/images/generations"
        answer = requests.post(server.url + path, json=body, timeout=60)
        method = "post"
    else:
        video = requests.post(f"{server.url}/v1/videos", json={**prompt, "previews": 1}, timeout=60).json()
        path, method = "/v1/videos/{id}/events", "get"
        headers = {"Last-Event-ID": "0"}
        answer = requests.get(server.url + path.format(id=video["id"]), headers=headers, timeout=60)
    content = written["paths"][path][method]["responses"]["200"]["content"]["text/event-stream"]
    told = {event["properties"].get("event", {}).get("const"): event for event in content["schema"]["anyOf"]}
    seen = set()
    for name, data in events(answer):
        assert data["type"].endswith(name)
        reference = {**told[name]["properties"]["data"]["contentSchema"], "components": written["components"]}
        jsonschema.validate(data, reference, jsonschema.Draft202012Validator)
        assert set(data) == set(resolved(written, reference)["properties"])
        seen.add(name)
    assert len(seen) >= 2, seen
    assert (kind == "images") == (None in told) == answer.text.endswith("data: [DONE]\n\n")


def resolved(written: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = written["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def test_deleting_answers_as_the_document_says(server: Server) -> None:
    written = server.get("/openapi.json")[1]
    video = requests.post(f"{server.url}/v1/videos", json={"prompt": "a red circle"}, timeout=60).json()
    gone = requests.delete(f"{server.url}/v1/videos/{video['id']}", timeout=60).json()
    reference = {"$ref": "#/components/schemas/DeletedVideo", "components": written["components"]}
    jsonschema.validate(gone, reference, jsonschema.Draft202012Validator)


# Fuzzing

LARGEST = {"num_inference_steps": 2, "height": 72, "width": 72, "num_frames": 5, "fps": 10, "seconds": 1}
MANY = ("n", "num_outputs", "num_outputs_per_prompt")
SIDE = 24  # the demo model's
PNG = io.BytesIO()
Image.new("RGB", (SIDE, SIDE), "red").save(PNG, "png")
ADDRESS = f"data:image/png;base64,{base64.b64encode(PNG.getvalue()).decode()}"
FROM_PICTURES = ("/v1/images/edits", "/v1/images/variations")
PICTURES = ("image", "url", "mask", "input_reference", "reference_url", "strength")  # none that is made up is one
Fuzzed = schemathesis.APIOperation[Any, Any, Any, Any]


def cheap(body: Any) -> Any:
    """The same kind of values, but none that is valid and takes long: those are brought down to `LARGEST`."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    for name, most in {**LARGEST, **dict.fromkeys(MANY, 2)}.items():
        if type(value := body.get(name)) is int and most < value <= 16384:
            body[name] = most
    if isinstance(body.get("size"), str) and len(body["size"]) > 5:
        body["size"] = "48x72"
    return body


def consistent(body: dict[str, Any]) -> dict[str, Any]:
    """The same, without what a schema cannot tell: fields that contradict each other or the model, and 3.0 for 3."""
    body = {name: int(value) if isinstance(value, float) and value % 1 == 0 else value for name, value in body.items()}
    dropped = {"model", "seconds", "adjust_frames", "seed[]", *MANY[1:]}
    dropped |= {name for name in body if name.split("[")[0] in PICTURES}
    if body.get("size") not in (None, "", "auto"):
        dropped |= {"width", "height"}
    if not body.get("stream"):
        dropped |= {"partial_images"}
    body = {name: value for name, value in cheap(body).items() if name not in dropped}
    for name in ("width", "height"):
        if body.get(name) is not None:
            body[name] = max(SIDE, body[name] // SIDE * SIDE)
    if isinstance(body.get("seed"), list):
        body["seed"] = 5
    return {**body, **({"prompt": body["prompt"].strip() or "a red circle"} if body.get("prompt") else {})}


@pytest.fixture(scope="module")
def made(server: Server) -> dict[str, str]:
    """Ids of a picture, a video and a webhook endpoint."""
    hook = {"name": "mine", "url": "https://example.com/hook", "event_types": ["video.completed"]}
    paths = {"images": "/v1/images/generations", "videos": "/v1/videos", "webhook_endpoints": "/v1/webhook_endpoints"}
    bodies = {"images": {"prompt": "x"}, "videos": {"prompt": "x"}, "webhook_endpoints": hook}
    ids = {}
    for name, path in paths.items():
        answer = requests.post(server.url + path, json=bodies[name], timeout=60)
        assert answer.status_code == 200, answer.text
        ids[name] = answer.json()["id"]
    return {**ids, "models": "sgld/demo"}


def fuzz(operation: Fuzzed, mode: GenerationMode, examples: int, adapt: Callable[[Case], None]) -> Counter[int]:
    """How often each status came; every answer has been checked against the document, and none was a 5xx."""
    statuses: Counter[int] = Counter()
    # a schema cannot tell which fields contradict each other, nor which ids there are
    excluded = [positive_data_acceptance]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    def run(case: Case) -> None:
        adapt(case)
        answer = case.call(timeout=60)
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=excluded)

    run()
    return statuses


def operations(schema: schemathesis.BaseSchema) -> list[Fuzzed]:
    return [found.ok() for found in schema.get_all_operations()]


def test_what_the_document_allows_is_answered_as_it_says(
    server: Server, schema: schemathesis.BaseSchema, made: dict[str, str]
) -> None:
    def adapt(case: Case) -> None:
        if isinstance(case.body, dict) and ("prompt" in case.body or case.path in FROM_PICTURES):
            case.body = consistent(case.body)
            if case.path in FROM_PICTURES:
                case.body |= {"image": ADDRESS, "strength": 1}
        kind = case.path.split("/")[2] if case.path.count("/") > 1 else ""
        if "id" in case.path_parameters and case.method != "DELETE":
            case.path_parameters["id"] = made[kind]
        if "after" in case.query:
            case.query["after"] = made[kind]
        if "url" in (case.body if isinstance(case.body, dict) else {}):
            case.body["url"] = "https://example.com/hook"
        if case.path.endswith("/test"):  # a real endpoint would be called
            case.path_parameters["id"] = "unknown"

    tried = {each.label: fuzz(each, GenerationMode.POSITIVE, 6, adapt) for each in operations(schema)}
    assert len(tried) > 20
    never = {label for label, statuses in tried.items() if not statuses[200]}
    deletes = {label for label in tried if label.startswith("DELETE")}
    adapters = {"POST /v1/set_lora", "POST /v1/merge_lora_weights"}  # there is no file of that name
    assert never <= deletes | adapters | {"POST /v1/webhook_endpoints/{id}/test"}
    assert "Traceback" not in server.log.read_text()


def test_what_the_document_forbids_is_refused_as_it_says(server: Server, schema: schemathesis.BaseSchema) -> None:
    def adapt(case: Case) -> None:
        case.body = cheap(case.body)

    unbodied = {"POST /v1/merge_lora_weights", "POST /v1/unmerge_lora_weights"}  # they take no body at all, too
    bodies = [each for each in operations(schema) if (len(each.body) or len(each.query)) and each.label not in unbodied]
    assert len(bodies) > 10
    for operation in bodies:
        statuses = fuzz(operation, GenerationMode.NEGATIVE, 6, adapt)
        assert all(400 <= status < 500 for status in statuses), (operation.label, statuses)
    assert "Traceback" not in server.log.read_text()


FORM = "multipart/form-data; boundary=x"


def form_part(headers: str, content: bytes) -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="prompt"\r\n{headers}\r\n'
    return head.encode() + content + b"\r\n--x--\r\n"


HOSTILE = {
    "a seed of 5000 digits": ("application/json", b'{"prompt": "x", "seed": %s}' % (b"9" * 5000)),
    "no number": ("application/json", b'{"prompt": "x", "seed": NaN, "n": Infinity}'),
    "guidance beyond float32": ("application/json", b'{"prompt": "x", "guidance_scale": 1e39}'),
    "a shift beyond precision": ("application/json", b'{"prompt": "x", "flow_shift": 1e30}'),
    "no gzip": ("application/json", b"\x1f\x8b00"),
    "a form that ends early": (FORM, b"--x\r\n\r\n"),
    "no UTF-8": (FORM, form_part("", b"\xff\xfe")),
    "an unknown encoding": (FORM, form_part("Content-Transfer-Encoding: none-such\r\n", b"a")),
    "an unknown charset": (FORM, form_part("Content-Type: text/plain; charset=none-such\r\n", b"a")),
}


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused(server: Server, path: str, name: str) -> None:
    kind, body = HOSTILE[name]
    headers = {"Content-Type": kind, **({"Content-Encoding": "gzip"} if name == "no gzip" else {})}
    answer = requests.post(server.url + path, body, headers=headers, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"]


def test_a_hostile_event_number_is_refused(server: Server, made: dict[str, str]) -> None:
    path = f"{server.url}/v1/videos/{made['videos']}/events"
    assert requests.get(path, headers={"Last-Event-ID": "9" * 5000}, timeout=60).status_code == 400
