"""Catalog: jobs in the order in which they came, for everybody and for each owner."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict

from sgld.server.jobs import Job

EVERYBODY = None


class Catalog:
    """Jobs by arrival. A page costs what it shows, however many jobs there are."""

    def __init__(self) -> None:
        self._arrival: dict[Job, int] = {}
        self._count = itertools.count()
        self._lines: defaultdict[tuple[str, str | None], list[Job]] = defaultdict(list)  # by kind and owner

    def add(self, job: Job) -> None:
        """The last to have come."""
        assert job not in self._arrival
        self._arrival[job] = next(self._count)
        for owner in (job.owner, EVERYBODY):
            self._lines[job.kind, owner].append(job)

    def remove(self, job: Job) -> None:
        """Forget a job that is there."""
        for owner in (job.owner, EVERYBODY):
            line = self._lines[job.kind, owner]
            del line[self._index(line, job)]
            if not line:
                del self._lines[job.kind, owner]
        del self._arrival[job]

    def page(
        self, kind: str, owner: str | None, *, after: Job | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs of a kind that come after `after`, and whether more follow."""
        line = self._lines.get((kind, owner), [])
        if newest_first:
            end = len(line) if after is None else self._index(line, after)
            first = max(0, end - limit)
            return line[first:end][::-1], first > 0
        start = 0 if after is None else self._index(line, after) + 1
        return line[start : start + limit], start + limit < len(line)

    def _index(self, line: list[Job], job: Job) -> int:
        return bisect_left(line, self._arrival[job], key=self._arrival.__getitem__)
