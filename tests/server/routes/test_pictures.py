"""Pictures as inputs over HTTP: the stock `openai` client, the real server, the embedded model."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw

from tests import media_files
from tests.server.jobs.test_jobs import Start, start
from tests.server.test_server import Server, picture
from tests.test_inputs import png_header

__all__ = ["start"]
PROMPT = "a red circle on a blue background"
SIDE = 96
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # images.create_variation
]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, uploads: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("pictures") / "out", "--input-save-path", str(uploads))
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def drawing() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (40, 70, 215))
    ImageDraw.Draw(image).ellipse((12, 18, 48, 54), fill=(215, 35, 40))
    return image


RED = png(drawing())
FILE = ("red.png", RED, "image/png")
ADDRESS = f"data:image/png;base64,{base64.b64encode(RED).decode()}"


def stored(uploads: Path) -> set[Path]:
    """The files in the server's own part of the folder."""
    return {path for path in uploads.rglob("*") if path.is_file()}


def extra(**fields: Any) -> dict[str, Any]:
    return {"num_inference_steps": 5, "strength": 0.4, "seed": 1, **fields}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two pictures, in decibels."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def first(made: Any) -> np.ndarray:
    return picture(made.data[0].b64_json)


def call(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def test_edits(server: Server, uploads: Path) -> None:
    edit = server.client.images.edit
    made = first(edit(image=FILE, prompt=PROMPT, extra_body=extra()))
    alone = first(server.client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 5, "seed": 1}))
    drawn = np.asarray(drawing())
    assert psnr(made, drawn) > psnr(alone, drawn) + 1, "the control: without the picture"
    assert (first(edit(image=[FILE], prompt=PROMPT, extra_body=extra())) == made).all()
    status, answer = call(server, "/v1/images/edits", {"image": ADDRESS, "prompt": PROMPT, **extra()})
    assert status == 200 and (picture(answer["data"][0]["b64_json"]) == made).all(), answer
    assert len(stored(uploads)) == 3
    assert any(name.name.endswith("-red.png") for name in stored(uploads))


def test_a_streamed_edit(server: Server) -> None:
    edit, asked = server.client.images.edit, extra(num_inference_steps=10, strength=0.8)
    events = list(edit(image=FILE, prompt=PROMPT, stream=True, partial_images=2, extra_body=asked))
    assert [event.type for event in events] == [*["image_edit.partial_image"] * 2, "image_edit.completed"]
    made = first(edit(image=FILE, prompt=PROMPT, extra_body=asked))
    assert (picture(events[-1].b64_json) == made).all()
    assert all(picture(event.b64_json).shape == made.shape for event in events)


