"""Results as files: written while the next job already runs, and small pictures made from them on demand, once."""

from __future__ import annotations

import io
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import av
from PIL import Image

from sgld import media
from sgld.errors import NotFound, OutputError
from sgld.messages import Media
from sgld.params import SamplingParams
from sgld.server.jobs.job import Artifact, picture_name
from sgld.settings import Settings
from sgld.storage.local import PARTS, LocalStorage

log = logging.getLogger(__name__)
THUMBNAIL_SIDE = 480
ABANDONED_S = 3600.0
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 5, 4, 256
_DECODERS = anyio.CapacityLimiter(2)
_DAMAGED = (av.FFmpegError, LookupError, ValueError)  # LookupError: no video in it


@attrs.frozen
class Outputs:
    """The folder of the results. Everything that touches the disk runs in a thread."""

    root: Path
    model: str
    settings: Settings

    def describe(self, params: SamplingParams) -> dict[str, Any]:
        """What a file says of its making; of components put in the place of others, the folders' names alone."""
        folders = {name: Path(folder).name for name, folder in self.settings.model.component_paths.items()}
        return media.describe(params, self.model, self.settings.evolve(component_paths=folders))

    async def save(self, params: SamplingParams, result: Media, name: str, format: str) -> Artifact:
        """Encode one output into `name`, whole or not at all. Raises OutputError, whose reason is in the log."""
        try:
            return await anyio.to_thread.run_sync(self._save, params, result, name, format)
        except OutputError as error:
            log.error("a result is lost: %s", error)
            raise OutputError("the result cannot be stored; the server's log has the reason") from None

    def _save(self, params: SamplingParams, result: Media, name: str, format: str) -> Artifact:
        storage = LocalStorage(self.root)
        with storage.create(name, overwrite=True) as part:  # the name is ours: a second attempt replaces the first's
            media.encode(
                part,
                format,
                result.frames.array,
                fps=result.fps,
                quality=media.file_quality(format, params.output_quality, params.output_compression),
                metadata=self.describe(params),
                x264_preset=params.x264_preset,
                audio=result.audio,
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

    async def sweep(self) -> None:
        """Remove what a killed server was writing: unfinished files that nobody has written to for an hour."""
        await anyio.to_thread.run_sync(self._sweep)

    def _sweep(self) -> None:
        for part in self.root.glob(PARTS):
            with suppress(FileNotFoundError):  # another program has finished it
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink()

    async def keeps(self, artifacts: Iterable[Artifact]) -> bool:
        """Whether all these files are still there."""
        paths = [self.root / artifact.name for artifact in artifacts]
        return await anyio.to_thread.run_sync(lambda: all(path.is_file() for path in paths))

    async def picture(self, artifact: Artifact, variant: str) -> str:
        """The name of a webp beside a video: made when it is first asked for, and when the video has changed since.

        A thumbnail is the first frame, at most 480 pixels a side; a spritesheet up to 20 frames, evenly spread and in
        reading order. Raises NotFound, OutputError.
        """
        name = picture_name(artifact.name, variant)
        if not await anyio.to_thread.run_sync(self._fresh, name, artifact):
            await anyio.to_thread.run_sync(self._keep_picture, name, artifact, variant, limiter=_DECODERS)
        return name

    def _fresh(self, name: str, artifact: Artifact) -> bool:
        try:
            return (self.root / name).stat().st_mtime_ns >= (self.root / artifact.name).stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def _keep_picture(self, name: str, artifact: Artifact, variant: str) -> None:
        if self._fresh(name, artifact):  # who waited for the same one finds it
            return
        sheet = min(artifact.frames, SHEET_COLUMNS * SHEET_ROWS), SHEET_SIDE
        data = self._picture(artifact, *((1, THUMBNAIL_SIDE) if variant == "thumbnail" else sheet))
        with LocalStorage(self.root).create(name, overwrite=True) as part:
            part.write_bytes(data)

    def _picture(self, artifact: Artifact, count: int, side: int) -> bytes:
        """So many frames as tiles of one picture."""
        path = self.root / artifact.name
        wanted = [i * (artifact.frames - 1) // max(1, count - 1) for i in range(count)]
        try:
            tiles = list(_tiles(path, wanted, side))
        except FileNotFoundError:
            raise NotFound(f"{artifact.name}: the file has been removed", "id") from None
        except _DAMAGED as error:
            log.error("cannot read %s: %s", path, error)
            raise OutputError(f"{artifact.name}: the file is damaged; the server's log has the reason") from None
        width, height = tiles[0].size
        rows = -(-count // SHEET_COLUMNS)
        whole = Image.new("RGB", (width * min(count, SHEET_COLUMNS), height * rows))
        for i, tile in enumerate(tiles):
            whole.paste(tile, (i % SHEET_COLUMNS * width, i // SHEET_COLUMNS * height))
        return _webp(whole)


def _tiles(path: Path, wanted: list[int], side: int) -> Iterator[Image.Image]:
    """These frames of a video, made small; one at a time is held, and none is decoded behind the last of them.

    Raises ValueError where the video has fewer.
    """
    with av.open(str(path.absolute())) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                tile = Image.fromarray(frame.to_ndarray(format="rgb24"))
                tile.thumbnail((side, side))
                yield tile
            if number == wanted[-1]:
                return
    raise ValueError(f"frame {wanted[-1]} is missing")


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=85)
    return buffer.getvalue()
