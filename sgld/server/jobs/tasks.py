"""Tasks: the background tasks of the jobs; a graceful stop waits for the critical ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """A set of tasks with a subset of critical ones."""

    def __init__(self) -> None:
        self._all: set[asyncio.Task[Any]] = set()
        self._critical: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work in a task that is cancelled when the server stops."""
        task = asyncio.create_task(work)
        self._all.add(task)
        task.add_done_callback(self._all.discard)
        return task

    def spawn_critical(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work that a graceful stop waits for."""
        task = self.spawn(work)
        self._critical.add(task)
        task.add_done_callback(self._critical.discard)
        return task

    async def wait_critical(self, seconds: float = float("inf")) -> None:
        """Wait until no critical task is left, at most so long."""
        deadline = time.monotonic() + seconds
        while self._critical and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._critical, timeout=None if left == float("inf") else left)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their ends."""
        for task in self._all:
            task.cancel()
        while self._all:
            await asyncio.wait(self._all)
