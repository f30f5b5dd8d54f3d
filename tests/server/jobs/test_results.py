"""Results as files."""

from pathlib import Path

import numpy as np
import pytest

from sgld.errors import NotFound
from sgld.messages import Audio, Media, SharedFrames, Timings
from sgld.params import OutputParams
from sgld.server.jobs.results import Outputs
from sgld.settings import Settings
from sgld.storage.local import LocalResultStore
from tests import media_files


async def test_sound_reaches_the_file(tmp_path: Path) -> None:
    tone = np.sin(np.arange(27000) / 10, dtype=np.float32)[None]
    frames = SharedFrames.of(np.zeros((9, 32, 32, 3), np.uint8))
    made = Media(frames, 8, 7, Timings({}, [], 0), audio=Audio(tone, 24000))
    outputs, params = (
        Outputs(LocalResultStore(tmp_path), "some/model", Settings()),
        OutputParams(seed=7, num_frames=9, fps=8),
    )
    await outputs.save(params, made, "a.mp4", "mp4")
    heard = media_files.decode_sound(tmp_path / "a.mp4")
    assert heard is not None
    assert np.abs(heard.samples[0, 2000:20000] - tone[0, 2000:20000]).max() < 0.2
    assert np.abs(heard.samples[0, 2000:20000] + tone[0, 2000:20000]).max() > 1


async def test_images_stay_in_memory_as_long_as_somebody_answers_with_them(tmp_path: Path) -> None:
    made = Media(SharedFrames.of(np.full((1, 8, 8, 3), 7, np.uint8)), 8, 7, Timings({}, [], 0))
    outputs = Outputs(LocalResultStore(tmp_path), "some/model", Settings())
    with outputs.retain(["a.png"]):
        with outputs.retain(["a.png"]):
            artifact = await outputs.save(OutputParams(seed=7), made, "a.png", "png")
        data = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").unlink()
        assert (await outputs.read(artifact), artifact.bytes) == (data, len(data))
    with pytest.raises(NotFound, match=r"a\.png: the file has been removed"):
        await outputs.read(artifact)
