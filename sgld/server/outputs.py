"""Results as files: written while the next job already runs, and small pictures made from them on demand."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

import anyio.to_thread
import attrs
from PIL import Image

from sgld import media
from sgld.errors import NotFound
from sgld.messages import Media
from sgld.params import SamplingParams
from sgld.server.jobs import Artifact
from sgld.storage.local import LocalStorage

log = logging.getLogger(__name__)
THUMBNAIL_SIDE = 480
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 5, 4, 256


@attrs.frozen
class Outputs:
    """The folder of the results. Everything that touches the disk runs in a thread."""

    root: Path
    model: str

    async def save(self, params: SamplingParams, result: Media, name: str, format: str) -> Artifact:
        """Encode one output into `name`, whole or not at all. Raises OutputError."""
        return await anyio.to_thread.run_sync(self._save, params, result, name, format)

    def _save(self, params: SamplingParams, result: Media, name: str, format: str) -> Artifact:
        storage = LocalStorage(self.root)
        with storage.create(name, overwrite=True) as part:  # the name is ours: a second attempt replaces the first's
            media.encode(
                part,
                format,
                result.frames.array,
                fps=result.fps,
                quality=media.file_quality(format, params.output_quality, params.output_compression),
                metadata=media.describe(params, self.model),
                x264_preset=params.x264_preset,
            )
            size = part.stat().st_size
        return Artifact(name, media.FORMATS[format].media_type, size, result.seed, len(result.frames.array))

    async def read(self, artifact: Artifact) -> bytes:
        """The file's bytes. Raises NotFound where it has been removed."""
        try:
            return await anyio.to_thread.run_sync((self.root / artifact.name).read_bytes)
        except FileNotFoundError:
            raise NotFound(f"{artifact.name}: the file has been removed", "id") from None

    async def make_private(self) -> None:
        """Make the folder, for this user's eyes alone."""
        await anyio.to_thread.run_sync(lambda: self.root.mkdir(mode=0o700))

    async def clear(self) -> None:
        """Remove the folder and everything in it; what cannot be removed is logged."""
        await anyio.to_thread.run_sync(self._clear)

    def _clear(self) -> None:
        try:
            shutil.rmtree(self.root)
        except OSError as error:
            log.error("cannot remove %s: %s", self.root, error.strerror)

    async def remove(self, names: list[str]) -> None:
        """Remove files; those that have gone already are no error, and one that cannot be removed is logged."""
        await anyio.to_thread.run_sync(self._remove, names)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            try:
                (self.root / name).unlink(missing_ok=True)
            except OSError as error:
                log.error("cannot remove %s: %s", self.root / name, error.strerror)

    async def thumbnail(self, artifact: Artifact) -> bytes:
        """The first frame as webp, at most 480 pixels a side."""
        return await anyio.to_thread.run_sync(self._picture, artifact, False)

    async def spritesheet(self, artifact: Artifact) -> bytes:
        """Up to 20 frames, evenly spread and in reading order, as one webp."""
        return await anyio.to_thread.run_sync(self._picture, artifact, True)

    def _picture(self, artifact: Artifact, sheet: bool) -> bytes:
        path = self.root / artifact.name
        if not path.is_file():
            raise NotFound(f"{artifact.name}: the file has been removed", "id")
        frames, _ = media.decode(path)
        if not sheet:
            picture = Image.fromarray(frames[0])
            picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            return _webp(picture)
        count = min(len(frames), SHEET_COLUMNS * SHEET_ROWS)
        chosen = [frames[i * (len(frames) - 1) // max(1, count - 1)] for i in range(count)]
        tiles = [Image.fromarray(frame) for frame in chosen]
        for tile in tiles:
            tile.thumbnail((SHEET_SIDE, SHEET_SIDE))
        width, height = tiles[0].size
        rows = -(-count // SHEET_COLUMNS)
        whole = Image.new("RGB", (width * min(count, SHEET_COLUMNS), height * rows))
        for i, tile in enumerate(tiles):
            whole.paste(tile, (i % SHEET_COLUMNS * width, i // SHEET_COLUMNS * height))
        return _webp(whole)


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=85)
    return buffer.getvalue()
