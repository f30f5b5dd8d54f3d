"""Job: a record, and what this process alone knows about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import attrs

from sgld.server.jobs.events import EventLog, JobEvent
from sgld.server.jobs.record import JobRecord


@attrs.define(eq=False)
class JobRuntime:
    """The state of a job that ends with the process."""

    events: EventLog = attrs.field(factory=EventLog)
    task: asyncio.Task[None] | None = None  # the run with the workers
    waiters: int = 0  # clients whose answer waits for the end
    decided: bool = False  # completion, failure or cancel has won
    handed_over: bool = False  # the next process makes the job


@attrs.define(eq=False)
class Job:
    """One job of this server. Touched by the loop alone."""

    record: JobRecord
    runtime: JobRuntime = attrs.field(factory=JobRuntime)

    @classmethod
    def restore(cls, record: JobRecord) -> Job:
        """Return a job of an earlier process. Its events are numbered above all that process has sent."""
        events = EventLog(int(1000 * time.time()), closed=record.ended)
        return cls(record, JobRuntime(events, decided=record.ended))

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def owner(self) -> str:
        return self.record.owner

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def ended(self) -> bool:
        return self.record.ended

    @property
    def events(self) -> EventLog:
        return self.runtime.events

    def update(self, **changes: Any) -> None:
        """Replace fields of the record."""
        self.record = attrs.evolve(self.record, **changes)

    def decide_end(self) -> bool:
        """Claim the end of the job. True for the first caller, who must then finish it."""
        first, self.runtime.decided = not self.runtime.decided, True
        return first

    def hand_over(self) -> None:
        """Leave the job to the next process. Followers receive nothing more here."""
        self.runtime.decided = self.runtime.handed_over = True
        self.events.close()

    def state(self, position: int | None = None, eta_s: float | None = None) -> dict[str, Any]:
        """Return the data of every event: status, progress, and the place in the queue."""
        progress = self.record.progress
        return {
            "id": self.id,
            "status": self.status,
            "progress": progress.percent,
            "stage": progress.stage,
            "step": progress.step,
            "total": progress.total,
            "queue_position": position,
            "eta_seconds": None if eta_s is None else round(eta_s, 1),
        }

    def follow(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the events numbered above `after` until the end. An ended job without a log yields its end alone."""
        if self.ended and not len(self.events) and self.events.number > after:
            return _yield_one(JobEvent(self.events.number, self.status, self.state()))
        return self.events.follow(after)

    async def wait(self) -> None:
        """Wait until the job has ended or is handed over."""
        await self.events.wait_closed()


async def _yield_one(event: JobEvent) -> AsyncIterator[JobEvent]:
    yield event
