"""EventLog: the numbered events of one job, and the clients that follow them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import cached_property
from typing import Any

import attrs

_LOG_EVENTS = 1000


@attrs.frozen
class JobEvent:
    """One event of a job. Numbers rise by one."""

    number: int
    name: str  # queued, progress, preview, completed, failed or deleted
    data: dict[str, Any]

    @cached_property
    def text(self) -> str:
        """Return the event of a video as JSON, encoded once for all followers."""
        return event_text(self.name, self.data)


def event_text(name: str, data: dict[str, Any]) -> str:
    """Return the JSON that followers of a video receive."""
    return json.dumps({"type": f"video.{name}", **data})


class EventLog:
    """The latest events, kept until the job has ended and nobody reads them. Touched by the loop alone."""

    def __init__(self, number: int = 0, *, closed: bool = False):
        self.number = number  # of the last event
        self.closed = closed
        self._events: tuple[JobEvent, ...] = ()
        self._followers = 0
        self._changed: asyncio.Event | None = None  # set by the next event

    def __len__(self) -> int:
        return len(self._events)

    @property
    def followed(self) -> bool:
        """Return whether a client reads the events."""
        return self._followers > 0

    def publish(self, name: str, data: dict[str, Any], *, last: bool = False) -> None:
        """Append an event and wake the followers. After the last one the log closes."""
        self.number += 1
        self._events = (*self._events[1 - _LOG_EVENTS :], JobEvent(self.number, name, data))
        if last:
            self.close()
        else:
            self._wake()

    def close(self) -> None:
        """End the log. Followers still receive the events before its end."""
        self.closed = True
        self._drop_unread()
        self._wake()

    async def wait_closed(self) -> None:
        """Wait until the log is closed."""
        while not self.closed:
            await self._wait_for_change()

    async def follow(self, after: int) -> AsyncIterator[JobEvent]:
        """Yield the events numbered above `after` until the log is closed."""
        self._followers += 1
        try:
            while True:
                while unseen := [event for event in self._events if event.number > after]:
                    for event in unseen:
                        after = event.number
                        yield event
                if self.closed:
                    return
                await self._wait_for_change()
        finally:
            self._followers -= 1
            self._drop_unread()

    def _drop_unread(self) -> None:
        if self.closed and not self._followers:
            self._events = ()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _wait_for_change(self) -> None:
        self._changed = self._changed or asyncio.Event()
        await self._changed.wait()
