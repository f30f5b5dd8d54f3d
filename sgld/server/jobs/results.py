"""Encode outputs, store them, and make thumbnails of videos on demand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs

from sgld import media
from sgld.errors import OutputError
from sgld.messages import Media
from sgld.params import OutputParams, SamplingParams
from sgld.server.jobs.record import Artifact, picture_name
from sgld.server.jobs.thumbnails import DAMAGED, make_thumbnail
from sgld.settings import Settings
from sgld.storage.result_store import ResultStore

log = logging.getLogger(__name__)
_DECODERS = anyio.CapacityLimiter(2)


@attrs.define
class Outputs:
    """The results of jobs. Encoding and the store run in threads."""

    store: ResultStore
    model: str
    settings: Settings
    _readers: Counter[str] = attrs.field(factory=Counter, init=False)  # of the bytes of images, by file name
    _images: dict[str, bytes] = attrs.field(factory=dict, init=False)

    def describe(self, params: SamplingParams) -> dict[str, Any]:
        """Return the metadata of a file. Replaced components appear by the names of their folders alone."""
        folders = {name: Path(folder).name for name, folder in self.settings.model.component_paths.items()}
        return media.describe(params, self.model, self.settings.evolve(component_paths=folders))

    async def save(self, params: OutputParams, result: Media, name: str, format: str) -> Artifact:
        """Encode one output and store it as `name`. Raises OutputError; the log has the reason."""
        frames, metadata = result.frames.array, self.describe(params)
        quality = media.file_quality(format, params.output_quality, params.output_compression)
        write: Callable[[Path], object] = partial(
            media.encode, format=format, frames=frames, fps=result.fps, quality=quality, metadata=metadata,
            x264_preset=params.x264_preset, audio=result.audio,
        )  # fmt: skip
        try:
            if media.is_image(format):
                encode = partial(media.encode_image, frames[0], format, quality=quality, metadata=metadata)
                data = await anyio.to_thread.run_sync(encode)
                write = partial(Path.write_bytes, data=data)
                if self._readers[name]:
                    self._images[name] = data
            size = await self.store.put(name, write)
        except OutputError as error:
            log.error("a result is lost: %s", error)
            raise OutputError("the result cannot be stored; the server's log has the reason") from None
        return Artifact(name, media.FORMATS[format].media_type, size, result.seed, len(frames))

    @contextmanager
    def retain(self, names: Sequence[str]) -> Iterator[None]:
        """Hold the bytes of these images in memory, from their encoding until the last such context ends."""
        self._readers.update(names)
        try:
            yield
        finally:
            self._readers.subtract(names)
            for name in [name for name in names if not self._readers[name]]:
                del self._readers[name]
                self._images.pop(name, None)

    async def read(self, artifact: Artifact) -> bytes:
        """Return the bytes of an image: from memory if they are retained, else from the store. Raises NotFound."""
        if (data := self._images.get(artifact.name)) is not None:
            return data
        async with self.store.open(artifact.name) as path:
            return await anyio.to_thread.run_sync(path.read_bytes)

    async def picture(self, artifact: Artifact, variant: str) -> str:
        """Return the name of a thumbnail or spritesheet, made if it is missing or older than its video.

        Raises:
            NotFound: the video has been removed.
            OutputError: the video is damaged, or the picture cannot be stored.
        """
        name = picture_name(artifact.name, variant)
        if not await self.store.exists([name], newer_than=artifact.name):
            async with _DECODERS:
                if not await self.store.exists([name], newer_than=artifact.name):  # another request has made it
                    await self._make_picture(name, artifact, variant)
        return name

    async def _make_picture(self, name: str, artifact: Artifact, variant: str) -> None:
        async with self.store.open(artifact.name) as video:
            try:
                data = await anyio.to_thread.run_sync(make_thumbnail, video, artifact.frames, variant)
            except FileNotFoundError:  # FFmpeg's is one of DAMAGED
                raise
            except DAMAGED as error:
                log.error("cannot read %s: %s", video, error)
                raise OutputError(f"{artifact.name}: the file is damaged; the server's log has the reason") from None
        await self.store.put(name, partial(Path.write_bytes, data=data))
