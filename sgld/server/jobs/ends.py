"""JobEnds: ends each job by one path, and deletes the files and records of jobs that are gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from sgld.errors import JobCancelled, SgldError
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.index import JobIndex
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord, Outcome
from sgld.server.jobs.repository import JobRepository, MemoryJobRepository
from sgld.server.jobs.results import Outputs
from sgld.server.jobs.run import JobMetrics
from sgld.server.jobs.scheduler import Scheduler
from sgld.server.jobs.webhooks import Webhooks

log = logging.getLogger(__name__)
SWEEP_S = 30.0


class JobEnds:
    """The ends of jobs, and the repository that they are written to."""

    def __init__(
        self,
        index: JobIndex,
        scheduler: Scheduler,
        outputs: Outputs,
        upload_folder: Path,
        job_ttl: int,
        metrics: JobMetrics,
        webhooks: Webhooks,
    ):
        self.repository: JobRepository = MemoryJobRepository()
        self._index, self._scheduler = index, scheduler
        self._outputs, self._uploads = outputs, upload_folder
        self._job_ttl = job_ttl  # seconds
        self._metrics, self._webhooks = metrics, webhooks

    async def finish(self, job: Job, outcome: Outcome) -> None:
        """End a job whose end the caller has decided: one transaction, one terminal event.

        A deleted video takes a second transaction once its files are gone. A deleted image takes one: the next start
        deletes unfinished images anyway.

        Raises:
            OutputError: a deletion cannot be stored; the job has not ended then.
        """
        record, video = job.record.end(outcome, self._job_ttl), job.kind == "video"
        event = "video.completed" if outcome.error is None else "video.failed"
        deliveries = self._webhooks.due(job.owner, event, job.id) if video else []
        deleted = outcome.status == "deleted"
        if not deleted:
            await self.repository.update(record, deliveries)
        elif record.resumable:
            await self.repository.mark_deleted([record], deliveries)
        job.record = record
        if deleted:
            self.remove(job)
        elif outcome.error is not None:
            self._index.release_key(job)  # a repeated request may fare better
        self._count(job.kind, outcome.error)
        job.events.publish(job.status, self._scheduler.state(job), last=True)
        self._webhooks.send(deliveries)
        if deleted:
            await self.delete_files(record)
            await self.repository.delete([job.id])

    def _count(self, kind: str, error: SgldError | None) -> None:
        if error is None:
            self._metrics.job_finished(kind)
        elif isinstance(error, JobCancelled):
            self._metrics.job_cancelled(kind)
        else:
            self._metrics.job_failed(kind, error.code)

    def remove(self, job: Job) -> None:
        """Remove a job from the index."""
        self._index.remove(job)
        job.update(status="deleted")

    async def delete_files(self, record: JobRecord) -> None:
        """Delete the results and input pictures of a job."""
        await self._outputs.store.delete(record.all_file_names)
        if record.inputs:
            await uploads.remove(record.inputs, self._uploads)

    async def delete(self, records: Sequence[JobRecord]) -> None:
        """Delete the files of jobs, then their records."""
        for record in records:
            await self.delete_files(record)
        if records:
            await self.repository.delete([record.id for record in records])

    async def sweep(self) -> None:
        """Delete expired jobs and write unwritten records, for ever."""
        while True:
            await self.repository.flush()
            try:
                await self._delete_expired()
            except Exception:  # the next round may fare better
                log.exception("expired jobs stay for now")
            await asyncio.sleep(min(SWEEP_S, max(0.5, self._job_ttl / 4)))

    async def _delete_expired(self) -> None:
        now = time.time()
        old = [job for job in self._index if job.record.expires_at is not None and job.record.expires_at <= now]
        if not old:
            return
        records = [job.record for job in old]
        await self.repository.mark_deleted(records)
        await self.delete(records)
        for job in old:
            self.remove(job)
            log.info("expired", extra={"job_id": job.id})
