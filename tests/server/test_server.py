"""The real server, as a process on loopback, driven by the real OpenAI client."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from tests import media_files
from tests.processes import ranks_of

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # the client's word on its own server


class Server:
    """`sgld serve` in a process of its own."""

    def __init__(self, folder: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        command = [
            sys.executable,
            "-m",
            "sgld",
            "serve",
            "--port",
            str(self.port),
            *(() if "--output-path" in flags else ("--output-path", str(folder))),
            *flags,
        ]
        self.log = folder.parent / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused)

    def wait_until_healthy(self) -> list[int]:
        """The statuses that /health gave on the way."""
        statuses: list[int] = []
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            try:
                statuses.append(self.get("/health")[0])
            except urllib.error.URLError:  # not listening yet
                statuses.append(0)
            if statuses[-1] == 200:
                return statuses
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ranks(self) -> list[psutil.Process]:
        """Return its workers."""
        return ranks_of(self.process.pid)

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve") / "results")
    server.statuses = server.wait_until_healthy()  # type: ignore[attr-defined]
    yield server
    assert server.stop() == 0


def extra(**fields: Any) -> dict[str, Any]:
    return {"num_inference_steps": STEPS, **fields}


def picture(encoded: str | None) -> np.ndarray:
    assert encoded is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def test_health_is_503_until_the_model_is_loaded(server: Server) -> None:
    statuses = [status for status in server.statuses if status]  # type: ignore[attr-defined]
    assert statuses[-1] == 200
    assert set(statuses[:-1]) <= {503}
    assert 503 in statuses


def test_the_server_tells_its_attention(server: Server) -> None:
    told = dict.fromkeys(("transformer.self", "transformer.cross"), "torch_sdpa")
    assert server.get("/server_info")[1]["attention"] == told
    assert "attention: transformer.self torch_sdpa, transformer.cross torch_sdpa" in server.log.read_text()


def test_models(server: Server) -> None:
    listed = server.client.models.list().data
    assert [model.id for model in listed] == ["sgld/demo"]
    assert server.client.models.retrieve("sgld/demo").owned_by == "sgld"  # the client sends %2F
    with pytest.raises(openai.NotFoundError, match="gpt-4 is not|'gpt-4' is not served"):
        server.client.models.retrieve("gpt-4")


def test_images_from_the_stock_client(server: Server) -> None:
    make = server.client.images.generate
    made = make(prompt="a red circle on a blue background", n=2, size="auto", extra_body=extra(seed=7))
    assert made.data is not None and len(made.data) == 2
    first, second = (picture(item.b64_json) for item in made.data)
    assert first.ndim == 3 and first.shape == second.shape
    assert np.abs(first.astype(int) - second).max() > 8, "two seeds gave one picture"
    again = make(prompt="a red circle on a blue background", extra_body=extra(seed=8), output_format="png")
    assert again.data is not None
    assert (picture(again.data[0].b64_json) == second).all(), "seed 7, output 1 is seed 8"


def test_an_image_says_how_it_was_made(server: Server, tmp_path: Path) -> None:
    made = server.client.images.generate(prompt="a green star on a white background", extra_body=extra())
    assert made.data is not None and made.data[0].b64_json is not None
    path = tmp_path / "made.png"
    path.write_bytes(base64.b64decode(made.data[0].b64_json))
    told = media_files.read_metadata(path)
    assert told["prompt"] == "a green star on a white background"
    assert told["seed"] == made.seeds[0]  # type: ignore[attr-defined]
    assert told["model"] == "sgld/demo"


def test_a_video_from_the_stock_client(server: Server, tmp_path: Path) -> None:
    videos = server.client.videos
    video = videos.create(prompt="a yellow square moving left on a black background", extra_body=extra(num_frames=5))
    assert video.status == "queued" and video.progress == 0
    percent = [video.progress]
    for _ in range(600):
        video = videos.retrieve(video.id)
        percent.append(video.progress)
        if video.status in ("completed", "failed"):
            break
        time.sleep(0.05)
    assert video.status == "completed", video.error
    assert percent == sorted(percent) and percent[-1] == 100
    assert all(value < 100 for value in percent[:-1])
    path = tmp_path / "clip.mp4"
    videos.download_content(video.id).write_to_file(path)
    frames, fps = media_files.decode(path)
    assert len(frames) == 5
    assert fps == video.fps  # type: ignore[attr-defined]
    assert media_files.read_metadata(path)["prompt"].startswith("a yellow square")


def test_bad_requests_say_what_is_wrong(server: Server) -> None:
    generate = server.client.images.generate
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"num_inference_stpes": 3}, "num_inference_stpes", "did you mean num_inference_steps"),
        ({"num_inference_steps": "three"}, "num_inference_steps", "not a valid int"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000"),
        ({"height": 50}, "height", "nearest valid size"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2", "cannot use"),
        ({"output_path": "/etc"}, "output_path", "server decides"),
        ({"enable_teacache": True}, "enable_teacache", "not built yet"),
        ({"num_frames": 9}, "num_frames", "/v1/videos"),
        ({"return_frames": True}, "return_frames", "always false"),
        ({"data_type": "video"}, "data_type", "not one of image"),
    ]
    for body, param, words in cases:
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            generate(prompt="a red circle", extra_body=body)
        assert caught.value.param == param
        assert caught.value.body["message"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="WIDTHxHEIGHT"):
        generate(prompt="a red circle", size="big")  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="prompt"):
        generate(prompt=" ")
    with pytest.raises(openai.NotFoundError, match="not served"):
        generate(prompt="a red circle", model="dall-e-3")


def test_fields_that_say_what_is_so_anyway_are_taken(server: Server) -> None:
    fields = extra(
        save_output=True, return_frames=False, return_file_paths_only=None, data_type="image", negative_prompt=None
    )
    assert server.client.images.generate(prompt="a red circle", extra_body=fields).data


def test_values_that_contradict_each_other(server: Server) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n": 2, "num_outputs": 3}, "given too"),
        ({"size": "64x64", "width": 128}, "contradicts width"),
        ({"seed": [1, 2]}, "2 seeds for 1 output"),
        ({"seed": 2**63 - 1, "size": "12345678x1"}, "WIDTHxHEIGHT"),
    ]
    for body, words in cases:
        with pytest.raises(openai.BadRequestError, match=words):
            server.client.images.generate(prompt="a red circle", extra_body=body)
    with pytest.raises(openai.BadRequestError, match="num_frames is given too"):
        server.client.videos.create(prompt="a red circle", seconds="4", extra_body={"num_frames": 5})
    with pytest.raises(openai.BadRequestError, match="metadata of a jpeg"):
        server.client.images.generate(prompt="あ" * 32_000, output_format="jpeg")


def test_unknown_places(server: Server) -> None:
    assert server.get("/v1/videos/nothing")[0] == 404
    status, body = server.get("/v2/anything")
    assert status == 404 and body["error"]["code"] == "not_found" and body["detail"]


@pytest.mark.parametrize("body", [b"{", b"[" * 200_000, b"\xff", b"[]", b""])
def test_a_body_that_is_no_json(server: Server, body: bytes) -> None:
    request = urllib.request.Request(f"{server.url}/v1/images/generations", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 400
    assert "JSON" in json.load(caught.value)["error"]["message"]


def test_a_client_that_goes_away_frees_the_server(server: Server) -> None:
    """The connection is cut while its picture is made; `handler_cancellation` is what lets the server hear of it."""
    body = json.dumps({"prompt": "a red circle", "num_inference_steps": 1000, "num_outputs_per_prompt": 10}).encode()
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        ranks = server.ranks()
        used = [sum(rank.cpu_times()[:2]) for rank in ranks]
        while sum(sum(rank.cpu_times()[:2]) for rank in ranks) < sum(used) + 0.5:  # it is being made
            time.sleep(0.05)
    started = time.monotonic()
    assert server.client.images.generate(prompt="a red circle", extra_body=extra()).data
    assert time.monotonic() - started < 20, "10,000 steps would take minutes"


def test_a_killed_worker_fails_its_job_and_the_server_recovers(server: Server) -> None:
    video = server.client.videos.create(prompt="a red circle", extra_body={"num_inference_steps": 1000})
    while server.client.videos.retrieve(video.id).progress < 6:
        time.sleep(0.05)
    (rank,) = server.ranks()
    rank.kill()
    for _ in range(400):
        video = server.client.videos.retrieve(video.id)
        if video.status == "failed":
            break
        time.sleep(0.05)
    assert video.error is not None and video.error.code == "worker_died"
    assert 503 in server.wait_until_healthy()
    assert server.client.images.generate(prompt="a red circle", extra_body=extra()).data


def test_two_servers_with_several_workers_at_once(tmp_path: Path) -> None:
    """Each keeps to its own workers, and one does not mind what happens to the other's."""
    folders = [tmp_path / name / "results" for name in "ab"]
    for folder in folders:
        folder.parent.mkdir()
    servers = [Server(folder, "--num-gpus", "2", "--worker-retries", "1") for folder in folders]
    try:
        for server in servers:
            server.wait_until_healthy()
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(server.client.images.generate, prompt="a red circle", extra_body=extra(seed=5, **steps))
                for server, steps in zip(servers, ({}, {"num_inference_steps": 40}), strict=True)
            ]
            time.sleep(0.5)
            servers[0].ranks()[1].kill()
            made = [call.result().data for call in asked]
        assert all(data and picture(data[0].b64_json).any() for data in made)
        other = servers[1].client.images.generate(prompt="a red circle", extra_body=extra(seed=5)).data
        assert made[0] and other
        assert np.abs(picture(made[0][0].b64_json).astype(int) - picture(other[0].b64_json)).max() <= 1
    finally:
        codes = [server.stop() for server in servers]
    assert codes == [0, 0]


def test_a_busy_port_is_a_clear_error(server: Server) -> None:
    command = [sys.executable, "-m", "sgld", "serve", "--port", str(server.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert second.stderr.strip() == f"error: --port: cannot listen on 127.0.0.1:{server.port}: it is in use"


def test_a_model_that_does_not_load_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    server = Server(tmp_path / "results", "--model-path", str(tmp_path / "empty"))
    assert server.process.wait(60) == 1
    server.client.close()
    text = server.log.read_text()
    assert "model_index.json" in text and "Traceback" not in text


def test_sigterm_while_loading_ends_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path / "results")
    while True:
        try:
            assert server.get("/health")[0] == 503
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_the_server_keeps_to_loopback(server: Server) -> None:
    addresses = {
        connection.laddr.ip
        for process in [psutil.Process(server.process.pid), *server.ranks()]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
