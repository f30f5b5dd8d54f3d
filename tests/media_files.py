"""Read the files that sgld writes: frames, sound and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from sgld.messages import Audio, Frames

_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_EXIF, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_VIDEOS = (".mp4", ".webm")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata that `media.encode` stored; empty for npy and for files of other makers."""
    if path.suffix == ".npy":
        return {}
    try:
        stored = json.loads(_container_comment(path) if path.suffix in _VIDEOS else _image_comment(path))
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _container_comment(path: Path) -> str:
    with av.open(str(path.absolute())) as container:
        return {name.lower(): value for name, value in container.metadata.items()}.get("comment", "")


def _image_comment(path: Path) -> str:
    with Image.open(path) as image:
        comment = image.info.get("Comment") or image.info.get("comment")
        comment = comment or image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    return comment.removeprefix(_ASCII).decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)


def decode(path: Path) -> tuple[Frames, float]:
    """Return frames u8 [N, H, W, 3] and frames per second: of a gif the mean, of an image or npy 0."""
    if path.suffix == ".npy":
        return np.load(path), 0.0
    return _decode_video(path) if path.suffix in _VIDEOS else _decode_image(path)


def _decode_image(path: Path) -> tuple[Frames, float]:
    frames, milliseconds = [], 0
    with Image.open(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            milliseconds += image.info.get("duration", 0)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), 1000 * len(frames) / milliseconds if milliseconds else 0.0


def _decode_video(path: Path) -> tuple[Frames, float]:
    with av.open(str(path.absolute())) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24", interpolation=_ACCURATE) for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), float(stream.average_rate)


def decode_sound(path: Path) -> Audio | None:
    """Return the sound of a video; None if it is silent."""
    with av.open(str(path.absolute())) as container:
        if not container.streams.audio:
            return None
        parts = av.AudioResampler("fltp")
        frames = [part for frame in container.decode(audio=0) for part in parts.resample(frame)]
        return Audio(np.concatenate([frame.to_ndarray() for frame in frames], 1), frames[0].rate)
