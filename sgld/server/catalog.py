"""Catalog: jobs in the order in which they came, for everybody and for each owner."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict, deque

import attrs

from sgld.server.jobs import Job

EVERYBODY = None
REMEMBERED = 10_000  # removed jobs behind which a page may still begin


@attrs.frozen
class _Place:
    number: int
    kind: str
    owner: str


class Catalog:
    """Jobs by arrival. A page costs what it shows, however many jobs there are."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}  # by id, of the removed ones too
        self._removed: deque[str] = deque()
        self._count = itertools.count()
        self._lines: defaultdict[tuple[str, str | None], list[Job]] = defaultdict(list)  # by kind and owner

    def add(self, job: Job) -> None:
        """The last to have come."""
        assert job.id not in self._places
        self._places[job.id] = _Place(next(self._count), job.kind, job.owner)
        for owner in (job.owner, EVERYBODY):
            self._lines[job.kind, owner].append(job)

    def remove(self, job: Job) -> None:
        """Take out a job that is there; its place is remembered, so that who deletes page by page finds the next."""
        number = self._places[job.id].number
        for owner in (job.owner, EVERYBODY):
            line = self._lines[job.kind, owner]
            del line[self._index(line, number)]
            if not line:
                del self._lines[job.kind, owner]
        self._removed.append(job.id)
        if len(self._removed) > REMEMBERED:
            del self._places[self._removed.popleft()]

    def page(
        self, kind: str, owner: str | None, *, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs of a kind that come after the id `after`, and whether more follow.

        Nothing comes after an id that is not known, or is not the owner's.
        """
        line = self._lines.get((kind, owner), [])
        start, end = 0, len(line)
        if after is not None:
            place = self._places.get(after)
            if place is None or place.kind != kind or owner not in (EVERYBODY, place.owner):
                return [], False
            start, end = self._index(line, place.number + 1), self._index(line, place.number)
        if newest_first:
            first = max(0, end - limit)
            return line[first:end][::-1], first > 0
        return line[start : start + limit], start + limit < len(line)

    def _index(self, line: list[Job], number: int) -> int:
        return bisect_left(line, number, key=lambda job: self._places[job.id].number)
