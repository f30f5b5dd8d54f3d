"""Encode real files, read them back, and hold the result against what went in."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sgld import __version__, media
from sgld.config import settings_of
from sgld.convert import structure
from sgld.errors import BadRequest
from sgld.messages import Audio, Frames
from sgld.params import IMAGE_FORMATS, VIDEO_FORMATS, OutputSpec, SamplingParams
from tests import media_files

RED = (215, 35, 40)
METADATA = {"prompt": 'A "curious" 浣熊\n\\ é 🦝', "seed": 2**63 - 1, "guidance_scale": 4.5, "model": "a/b"}
ALL = sorted(media.FORMATS)
KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114)}


@pytest.fixture
def clip() -> Frames:
    """Nine frames of a gradient whose blue moves, around a still red square; frames 3 and 4 are equal."""
    y, x = np.mgrid[0:64, 0:96]
    frames = np.stack([np.stack([x * 2, y * 3, np.full_like(x, i * 25)], -1) for i in range(9)]).astype(np.uint8)
    frames[:, 16:48, 16:64] = RED
    frames[4] = frames[3]
    return frames


def frames_for(format: str, clip: Frames) -> Frames:
    return clip[:1] if media.is_image(format) else clip


def write(folder: Path, format: str, frames: Frames, **changes: Any) -> Path:
    path = folder / f"out.{format}"
    given: dict[str, Any] = {"fps": 24, "quality": 90, "metadata": METADATA, **changes}
    media.encode(path, format, frames, **given)
    return path


def red_error(frames: Frames) -> float:
    """How far the mean colour inside the red square is off, in levels."""
    return float(np.abs(frames[:, 20:44, 20:60].mean((0, 1, 2)) - RED).max())


def test_every_format_of_the_knobs_is_known() -> None:
    assert {*VIDEO_FORMATS, *IMAGE_FORMATS, "npy"} == set(media.FORMATS)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.mp4", "mp4"),
        ("a b.JPEG", "jpeg"),
        ("a.tar.webp", "webp"),
        ("mp4", None),
        ("a.avi", None),
        ("a.", None),
    ],
)
def test_the_extension_decides(name: str, format: str | None) -> None:
    assert media.format_of(name) == format


@pytest.mark.parametrize("format", ALL)
def test_round_trip(format: str, clip: Frames, tmp_path: Path) -> None:
    sent = frames_for(format, clip)
    frames, fps = media_files.decode(write(tmp_path, format, sent))
    assert frames.shape == sent.shape
    assert frames.dtype == np.uint8
    difference = np.abs(frames.astype(int) - sent).mean()
    if format in ("png", "npy"):
        assert difference == 0
    assert difference < 8
    assert np.abs(np.roll(frames, 12, 2).astype(int) - sent).mean() > 12  # negative control: the same, moved aside
    if media.FORMATS[format].kind == media.VIDEO:
        assert fps == pytest.approx(24, rel=0.02)


@pytest.mark.parametrize("format", ALL)
def test_metadata_survives(format: str, clip: Frames, tmp_path: Path) -> None:
    stored = media_files.read_metadata(write(tmp_path, format, frames_for(format, clip)))
    assert stored == ({} if format == "npy" else METADATA)


@pytest.mark.parametrize("format", [f for f in ALL if f != "npy"])
@pytest.mark.parametrize("prompt", ["\ud800 no Unicode", "", "長い" * 5000], ids=["surrogate", "empty", "long"])
def test_metadata_of_odd_prompts_survives(format: str, prompt: str, clip: Frames, tmp_path: Path) -> None:
    path = write(tmp_path, format, frames_for(format, clip)[:1], metadata={"prompt": prompt})
    assert media_files.read_metadata(path) == {"prompt": prompt}
    assert media_files.decode(path)[0].shape[0] == 1


@pytest.mark.parametrize("format", ALL)
def test_equal_input_gives_equal_bytes(format: str, clip: Frames, tmp_path: Path) -> None:
    sent = frames_for(format, clip)
    first = write(tmp_path, format, sent).read_bytes()
    assert first == write(tmp_path, format, sent).read_bytes()
    assert first != write(tmp_path, format, 255 - sent).read_bytes()


@pytest.mark.parametrize("format", ["mp4", "webm", "jpg", "webp"])
def test_colour_by_quality(format: str, clip: Frames, tmp_path: Path) -> None:
    margins = {100: 2, 90: 2, 55: 4, 50: 4, 35: 8}
    sizes = []
    for quality, margin in margins.items():
        path = write(tmp_path, format, frames_for(format, clip), quality=quality)
        assert red_error(media_files.decode(path)[0]) <= margin, quality
        sizes.append(path.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[3] > sizes[4]  # the knob is real


@pytest.mark.parametrize("format", ["gif", "png"])
def test_flat_colour_is_exact(format: str, clip: Frames, tmp_path: Path) -> None:
    assert red_error(media_files.decode(write(tmp_path, format, frames_for(format, clip)))[0]) == 0


def rgb_of_planes(path: Path, matrix: str) -> list[float]:
    """The red square's colour from the stored Y, U, V by the textbook formula, so without FFmpeg's conversion."""
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).planes
        y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size) for p in planes)
    kr, kb = KR_KB[matrix]
    y1, pb, pr = (y[32, 40] - 16) / 219, (u[16, 20] - 128.0) / 224, (v[16, 20] - 128.0) / 224
    r, b = y1 + 2 * (1 - kr) * pr, y1 + 2 * (1 - kb) * pb
    return [255 * r, 255 * (y1 - kr * r - kb * b) / (1 - kr - kb), 255 * b]


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_video_is_bt709_and_says_so(format: str, clip: Frames, tmp_path: Path) -> None:
    path = write(tmp_path, format, clip)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert context.pix_fmt == "yuv420p"
    assert tags == (1, 1, 1, 1)
    assert np.abs(np.subtract(rgb_of_planes(path, "bt709"), RED)).max() < 4
    assert np.abs(np.subtract(rgb_of_planes(path, "bt601"), RED)).max() > 8  # negative control: the wrong matrix


def sweep(channels: int, rate: int, seconds: float) -> Audio:
    """Tones that rise, each channel's from another one."""
    t = np.arange(round(seconds * rate)) / rate
    tones = [0.5 * np.sin(2 * np.pi * (300 * (i + 1) + 400 * t) * t) for i in range(channels)]
    return Audio(np.stack(tones).astype(np.float32), rate)


