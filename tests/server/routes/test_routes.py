"""What the routes of pictures and videos answer when something is wrong: names, statuses, headers, and no paths."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import openai
import pytest
from aiohttp import web
from PIL import Image

from sgld.errors import (
    BadRequest,
    ModelError,
    NotReady,
    OutOfMemory,
    OutputError,
    QueueFull,
    SgldError,
    WorkerDied,
)
from sgld.params import Memory
from sgld.server.http.errors import answer_errors, error_response
from sgld.server.jobs import inputs, thumbnails
from sgld.server.service import SERVICE
from sgld.storage.local import LocalResultStore
from tests.server.http.test_auth import Connect
from tests.server.jobs.test_jobs import Client, Start, start

__all__ = ["start"]
IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"


async def image(client: Client, **fields: Any) -> Any:
    status, answer = await client.call("POST", IMAGES, json={"prompt": "{}", **fields})
    assert status == 200, answer
    return answer


async def refusal(client: Client, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any], Any]:
    """Status, error and headers of an answer that is one of our errors."""
    async with client.session.request(method, client.url + path, **options) as answer:
        assert answer.content_type == "application/json", (answer.status, await answer.read())
        told = await answer.json()
        assert set(told) == {"error", "detail"} and set(told["error"]) == {"message", "type", "param", "code"}
        return answer.status, told["error"], answer.headers


# Which answers are worth a repeat


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (SgldError("x"), "false"),
        (OutOfMemory("x"), "false"),
        (ModelError("x"), "false"),
        (OutputError("x"), "false"),
        (WorkerDied("x"), None),
        (NotReady("x"), "true"),
        (QueueFull("x"), "true"),
        (BadRequest("x"), None),
    ],
)
def test_whether_a_repeat_helps(error: SgldError, retry: str | None) -> None:
    assert error_response(error).headers.get("x-should-retry") == retry


async def test_the_stock_client_does_not_generate_three_times(start: Start) -> None:
    client = await start()
    async with openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="unused", max_retries=2) as stock:
        with pytest.raises(openai.InternalServerError) as failed:
            await stock.images.generate(prompt='{"fault": "oom", "step": 1}')
    assert failed.value.code == "out_of_memory"
    async with client.session.get(f"{client.url}/metrics") as answer:
        text = await answer.text()
    assert f'sgld_http_requests_total{{method="POST",route="{IMAGES}",status="500"}} 1.0' in text


# Names of fields


NAMES: list[tuple[str, dict[str, Any], str]] = [
    (IMAGES, {"n": 11}, "n: 11 is out of range; allowed is 1 to 10"),
    (VIDEOS, {"num_outputs": 11}, "num_outputs: 11 is out"),
    (VIDEOS, {"num_outputs_per_prompt": 11}, "num_outputs_per_prompt: 11 is out"),
    (IMAGES, {"size": "97x96"}, "size: '97x96': width 97 is not a multiple of 8; the nearest valid"),
    (IMAGES, {"size": "96x97"}, "size: '96x97': height 97 is not a multiple of 8"),
    (VIDEOS, {"size": "96x99999"}, "size: '96x99999': height 99999 is out of range; allowed is 1 to"),
    (VIDEOS, {"width": 97}, "width: 97 is not a multiple of 8"),
    (VIDEOS, {"width": 97, "size": "97x96"}, "width: 97 is not a multiple of 8"),
    (VIDEOS, {"seconds": "3600"}, "seconds: '3600': num_frames 28800 is out of range"),
    (VIDEOS, {"seconds": 3600}, "seconds: 3600: num_frames 28800 is out of range"),
    (VIDEOS, {"num_frames": 28800}, "num_frames: 28800 is out of range"),
    (VIDEOS, {"n": 3, "seed": [1, 2]}, "seed: 2 seeds for 3 outputs"),
    (VIDEOS, {"n": 2, "num_outputs_per_prompt": 2}, "num_outputs_per_prompt: n is given too"),
    (VIDEOS, {"num_outputs_per_prompt": 2, "n": 2}, "n: num_outputs_per_prompt is given too"),
    (VIDEOS, {"video_url": "https://example.com/a.mp4"}, "video_url: not built yet"),
    (VIDEOS, {"video_reference": "https://example.com/a.mp4"}, "video_reference: not built yet"),
    (VIDEOS, {"enhance_prompt": True}, "enhance_prompt: not built yet"),
    (IMAGES, {"enhance_prompt": True}, "enhance_prompt: not built yet"),
    (IMAGES, {"skip_softmax_params": {"threshold": 1}}, "skip_softmax_params: not built yet"),
]


async def test_errors_name_the_field_that_was_sent(start: Start) -> None:
    client = await start()
    for path, fields, says in NAMES:
        status, error, _ = await refusal(client, "POST", path, json={"prompt": "{}", **fields})
        assert (status, error["param"]) == (400, says.partition(":")[0])
        assert error["message"].startswith(says)


async def test_no_name_is_suggested_that_would_be_refused(start: Start) -> None:
    """`image_path`, `video_path` and `enable_teacache` are known, and refused."""
    client = await start()
    for name in ("image_pth", "video_paths", "enable_teacach"):
        _, error, _ = await refusal(client, "POST", IMAGES, json={"prompt": "{}", name: "x"})
        assert error["message"] == f"unknown parameter {name!r}"
    _, error, _ = await refusal(client, "POST", IMAGES, json={"prompt": "{}", "num_ouputs": 2})
    assert error["message"].endswith("did you mean num_outputs?")


# Bodies


def form(*parts: tuple[str, str]) -> bytes:
    """A form of parts, each its headers and its content, with boundary x."""
    return "".join(f"--x\r\n{headers}\r\n\r\n{content}\r\n" for headers, content in parts).encode() + b"--x--\r\n"


FIELD = 'Content-Disposition: form-data; name="{}"'
PROMPT = (FIELD.format("prompt"), "{}")
FORMS = {
    "a header without a colon": form((f"{PROMPT[0]}\r\nno header", "{}")),
    "a long header": form((f"{PROMPT[0]}\r\nX: {'a' * 9000}", "{}")),
    "NUL in a header": form((f"{PROMPT[0]}\r\nX: a\0", "{}")),
    "a name of brackets": form((FIELD.format("a" + "[" * 15000), "x")),
    "a name of many levels": form(PROMPT, (FIELD.format("user" + "[a]" * 1500), "x")),
    "a strange charset": form((FIELD.format("_charset_"), "none-such"), PROMPT),
}


async def test_a_form_that_cannot_be_read(start: Start) -> None:
    client = await start()
    for name, data in FORMS.items():
        options = {"data": data, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
        status, error, _ = await refusal(client, "POST", VIDEOS, **options)
        assert status == 400 and len(error["message"]) < 250, name
        assert error["message"].startswith("'user[a][a]" if "levels" in name else "the body is not a valid form: ")


async def test_json_that_cannot_be_read(start: Start) -> None:
    """980 levels can be parsed, and exhaust the stack of what comes next."""
    client = await start()
    json_type = {"Content-Type": "application/json"}
    nested = ("[" * 980 + "]" * 980, '{"a":' * 99999 + "1" + "}" * 99999)
    for text, says in (
        *(
            (f'{{"prompt": "x", "user": {value}}}', "the body is not valid JSON: it has more than 32")
            for value in nested
        ),
        ('{"prompt": "{}", "seed": 1, "seed": 2}', "seed: given several times; give it once"),
        ('{"prompt": "{}", "extra_body": {"seed": 1, "seed": 2}}', "seed: given several times; give it once"),
    ):
        status, error, _ = await refusal(client, "POST", VIDEOS, data=text, headers=json_type)
        assert status == 400 and error["message"].startswith(says)


async def test_what_stands_beside_the_body(start: Start) -> None:
    client = await start()
    status, error, _ = await refusal(client, "POST", f"{VIDEOS}?seed=7", json={"prompt": "{}"})
    assert (status, error["code"], error["param"]) == (400, "unknown_parameter", "seed")
    for coding in ("compress", "gzip, gzip"):
        options = {"data": b'{"prompt": "{}"}', "headers": {"Content-Encoding": coding}}
        status, error, _ = await refusal(client, "POST", VIDEOS, **options)
        assert (status, error["param"]) == (400, "Content-Encoding")


async def test_too_many_fields(start: Start) -> None:
    client = await start()
    options = {"data": form(*[PROMPT] * 1001), "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    status, error, _ = await refusal(client, "POST", VIDEOS, **options)
    assert (status, error["code"]) == (413, "too_large")
    assert error["message"] == "Maximum number of form fields 1000 exceeded."


# Warnings


async def test_what_has_no_effect_is_told(start: Start) -> None:
    client = await start()
    fields = {"fps": 9, "x264_preset": "slow", "output_compression": 40}
    warnings = (await image(client, **fields))["warnings"]
    assert [text.partition(":")[0] for text in warnings] == list(fields)
    warnings = (await image(client, **fields, output_format="webp"))["warnings"]
    assert [text.partition(":")[0] for text in warnings] == ["fps", "x264_preset"]
    assert (await image(client, enhance_prompt=False))["warnings"] == []


# Remix


async def test_a_remix_is_resolved_again(start: Start) -> None:
    client = await start()
    video = await client.create(seed=[4, 9], n=2, num_frames=9)
    service = client.app[SERVICE]
    info, settings = service.info, service.settings
    assert info is not None
    path, body = f"{VIDEOS}/{video['id']}/remix", {"prompt": "{}"}

    service.info = attrs.evolve(info, memory=Memory(free=0, pixel=1))
    status, error, _ = await refusal(client, "POST", path, json=body)
    assert (status, error["code"], error["param"]) == (413, "too_large", "num_frames")

    service.info, service.settings = info, settings.evolve(served_model_name="another")
    status, error, _ = await refusal(client, "POST", path, json=body)
    assert (status, error["param"]) == (400, "id")
    assert repr(settings.model.model_path) in error["message"] and "'another'" in error["message"]

    service.settings, service.sampling = settings, {"num_inference_steps": 7, "output_compression": 3}
    status, remix = await client.call("POST", path, json=body)
    assert (status, remix["seeds"], remix["num_frames"]) == (200, [4, 9], 9)
    for job_id in (video["id"], remix["id"]):
        params = service.jobs.index.get(job_id).record.params
        assert (params.num_inference_steps, params.output_compression) == (4, None), "the operator's defaults are new"


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def files(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}_*"))


def block(folder: Path) -> None:
    """Put a file where the folder should be."""
    assert not files(folder, "")
    folder.write_text("a file")


async def test_a_file_that_has_gone(start: Start, folder: Path) -> None:
    client = await start()
    made = await image(client)
    video = await client.until(await client.create(), "completed")
    for file in (*files(folder, "image"), *files(folder, "video")):
        file.unlink()
    base = f"{VIDEOS}/{video['id']}/content"
    for path in (f"/v1/images/{made['id']}/content", base, f"{base}?variant=thumbnail", f"{base}?variant=spritesheet"):
        status, error, _ = await refusal(client, "GET", path)
        assert (status, error["code"], error["param"]) == (404, "not_found", "id")
        assert "the file has been removed" in error["message"] and str(folder) not in error["message"]


async def test_ranges_and_conditions_that_fail(start: Start, folder: Path) -> None:
    client = await start()
    made = await image(client)
    path, size = f"/v1/images/{made['id']}/content", files(folder, "image")[0].stat().st_size
    status, error, headers = await refusal(client, "GET", path, headers={"Range": f"bytes={size}-"})
    assert (status, error["code"], headers["Content-Range"]) == (416, "range_not_satisfiable", f"bytes */{size}")
    assert error["message"] == f"Range: 'bytes={size}-': the file has {size} bytes"
    status, error, _ = await refusal(client, "GET", path, headers={"If-Match": '"another"'})
    assert (status, error["code"]) == (412, "precondition_failed")
    async with client.session.get(client.url + path, headers={"Range": f"bytes={size - 1}-"}) as answer:
        assert (answer.status, len(await answer.read())) == (206, 1)


async def test_a_range_that_brings_the_whole_file(start: Start, folder: Path) -> None:
    client = await start()
    url = f"{client.url}/v1/images/{(await image(client))['id']}/content"
    whole = files(folder, "image")[0].read_bytes()

    async def read(*ranges: str, **more: str) -> tuple[int, bytes]:
        headers = [*(("Range", text) for text in ranges), *((name.replace("_", "-"), more[name]) for name in more)]
        async with client.session.get(url, headers=headers) as answer:
            return answer.status, await answer.read()

    async with client.session.get(url) as answer:
        tag = answer.headers["ETag"]
    assert await read("bytes=0-4", If_Range=tag) == await read("BYTES=0-4") == (206, whole[:5])
    assert await read("bytes=-5") == (206, whole[-5:])
    assert await read("bytes=0-4", If_Range='"another"') == (200, whole)
    assert await read("bytes=0-4", If_Range=f"W/{tag}") == (200, whole)
    assert await read("bytes=0-4", If_Range="Sun, 06 Nov 1994 08:49:37 GMT") == (200, whole)
    for text in (
        "frames=0-4",
        "bytes=0-1,3-4",
        "bytes=4-0",
        "bytes=-",
        "bytes=-0",
        "bytes=a-b",
        "bytes",
        f"bytes={'9' * 5000}-",
    ):
        assert await read(text) == (200, whole), text
    assert await read("bytes=0-1", "bytes=3-4") == (200, whole)
    for text in (f"bytes={len(whole)}-", f"bytes={'9' * 30}-"):
        assert (await read(text))[0] == 416, text


async def test_a_query_is_read_strictly(start: Start) -> None:
    client = await start()
    made = {"images": await image(client), "videos": await client.until(await client.create(), "completed")}
    for kind, job in made.items():
        path = f"/v1/{kind}/{job['id']}/content"
        status, error, _ = await refusal(client, "GET", f"{path}?varient=0")
        assert (status, error["code"], error["param"]) == (400, "unknown_parameter", "varient")
        assert error["message"].endswith("did you mean variant?")
        status, error, _ = await refusal(client, "GET", f"{path}?variant=0&variant=0")
        assert (status, error["message"]) == (400, "variant: given several times; give it once")
        assert (await client.call("GET", f"{path}?variant=0"))[0] == 200


async def test_a_result_that_cannot_be_stored_tells_no_path(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start(ephemeral=True)
    block(folder)
    video = await client.until(await client.create(), "failed")
    told = {"code": "output_error", "message": "the result cannot be stored; the server's log has the reason"}
    assert video["error"] == told
    status, error, _ = await refusal(client, "POST", IMAGES, json={"prompt": "{}"})
    assert (status, error["message"]) == (500, told["message"])
    assert f"cannot write {folder}" in caplog.text


async def test_a_journal_that_cannot_be_written_tells_no_path(
    aiohttp_client: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async def submit(_: web.Request) -> web.Response:
        raise OutputError("cannot use the journal /secret/.sgld/journal.db: No space left on device", "output_path")

    app = web.Application(middlewares=[answer_errors])
    app.add_routes([web.post(VIDEOS, submit)])
    client = await aiohttp_client(app)
    answer = await client.post(VIDEOS)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["param"]) == (500, "output_error", None)
    assert "/secret" not in error["message"] and "cannot use the journal /secret/.sgld" in caplog.text


async def test_a_damaged_result_is_the_servers_fault(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start()
    video = await client.until(await client.create(num_frames=9), "completed")
    file, path = files(folder, "video")[0], f"{VIDEOS}/{video['id']}/content?variant="
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # of the last frame
    assert (await client.call("GET", f"{path}thumbnail"))[0] == 200, "the first frame is all that it needs"
    for content, variants in (
        (whole[: len(whole) // 2], ("spritesheet",)),
        (b"no video", ("thumbnail", "spritesheet")),
    ):
        file.write_bytes(content)
        for variant in variants:
            status, error, headers = await refusal(client, "GET", path + variant)
            assert (status, error["code"], headers["x-should-retry"]) == (500, "output_error", "false")
            assert error["message"] == f"{file.name}: the file is damaged; the server's log has the reason"
    assert f"cannot read {file}" in caplog.text


READS: dict[Path, list[str]] = {}  # files that were opened to be read, by the folder that is watched


def audit(event: str, given: tuple[Any, ...]) -> None:
    if READS and event == "open" and isinstance(given[0], str | Path) and given[2] & os.O_ACCMODE == os.O_RDONLY:
        for folder, names in READS.items():
            if Path(given[0]).is_relative_to(folder):
                names.append(Path(given[0]).name)


sys.addaudithook(audit)


async def test_base64_is_answered_from_memory(start: Start, folder: Path) -> None:
    """The files are written all the same, and read for those who ask for them."""
    client = await start()
    reads = READS[folder] = []
    try:
        assert len((await image(client, n=2))["data"]) == 2
        async with client.session.post(client.url + IMAGES, json={"prompt": "{}", "stream": True}) as answer:
            assert "image_generation.completed" in await answer.text()
        assert (len(files(folder, "image")), reads) == (3, [])
        address = (await image(client, response_format="url"))["data"][0]["url"]
        async with client.session.get(address) as answer:
            assert Image.open(io.BytesIO(await answer.read())).size == (16, 16)
        assert reads
    finally:
        del READS[folder]


async def test_small_pictures_decode_what_they_show(start: Start, folder: Path) -> None:
    client = await start()
    video = await client.until(await client.create(num_frames=41), "completed")
    service = client.app[SERVICE]
    artifact = service.jobs.index.get(video["id"]).record.artifacts[0]
    sheet = folder / await service.jobs.outputs.picture(artifact, "spritesheet")
    assert Image.open(io.BytesIO(sheet.read_bytes())).size == (5 * 16, 4 * 16)
    seen: list[int] = []
    for wanted in ([0], [0, 3, 5]):
        tiles = list(thumbnails.read_tiles(folder / artifact.name, wanted, 8))
        seen.append(len(tiles))
        assert {tile.size for tile in tiles} == {(8, 8)}
    assert seen == [1, 3]
    with pytest.raises(ValueError, match="frame 41 is missing"):
        list(thumbnails.read_tiles(folder / artifact.name, [0, 41], 8))


async def test_two_decoders_at_most(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await start()
    video = await client.until(await client.create(), "completed")
    lock, busy, most = threading.Lock(), 0, 0
    tiles = thumbnails.read_tiles

    def counted(*given: Any) -> Iterator[Image.Image]:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)  # in its thread, so that all others could begin
        yield from tiles(*given)
        with lock:
            busy -= 1

    monkeypatch.setattr(thumbnails, "read_tiles", counted)
    variants = ["thumbnail", "spritesheet"] * 4
    calls = [client.call("GET", f"{VIDEOS}/{video['id']}/content?variant={variant}") for variant in variants]
    assert [status for status, _ in await asyncio.gather(*calls)] == [200] * len(calls)
    assert (most, busy) == (2, 0)


async def test_two_masks_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, busy, most = threading.Lock(), 0, 0

    def counted(*_: Any) -> tuple[int, int]:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return 8, 8

    monkeypatch.setattr(inputs, "_measure", counted)
    await asyncio.gather(*(inputs.measure("picture", "mask") for _ in range(8)))
    assert (most, busy) == (2, 0)


async def test_a_stream_ends_with_its_error(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request again, whose file goes at the last moment: the headers have left when that is seen."""
    client = await start()
    body = {"prompt": "{}", "seed": 1, "stream": True}
    options = {"json": body, "headers": {"Idempotency-Key": "picture"}}
    async with client.session.post(client.url + IMAGES, **options) as answer:
        assert '"type": "image_generation.completed"' in await answer.text()
    file = files(folder, "image")[0]
    file.unlink()

    async def seen(*_: object) -> bool:
        return True

    monkeypatch.setattr(LocalResultStore, "exists", seen)
    async with client.session.post(client.url + IMAGES, **options) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        name, data, last = (await answer.text()).removesuffix("\n\n").replace("\n\n", "\n").split("\n")
    assert (name, last) == ("event: error", "data: [DONE]")
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["code"] == "not_found" and "the file has been removed" in error["message"]
    file.mkdir()
    async with client.session.post(client.url + IMAGES, **options) as answer:
        text = await answer.text()
    assert text.startswith("event: error\n") and text.endswith("\n\ndata: [DONE]\n\n")
    assert '"code": "internal_error"' in text and str(folder) not in text
    assert "IsADirectoryError" in caplog.text, "what nobody expected is logged"
