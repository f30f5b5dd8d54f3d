"""Pictures by http address over HTTP: the real server fetches them from a site on loopback."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import media_files
from tests.server.routes.test_pictures import FILE, PROMPT, RED, call, extra, first, picture
from tests.server.test_server import Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


class Site(BaseHTTPRequestHandler):
    """Serves one picture."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/red.png" else 404)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        if self.path == "/red.png":
            self.wfile.write(RED)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Site) as site:
        serving = threading.Thread(target=site.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{site.server_port}/red.png"
        site.shutdown()
        serving.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("addresses") / "out", "--allow-private-urls")
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


def form(server: Server, path: str, fields: list[tuple[str, str]]) -> tuple[int, Any]:
    """Send a multipart form of texts."""
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    body = "".join([*parts, "--x--\r\n"]).encode()
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "multipart/form-data; boundary=x"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, json.load(answer)


def test_edits_by_address(server: Server, address: str) -> None:
    """In a form and in JSON, under each name, as the same file uploaded."""
    made = first(server.client.images.edit(image=FILE, prompt=PROMPT, extra_body=extra()))
    texts = [("prompt", PROMPT), *((name, str(value)) for name, value in extra().items())]
    for name in ("url", "url[]"):
        status, answer = form(server, "/v1/images/edits", [*texts, (name, address)])
        assert status == 200 and (picture(answer["data"][0]["b64_json"]) == made).all(), name
    for given in ({"url": address}, {"url": [address]}, {"image": {"image_url": address}}):
        status, answer = call(server, "/v1/images/edits", {"prompt": PROMPT, **given, **extra()})
        assert status == 200 and (picture(answer["data"][0]["b64_json"]) == made).all(), given
    status, answer = call(server, "/v1/images/edits", {"prompt": PROMPT, "url": address + "x"})
    assert status == 400 and "answered 404" in answer["error"]["message"] and answer["error"]["param"] == "url"


def test_videos_by_address(server: Server, address: str, tmp_path: Path) -> None:
    """`input_reference` as OpenAI nests it and as text, `reference_url`, and `extra_body` in a form."""
    fields, videos = extra(num_frames=5), server.client.videos
    uploaded = videos.create_and_poll(prompt=PROMPT, input_reference=FILE, extra_body=fields)
    given: list[dict[str, Any]] = [
        {"input_reference": {"image_url": address}}, {"input_reference": address}, {"reference_url": address},
    ]  # fmt: skip
    made = [call(server, "/v1/videos", {"prompt": PROMPT, **one, **fields}) for one in given]
    extras = json.dumps({**fields, "reference_url": address})
    made.append(form(server, "/v1/videos", [("prompt", PROMPT), ("extra_body", extras)]))
    clips = []
    for id in (uploaded.id, *(answer["id"] for _, answer in made)):
        assert videos.poll(id).status == "completed"
        (tmp_path / "clip.mp4").write_bytes(videos.download_content(id).read())
        clips.append(media_files.decode(tmp_path / "clip.mp4")[0])
    assert all((clip == clips[0]).all() for clip in clips)
    plain = videos.create_and_poll(prompt=PROMPT, extra_body={"num_inference_steps": 5, "num_frames": 5, "seed": 1})
    (tmp_path / "clip.mp4").write_bytes(videos.download_content(plain.id).read())
    assert (media_files.decode(tmp_path / "clip.mp4")[0] != clips[0]).any(), "the control: without the picture"
