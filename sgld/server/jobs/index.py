"""Catalog: jobs by id, and in the order in which they came, for everybody and for each owner."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

import attrs

from sgld.server.jobs.job import Job

EVERYBODY = None
REMEMBERED = 10_000  # removed jobs behind which a page may still begin


@attrs.frozen
class _Place:
    arrival: int
    kind: str
    owner: str


class JobIndex:
    """Jobs by arrival. A page costs what it shows, however many jobs there are."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._removed: dict[str, _Place] = {}  # where they were
        self._count = itertools.count()
        self._lines: defaultdict[tuple[str, str | None], list[Job]] = defaultdict(list)  # by kind and owner

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, job: Job) -> bool:
        return job.id in self._jobs

    def get(self, job_id: str) -> Job | None:
        """The job of that id, if it is there."""
        return self._jobs.get(job_id)

    def add(self, job: Job) -> None:
        """The last to have come."""
        assert job not in self
        self._jobs[job.id] = job
        job.arrival = next(self._count)
        for owner in (job.owner, EVERYBODY):
            self._lines[job.kind, owner].append(job)

    def remove(self, job: Job) -> None:
        """Take out a job that is there; its place is remembered, so that who deletes page by page finds the next."""
        del self._jobs[job.id]
        for owner in (job.owner, EVERYBODY):
            line = self._lines[job.kind, owner]
            del line[_index(line, job.arrival)]
            if not line:
                del self._lines[job.kind, owner]
        self._removed[job.id] = _Place(job.arrival, job.kind, job.owner)
        if len(self._removed) > REMEMBERED:
            del self._removed[next(iter(self._removed))]

    def page(
        self, kind: str, owner: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs of a kind that come after the id `after`, and whether more follow.

        Nothing comes after an id that is not known, or is not the owner's.
        """
        line = self._lines.get((kind, owner), [])
        start, end = 0, len(line)
        if after is not None:
            place = self._jobs.get(after) or self._removed.get(after)
            if place is None or place.kind != kind or owner not in (EVERYBODY, place.owner):
                return [], False
            start, end = _index(line, place.arrival + 1), _index(line, place.arrival)
        if newest_first:
            first = max(0, end - limit)
            return line[first:end][::-1], first > 0
        return line[start : start + limit], start + limit < len(line)


def _index(line: list[Job], arrival: int) -> int:
    return bisect_left(line, arrival, key=lambda job: job.arrival)
