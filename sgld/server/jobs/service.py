"""JobService: admits jobs, ends each of them once, and removes what has expired."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sgld.engine.engine import Engine
from sgld.errors import JobCancelled, ModelError, NotFound, NotReady, QueueFull, SgldError, WorkerDied
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.ends import JobEnds
from sgld.server.jobs.index import JobIndex
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord, Outcome
from sgld.server.jobs.repository import JobRepository
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.run import JobMetrics, RunResources
from sgld.server.jobs.runs import JobRuns
from sgld.server.jobs.scheduler import Scheduler
from sgld.server.jobs.tasks import Tasks
from sgld.server.jobs.webhooks import Webhooks
from sgld.settings import Settings

log = logging.getLogger(__name__)
ATTEMPTS = 2  # runs of a job whose server was killed meanwhile
SWEEP_S = 30.0


class JobService:
    """The jobs of a server. The workers make one at a time; its files are written while the next one runs."""

    def __init__(
        self,
        engine: Engine,
        outputs: Outputs,
        upload_folder: Path,
        settings: Settings,
        metrics: JobMetrics,
        webhooks: Webhooks,
    ):
        self.outputs, self.uploads = outputs, upload_folder
        self.index, self.scheduler = JobIndex(), Scheduler()
        self.draining = False
        self.admitting: dict[Job, asyncio.Event] = {}  # until they are in the repository
        self.ends = JobEnds(
            self.index, self.scheduler, outputs, upload_folder, settings.server.job_ttl, metrics, webhooks
        )
        self._max_queue = settings.server.max_queue
        self._tasks = Tasks()
        self._runs = JobRuns(RunResources(engine, outputs, self.scheduler, metrics, self._tasks), self.ends)
        self._dispatcher: asyncio.Task[None] | None = None

    # Life

    async def restore(self, repository: JobRepository) -> None:
        """Load the jobs of the process before this one. Those that have not ended are queued once more."""
        self.ends.repository = repository
        waiting: list[Job] = []
        gone: list[JobRecord] = []
        for record in await repository.load():
            if record.status == "deleted" or not (record.ended or record.resumable):
                gone.append(record)
                continue
            job = Job.restore(record)
            self.index.add(job)
            if job.ended:
                continue
            if (error := self._find_obstacle(record)) is not None:
                job.decide_end()
                await self.outputs.store.delete(record.file_names)
                await self.ends.finish(job, Outcome("failed", error))
            else:
                job.record = record.requeue(record.attempts)
                self.scheduler.push(job)
                waiting.append(job)
        await self.ends.delete(gone)
        for job in waiting:  # now that each has its position
            job.events.publish("queued", self.scheduler.state(job))
        if repository.durable:
            await uploads.sweep({name for job in self.index for name in job.record.inputs}, self.uploads)
            await self.outputs.store.sweep()
        self._tasks.spawn(self.ends.sweep())

    def _find_obstacle(self, record: JobRecord) -> SgldError | None:
        """Return why this server cannot make a job of the process before it."""
        if record.attempts >= ATTEMPTS:
            return WorkerDied(f"the server was killed {record.attempts} times while it made this")
        if record.model != self.outputs.model:
            return ModelError(f"the server was started again with {self.outputs.model!r}, not {record.model!r}")
        return None

    def start(self) -> None:
        """Start to make jobs, now that the model is loaded."""
        self._dispatcher = self._tasks.spawn(self.scheduler.dispatch(self._runs.start))

    async def drain(self, seconds: float) -> None:
        """Admit and start no more jobs. Wait at most so long for the running job and for files being written."""
        self.draining = True
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        await self._tasks.wait_critical(seconds)

    async def close(self) -> None:
        """Hand unfinished videos over to the next process, and fail the other jobs."""
        self.draining = True
        for job in [job for job in self.index if job.decide_end()]:
            if self.ends.repository.durable and job.record.resumable:
                job.hand_over()
                if job.status == "in_progress":  # a queued one is in the repository as it stands
                    await self.ends.repository.update(job.record.requeue(job.record.attempts - 1))
            else:
                await self.ends.finish(job, Outcome("failed", NotReady("the server is stopping")))
            if job.runtime.task is not None:
                job.runtime.task.cancel()
        await self._tasks.wait_critical()  # other ends that are decided
        await self.ends.repository.flush()
        await self._tasks.cancel()

    # Requests

    async def submit(self, record: JobRecord) -> Job:
        """Queue a job. Return the earlier job of the Idempotency-Key instead, if there is one.

        Raises:
            NotReady: the server stops.
            QueueFull: the queue has no free place.
            BadRequest: the key came before, with another request.
        """
        while (before := self.index.find_repeated(record)) is not None:
            if (admission := self.admitting.get(before)) is not None:
                await admission.wait()  # it may yet be refused
            elif before.status != "completed" or await self.outputs.store.exists(
                each.name for each in before.record.artifacts
            ):
                return before
            else:
                self.index.release_key(before)  # its files have vanished: they are made anew
        if self.draining:
            raise NotReady("the server is stopping; try another one")
        most = self._max_queue
        if len(self.scheduler) + len(self.admitting) >= most:
            raise QueueFull(f"the queue is full ({most} waiting); try again later", None, self.scheduler.retry_after())
        return await self._admit(Job(record))

    async def _admit(self, job: Job) -> Job:
        self.index.add(job)
        self.admitting[job] = asyncio.Event()
        try:
            await self.ends.repository.insert(job.record)
        except BaseException:
            job.decide_end()
            self.ends.remove(job)
            job.events.publish("deleted", job.state(), last=True)
            self._tasks.spawn(self._drop(job.record))
            raise
        finally:
            self.admitting.pop(job).set()
        if not job.runtime.decided:  # nobody was quick enough to cancel it
            self.scheduler.push(job)
            job.events.publish("queued", self.scheduler.state(job))
        return job

    async def _drop(self, record: JobRecord) -> None:
        """Delete a job that was never admitted. A write whose caller has gone still happens."""
        await self.ends.repository.delete([record.id])
        await self.ends.delete_files(record)

    def get(self, kind: str, job_id: str, owner: str | None) -> Job:
        """Return the owner's job, or anybody's for None. Raises NotFound."""
        job = self.index.get(job_id)
        if job is None or job.kind != kind or owner not in (None, job.owner):
            raise NotFound(f"no {kind} {job_id!r}", "id")
        return job

    @asynccontextmanager
    async def attend(self, job: Job) -> AsyncIterator[None]:
        """Keep a job while a client waits for it. It is discarded if the last client leaves before its end."""
        job.runtime.waiters += 1
        try:
            yield
        finally:
            job.runtime.waiters -= 1
            if not job.ended and not job.runtime.waiters:
                self.on_client_gone(job)

    def on_client_gone(self, job: Job) -> None:
        """Discard a job that nobody waits for any more."""
        self.index.release_key(job)  # a repeated request gets a job of its own
        self._tasks.spawn_critical(self._discard(job))

    async def cancel(self, job: Job) -> None:
        """Cancel a job whose end is not decided yet, even if the caller is cancelled meanwhile.

        Raises:
            NotReady: the next process makes the job.
        """
        await asyncio.shield(self._tasks.spawn_critical(self._cancel(job)))

    async def delete(self, job: Job) -> None:
        """Cancel a job if needed, and delete it with its files, even if the caller is cancelled meanwhile.

        Raises:
            NotReady: the next process makes the job.
            OutputError: the deletion cannot be stored; the job stays, cancelled.
        """
        await asyncio.shield(self._tasks.spawn_critical(self._delete(job)))

    async def _cancel(self, job: Job) -> None:
        if job.decide_end():
            self._stop(job)
            await self.ends.finish(job, Outcome("failed", JobCancelled("the job was cancelled")))
        else:
            await self._wait_for_end(job)

    async def _delete(self, job: Job) -> None:
        error = JobCancelled("the job was cancelled")
        if job.decide_end():
            self._stop(job)
            try:
                await self.ends.finish(job, Outcome("deleted", error))
            except SgldError:
                await self.ends.finish(job, Outcome("failed", error))
                raise
        else:
            await self._wait_for_end(job)
            await self.ends.repository.mark_deleted([job.record])
            self.ends.remove(job)
            await self.ends.delete([job.record])

    async def _discard(self, job: Job) -> None:
        try:
            await self._delete(job)
        except SgldError as error:
            log.error("%s stays for now: %s", job.id, error)

    async def _wait_for_end(self, job: Job) -> None:
        await job.wait()
        if job.runtime.handed_over:
            raise NotReady("the server is stopping; the job goes on after its restart")

    def _stop(self, job: Job) -> None:
        self.scheduler.remove(job)
        if job.runtime.task is not None:
            job.runtime.task.cancel()

    async def picture(self, job: Job, variant: str) -> str:
        """Return the file name of a video's thumbnail or spritesheet, which is deleted with its job.

        Raises:
            NotFound: the job or its file is gone.
            OutputError: the video is damaged, or the disk is full.
        """
        name = await self.outputs.picture(job.record.artifacts[0], variant)
        if job not in self.index:
            await self.ends.delete_files(job.record)
            raise NotFound(f"no {job.kind} {job.id!r}", "id")
        return name
