"""Encode frames as mp4, webm, gif, png, jpg, webp or raw npy.

Encoding blocks: call it in a thread. A file carries its parameters as one JSON text and no time stamps, so equal
input gives equal bytes.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

import attrs
import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sgld import __version__
from sgld.convert import fields_of, knob_of
from sgld.errors import BadRequest, OutputError
from sgld.messages import Audio, Frames
from sgld.params import DEBUG, LoraUse, OutputSpec, SamplingParams
from sgld.settings import Settings

VIDEO, IMAGE, RAW = "video", "image", "raw"
Codec = tuple[str, dict[str, str]]  # name and options


@attrs.frozen
class Format:
    """The limits of a file format."""

    media_type: str
    kind: str  # video, image or raw
    max_side: int = 65535  # pixels
    side_multiple: int = 1  # 4:2:0 video stores colour at half the size
    max_fps: int | None = None
    max_metadata: int | None = None  # bytes
    sound: str | None = None  # codec; None: it holds no sound


FORMATS = {
    "mp4": Format("video/mp4", VIDEO, max_side=16384, side_multiple=2, sound="aac"),
    "webm": Format("video/webm", VIDEO, side_multiple=2, sound="libopus"),
    "gif": Format("image/gif", VIDEO, max_fps=50),
    "png": Format("image/png", IMAGE),
    "jpg": Format("image/jpeg", IMAGE, max_side=65500, max_metadata=65000),
    "jpeg": Format("image/jpeg", IMAGE, max_side=65500, max_metadata=65000),
    "webp": Format("image/webp", IMAGE, max_side=16383),
    "npy": Format("application/octet-stream", RAW),
}
QUALITIES = {"maximum": 100, "high": 90, "medium": 55, "low": 35}
LOSSLESS = ("png", "gif", "npy")  # no quality to choose
DEFAULT_QUALITY = {VIDEO: 50, IMAGE: 75, RAW: 100}

_BT709 = 1  # matrix, primaries and transfer of ITU-T H.273
_EXIF, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_LAYOUTS = {1: "mono", 2: "stereo"}  # by number of channels
_SOUND_BITS, _SOUND_RATE = 96_000, 48_000  # bits a second and channel; samples a second for an unsupported rate
_GIF_SAMPLE = 1 << 18  # pixels that choose a gif's palette
_SETTINGS = (
    "revision", "component_paths", "precision", "dit_precision", "vae_precision", "text_encoder_precisions",
    "vae_tiling", "lora_nickname", "lora_scale", "lora_target",
)  # fmt: skip
_TILES = ("use_tiling", *(f"tile_sample_{what}_{side}" for what in ("min", "stride") for side in ("height", "width")))


def format_of(file_name: str) -> str | None:
    """Return the format of a file name by its extension; None if it is not one of `FORMATS`."""
    suffix = PurePath(file_name).suffix[1:].lower()
    return suffix if suffix in FORMATS else None


def is_image(format: str) -> bool:
    """Return whether the format holds exactly one frame."""
    return FORMATS[format].kind == IMAGE


def file_quality(format: str, output_quality: str = "default", output_compression: int | None = None) -> int:
    """Return the quality, 0 to 100, from the two knobs. The number wins over the word."""
    if output_compression is not None:
        return output_compression
    return QUALITIES.get(output_quality, DEFAULT_QUALITY[FORMATS[format].kind])


def describe(params: SamplingParams, model: str, settings: Settings | None = None) -> dict[str, Any]:
    """Return the metadata of a file: the version of sgld, the model, and every knob under its own name.

    Settings are included if they change pixels and differ from their defaults. Input files appear by name, without
    their folders.
    """
    knobs = {name: knob_of(field) for name, field in fields_of(SamplingParams).items()}
    values = attrs.asdict(params)
    values = {name: values[name] for name, knob in knobs.items() if not (knob.pending or knob.group == DEBUG)}
    values["image_path"] = [Path(path).name for path in params.image_path] if params.image_path else None
    values["mask_path"] = Path(params.mask_path).name if params.mask_path else None
    values["loras"] = [_describe_adapter(lora) for lora in params.loras] or None
    made_by = _describe_settings(settings) if settings else {}
    return {"sgld": __version__, "model": model, **made_by, **{name: v for name, v in values.items() if v is not None}}


def _describe_adapter(lora: LoraUse) -> dict[str, Any]:
    name = lora.nickname or Path(lora.path or "").name
    return {"nickname": name, "strength": lora.strength, "target": lora.target}


def _describe_settings(settings: Settings) -> dict[str, Any]:
    tiles = {name: value for name in _TILES if (value := getattr(settings.memory.vae_config, name)) is not None}
    adapters = [Path(path).name for path in settings.lora.lora_path or []]
    values = {name: settings.get(name) for name in _SETTINGS} | {"vae_config": tiles, "lora_path": adapters}
    values["backend"] = settings.model.backend if settings.model.backend == "diffusers" else None
    return {name: value for name, value in values.items() if value or value is False}


def check_encodable(format: str, output: OutputSpec, metadata: Mapping[str, object] | None = None) -> None:
    """Refuse an output that the format cannot hold. Cheap: call it before denoising. Raises BadRequest."""
    spec = FORMATS[format]
    if spec.kind == IMAGE and output.frames != 1:
        raise BadRequest(
            f"{output.frames} frames do not fit in one {format}; give 1, or a video format",
            field="num_frames",
        )
    for field, side in (("height", output.height), ("width", output.width)):
        _check_side(format, field, side)
    if spec.max_fps and output.fps > spec.max_fps:
        raise BadRequest(
            f"{output.fps}: a {format} shows at most {spec.max_fps} frames per second; choose mp4 or webm",
            field="fps",
        )
    if spec.max_metadata and len(_ascii_json(metadata or {})) > spec.max_metadata:
        raise BadRequest(
            f"too long for the metadata of a {format} ({spec.max_metadata} bytes); choose png or webp",
            field="prompt",
        )


def _check_side(format: str, field: str, side: int) -> None:
    spec = FORMATS[format]
    if side > spec.max_side:
        raise BadRequest(f"{side}: a {format} holds at most {spec.max_side} pixels a side", field=field)
    if side % spec.side_multiple:
        nearest = " and ".join(str(even) for even in (side - 1, side + 1) if even)
        raise BadRequest(f"{side}: a {format} needs an even size; nearest: {nearest}", field=field)


def encode(
    path: Path,
    format: str,
    frames: Frames,
    *,
    fps: int,
    quality: int,
    metadata: Mapping[str, object],
    x264_preset: str | None = None,
    audio: Audio | None = None,
) -> None:
    """Write frames [N, H, W, 3] to `path` as `format`, with `audio` if the format holds sound.

    `quality` is 0 to 100: the constant rate factor of mp4 and webm, the quality of jpg and webp. png, gif and npy have
    none. A gif counts time in 1/100 s. At 24 frames per second its delays are 4 or 5 of them, so the whole keeps its
    length to 1/100 s. npy is the array alone and carries no metadata.

    Raises:
        BadRequest: the format cannot hold the output.
        OSError: the system cannot write.
    """
    n, height, width, _ = frames.shape
    check_encodable(format, OutputSpec(width, height, n, fps), metadata)
    if format == "npy":
        _write_npy(path, frames)
    elif is_image(format):
        path.write_bytes(encode_image(frames[0], format, quality=quality, metadata=metadata))
    elif format == "gif":
        _write_gif(path, frames, fps, metadata)
    else:
        codec = _video_codec(format, quality, x264_preset)
        _write_video(path, format, codec, map(_to_yuv, frames), (width, height), fps, metadata, audio)


def encode_image(frame: Frames, format: str, *, quality: int, metadata: Mapping[str, object]) -> bytes:
    """Encode one frame [H, W, 3] as png, jpg or webp."""
    options: dict[str, Any] = {"quality": quality, "exif": _exif(metadata)}
    if format == "png":
        info = PngInfo()
        info.add_text("Comment", _json(metadata))
        options = {"pnginfo": info}
    elif format != "webp" and quality >= QUALITIES["high"]:
        options["subsampling"] = 0  # 4:4:4: colour at full size
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg" if format == "jpg" else format, **options)
    return file.getvalue()


def through_h264(frame: Frames, rate_factor: int) -> Frames:
    """Compress and decompress one frame [H, W, 3] with H.264. An odd row or column is cut."""
    height, width = (side // 2 * 2 for side in frame.shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(rate_factor), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), "rgb24")
        container.mux([*stream.encode(picture.reformat(format="yuv420p")), *stream.encode(None)])
    file.seek(0)
    with av.open(file) as container:
        seen: Frames = next(container.decode(video=0)).to_ndarray(format="rgb24")
        return seen


def _write_npy(path: Path, frames: Frames) -> None:
    frames = np.ascontiguousarray(frames)
    with path.open("wb") as file:  # np.save would hide why a write failed
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(frames))
        file.write(frames.data)


def _video_codec(format: str, quality: int, x264_preset: str | None) -> Codec:
    """Return the codec and its options. Quality 100 .. 0 is the constant rate factor 1 .. 51 (VP9: 0 .. 63)."""
    if format == "webm":
        speed = {"deadline": "good", "cpu-used": "4", "row-mt": "1"}
        return "libvpx-vp9", {"crf": str(int((1 - quality / 100) * 63)), "b": "0", **speed}
    crf = max(1, int((1 - quality / 100) * 51))  # 0 would be a lossless profile that browsers do not play
    return "libx264", {"crf": str(crf), "preset": x264_preset or "fast"}


def _to_yuv(frame: Frames) -> av.VideoFrame:
    """Convert full-range RGB to limited-range BT.709 4:2:0."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").reformat(
        format="yuv420p",
        interpolation=_ACCURATE,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
    )


