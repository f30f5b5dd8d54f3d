"""Jobs: one for each image or video request, run one after the other by the engine. In memory only, for now."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import attrs

from sgld.engine.engine import Engine
from sgld.errors import Cancelled, NotFound, NotReady, SgldError
from sgld.messages import Event, Media, Note, Progress
from sgld.params import SamplingParams

log = logging.getLogger(__name__)
Finish = Callable[["Job", SamplingParams, Media], Awaitable[None]]


@attrs.define(eq=False)
class Job:
    """Mutable, and touched by the loop alone. `progress` never falls, and is 100 only with the result."""

    id: str
    kind: str
    params: SamplingParams
    created_at: int = attrs.field(factory=lambda: int(time.time()))
    status: str = "queued"  # queued, in_progress, completed or failed
    progress: int = 0
    completed_at: int | None = None
    error: SgldError | None = None
    seeds: list[int] = attrs.field(factory=list)
    paths: list[Path] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    task: asyncio.Task[None] | None = None

    def finish(self, status: str, error: SgldError | None = None) -> None:
        self.status, self.error = status, error
        self.completed_at = int(time.time())
        self.progress = 100 if status == "completed" else self.progress


class JobStore:
    """Submits jobs to the engine and keeps them by id."""

    def __init__(self, engine: Engine, output_path: Path):
        self._engine = engine
        self._jobs: dict[str, Job] = {}
        self.output_path = output_path

    def submit(self, kind: str, params: SamplingParams, notes: list[str], finish: Finish) -> Job:
        """Queue a job; `finish` turns each output into a result before the job says completed."""
        if self._engine.state in ("new", "loading", "stopped"):
            raise NotReady(f"the server is {self._engine.state}; try again soon")
        job = Job(f"{kind}_{uuid.uuid4().hex}", kind, params, notes=notes)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, finish), name=job.id)
        return job

    def get(self, kind: str, job_id: str) -> Job:
        """The job of that id. Raises `NotFound`."""
        job = self._jobs.get(job_id)
        if job is None or job.kind != kind:
            raise NotFound(f"no {kind} {job_id!r}", "id")
        return job

    async def result(self, job: Job) -> None:
        """Wait for the job; a caller that is cancelled (its client has gone) cancels it. Raises what it failed with."""
        assert job.task is not None
        try:
            await asyncio.shield(job.task)
        except asyncio.CancelledError:
            job.task.cancel()
            raise
        if job.error is not None:
            raise job.error

    def forget(self, job: Job) -> None:
        """Drop a job whose result has been handed over."""
        self._jobs.pop(job.id, None)

    async def close(self) -> None:
        """Cancel what has not ended."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, job: Job, finish: Finish) -> None:
        try:
            await self._make(job, finish)
        except asyncio.CancelledError:
            job.finish("failed", Cancelled("cancelled"))
            raise
        except SgldError as error:
            log.warning("%s failed: %s", job.id, error)
            job.finish("failed", error)
        except Exception:  # every job ends in one of its states
            log.exception("%s failed", job.id)
            job.finish("failed", SgldError("internal error; the server's log has the reason"))
        else:
            job.finish("completed")

    async def _make(self, job: Job, finish: Finish) -> None:
        outputs = job.params.outputs()
        for index, params in enumerate(outputs):
            media = await self._engine.generate(job.id, params, _Follower(job, index, len(outputs)))
            await finish(job, params, media)
            job.seeds.append(media.seed)


class _Follower:
    """Turns a rank's events into the job's status and percentage."""

    SHARE: ClassVar = {"encode": (0, 5), "denoise": (5, 85), "decode": (90, 9)}

    def __init__(self, job: Job, index: int, outputs: int):
        self._job, self._index, self._outputs = job, index, outputs

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._job.notes.append(event.text)
        elif isinstance(event, Progress) and event.stage in self.SHARE:
            start, width = self.SHARE[event.stage]
            percent = start + width * event.step / event.total
            overall = int((100 * self._index + percent) / self._outputs)
            if self._job.status == "queued":
                self._job.status = "in_progress"
            self._job.progress = max(self._job.progress, min(overall, 99))
