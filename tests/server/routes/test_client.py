"""The stock `openai` client against the real server. `PYTHONPATH=FOLDER` runs it with another version of the client."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from tests.server.test_server import Server, picture

OLD = "2.8.1"
UNREACHABLE = "after connection broken by"  # pip's words when it gets no connection to the index
PROMPT = "a red circle on a blue background"
STREAMED_STEPS, LONG = 24, 60
MARGIN_DB = 1.0  # by which each preview is nearer to the final picture than the one before; measured: 1.6 at least
pytestmark = [
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # images.create_variation
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("client") / "out", "--max-queue", "2")
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client


def extra(**fields: Any) -> dict[str, Any]:
    return {"num_inference_steps": 3, "num_frames": 5, **fields}


def one_frame(**fields: Any) -> dict[str, Any]:
    return {"num_inference_steps": 3, **fields}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between two pictures of 8 bits."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def running(server: Server) -> bool:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        return "sgld_jobs_running 1.0" in answer.read().decode()


def test_a_streamed_picture_comes_nearer(server: Server, client: openai.OpenAI) -> None:
    steps = one_frame(num_inference_steps=STREAMED_STEPS, seed=3)
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=steps)
    first = next(iter(stream))
    assert running(server), "the first event comes while the picture is made"
    partials: list[Any] = [first]
    *more, final = list(stream)
    partials += more
    assert all(type(event) is ImageGenPartialImageEvent for event in partials)
    assert all(event.type == "image_generation.partial_image" for event in partials)
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    assert type(final) is ImageGenCompletedEvent and final.type == "image_generation.completed"
    for event in (*partials, final):
        assert (event.size, event.output_format, event.background) == ("96x96", "png", "opaque")
        assert event.created_at == first.created_at and event.quality == "high"

    made = picture(final.b64_json)
    nearness = [psnr(picture(event.b64_json), made) for event in partials]
    assert all(b > a + MARGIN_DB for a, b in itertools.pairwise(nearness)), nearness
    answer = client.images.generate(prompt=PROMPT, extra_body=one_frame(num_inference_steps=STREAMED_STEPS, seed=4))
    assert answer.data is not None
    assert psnr(picture(answer.data[0].b64_json), made) < nearness[-1] - MARGIN_DB, "another picture is further away"
    again = client.images.generate(prompt=PROMPT, extra_body=steps)
    assert again.data is not None
    assert (picture(again.data[0].b64_json) == made).all(), "previews change nothing"


def test_usage_counts_tokens(client: openai.OpenAI) -> None:
    short = client.images.generate(prompt=PROMPT, extra_body=one_frame()).usage
    long = client.images.generate(prompt=f"{PROMPT} and nothing else", n=2, extra_body=one_frame()).usage
    finals = list(client.images.generate(prompt=PROMPT, n=2, stream=True, extra_body=one_frame()))
    assert len(finals) == 2, "each with what its own picture took"
    for final in finals:
        assert isinstance(final, ImageGenCompletedEvent) and final.usage.total_tokens == short.total_tokens
    for usage in (short, long):
        assert usage is not None
        assert usage.input_tokens == usage.input_tokens_details.text_tokens + usage.input_tokens_details.image_tokens
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < short.input_tokens < long.input_tokens
    assert long.output_tokens == 2 * short.output_tokens > 0


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pictures_by_address(client: openai.OpenAI, format: Any) -> None:
    made = client.images.generate(
        prompt=PROMPT, n=2, response_format="url", output_format=format, extra_body=one_frame()
    )
    assert made.data is not None and len(made.data) == 2
    for item in made.data:
        assert item.b64_json is None and item.url is not None
        with urllib.request.urlopen(item.url, timeout=10) as answer:
            assert answer.headers["Content-Type"] == f"image/{format}"
            shown = Image.open(io.BytesIO(answer.read()))
        assert (shown.format, shown.size) == (format.upper(), (96, 96))


def test_compression_makes_a_file_smaller(client: openai.OpenAI) -> None:
    def size(format: Any, quality: int) -> int:
        made = client.images.generate(
            prompt=PROMPT, output_format=format, output_compression=quality, extra_body=one_frame(seed=3)
        )
        assert made.data is not None and made.data[0].b64_json is not None
        return len(made.data[0].b64_json)

    assert size("jpeg", 10) < 0.7 * size("jpeg", 95)
    assert size("png", 10) == size("png", 95), "which loses nothing"


def test_a_video_from_creation_to_deletion(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, size="96x72", seconds="1", extra_body=extra(num_frames=None))
    assert (video.status, video.progress, video.size) == ("completed", 100, "96x72")
    assert video.completed_at is not None and video.expires_at is not None
    assert video.created_at <= video.completed_at < video.expires_at

    assert client.videos.download_content(video.id).content[4:8] == b"ftyp"
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").content
    assert Image.open(io.BytesIO(thumbnail)).size == (96, 72)
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").content))
    assert sheet.width > 96 and sheet.height > 72

    remix = client.videos.remix(video.id, prompt="a green star on a white background")
    assert remix.remixed_from_video_id == video.id and remix.prompt == "a green star on a white background"
    remix = client.videos.poll(remix.id)
    assert (remix.status, remix.size, remix.seconds) == ("completed", video.size, video.seconds)
    assert client.videos.download_content(remix.id).content != client.videos.download_content(video.id).content

    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            call(video.id)


def test_a_listing_is_read_to_its_end(client: openai.OpenAI) -> None:
    made = [client.videos.create_and_poll(prompt=PROMPT, extra_body=extra(num_frames=1)).id for _ in range(3)]
    page = client.videos.list(limit=1)
    assert [video.id for video in page.data] == made[-1:] and page.has_next_page()
    newest = [video.id for video in client.videos.list(limit=2)]
    assert newest[:3] == made[::-1] and len(set(newest)) == len(newest)
    assert [video.id for video in client.videos.list(limit=1, order="asc")] == newest[::-1]
    assert list(client.videos.list(after=newest[-1])) == []


def test_a_loop_that_deletes_what_it_lists_reaches_everything(client: openai.OpenAI) -> None:
    ids = {client.videos.create_and_poll(prompt=PROMPT, extra_body=extra()).id for _ in range(5)}
    for video in client.videos.list(limit=2):
        client.videos.delete(video.id)
        ids.discard(video.id)
    assert not ids and not list(client.videos.list())


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": -1})
    assert (wrong.value.param, wrong.value.code) == ("num_inference_steps", "invalid_value")
    assert wrong.value.type == "invalid_request_error" and wrong.value.request_id
    with pytest.raises(openai.BadRequestError) as unknown:
        client.videos.create(prompt=PROMPT, extra_body={"num_frame": 5})
    assert (unknown.value.param, unknown.value.code) == ("num_frame", "unknown_parameter")
    assert "did you mean num_frames?" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as streamed:
        client.images.generate(prompt=PROMPT, stream=True, size="50x50")  # type: ignore[call-overload]
    assert streamed.value.param == "size"
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.retrieve("video_none")
    assert missing.value.code == "not_found"


def test_a_full_queue_is_a_rate_limit(client: openai.OpenAI) -> None:
    videos = [client.videos.create(prompt=PROMPT, extra_body=extra(num_inference_steps=LONG))]
    while client.videos.retrieve(videos[0].id).status == "queued":
        time.sleep(0.02)
    videos += [client.videos.create(prompt=PROMPT, extra_body=extra()) for _ in range(2)]
    try:
        with pytest.raises(openai.RateLimitError) as full:
            client.videos.create(prompt=PROMPT, extra_body=extra())
        assert full.value.code == "queue_full" and int(full.value.response.headers["Retry-After"]) > 0
        patient = client.with_options(max_retries=4)
        videos.append(patient.videos.create(prompt=PROMPT, extra_body=extra()))
        assert client.videos.poll(videos[-1].id).status == "completed", "the client's own retry came when told"
    finally:
        for video in videos:
            client.videos.delete(video.id)


async def test_the_asynchronous_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.images.generate(
            prompt=PROMPT, stream=True, partial_images=1, extra_body=one_frame(num_inference_steps=6)
        )
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image", "image_generation.completed"]
        video = await client.videos.create_and_poll(prompt=PROMPT, extra_body=extra())
        assert video.status == "completed"
        assert (await client.videos.delete(video.id)).deleted


@pytest.mark.skipif(openai.__version__ == OLD, reason="this is that run")
@pytest.mark.timeout(600)
def test_an_old_client(tmp_path: Path) -> None:
    """All of the above once more with the client of a year ago."""
    folder = tmp_path / "client"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), f"openai=={OLD}"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=240)
    if UNREACHABLE in installed.stderr:
        pytest.skip(f"no package index can be reached: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    version = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    asked = subprocess.run(version, env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == OLD
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    again = subprocess.run(tests, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout[-4000:]
