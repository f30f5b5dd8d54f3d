"""JobStore: admits jobs, decides their order, drives the engine with them, and keeps what came of them."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread

from sgld import media
from sgld.config import Settings
from sgld.engine.engine import Engine
from sgld.errors import (
    BadRequest,
    Cancelled,
    ModelError,
    NotFound,
    NotReady,
    QueueFull,
    SgldError,
    WorkerDied,
)
from sgld.log import job_context
from sgld.messages import Event, Media, Note, OutputReady, Preview, Progress
from sgld.server.http.auth import Identity, may_see
from sgld.server.http.errors import INTERNAL
from sgld.server.http.metrics import Metrics
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.index import EVERYBODY, JobIndex
from sgld.server.jobs.job import Artifact, Job
from sgld.server.jobs.journal import Journal
from sgld.server.jobs.ledger import Ledger
from sgld.server.jobs.queue import FairQueue, QueuePosition, ThroughputEstimate
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.webhooks import Webhooks

log = logging.getLogger(__name__)
ATTEMPTS = 2  # runs of a job whose server was killed meanwhile
SAVING = 2  # outputs that are written at once
SWEEP_S = 30.0
AGED_S = 1.0


class JobStore:
    """All jobs of a server. One is made at a time; its files are written while the next one runs."""

    def __init__(
        self,
        engine: Engine,
        outputs: Outputs,
        kept: Path,
        settings: Settings,
        metrics: Metrics,
        webhooks: Webhooks,
    ):
        self.outputs, self.uploads = outputs, kept
        self.draining = False
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._webhooks = webhooks
        self._ledger = Ledger()
        self._jobs = JobIndex()
        self._repeats: dict[tuple[str, str], Job] = {}  # by owner and Idempotency-Key
        self._queue: FairQueue[Job] = FairQueue()
        self._admitting: dict[Job, asyncio.Event] = {}  # until they are in the journal
        self._running: Job | None = None
        self._line: tuple[float, dict[Job, QueuePosition]] | None = None  # when it was reckoned, and the queue in order
        self._pace = ThroughputEstimate()
        self._wake = asyncio.Event()
        self._saving = asyncio.Semaphore(SAVING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()  # those that make a job or write its files
        self._dispatcher: asyncio.Task[None] | None = None

    # Life

    async def open(self, journal: Journal | None) -> None:
        """Read the journal: what had not ended waits again, once more. None: there is no journal."""
        self._ledger = Ledger(journal)
        jobs = await self._ledger.restore()
        waiting: list[Job] = []
        for job in jobs:
            if job.status == "deleted" or (job.kind == "image" and not job.ended):  # its client is gone
                await self._erase([job])
                continue
            self._remember(job)
            if job.ended:
                continue
            if (error := self._lost(job)) is not None:
                job.settle()
                await self._discard(job, [])
                await self._end(job, error)
            else:
                job.change(status="queued", stage="queued", progress=0, step=0, total=0)
                self._enqueue(job)
                waiting.append(job)
        for job in waiting:  # now that each has its place
            job.publish("queued", self.state(job))
        if journal is not None:
            await uploads.sweep({name for job in self._jobs for name in job.inputs}, self.uploads)
            await self.outputs.store.sweep()
        self._spawn(self._sweep())

    def _lost(self, job: Job) -> SgldError | None:
        """Why a job of the process before this one cannot be made here."""
        if job.attempts >= ATTEMPTS:
            return WorkerDied(f"the server was killed {job.attempts} times while it made this")
        if job.model != self.outputs.model:
            return ModelError(f"the server was started again with {self.outputs.model!r}, not {job.model!r}")
        return None

    def start(self) -> None:
        """Begin to make jobs, now that the model is loaded."""
        self._dispatcher = self._spawn(self._dispatch())

    async def drain(self, seconds: float) -> None:
        """Admit nothing more, start nothing more, and leave `seconds` to what runs and to files being written."""
        self.draining = True
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        while self._busy and seconds > 0:
            began = time.monotonic()
            await asyncio.wait(self._busy, timeout=seconds)
            seconds -= time.monotonic() - began

    async def close(self) -> None:
        """Put what has not ended back into the journal, or fail it where there is none."""
        self.draining = True
        for job in [job for job in self._jobs if job.settle()]:
            if self._ledger.lasts and job.kind == "video":
                job.park()
                if job.status == "in_progress":  # a queued one is in the journal as it stands
                    await self._ledger.write_down(job, status="queued", attempts=job.attempts - 1)
            else:
                await self._end(job, NotReady("the server is stopping"))
            if job.task is not None:
                job.task.cancel()
        while self._busy:  # the ends that others have decided
            await asyncio.wait(self._busy)
        await self._ledger.pay()
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Requests

    async def submit(self, job: Job) -> Job:
        """Queue a job; the one that the same Idempotency-Key brought before, where there is one.

        Raises:
            NotReady: the server stops.
            QueueFull: as many wait as may.
            BadRequest: the key came before, with another request.
        """
        while (before := self._repeated(job)) is not None:
            if (writing := self._admitting.get(before)) is not None:
                await writing.wait()  # whether it is taken at all
            elif before.status != "completed" or await self.outputs.store.exists(
                each.name for each in before.artifacts
            ):
                return before
            else:
                self._release_key(before)  # its files have vanished: they are made anew
        if self.draining:
            raise NotReady("the server is stopping; try another one")
        if len(self._queue) + len(self._admitting) >= self._settings.max_queue:
            raise QueueFull(f"{self._settings.max_queue} jobs wait already; try again later", None, self._relief())
        self._remember(job)
        self._admitting[job] = asyncio.Event()
        try:
            await self._ledger.write(job)
        except BaseException:
            job.settle()
            self._vanish(job)
            self._spawn(self._drop(job))
            raise
        finally:
            self._admitting.pop(job).set()
        if not job.settled:  # nobody was quick enough to cancel it
            self._enqueue(job)
            job.publish("queued", self.state(job))
        return job

    def get(self, kind: str, job_id: str, identity: Identity) -> Job:
        """The job of that id. Raises NotFound, for another key's job too."""
        job = self._jobs.get(job_id)
        if job is None or job.kind != kind or not may_see(identity, job.owner):
            raise NotFound(f"no {kind} {job_id!r}", "id")
        return job

    def page(
        self, kind: str, identity: Identity, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs by age, from behind the id `after` on, and whether more follow."""
        owner = EVERYBODY if identity.admin else identity.name
        return self._jobs.page(kind, owner, after=after, limit=limit, newest_first=newest_first)

    @asynccontextmanager
    async def attend(self, job: Job) -> AsyncIterator[None]:
        """A client waits for this job: when the last one has gone before its end, so does the job."""
        job.waiters += 1
        try:
            yield
        finally:
            job.waiters -= 1
            if not job.ended and not job.waiters:
                self._release_key(job)  # who repeats the request gets a job of its own
                self._labour(self._leave(job))

    async def cancel(self, job: Job) -> None:
        """Cancel it, unless its end is decided already. Goes on when the caller is cancelled.

        Raises:
            NotReady: the job waits for the next start of the server.
        """
        await asyncio.shield(self._labour(self._cancel(job)))

    async def delete(self, job: Job) -> None:
        """Cancel it where needed, and remove it with its files. Goes on, and raises, as `cancel` does."""
        await asyncio.shield(self._labour(self._delete(job)))

    async def _cancel(self, job: Job) -> None:
        if job.settle():
            self._queue.remove(job)
            self._line = None
            self._tell_positions()
            if job.task is not None:
                job.task.cancel()
            await self._end(job, Cancelled("the job was cancelled"))
            return
        await job.wait()
        if job.parked:
            raise NotReady("the server is stopping; the job goes on after its restart")

    async def _delete(self, job: Job) -> None:
        await self._cancel(job)
        await self._ledger.condemn([job])
        self._vanish(job)
        await self._remove_files([job])
        await self._ledger.strike([job])

    async def _leave(self, job: Job) -> None:
        """Delete a job whose client has gone; where that fails, it stays until it expires."""
        try:
            await self._delete(job)
        except SgldError as error:
            log.error("%s stays for now: %s", job.id, error)

    def _vanish(self, job: Job) -> None:
        """Forget a job, and tell who still follows it."""
        self._forget(job)
        job.status = "deleted"
        job.publish("deleted", self.state(job))

    def state(self, job: Job) -> dict[str, Any]:
        """Where a job stands among the others: what every event and every answer tells."""
        place = self._places().get(job)
        return job.state(None if place is None else place.position, self.eta(job))

    def eta(self, job: Job) -> float | None:
        """Seconds until its end, where past jobs allow an estimate."""
        if job.ended:
            return None
        if job.status == "in_progress":
            return self._remaining(job)
        waits = self._remaining(self._running) if self._running is not None and self._next is None else 0.0
        place = self._places().get(job)
        own = self._pace.estimate(place.cost if place is not None else job.cost)
        return None if own is None or waits is None else waits + own

    @property
    def waiting(self) -> int:
        """Jobs that no worker has begun."""
        return len(self._queue) + (self._next is not None)

    @property
    def running(self) -> int:
        """Jobs with the workers: one or none."""
        return int(self._running is not None) - (self._next is not None)

    @property
    def _next(self) -> Job | None:
        """The job whose turn it is, while no worker has begun it: they restart, or their adapters change."""
        job = self._running
        return job if job is not None and job.status == "queued" and not job.settled else None

    # Making

    async def _dispatch(self) -> None:
        while True:
            while not len(self._queue):
                self._wake.clear()
                await self._wake.wait()
            job = self._running = self._queue.pop(time.monotonic())
            self._line = None
            job.task = self._labour(self._make(job))
            job.task.add_done_callback(self._stand_idle)
            await asyncio.wait({job.task})
            job.task = None
            self._tell_positions()

    def _stand_idle(self, _: asyncio.Task[None]) -> None:
        self._running = self._line = None

    async def _make(self, job: Job) -> None:
        """Every output of a job, then its end in a task of its own."""
        saves: list[asyncio.Task[Artifact]] = []
        previews: list[asyncio.Task[None]] = []
        with job_context(job.id):
            try:
                async with self._engine.steady():  # all its outputs are made with the same adapters
                    await self._generate(job, saves, previews)
            except asyncio.CancelledError:
                if job.settled:
                    self._labour(self._discard(job, saves))
                    raise
                self._labour(self._finish(job, saves, previews, None))  # an output before it could not be saved
            except SgldError as error:
                self._labour(self._finish(job, saves, previews, error))
            except Exception:  # every job ends in one of its states
                log.exception("failed")
                self._labour(self._finish(job, saves, previews, SgldError(INTERNAL)))
            else:
                self._labour(self._finish(job, saves, previews, None))

    def _begin(self, job: Job) -> None:
        """A worker has told its first event of an unsettled job."""
        job.change(status="in_progress", started_at=time.time(), attempts=job.attempts + 1, output_tokens=0)
        self._line = None
        if job.kind == "video":
            self._labour(self._write_beginning(job))
        job.publish("progress", self.state(job))
        self._tell_positions()

    async def _write_beginning(self, job: Job) -> None:
        if not job.settled:  # else the journal hears of its end, or of its waiting
            await self._ledger.write_down(job)

    async def _generate(
        self, job: Job, saves: list[asyncio.Task[Artifact]], previews: list[asyncio.Task[None]]
    ) -> None:
        def emit(event: Event) -> None:
            self._hear(job, event, saves, previews)

        async with self._saving:  # while the outputs of jobs before it wait for the disk, none are added
            started = time.monotonic()
        await self._engine.generate(job.id, job.outputs, emit, job.previews)
        self._pace.learn(job.cost, time.monotonic() - started)

    async def _save(self, job: Job, index: int, result: Media) -> Artifact:
        async with self._saving:
            began = time.monotonic()
            name, params = job.file_names()[index], job.outputs[index]
            artifact = await self.outputs.save(params, result, name, job.output_format)
            self._metrics.saved("local", time.monotonic() - began)
            return artifact

    def _hear(
        self, job: Job, event: Event, saves: list[asyncio.Task[Artifact]], previews: list[asyncio.Task[None]]
    ) -> None:
        """A rank's event on the loop."""
        if job.settled:
            return
        if job.status == "queued":
            self._begin(job)
        if isinstance(event, OutputReady):
            self._metrics.stages(event.media.timings)
            job.prompt_tokens = event.media.tokens.prompt  # one prompt for all outputs
            job.output_tokens += event.media.tokens.latent
            saves.append(self._spawn(self._save(job, event.item, event.media)))
            saves[-1].add_done_callback(partial(_stop_if_lost, job))
        elif isinstance(event, Note):
            if event.text not in job.notes:  # each output tells it
                job.notes = (*job.notes, event.text)
        elif isinstance(event, Preview):
            previews.append(self._spawn(self._show(job, event, previews[-1:])))
        elif isinstance(event, Progress) and event.stage in job.spec.stages:
            job.advance(event)
            job.publish("progress", self.state(job))

    async def _show(self, job: Job, preview: Preview, before: list[asyncio.Task[None]]) -> None:
        """Publish a preview as a picture of the job's format (a video's as webp), after those before it."""
        format = job.output_format if job.kind == "image" else "webp"
        quality = media.file_quality(format, job.params.output_quality, job.params.output_compression)
        try:
            picture = await anyio.to_thread.run_sync(_encode, preview.frames.array[0], format, quality)
        except SgldError as error:  # the job does not fail for it
            log.warning("preview %d is lost: %s", preview.index, error)
            return
        if before:
            await asyncio.wait(before)
        if not job.ended:
            shown = {"index": preview.index, "output": preview.item, "format": format, "b64_json": picture}
            job.publish("preview", {**self.state(job), **shown})

    async def _finish(
        self,
        job: Job,
        saves: list[asyncio.Task[Artifact]],
        previews: list[asyncio.Task[None]],
        error: SgldError | None,
    ) -> None:
        with job_context(job.id):
            try:
                artifacts = await asyncio.gather(*saves)
                await asyncio.gather(*previews)
            except SgldError as failed:
                artifacts, error = [], error or failed
            except Exception:  # as above
                log.exception("failed")
                artifacts, error = [], error or SgldError(INTERNAL)
            if error is not None:
                await self._discard(job, saves)
                error = uploads.without_paths(error, job.params)
            if not job.settle():  # a cancel came first
                await self._discard(job, saves)
                return
            if error is not None:
                log.warning("failed: %s", error)
            else:
                job.artifacts = tuple(artifacts)
                log.info("completed in %.2f s", time.time() - (job.started_at or job.created_at))
            await self._end(job, error)

    async def _discard(self, job: Job, saves: list[asyncio.Task[Artifact]]) -> None:
        """Remove what was written of a job that came to nothing."""
        if saves:
            await asyncio.wait(saves)
        await self.outputs.store.delete(job.file_names())

    async def _end(self, job: Job, error: SgldError | None) -> None:
        """Write a settled job's end down, then tell it."""
        changes = job.ending(error, self._settings.job_ttl)
        video = job.kind == "video"
        due = self._webhooks.due(job.owner, f"video.{changes['status']}", job.id) if video else []
        await self._ledger.write_down(job, due, **changes)
        job.change(**changes)
        if error is not None:
            self._release_key(job)  # a repeated request may fare better
        self._count(job.kind, error)
        job.publish(job.status, self.state(job))
        self._webhooks.send(due)

    def _count(self, kind: str, error: SgldError | None) -> None:
        if error is None:
            self._metrics.job_finished(kind)
        elif isinstance(error, Cancelled):
            self._metrics.job_cancelled(kind)
        else:
            self._metrics.job_failed(kind, error.code)

    # Keeping

    async def _erase(self, jobs: list[Job]) -> None:
        """Remove jobs from the disk. The journal knows first and forgets last: what a kill interrupts, goes on."""
        await self._ledger.condemn(jobs)
        await self._remove_files(jobs)
        await self._ledger.strike(jobs)

    async def _remove_files(self, jobs: list[Job]) -> None:
        for job in jobs:
            await self.outputs.store.delete([*job.file_names(), *job.picture_names()])
            if job.inputs:
                await uploads.remove(job.inputs, self.uploads)

    async def _drop(self, job: Job) -> None:
        """Erase what was never taken, for a write whose caller has gone still happens."""
        await self._ledger.strike([job])
        await self._remove_files([job])

    async def picture(self, job: Job, variant: str) -> str:
        """The file of a video's thumbnail or spritesheet, which goes with its job.

        Raises:
            NotFound: the job or its file is gone.
            OutputError: the video is damaged, or the disk is full.
        """
        name = await self.outputs.picture(job.artifacts[0], variant)
        if job not in self._jobs:
            await self._remove_files([job])
            raise NotFound(f"no {job.kind} {job.id!r}", "id")
        return name

    async def _sweep(self) -> None:
        """Remove what has expired."""
        while True:
            await self._ledger.pay()
            now = time.time()
            old = [job for job in self._jobs if job.expires_at is not None and job.expires_at <= now]
            try:
                await self._erase(old)
            except Exception:  # the next round may fare better
                log.exception("expired jobs stay for now")
                old = []
            for job in old:
                self._forget(job)
                log.info("expired", extra={"job_id": job.id})
            await asyncio.sleep(min(SWEEP_S, max(0.5, self._settings.job_ttl / 4)))

    def _remember(self, job: Job) -> None:
        self._jobs.add(job)
        if job.idempotency_key is not None and job.status != "failed":
            self._repeats[job.owner, job.idempotency_key] = job

    def _forget(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        self._ledger.forget(job)
        self._release_key(job)

    def _release_key(self, job: Job) -> None:
        """From now on its Idempotency-Key brings a new job."""
        key = job.owner, job.idempotency_key or ""
        if self._repeats.get(key) is job:
            del self._repeats[key]

    def _repeated(self, job: Job) -> Job | None:
        before = self._repeats.get((job.owner, job.idempotency_key)) if job.idempotency_key is not None else None
        if before is not None and before.digest != job.digest:
            raise BadRequest("it came before with another request; take a new one", field="Idempotency-Key")
        return before

    def _enqueue(self, job: Job) -> None:
        since = time.monotonic() - (time.time() - job.created_at)  # a restart does not begin the wait anew
        self._queue.push(job, owner=job.owner, priority=job.priority, cost=job.cost, now=since)
        self._line = None
        self._wake.set()

    def _tell_positions(self) -> None:
        for job in self._places():
            if job.followed:
                job.publish("queued", self.state(job))

    def _places(self) -> dict[Job, QueuePosition]:
        """Where every waiting job stands; reckoned anew when the queue has changed, or jobs have aged."""
        now = time.monotonic()
        if self._line is None or now - self._line[0] > AGED_S:
            places, cost = {}, 0.0
            begins = [self._next] if self._next is not None else []
            for position, job in enumerate([*begins, *self._queue.order(now)], 1):
                cost += job.cost
                places[job] = QueuePosition(position, cost)
            self._line = now, places
        return self._line[1]

    def _remaining(self, job: Job) -> float | None:
        estimate = self._pace.estimate(job.cost)
        if job.progress >= 10 and job.started_at is not None:  # its own speed tells more
            estimate = (time.time() - job.started_at) * 100 / job.progress
        return None if estimate is None else estimate * (100 - job.progress) / 100

    def _relief(self) -> int:
        """Seconds until a place in the queue is free, at least one and at most two minutes."""
        running = self._remaining(self._running) if self._running is not None else None
        return min(120, max(1, math.ceil(running if running is not None else 5)))

    def _labour(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Spawn what a graceful stop waits for."""
        task = self._spawn(work)
        self._busy.add(task)
        task.add_done_callback(self._busy.discard)
        return task

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _stop_if_lost(job: Job, save: asyncio.Task[Artifact]) -> None:
    """Make no more outputs of a job when one of them could not be saved."""
    if not save.cancelled() and save.exception() is not None and job.task is not None:
        job.task.cancel()


def _encode(frame: Any, format: str, quality: int) -> str:
    return base64.b64encode(media.encode_image(frame, format, quality=quality, metadata={})).decode()
