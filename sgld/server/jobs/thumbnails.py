"""Make small pictures from a video: its first frame, or a sheet of frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image

THUMBNAIL_SIDE = 480
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 5, 4, 256
DAMAGED = (av.FFmpegError, LookupError, ValueError)  # LookupError: the file has no video stream


def make_thumbnail(video: Path, frames: int, variant: str) -> bytes:
    """Return a webp made from a video of that many frames. Blocks.

    A thumbnail is the first frame, at most 480 pixels a side. A spritesheet holds up to 20 frames, evenly spread and
    in reading order. Raises one of `DAMAGED` for a file that cannot be decoded.
    """
    if variant == "thumbnail":
        return _sheet(video, frames, 1, THUMBNAIL_SIDE)
    return _sheet(video, frames, min(frames, SHEET_COLUMNS * SHEET_ROWS), SHEET_SIDE)


def _sheet(video: Path, frames: int, count: int, side: int) -> bytes:
    wanted = [i * (frames - 1) // max(1, count - 1) for i in range(count)]
    tiles = list(read_tiles(video, wanted, side))
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * min(count, SHEET_COLUMNS), height * -(-count // SHEET_COLUMNS)))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % SHEET_COLUMNS * width, i // SHEET_COLUMNS * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "webp", quality=85)
    return buffer.getvalue()


def read_tiles(video: Path, wanted: list[int], side: int) -> Iterator[Image.Image]:
    """Yield these frames scaled down. Decoding stops behind the last of them, and holds one frame at a time."""
    with av.open(str(video.absolute())) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                tile = Image.fromarray(frame.to_ndarray(format="rgb24"))
                tile.thumbnail((side, side))
                yield tile
            if number == wanted[-1]:
                return
    raise ValueError(f"frame {wanted[-1]} is missing")
