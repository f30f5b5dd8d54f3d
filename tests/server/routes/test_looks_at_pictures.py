"""Pictures for models that look at them: the stock `openai` client and `sgld generate`, and tiny twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import media_files
from tests.cli.command import sgld
from tests.models.parity import photo
from tests.server.routes.test_pictures import first
from tests.server.test_server import Server
from tools.tiny import makers

PROMPT = "a red cat over the green ball"
QUICK = {"num_inference_steps": 2, "seed": 1}
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

Serve = Callable[[str], Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server of that twin, which lies in `twin`."""
    servers: list[Server] = []

    def start(name: str) -> Server:
        folder = makers()[name](tmp_path / "twin")
        servers.append(Server(tmp_path / "out", "--model-path", str(folder), "--warmup", "off"))
        servers[0].wait_until_healthy()
        return servers[0]

    yield start
    assert [server.stop() for server in servers] == [0]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three pictures of unlike sizes."""
    sizes = ((80, 64), (64, 96), (70, 70))
    return [photo(tmp_path / f"{i}.png", width, height) for i, (width, height) in enumerate(sizes)]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, in levels of 255."""
    return int(np.abs(a.astype(int) - b).max())


def test_several_pictures(serve: Serve, photos: list[Path], tmp_path: Path) -> None:
    """Each of them counts, and so does their order; the command makes what the server makes."""
    edit = partial(serve("flux2-klein").client.images.edit, prompt=PROMPT, size="64x32", extra_body=QUICK)
    one, two, three = photos
    made = first(edit(image=[one, two]))
    assert made.shape == (32, 64, 3)
    assert apart(made, first(edit(image=[two, one]))) > 1
    for others in ([one, three], [one], [one, two, three]):
        assert apart(made, first(edit(image=others))) > 4, others
    done = sgld(
        "generate", "--model-path", "twin", "--prompt", PROMPT, "--image-path", "0.png", "1.png", "--width", "64",
        "--height", "32", "--num-inference-steps", "2", "--seed", "1", "--output-path", "made",
        "--output-file-name", "a.png", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (media_files.decode(tmp_path / "made" / "a.png")[0][0] == made).all()
    assert media_files.read_metadata(tmp_path / "made" / "a.png")["image_path"] == ["0.png", "1.png"]


def test_a_video_of_a_picture(serve: Serve, photos: list[Path], tmp_path: Path) -> None:
    videos = serve("wan22-i2v-a14b").client.videos

    def clip(file: Path) -> Any:
        video = videos.create_and_poll(
            prompt=PROMPT, input_reference=file, extra_body=QUICK | {"size": "64x32", "num_frames": 5}
        )
        assert video.status == "completed", video.error
        (tmp_path / "clip.mp4").write_bytes(videos.download_content(video.id).read())
        return media_files.decode(tmp_path / "clip.mp4")[0]

    made = clip(photos[0])
    assert made.shape == (5, 32, 64, 3)
    assert (made == clip(photos[0])).all()
    assert apart(made, clip(photos[1])) > 20