def loudness(samples: Any) -> float:
    return float(np.sqrt(np.square(samples).mean()))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 24000, 48000])
@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound_comes_back_in_time(format: str, rate: int, channels: int, clip: Frames, tmp_path: Path) -> None:
    """Opus knows one rate alone when it is read; what is compared is every third or second sample."""
    sent = sweep(channels, rate, 49 / 24)
    path = write(tmp_path, format, np.tile(clip, (6, 1, 1, 1))[:49], audio=sent)
    heard = media_files.decode_sound(path)
    assert heard is not None
    assert len(heard.samples) == channels
    assert heard.samples.shape[1] / heard.rate == pytest.approx(49 / 24, abs=0.08)
    got = heard.samples[:, :: heard.rate // rate]
    n = min(got.shape[1], sent.samples.shape[1]) - 2000  # the last block fades
    assert loudness(got[:, :n] - sent.samples[:, :n]) < 0.03
    late = rate // 100  # negative control: 10 ms late
    assert loudness(got[:, late : n + late] - sent.samples[:, :n]) > 0.2
    if channels == 2:
        assert loudness(got[::-1, :n] - sent.samples[:, :n]) > 0.2  # negative control: left for right


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound_at_a_rate_that_the_codec_does_not_know(format: str, clip: Frames, tmp_path: Path) -> None:
    heard = media_files.decode_sound(write(tmp_path, format, clip, audio=sweep(2, 12345, 9 / 24)))
    assert heard is not None
    assert (heard.rate, heard.samples.shape[1] / heard.rate) == (48000, pytest.approx(9 / 24, abs=0.08))


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound_lies_beside_its_pictures_and_changes_nothing_else(format: str, clip: Frames, tmp_path: Path) -> None:
    silent = write(tmp_path, format, clip)
    assert media_files.decode_sound(silent) is None
    frames = media_files.decode(silent)[0].astype(int)
    path = write(tmp_path, format, clip, audio=sweep(2, 24000, 9 / 24))
    assert np.abs(media_files.decode(path)[0] - frames).mean() < 0.5
    assert media_files.read_metadata(path) == METADATA
    with av.open(str(path)) as container:
        times = [(p.stream.type, float(p.dts * p.time_base)) for p in container.demux() if p.dts is not None]
    order = [kind for kind, _ in times]
    half = order[: len(order) // 2]
    assert "audio" in half
    assert "video" in half


@pytest.mark.parametrize("format", [f for f in ALL if media.FORMATS[f].sound is None])
def test_other_formats_are_silent(format: str, clip: Frames, tmp_path: Path) -> None:
    sent = frames_for(format, clip)
    silent = write(tmp_path, format, sent).read_bytes()
    assert write(tmp_path, format, sent, audio=sweep(2, 24000, 9 / 24)).read_bytes() == silent


def test_a_frame_through_h264(clip: Frames) -> None:
    seen = media.through_h264(clip[0, :63, :95], 33)
    assert seen.shape == (62, 94, 3)
    loss = np.abs(seen.astype(int) - clip[0, :62, :94]).mean()
    assert 0.5 < loss < 12
    assert np.abs(media.through_h264(clip[0], 10).astype(int) - clip[0]).mean() < loss


@pytest.mark.parametrize("quality", [0, 50, 100])
def test_mp4_plays_in_browsers(quality: int, clip: Frames, tmp_path: Path) -> None:
    path = write(tmp_path, "mp4", clip, quality=quality)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # +faststart
    assert b"colrnclx\0\1\0\1\0\1\0" in data
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.profile) == ("h264", "High")  # not the lossless profile


def test_x264_preset_is_obeyed(clip: Frames, tmp_path: Path) -> None:
    assert (
        write(tmp_path, "mp4", clip, x264_preset="ultrafast").read_bytes() != write(tmp_path, "mp4", clip).read_bytes()
    )
    assert write(tmp_path, "mp4", clip, x264_preset="fast").read_bytes() == write(tmp_path, "mp4", clip).read_bytes()


@pytest.mark.parametrize("format", ALL)
def test_a_colon_makes_no_url(format: str, clip: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("http:").mkdir()
    path = write(Path("http:"), format, clip[:1])
    assert media_files.decode(path)[0].shape[0] == 1


@pytest.mark.parametrize("fps", [1, 7, 16, 24, 30, 50])
def test_gif_keeps_its_length(fps: int, clip: Frames, tmp_path: Path) -> None:
    with Image.open(write(tmp_path, "gif", clip[:, :24, :32], fps=fps)) as image:
        delays = []
        for i in range(len(clip)):
            image.seek(i)
            delays.append(image.info["duration"])
        with pytest.raises(EOFError):
            image.seek(len(clip))  # equal neighbours stay two frames, and no more are there
    assert sum(delays) == pytest.approx(1000 * len(clip) / fps, abs=10)
    assert max(delays) - min(delays) <= 10


@pytest.mark.parametrize("fps", [1, 16, 24, 60])
@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_video_keeps_its_rate(format: str, fps: int, clip: Frames, tmp_path: Path) -> None:
    frames, rate = media_files.decode(write(tmp_path, format, clip, fps=fps))
    assert (len(frames), rate) == (9, fps)


@pytest.mark.parametrize("format", ALL)
def test_odd_sizes(format: str, clip: Frames, tmp_path: Path) -> None:
    odd = frames_for(format, clip)[:, :33, :35]
    if media.FORMATS[format].side_multiple == 1:
        assert media_files.decode(write(tmp_path, format, odd))[0].shape == odd.shape
        return
    with pytest.raises(BadRequest, match=r"^height: 33: a \w+ needs an even size; nearest: 32 and 34$"):
        write(tmp_path, format, odd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("png", {"frames": 2}, "num_frames: 2 frames do not fit in one png"),
        ("webp", {"width": 16384}, "width: 16384: a webp holds at most 16383 pixels a side"),
        ("gif", {"fps": 51}, "fps: 51: a gif shows at most 50 frames per second"),
        ("mp4", {"width": 1}, "nearest: 2$"),
        ("jpg", {"metadata": {"prompt": "x" * 65000}}, "prompt: too long for the metadata of a jpg"),
    ],
)
def test_what_a_format_cannot_hold_is_told_before_encoding(format: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"width": 64, "height": 64, "frames": 1, "fps": 24, "metadata": {}}
    changed = given | change
    media.check_encodable(format, OutputSpec(64, 64, 1, 24))
    with pytest.raises(BadRequest, match=message) as caught:
        media.check_encodable(format, OutputSpec(*list(changed.values())[:4]), changed["metadata"])
    assert caught.value.param == message.split(":")[0] or caught.value.param in change


@pytest.mark.parametrize(
    ("format", "word", "number", "quality"),
    [
        ("mp4", "default", None, 50),
        ("png", "default", None, 75),
        ("jpg", "low", None, 35),
        ("gif", "maximum", 3, 3),
    ],
)
def test_file_quality(format: str, word: str, number: int | None, quality: int) -> None:
    assert media.file_quality(format, word, number) == quality


def test_described_parameters_make_the_request_again() -> None:
    params = SamplingParams(prompt="a fox", seed=7, guidance_scale=4.5, output_compression=0)
    stored = media.describe(params, "some/model")
    assert (stored.pop("model"), stored.pop("sgld")) == ("some/model", __version__)
    assert structure(stored, SamplingParams) == params


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses to write files past `limit` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ALL)
def test_a_failed_write_is_never_silent(format: str, clip: Frames, tmp_path: Path) -> None:
    small = frames_for(format, clip)[:, :48, :64]
    whole = write(tmp_path, format, small).stat().st_size
    slack = 200  # x264's bits differ a little from run to run on a busy machine
    for limit in {1, whole // 2, whole - 700, whole - slack}:
        with file_size_limit(limit), pytest.raises(OSError, match="File too large"):
            write(tmp_path, format, small)
    with file_size_limit(whole + slack):  # control: what fits is written
        write(tmp_path, format, small)


def test_a_file_says_which_settings_made_it() -> None:
    given = {
        "revision": "v1", "component_paths": {"vae": "x"}, "precision": "bf16", "text_encoder_precisions": ["fp32"],
        "vae_tiling": True, "vae_config": {"tile_sample_min_height": 64},
    }  # fmt: skip
    plain = media.describe(SamplingParams(), "m", settings_of({"port": 1, "vae_config": {"load_encoder": False}}))
    told = media.describe(SamplingParams(), "m", settings_of(given))
    assert plain == media.describe(SamplingParams(), "m")
    assert {name: value for name, value in told.items() if name not in plain} == given
