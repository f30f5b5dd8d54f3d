"""JobRuns: starts the run of each job, and ends the job once its files are written."""

from __future__ import annotations

import asyncio
import logging
import time

from sgld.errors import INTERNAL, SgldError
from sgld.log import job_context
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.ends import JobEnds
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import Outcome
from sgld.server.jobs.run import JobRun, RunResources

log = logging.getLogger(__name__)


class JobRuns:
    """Runs jobs, one at a time. The files of a job are written while the next job runs."""

    def __init__(self, resources: RunResources, ends: JobEnds):
        self._resources, self._ends = resources, ends

    def start(self, job: Job) -> asyncio.Task[None]:
        """Run a job in a task that ends when the workers are free."""
        return self._resources.tasks.spawn_critical(self._run(JobRun(self._resources, job, self._on_begin)))

    async def _run(self, run: JobRun) -> None:
        """Generate the outputs of a job; its files and its end are left to a task of their own."""
        error: SgldError | None = None
        with job_context(run.job.id):
            try:
                await run.generate()
            except asyncio.CancelledError:
                if run.job.runtime.decided:
                    self._resources.tasks.spawn_critical(run.discard())
                    raise
                # an output could not be saved: `_complete` finds the error
            except SgldError as failed:
                error = failed
            except Exception:  # every job ends in one of its states
                log.exception("failed")
                error = SgldError(INTERNAL)
            self._resources.tasks.spawn_critical(self._complete(run, error))

    def _on_begin(self, job: Job) -> None:
        """Note that a worker has begun a job whose end is not decided."""
        job.record = job.record.begin()
        if job.record.resumable:
            self._resources.tasks.spawn_critical(self._store_beginning(job))
        self._resources.scheduler.publish_positions()
        job.events.publish("progress", self._resources.scheduler.state(job))

    async def _store_beginning(self, job: Job) -> None:
        if not job.runtime.decided:  # else its end, or its waiting, is stored
            await self._ends.repository.update(job.record)

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
                await self._ends.finish(job, Outcome("failed", error))
            else:
                log.info("completed in %.2f s", time.time() - (job.record.started_at or job.record.created_at))
                await self._ends.finish(job, outcome)
