"""JobIndex: jobs by id, by Idempotency-Key, and in order of arrival for everybody and for each owner."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

import attrs

from sgld.errors import BadRequest
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord

EVERYBODY = None
REMEMBERED = 10_000  # removed jobs behind which a page may still begin


@attrs.frozen
class _Entry:
    arrival: int
    kind: str
    owner: str


class JobIndex:
    """The jobs of this server. The cost of a page does not depend on the number of jobs."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._entries: dict[str, _Entry] = {}  # of present jobs
        self._removed: dict[str, _Entry] = {}
        self._count = itertools.count()
        self._by_arrival: defaultdict[tuple[str, str | None], list[Job]] = defaultdict(list)  # by kind and owner
        self._by_key: dict[tuple[str, str | None], Job] = {}  # by owner and Idempotency-Key

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, job: Job) -> bool:
        return job.id in self._jobs

    def get(self, job_id: str) -> Job | None:
        """Return the job with that id, if it is present."""
        return self._jobs.get(job_id)

    def add(self, job: Job) -> None:
        """Add a job behind all others."""
        assert job not in self
        self._jobs[job.id] = job
        self._entries[job.id] = _Entry(next(self._count), job.kind, job.owner)
        for owner in (job.owner, EVERYBODY):
            self._by_arrival[job.kind, owner].append(job)
        if job.record.idempotency_key is not None and job.status != "failed":
            self._by_key[job.owner, job.record.idempotency_key] = job

    def remove(self, job: Job) -> None:
        """Remove a job. Its place is remembered, so that a client may delete page by page."""
        self.release_key(job)
        if self._jobs.pop(job.id, None) is None:
            return
        entry = self._entries[job.id]
        for owner in (job.owner, EVERYBODY):
            jobs = self._by_arrival[job.kind, owner]
            del jobs[bisect_left(jobs, entry.arrival, key=self._arrival)]
            if not jobs:
                del self._by_arrival[job.kind, owner]
        self._removed[job.id] = self._entries.pop(job.id)
        if len(self._removed) > REMEMBERED:
            del self._removed[next(iter(self._removed))]

    def page(
        self, kind: str, owner: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """Return at most `limit` jobs of a kind behind the id `after`, and whether more follow.

        Nothing follows an id that is unknown or belongs to another owner.
        """
        jobs = self._by_arrival.get((kind, owner), [])
        start, end = 0, len(jobs)
        if after is not None:
            entry = self._entries.get(after) or self._removed.get(after)
            if entry is None or entry.kind != kind or owner not in (EVERYBODY, entry.owner):
                return [], False
            start = bisect_left(jobs, entry.arrival + 1, key=self._arrival)
            end = bisect_left(jobs, entry.arrival, key=self._arrival)
        if newest_first:
            first = max(0, end - limit)
            return jobs[first:end][::-1], first > 0
        return jobs[start : start + limit], start + limit < len(jobs)

    def find_repeated(self, record: JobRecord) -> Job | None:
        """Return the job that the Idempotency-Key of a request belongs to. Raises BadRequest for another request."""
        if record.idempotency_key is None:
            return None
        before = self._by_key.get((record.owner, record.idempotency_key))
        if before is not None and before.record.digest != record.digest:
            raise BadRequest("it came before with another request; take a new one", field="Idempotency-Key")
        return before

    def release_key(self, job: Job) -> None:
        """Free the Idempotency-Key of a job for a new one."""
        key = job.owner, job.record.idempotency_key
        if self._by_key.get(key) is job:
            del self._by_key[key]

    def _arrival(self, job: Job) -> int:
        return self._entries[job.id].arrival
