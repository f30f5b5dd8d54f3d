"""FairQueue: whose job is next, by priority, waiting time and the service each owner has had."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import attrs

from sgld.params import PRIORITIES

AGING_S = 60.0  # a waiting job rises one class each time this passes

T = TypeVar("T", bound=Hashable)


@attrs.frozen
class _Entry(Generic[T]):
    item: T
    owner: str
    base: int  # index into PRIORITIES
    cost: float
    since: float
    sequence: int

    def level(self, now: float) -> int:
        """Return the class the entry has risen to. A clock that steps back leaves it in its own."""
        waited = max(now - self.since, 0.0)
        return min(self.base + int(waited // AGING_S), len(PRIORITIES) - 1)


class FairQueue(Generic[T]):
    """Items by class, then by owner in turn, then first in first out. `now` is in seconds on one clock of the caller.

    Owners share a class by start-time fair queueing (Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM 1996):
    an owner's start tag is the cost of what it has been given, the lowest tag goes next, and virtual time is the
    highest tag served. An owner who comes back starts at the virtual time at least, so idling earns nothing. Once
    the queue is empty, all start as equals.
    """

    def __init__(self) -> None:
        self._entries: dict[T, _Entry[T]] = {}  # in the order of arrival
        self._count = itertools.count()
        self._queued: defaultdict[str, int] = defaultdict(int)  # entries of each owner
        self._tags: dict[str, float] = {}
        self._virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, item: T, *, owner: str, priority: str, cost: float, now: float) -> None:
        """Add an item that is not queued. `cost`, above 0, is in any unit that all owners share.

        A `now` in the past counts as time waited. Raises ValueError for a class that is not in PRIORITIES.
        """
        assert item not in self._entries and 0 < cost < math.inf
        entry = _Entry(item, owner, PRIORITIES.index(priority), cost, now, next(self._count))
        if not self._queued[owner]:
            self._tags[owner] = max(self._tags.get(owner, 0.0), self._virtual_time)
        self._queued[owner] += 1
        self._entries[item] = entry

    def pop(self, now: float) -> T:
        """Remove the next item and charge its cost to its owner. Raises IndexError if there is none."""
        if not self._entries:
            raise IndexError("the queue is empty")
        entry = next(self._in_order(now))
        self._virtual_time = max(self._virtual_time, self._tags[entry.owner])
        self._tags[entry.owner] += entry.cost
        self._forget(entry)
        return entry.item

    def remove(self, item: T) -> bool:
        """Remove an item, free of charge. Return whether it was queued."""
        entry = self._entries.get(item)
        if entry is not None:
            self._forget(entry)
        return entry is not None

    def order(self, now: float) -> list[T]:
        """Return all items in the order of pops at `now`."""
        return [entry.item for entry in self._in_order(now)]

    def _in_order(self, now: float) -> Iterator[_Entry[T]]:
        """Yield the entries in the order of their turns; O(n) to the first, O(n log owners) to the last."""
        lines: dict[int, defaultdict[str, deque[_Entry[T]]]] = defaultdict(lambda: defaultdict(deque))
        for entry in self._entries.values():
            lines[entry.level(now)][entry.owner].append(entry)
        tags = dict(self._tags)
        for level in sorted(lines, reverse=True):
            heads = [(tags[owner], line[0].sequence, line) for owner, line in lines[level].items()]
            heapq.heapify(heads)
            while heads:
                line = heads[0][2]
                entry = line.popleft()
                yield entry
                tags[entry.owner] += entry.cost
                if line:
                    heapq.heapreplace(heads, (tags[entry.owner], line[0].sequence, line))
                else:
                    heapq.heappop(heads)

    def _forget(self, entry: _Entry[T]) -> None:
        del self._entries[entry.item]
        self._queued[entry.owner] -= 1
        if not self._entries:
            self._queued.clear()
            self._tags.clear()
            self._virtual_time = 0.0
