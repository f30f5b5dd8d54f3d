"""JobRun: one run of one job with the workers, with its files and previews."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import anyio.to_thread

from sgld import media
from sgld.engine.engine import Engine
from sgld.errors import INTERNAL, SgldError
from sgld.messages import Event, Media, Note, OutputReady, Preview, Progress, Timings
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import Artifact
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.scheduler import Scheduler
from sgld.server.jobs.tasks import Tasks

log = logging.getLogger(__name__)
SAVING = 2  # outputs that are written at once


class JobMetrics(Protocol):
    """The counters of jobs."""

    def job_finished(self, kind: str) -> None: ...

    def job_cancelled(self, kind: str) -> None: ...

    def job_failed(self, kind: str, code: str) -> None: ...

    def stages(self, timings: Timings) -> None: ...

    def saved(self, destination: str, seconds: float) -> None: ...


class RunResources:
    """What all runs share."""

    def __init__(self, engine: Engine, outputs: Outputs, scheduler: Scheduler, metrics: JobMetrics, tasks: Tasks):
        self.engine, self.outputs, self.scheduler = engine, outputs, scheduler
        self.metrics, self.tasks = metrics, tasks
        self.saving = asyncio.Semaphore(SAVING)


class JobRun:
    """Generates the outputs of a job, saves them and publishes progress and previews."""

    def __init__(self, runner: RunResources, job: Job, on_begin: Callable[[Job], None]):
        self.job = job
        self._shared = runner
        self._on_begin = on_begin
        self._saves: list[asyncio.Task[Artifact]] = []
        self._previews: list[asyncio.Task[None]] = []

    async def generate(self) -> None:
        """Make all outputs with the workers. Files may still be written afterwards. Raises what the engine raises."""
        shared, record = self._shared, self.job.record
        async with shared.engine.steady():  # all outputs are made with the same adapters
            async with shared.saving:  # no more outputs while those of earlier jobs wait for the disk
                started = time.monotonic()
            await shared.engine.generate(record.id, record.outputs, self.on_event, record.previews)
        shared.scheduler.throughput.learn(record.cost, time.monotonic() - started)

    async def collect(self) -> tuple[Artifact, ...]:
        """Wait for the files and previews. Raises the first error of a file."""
        try:
            artifacts = await asyncio.gather(*self._saves)
            await asyncio.gather(*self._previews)
        except SgldError:
            raise
        except Exception:
            log.exception("failed")
            raise SgldError(INTERNAL) from None
        return tuple(artifacts)

    async def discard(self) -> None:
        """Delete the files of a job that came to nothing."""
        if self._saves:
            await asyncio.wait(self._saves)
        await self._shared.outputs.store.delete(self.job.record.file_names)

    def on_event(self, event: Event) -> None:
        """Take in an event of the workers, on the loop."""
        job, shared = self.job, self._shared
        if job.runtime.decided:
            return
        if job.status == "queued":
            self._on_begin(job)
        if isinstance(event, OutputReady):
            shared.metrics.stages(event.media.timings)
            tokens = event.media.tokens  # one prompt for all outputs
            job.update(prompt_tokens=tokens.prompt, output_tokens=job.record.output_tokens + tokens.latent)
            self._saves.append(shared.tasks.spawn(self._save(event.item, event.media)))
            self._saves[-1].add_done_callback(self._stop_after_failed_save)
        elif isinstance(event, Note):
            if event.text not in job.record.notes:  # each output brings it
                job.update(notes=(*job.record.notes, event.text))
        elif isinstance(event, Preview):
            self._previews.append(shared.tasks.spawn(self._publish_preview(event, self._previews[-1:])))
        elif isinstance(event, Progress) and event.stage in job.record.spec.stages:
            job.record = job.record.advance(event)
            job.events.publish("progress", shared.scheduler.state(job))

    async def _save(self, index: int, result: Media) -> Artifact:
        async with self._shared.saving:
            began, record = time.monotonic(), self.job.record
            name, params = record.file_names[index], record.outputs[index]
            artifact = await self._shared.outputs.save(params, result, name, record.output_format)
            self._shared.metrics.saved("local", time.monotonic() - began)
            return artifact

    def _stop_after_failed_save(self, save: asyncio.Task[Artifact]) -> None:
        if not save.cancelled() and save.exception() is not None and self.job.runtime.task is not None:
            self.job.runtime.task.cancel()

    async def _publish_preview(self, preview: Preview, before: list[asyncio.Task[None]]) -> None:
        """Publish a preview in the format of the job (a video's as webp), after the earlier previews."""
        job = self.job
        format = job.record.output_format if job.kind == "image" else "webp"
        params = job.record.params
        quality = media.file_quality(format, params.output_quality, params.output_compression)
        try:
            picture = await anyio.to_thread.run_sync(_encode, preview.frames.array[0], format, quality)
        except SgldError as error:  # the job does not fail for it
            log.warning("preview %d is lost: %s", preview.index, error)
            return
        if before:
            await asyncio.wait(before)
        if not job.ended:
            own = {"index": preview.index, "output": preview.item, "format": format, "b64_json": picture}
            job.events.publish("preview", {**self._shared.scheduler.state(job), **own})


def _encode(frame: Any, format: str, quality: int) -> str:
    return base64.b64encode(media.encode_image(frame, format, quality=quality, metadata={})).decode()