def test_a_mask(server: Server) -> None:
    mask = Image.new("RGBA", (SIDE, SIDE), "white")
    mask.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    asked = extra(strength=1)
    made = first(server.client.images.edit(image=FILE, mask=png(mask), prompt="a green star", extra_body=asked))
    drawn = np.asarray(drawing())
    assert (made[:, SIDE // 2 :] == drawn[:, SIDE // 2 :]).all()
    assert psnr(made[:, : SIDE // 2], drawn[:, : SIDE // 2]) < 25
    with pytest.raises(
        openai.BadRequestError, match=r"mask: it is 48x48; .* the size of the picture, 96x96"
    ) as refused:
        server.client.images.edit(image=FILE, mask=png(mask.resize((48, 48))), prompt=PROMPT)
    assert refused.value.param == "mask"
    with pytest.raises(openai.BadRequestError, match="mask: it leaves nothing to paint"):
        server.client.images.edit(image=FILE, mask=png(Image.new("L", (SIDE, SIDE))), prompt=PROMPT)


def test_a_variation_needs_no_prompt_and_takes_the_pictures_shape(server: Server) -> None:
    wide = png(drawing().resize((200, 100)))
    made = server.client.images.create_variation(image=wide, extra_body=extra())
    assert first(made).shape == (48, 120, 3)
    assert "size: 96x96 becomes 120x48, after the picture's 200x100 pixels" in made.warnings  # type: ignore[attr-defined]
    square = server.client.images.create_variation(image=wide, size="96x96", extra_body=extra())  # type: ignore[call-overload]
    assert first(square).shape == (96, 96, 3)


def test_a_video_from_a_picture(server: Server, uploads: Path, tmp_path: Path) -> None:
    videos, before = server.client.videos, stored(uploads)
    fields = extra(num_frames=5)
    video = videos.create_and_poll(prompt=PROMPT, input_reference=FILE, extra_body=fields)
    assert video.status == "completed", video.error
    again = videos.create_and_poll(prompt=PROMPT, extra_body={**fields, "reference_url": ADDRESS})
    clips = []
    for one in (video, again):
        (tmp_path / "clip.mp4").write_bytes(videos.download_content(one.id).read())
        clips.append(media_files.decode(tmp_path / "clip.mp4")[0])
    assert (clips[0] == clips[1]).all(), "a file and a data: URL are the same"
    assert len(stored(uploads) - before) == 2
    remixed = videos.remix(video.id, prompt="a green square on a blue background")
    videos.delete(video.id)
    assert videos.poll(remixed.id).status == "completed", "it has its own copy of the picture"
    for one in (again, remixed):
        videos.delete(one.id)
    assert stored(uploads) == before


def refused(*call: Callable[[], Any]) -> list[openai.APIStatusError]:
    errors = []
    for one in call:
        with pytest.raises(openai.APIStatusError) as error:
            one()
        errors.append(error.value)
    return errors


def test_refusals_leave_nothing(server: Server, uploads: Path) -> None:
    before, edit, create = stored(uploads), server.client.images.edit, server.client.videos.create
    cases: list[tuple[str, int, str, dict[str, Any]]] = [
        ("no picture", 400, "is no picture that is taken", {"image": ("a.png", b"text", "image/png")}),
        ("torn", 400, "'a' cannot be read: ", {"image": ("a.png", RED[:200], "image/png")}),
        ("16 pictures", 400, "image: 16 pictures; 'sgld/demo' takes 1", {"image": [FILE] * 16}),
        ("bomb", 413, "64000000 pixels", {"image": ("a.png", png_header(60000, 60000), "image/png")}),
        ("strength", 400, "strength: 0.01 of 5 steps is less than one step", {"image": FILE, "strength": 0.01}),
        ("own path", 400, "image_path: local paths are refused", {"image": FILE, "image_path": ["/etc/passwd"]}),
        ("own mask", 400, "mask_path: local paths are refused", {"image": FILE, "mask_path": "/etc/passwd"}),
    ]
    for name, status, says, fields in cases:
        image = fields.pop("image")
        (error,) = refused(lambda i=image, f=fields: edit(image=i, prompt=PROMPT, extra_body=extra(**f)))  # type: ignore[misc]
        assert (error.status_code, says in error.message) == (status, True), (name, error.message)
    status, answer = call(server, "/v1/images/edits", {"url": ["file:///etc/passwd"], "prompt": PROMPT})
    assert (status, answer["error"]["param"]) == (400, "url"), answer
    for address in ("file:///etc/passwd", "/etc/passwd"):
        (error,) = refused(lambda a=address: create(prompt=PROMPT, extra_body={"reference_url": a}))  # type: ignore[misc]
        assert error.status_code in (400, 403), error.message
    (error,) = refused(lambda: server.client.images.generate(prompt=PROMPT, extra_body={"strength": 0.5}))
    assert "strength: it needs a picture" in error.message
    assert stored(uploads) == before


def test_a_picture_that_vanishes_is_told_without_its_path(server: Server, uploads: Path) -> None:
    """Between admission and generation, of a video and of an edit; and so is a mask that the cut leaves empty."""
    create, before = server.client.videos.create, stored(uploads)
    long = create(prompt=PROMPT, extra_body={"num_inference_steps": 1000})
    video = create(prompt=PROMPT, input_reference=FILE, extra_body=extra(num_frames=5))
    with ThreadPoolExecutor(1) as pool:
        edit = pool.submit(refused, lambda: server.client.images.edit(image=FILE, prompt=PROMPT, extra_body=extra()))
        while len(stored(uploads) - before) < 2 or server.get("/server_info")[1]["queue_depth"] < 2:
            time.sleep(0.02)
        for path in stored(uploads) - before:
            path.unlink()
        server.client.videos.delete(long.id)
        (error,) = edit.result()
    told = "the picture 'red' is gone from the server; send the request again"
    assert (error.status_code, error.code, error.body["message"]) == (404, "not_found", told)  # type: ignore[index]
    failed = server.client.videos.poll(video.id)
    assert failed.status == "failed" and failed.error is not None
    assert (failed.error.code, failed.error.message) == ("not_found", told)
    edge = Image.new("L", (200, 100))
    edge.paste(255, (0, 0, 10, 100))
    asked: dict[str, Any] = {"prompt": PROMPT, "size": "96x96", "extra_body": extra()}
    wide = png(drawing().resize((200, 100)))
    (error,) = refused(lambda: server.client.images.edit(image=wide, mask=png(edge), **asked))
    assert (error.status_code, error.param) == (400, "mask")
    assert "mask: it leaves nothing to paint once it is cut to 96x96 pixels" in error.message
    assert str(uploads) in server.log.read_text(), "the operator is told which file it was"


def test_another_picture_under_the_same_key_is_refused(server: Server) -> None:
    body = {"prompt": PROMPT, **extra(num_frames=1)}
    client = server.client.with_options(default_headers={"Idempotency-Key": "picture-key"})
    one = client.videos.create(prompt=PROMPT, extra_body={**body, "reference_url": ADDRESS})
    same = client.videos.create(prompt=PROMPT, extra_body={**body, "reference_url": ADDRESS})
    assert one.id == same.id
    other = f"data:image/png;base64,{base64.b64encode(png(Image.new('RGB', (SIDE, SIDE)))).decode()}"
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key: it came before with another request"):
        client.videos.create(prompt=PROMPT, extra_body={**body, "reference_url": other})


async def test_a_model_of_text_alone_takes_none(start: Start, tmp_path: Path) -> None:
    client = await start(input_save_path=str(tmp_path / "uploads"))
    for path, body in (
        ("/v1/images/edits", {"prompt": "{}", "image": ADDRESS}),
        ("/v1/images/edits", {"prompt": "{}", "images": [{"image_url": ADDRESS}]}),  # as OpenAI documents its JSON
        ("/v1/images/variations", {"image": ADDRESS}),
        ("/v1/videos", {"prompt": "{}", "reference_url": ADDRESS}),
        ("/v1/videos", {"prompt": "{}", "input_reference": {"image_url": ADDRESS}}),
    ):
        status, answer = await client.call("POST", path, json=body)
        field = next(name for name in body if name != "prompt")
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, field, "not_supported")
        assert "text alone" in answer["error"]["message"]
    assert not (tmp_path / "uploads").exists()
