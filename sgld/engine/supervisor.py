"""Supervisor: a worker group behind one executor thread, watched while it is idle, and revived after a death."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, TypeVar, TypeVarTuple

import attrs

from sgld.engine.group import WorkerGroup
from sgld.errors import SgldError, WorkerDied

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
State = Literal["new", "loading", "ready", "restarting", "failed", "stopped"]
REVIVALS = 3  # tries to get a group back before the engine says failed


@attrs.frozen
class EngineStatus:
    """An engine as its users read it."""

    state: State
    restarts: int  # of the ranks, since the start
    pids: tuple[int, ...]  # of the ranks on this machine, rank 0 first


class Supervisor:
    """The one user of a worker group. Its executor thread makes every blocking call.

    States: new -> loading -> ready <-> restarting; failed when the model cannot be loaded again; stopped.
    """

    def __init__(self, group: WorkerGroup):
        self.state: State = "new"
        self._group = group
        self._executor = ThreadPoolExecutor(1, "sgld-executor")
        self._watched: list[int] = []
        self._reviving: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        """Return the present status. The executor thread replaces the part of the group as a whole."""
        group = self._group.status
        return EngineStatus(self.state, group.restarts, group.pids)

    def submit(self, function: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `function` on the executor thread after all earlier ones."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        future.add_done_callback(retrieve)
        return future

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run `function` on the executor thread, to its end even if the caller is cancelled."""
        return await asyncio.shield(self.submit(function, *args))

    def become_ready(self) -> None:
        """Note that the ranks hold the model, and watch them until one dies."""
        if self.state != "stopped":
            self.state = "ready"
            self.submit(self._group.sentinels).add_done_callback(self._watch)

    def note_return(self) -> None:
        """Become ready again once a command has found the group back."""
        if self.state in ("restarting", "failed"):
            self.become_ready()

    async def stop(self) -> None:
        """Let the running command end, stop the workers and free the thread. A second call does nothing."""
        if self.state == "stopped":
            return
        self.state = "stopped"
        self._group.close()
        self._unwatch()
        if self._reviving is not None and not self._reviving.done():
            self.kill()
            await asyncio.wait([self._reviving])
        await self.run(self._group.stop)
        self._executor.shutdown(wait=False)  # idle now, and joining it would block the loop

    def kill(self) -> None:
        """Kill the workers from the loop. The command under way fails with `WorkerDied`."""
        for pid in self._group.status.pids:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)

    def _watch(self, sentinels: asyncio.Future[list[int]]) -> None:
        """Let the loop hear of a death while the group is idle."""
        self._unwatch()
        self._watched = sentinels.result()
        for descriptor in self._watched:
            asyncio.get_running_loop().add_reader(descriptor, self._on_death)
        if self.state == "stopped":
            self._unwatch()

    def _unwatch(self) -> None:
        for descriptor in self._watched:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watched = []

    def _on_death(self) -> None:
        self._unwatch()
        self.state = "restarting"
        self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        for _ in range(REVIVALS):
            try:
                await self.run(self._group.revive)
            except WorkerDied as error:
                if self.state != "stopped":
                    log.warning("a worker died while the model was loaded again: %s", error)
            except (SgldError, OSError) as error:
                log.error("the model could not be loaded again: %s", error)
                break
            else:
                self.become_ready()
                return
            if self.state == "stopped":
                return
        self.state = "failed"


def retrieve(done: asyncio.Future[T]) -> None:
    """Log a failure whose awaiter may be gone."""
    if not done.cancelled() and (error := done.exception()):
        log.debug("a command ended with %r", error)
