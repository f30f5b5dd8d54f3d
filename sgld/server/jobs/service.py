"""JobService: admits jobs, ends each of them once, and removes what has expired."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sgld.engine.engine import Engine
from sgld.errors import INTERNAL, JobCancelled, ModelError, NotFound, NotReady, QueueFull, SgldError, WorkerDied
from sgld.log import job_context
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.index import JobIndex
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord, Outcome
from sgld.server.jobs.repository import JobRepository, MemoryJobRepository
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.run import JobMetrics, JobRun, RunResources
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
        self.repository: JobRepository = MemoryJobRepository()
        self.draining = False
        self.admitting: dict[Job, asyncio.Event] = {}  # until they are in the repository
        self._settings = settings
        self._metrics = metrics
        self._webhooks = webhooks
        self._tasks = Tasks()
        self._runner = RunResources(engine, outputs, self.scheduler, metrics, self._tasks)
        self._dispatcher: asyncio.Task[None] | None = None

    # Life

    async def restore(self, repository: JobRepository) -> None:
        """Load the jobs of the process before this one. Those that have not ended are queued once more."""
        self.repository = repository
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
                await self.finish(job, Outcome("failed", error))
            else:
                job.record = record.requeue(record.attempts)
                self.scheduler.push(job)
                waiting.append(job)
        await self._delete_files_and_records(gone)
        for job in waiting:  # now that each has its position
            job.events.publish("queued", self.scheduler.state(job))
        if repository.durable:
            await uploads.sweep({name for job in self.index for name in job.record.inputs}, self.uploads)
            await self.outputs.store.sweep()
        self._tasks.spawn(self._sweep())

    def _find_obstacle(self, record: JobRecord) -> SgldError | None:
        """Return why this server cannot make a job of the process before it."""
        if record.attempts >= ATTEMPTS:
            return WorkerDied(f"the server was killed {record.attempts} times while it made this")
        if record.model != self.outputs.model:
            return ModelError(f"the server was started again with {self.outputs.model!r}, not {record.model!r}")
        return None

    def start(self) -> None:
        """Start to make jobs, now that the model is loaded."""
        self._dispatcher = self._tasks.spawn(self.scheduler.dispatch(self._start_run))

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
            if self.repository.durable and job.record.resumable:
                job.hand_over()
                if job.status == "in_progress":  # a queued one is in the repository as it stands
                    await self.repository.update(job.record.requeue(job.record.attempts - 1))
            else:
                await self.finish(job, Outcome("failed", NotReady("the server is stopping")))
            if job.runtime.task is not None:
                job.runtime.task.cancel()
        await self._tasks.wait_critical()  # other ends that are decided
        await self.repository.flush()
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
            elif before.status != "completed" or await self._has_files(before):
                return before
            else:
                self.index.release_key(before)  # its files have vanished: they are made anew
        if self.draining:
            raise NotReady("the server is stopping; try another one")
        most = self._settings.server.max_queue
        if len(self.scheduler) + len(self.admitting) >= most:
            raise QueueFull(f"{most} jobs wait already; try again later", None, self.scheduler.retry_after())
        return await self._admit(Job(record))

    async def _admit(self, job: Job) -> Job:
        self.index.add(job)
        self.admitting[job] = asyncio.Event()
        try:
            await self.repository.insert(job.record)
        except BaseException:
            job.decide_end()
            self._remove(job)
            job.events.publish("deleted", job.state(), last=True)
            self._tasks.spawn(self._drop(job.record))
            raise
        finally:
            self.admitting.pop(job).set()
        if not job.runtime.decided:  # nobody was quick enough to cancel it
            self.scheduler.push(job)
            job.events.publish("queued", self.scheduler.state(job))
        return job

    async def _has_files(self, job: Job) -> bool:
        return await self.outputs.store.exists(each.name for each in job.record.artifacts)

    async def _drop(self, record: JobRecord) -> None:
        """Delete a job that was never admitted. A write whose caller has gone still happens."""
        await self.repository.delete([record.id])
        await self._delete_files(record)

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
            await self.finish(job, Outcome("failed", JobCancelled("the job was cancelled")))
        else:
            await self._wait_for_end(job)

    async def _delete(self, job: Job) -> None:
        error = JobCancelled("the job was cancelled")
        if job.decide_end():
            self._stop(job)
            try:
                await self.finish(job, Outcome("deleted", error))
            except SgldError:
                await self.finish(job, Outcome("failed", error))
                raise
        else:
            await self._wait_for_end(job)
            await self.repository.mark_deleted([job.record])
            self._remove(job)
            await self._delete_files_and_records([job.record])

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

    # Runs

    def _start_run(self, job: Job) -> asyncio.Task[None]:
        return self._tasks.spawn_critical(self._run(JobRun(self._runner, job, self._on_begin)))

    async def _run(self, run: JobRun) -> None:
        """Generate the outputs of a job; its files and its end are left to a task of their own."""
        error: SgldError | None = None
        with job_context(run.job.id):
            try:
                await run.generate()
            except asyncio.CancelledError:
                if run.job.runtime.decided:
                    self._tasks.spawn_critical(run.discard())
                    raise
                # an output could not be saved: `_complete` finds the error
            except SgldError as failed:
                error = failed
            except Exception:  # every job ends in one of its states
                log.exception("failed")
                error = SgldError(INTERNAL)
            self._tasks.spawn_critical(self._complete(run, error))

    def _on_begin(self, job: Job) -> None:
        """Note that a worker has begun a job whose end is not decided."""
        job.record = job.record.begin()
        if job.record.resumable:
            self._tasks.spawn_critical(self._store_beginning(job))
        self.scheduler.publish_positions()
        job.events.publish("progress", self.scheduler.state(job))

    async def _store_beginning(self, job: Job) -> None:
        if not job.runtime.decided:  # else its end, or its waiting, is stored
            await self.repository.update(job.record)

    async def _complete(self, run: JobRun, error: SgldError | None) -> None:
        """Wait for the files of a run, then finish its job unless a cancel came first."""
        job = run.job
        with job_context(job.id):
            outcome = Outcome("failed", error)
            try:
                artifacts = await run.collect()
                if error is None:
                    outcome = Outcome("completed", artifacts=artifacts)
            except SgldError as failed:
                outcome = Outcome("failed", error or failed)
            if outcome.error is not None:
                await run.discard()
            if not job.decide_end():
                await run.discard()
            elif outcome.error is not None:
                error = uploads.without_paths(outcome.error, job.record.params)
                log.warning("failed: %s", error)
                await self.finish(job, Outcome("failed", error))
            else:
                log.info("completed in %.2f s", time.time() - (job.record.started_at or job.record.created_at))
                await self.finish(job, outcome)

    async def finish(self, job: Job, outcome: Outcome) -> None:
        """End a job whose end the caller has decided: one transaction, one terminal event.

        A deleted video takes a second transaction once its files are gone. A deleted image takes one: the next start
        deletes unfinished images anyway.

        Raises:
            OutputError: a deletion cannot be stored; the job has not ended then.
        """
        record, video = job.record.end(outcome, self._settings.server.job_ttl), job.kind == "video"
        event = "video.completed" if outcome.error is None else "video.failed"
        deliveries = self._webhooks.due(job.owner, event, job.id) if video else []
        deleted = outcome.status == "deleted"
        if not deleted:
            await self.repository.update(record, deliveries)
        elif record.resumable:
            await self.repository.mark_deleted([record], deliveries)
        job.record = record
        if deleted:
            self._remove(job)
        elif outcome.error is not None:
            self.index.release_key(job)  # a repeated request may fare better
        self._count(job.kind, outcome.error)
        job.events.publish(job.status, self.scheduler.state(job), last=True)
        self._webhooks.send(deliveries)
        if deleted:
            await self._delete_files(record)
            await self.repository.delete([job.id])

    def _count(self, kind: str, error: SgldError | None) -> None:
        if error is None:
            self._metrics.job_finished(kind)
        elif isinstance(error, JobCancelled):
            self._metrics.job_cancelled(kind)
        else:
            self._metrics.job_failed(kind, error.code)

    # Files

    async def picture(self, job: Job, variant: str) -> str:
        """Return the file name of a video's thumbnail or spritesheet, which is deleted with its job.

        Raises:
            NotFound: the job or its file is gone.
            OutputError: the video is damaged, or the disk is full.
        """
        name = await self.outputs.picture(job.record.artifacts[0], variant)
        if job not in self.index:
            await self._delete_files(job.record)
            raise NotFound(f"no {job.kind} {job.id!r}", "id")
        return name

    def _remove(self, job: Job) -> None:
        """Remove a job from the index."""
        self.index.remove(job)
        job.update(status="deleted")

    async def _delete_files(self, record: JobRecord) -> None:
        await self.outputs.store.delete(record.all_file_names)
        if record.inputs:
            await uploads.remove(record.inputs, self.uploads)

    async def _delete_files_and_records(self, records: Sequence[JobRecord]) -> None:
        for record in records:
            await self._delete_files(record)
        if records:
            await self.repository.delete([record.id for record in records])

    async def _sweep(self) -> None:
        """Delete expired jobs and write unwritten records, for ever."""
        while True:
            await self.repository.flush()
            try:
                await self._delete_expired()
            except Exception:  # the next round may fare better
                log.exception("expired jobs stay for now")
            await asyncio.sleep(min(SWEEP_S, max(0.5, self._settings.server.job_ttl / 4)))

    async def _delete_expired(self) -> None:
        now = time.time()
        old = [job for job in self.index if job.record.expires_at is not None and job.record.expires_at <= now]
        if not old:
            return
        records = [job.record for job in old]
        await self.repository.mark_deleted(records)
        await self._delete_files_and_records(records)
        for job in old:
            self._remove(job)
            log.info("expired", extra={"job_id": job.id})
