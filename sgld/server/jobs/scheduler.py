"""Scheduler: the order of waiting jobs, their positions and estimates, and the one that runs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import attrs

from sgld.server.jobs.job import Job
from sgld.server.jobs.queue import FairQueue

_NEWEST_WEIGHT = 0.3
ORDER_S = 1.0  # for so long the cached order holds, though jobs age


@attrs.define
class ThroughputEstimate:
    """Seconds for a unit of a job's cost, as a moving average over past jobs."""

    seconds: float | None = None

    def learn(self, cost: float, seconds: float) -> None:
        """Take in a finished job."""
        seen = seconds / cost
        self.seconds = seen if self.seconds is None else self.seconds + _NEWEST_WEIGHT * (seen - self.seconds)

    def estimate(self, cost: float) -> float | None:
        """Return the seconds for a job; None before the first has ended."""
        return None if self.seconds is None else self.seconds * cost


@attrs.frozen
class QueuePosition:
    """The place of a waiting job, from 1, and the cost of all jobs up to and with it."""

    position: int
    cost: float


class Scheduler:
    """Runs one job at a time, in fair order."""

    def __init__(self) -> None:
        self.throughput = ThroughputEstimate()
        self.current: Job | None = None  # with the workers, or about to be
        self._queue: FairQueue[Job] = FairQueue()
        self._order: tuple[float, dict[Job, QueuePosition]] | None = None  # the cached order, and when it was made
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, job: Job) -> None:
        """Queue a job. The wait counts from its creation, so a restart does not begin it anew."""
        record, since = job.record, time.monotonic() - (time.time() - job.record.created_at)
        self._queue.push(job, owner=record.owner, priority=record.priority, cost=record.cost, now=since)
        self._order = None
        self._wake.set()

    def remove(self, job: Job) -> None:
        """Remove a job whose end is decided, and publish the new positions."""
        self._queue.remove(job)
        self.publish_positions()

    async def dispatch(self, start: Callable[[Job], asyncio.Task[None]]) -> None:
        """Start the next job as soon as the task of the one before has ended, for ever."""
        while True:
            while not len(self._queue):
                self._wake.clear()
                await self._wake.wait()
            job = self.current = self._queue.pop(time.monotonic())
            self._order = None
            job.runtime.task = start(job)
            job.runtime.task.add_done_callback(self._on_done)
            await asyncio.wait({job.runtime.task})
            job.runtime.task = None
            self.publish_positions()

    def _on_done(self, _: asyncio.Task[None]) -> None:
        self.current = self._order = None

    # Positions and estimates

    @property
    def waiting(self) -> int:
        """Return the number of jobs that no worker has begun."""
        return len(self._queue) + (self._next is not None)

    @property
    def running(self) -> int:
        """Return the number of jobs that the workers make: one or none."""
        return int(self.current is not None) - (self._next is not None)

    @property
    def _next(self) -> Job | None:
        """Return the current job while no worker has begun it: they restart, or their adapters change."""
        job = self.current
        return job if job is not None and job.status == "queued" and not job.runtime.decided else None

    def state(self, job: Job) -> dict[str, Any]:
        """Return the data of every event and answer: status, progress, position and estimate."""
        place = self._positions().get(job)
        return job.state(None if place is None else place.position, self.eta(job))

    def eta(self, job: Job) -> float | None:
        """Return the seconds until the end of a job, if past jobs allow an estimate."""
        if job.ended:
            return None
        if job.status == "in_progress":
            return self._remaining(job)
        ahead = self._remaining(self.current) if self.current is not None and self._next is None else 0.0
        place = self._positions().get(job)
        own = self.throughput.estimate(place.cost if place is not None else job.record.cost)
        return None if own is None or ahead is None else ahead + own

    def retry_after(self) -> int:
        """Return the seconds until the queue has a free place, at least one and at most two minutes."""
        remaining = self._remaining(self.current) if self.current is not None else None
        return min(120, max(1, math.ceil(remaining if remaining is not None else 5)))

    def publish_positions(self) -> None:
        """Publish the positions of waiting jobs to their followers."""
        self._order = None
        for job in self._positions():
            if job.events.followed:
                job.events.publish("queued", self.state(job))

    def _positions(self) -> dict[Job, QueuePosition]:
        """Return the cached order, made anew when the queue has changed or jobs have aged."""
        now = time.monotonic()
        if self._order is None or now - self._order[0] > ORDER_S:
            places, cost = {}, 0.0
            begins = [self._next] if self._next is not None else []
            for position, job in enumerate([*begins, *self._queue.order(now)], 1):
                cost += job.record.cost
                places[job] = QueuePosition(position, cost)
            self._order = now, places
        return self._order[1]

    def _remaining(self, job: Job) -> float | None:
        percent, started_at = job.record.progress.percent, job.record.started_at
        estimate = self.throughput.estimate(job.record.cost)
        if percent >= 10 and started_at is not None:  # its own speed says more
            estimate = (time.time() - started_at) * 100 / percent
        return None if estimate is None else estimate * (100 - percent) / 100