def _write_video(
    path: Path,
    format: str,
    codec: Codec,
    pictures: Iterable[av.VideoFrame],
    size: tuple[int, int],
    fps: int,
    metadata: Mapping[str, object],
    audio: Audio | None = None,
) -> None:
    """Mux pictures and sound, each picture followed by its sound."""
    muxer = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if format == "mp4" else {})
    with _map_ffmpeg_errors(format), av.open(_absolute(path), "w", format=format, options=muxer) as container:
        container.metadata["comment"] = _json(metadata)
        stream = container.add_stream(codec[0], rate=fps, options=codec[1])
        stream.width, stream.height = size
        if format == "gif":
            stream.pix_fmt = "pal8"
        else:
            stream.pix_fmt = "yuv420p"
            stream.colorspace = stream.color_primaries = stream.color_trc = _BT709
            stream.color_range = ColorRange.MPEG
        sound = FORMATS[format].sound
        track = _Track.of(container, sound, audio) if audio is not None and sound is not None else None
        for i, picture in enumerate(pictures):
            picture.pts, picture.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(picture))
            if track is not None:
                container.mux(track.until(Fraction(i + 1, fps)))
        container.mux(stream.encode(None))
        if track is not None:
            container.mux(track.rest())


@attrs.define
class _Track:
    """The sound of a file under construction."""

    stream: av.AudioStream
    audio: Audio
    done: int = 0  # samples

    @classmethod
    def of(cls, container: av.container.OutputContainer, codec: str, audio: Audio) -> _Track:
        """Add a stream with the rate of the sound, or 48 kHz if the codec does not support that rate."""
        known = av.Codec(codec, "w").audio_rates
        stream = container.add_stream(codec, rate=audio.rate if known and audio.rate in known else _SOUND_RATE)
        stream.layout = _LAYOUTS[len(audio.samples)]
        stream.bit_rate = _SOUND_BITS * len(audio.samples)
        return cls(stream, audio)

    def until(self, time: Fraction) -> list[av.Packet]:
        """Encode the sound up to `time`, in seconds, and return its packets."""
        end = min(round(time * self.audio.rate), self.audio.samples.shape[1])
        if end <= self.done:
            return []
        part = np.ascontiguousarray(self.audio.samples[:, self.done : end], np.float32)
        frame = av.AudioFrame.from_ndarray(part, "fltp", self.stream.layout.name)
        frame.rate, frame.pts, frame.time_base = self.audio.rate, self.done, Fraction(1, self.audio.rate)
        self.done = end
        return list(self.stream.encode(frame))

    def rest(self) -> list[av.Packet]:
        """Encode the rest of the sound and return its packets."""
        return [*self.until(Fraction(self.audio.samples.shape[1], self.audio.rate)), *self.stream.encode(None)]


def _write_gif(path: Path, frames: Frames, fps: int, metadata: Mapping[str, object]) -> None:
    """Encode all frames with one palette, so that still areas do not flicker."""
    _, height, width, _ = frames.shape
    palette = _palette(frames)
    colours = np.full((256, 4), 255, np.uint8)  # ARGB
    chosen = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(chosen), 1:] = chosen
    indexed = (np.asarray(Image.fromarray(frame).quantize(palette=palette)) for frame in frames)
    pictures = (av.VideoFrame.from_ndarray((index, colours), "pal8") for index in indexed)
    _write_video(path, "gif", ("gif", {}), pictures, (width, height), fps, metadata)
    _add_gif_comment(path, _ascii_json(metadata))


def _palette(frames: Frames) -> Image.Image:
    """Choose 256 colours from an even sample of all frames."""
    n, height, width, _ = frames.shape
    step = max(1, round((n * height * width / _GIF_SAMPLE) ** (1 / 3)))
    sample = frames[::step, ::step, ::step]
    mosaic = np.ascontiguousarray(sample.reshape(-1, sample.shape[2], 3))
    return Image.fromarray(mosaic).quantize(256, Image.Quantize.MEDIANCUT)


def _add_gif_comment(path: Path, text: bytes) -> None:
    """Insert a comment extension behind the global palette (GIF89a, section 24). FFmpeg writes none."""
    data = path.read_bytes()
    flags = data[10]
    start = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = [text[i : i + 255] for i in range(0, len(text), 255)]
    comment = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    path.write_bytes(data[:start] + comment + data[start:])


def _absolute(path: Path) -> str:
    """Return an absolute path, because FFmpeg takes "a:b/c.mp4" for a URL."""
    return str(path.absolute())


@contextmanager
def _map_ffmpeg_errors(format: str) -> Iterator[None]:
    """Raise errors of FFmpeg as OSError if the system failed, as OutputError if the encoder did."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in errno.errorcode:
            raise OSError(error.errno, os.strerror(error.errno)) from error
        raise OutputError(f"cannot encode {format}: {error}") from error


def _json(metadata: Mapping[str, object]) -> str:
    """Return readable JSON. Text with a lone surrogate is escaped."""
    text = json.dumps(dict(metadata), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(dict(metadata))
    return text


def _ascii_json(metadata: Mapping[str, object]) -> bytes:
    return json.dumps(dict(metadata)).encode("ascii")


def _exif(metadata: Mapping[str, object]) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = _ASCII + _ascii_json(metadata)
    return exif
