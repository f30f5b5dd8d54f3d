"""Engine: the asyncio face of the workers. `generate` and `serve` both drive this one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import anyio.to_thread

from sgld.config import Settings
from sgld.engine.cancel import CancelToken
from sgld.engine.group import Emit, WorkerGroup
from sgld.engine.lora import AdapterNames, LoraPlan, at_start
from sgld.engine.node import NodeListener
from sgld.errors import ModelError, NotReady, SgldError, WorkerDied
from sgld.hub.hub import resolve_model
from sgld.messages import (
    Event,
    Generate,
    Item,
    ListLoras,
    Load,
    LoraCommand,
    LoraState,
    MergeLora,
    MergeMode,
    OutputReady,
    Preview,
    SetLora,
    UnmergeLora,
)
from sgld.params import LoraUse, ModelInfo, OutputParams, check_lora_target, check_loras
from sgld.worker.entry import run_rank

log = logging.getLogger(__name__)
T = TypeVar("T")
REVIVALS = 3  # tries to get a group back before the engine says failed


class Engine:
    """One worker group behind one executor thread. Cancelling the task that awaits `generate` cancels the job.

    States: new -> loading -> ready <-> restarting; failed when the model cannot be loaded again; stopped.
    """

    def __init__(self, settings: Settings, group: WorkerGroup | None = None):
        self.settings = settings
        self.state = "new"
        self.info: ModelInfo | None = None
        self.adapters = AdapterNames()
        self.kept: LoraPlan | None = None  # the adapters of the server before this one
        self.keep: Callable[[LoraPlan], Awaitable[None]] = _forget
        node_listener = NodeListener(settings) if settings.nnodes > 1 else None
        self.group = group or WorkerGroup(
            settings.num_gpus, run_rank, dist_timeout_s=settings.dist_timeout, node_listener=node_listener
        )
        self._executor = ThreadPoolExecutor(1, "sgld-executor")
        self._watched: list[int] = []
        self._reviving: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._steady = asyncio.Lock()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def load(self, emit: Emit) -> ModelInfo:
        """Resolve the model and its adapters (downloads run in a thread), start the workers and load them."""
        self.state = "loading"
        command = await anyio.to_thread.run_sync(resolve_model, self.settings)
        loras = at_start(self.settings)
        found = await self.adapters.resolve(loras, "lora_path", local=True)
        try:
            self.info = await self._bring_up(command, found, emit)
        except WorkerDied as error:
            log.warning("%s while the model was loaded; it is tried once more", error)
            self.info = await self._bring_up(command, found, emit)
        if self.kept is None:
            self.adapters.register(loras, found)
        await self._remember()
        self._become_ready()
        if self.info.backend != "native" and self.settings.backend == "auto":
            log.warning("%s: sgld has no native code for it; diffusers runs it (--backend diffusers)", self.info.name)
        if self.settings.num_gpus > 1:
            shares = " x ".join(f"{name} {degree}" for name, degree in self.info.degrees.items())
            log.info("%d workers: %s", self.settings.num_gpus, shares)
        if self.info.attention:
            log.info("attention: %s", ", ".join(f"{use} {kernel}" for use, kernel in self.info.attention.items()))
        return self.info

    async def _bring_up(self, command: Load, loras: list[LoraUse], emit: Emit) -> ModelInfo:
        """Workers with the model, and with the adapters of the settings or those that outlived the server before."""
        info = await self._in_executor(self.group.load, command, self._on_loop(emit))
        if self.kept is not None:
            await self._restore(self.kept)
        elif loras:
            check_loras(loras, info, "lora_path", "lora_target")
            await self._in_executor(self.group.run, SetLora(tuple(loras)))
        return info

    async def _restore(self, kept: LoraPlan) -> None:
        """Jobs that outlived a server are made with the adapters they were asked for, or not at all."""
        self.adapters.known.update(kept.known)
        state = await self.adapters.sought_again(kept.state)
        for reason in await self._in_executor(self.group.restore, state):
            raise ModelError(
                f"the adapters that were set over HTTP cannot be set again: {reason.message}; put them back, or give"
                " others with --lora-path, or another --output-path"
            )

    async def _remember(self) -> None:
        settings = self.settings
        await self.keep(LoraPlan(settings.model_path, at_start(settings), dict(self.adapters.known), self.group.loras))

    async def generate(self, job_id: str, items: Sequence[OutputParams], emit: Emit, previews: int = 0) -> None:
        """Make one output for each of `items`, in turn. Jobs run one at a time, in the order of their calls.

        `emit` is called on the loop with every event, and never after this call has ended. `OutputReady` brings each
        output as soon as it is finished, exactly once. `Preview` comes at most `previews` times for each, and at most
        once a step before the last. After a worker's death the items that are not finished are tried again, each up to
        `worker_retries` times.

        Raises:
            errors.Cancelled: never; a cancelled task raises asyncio.CancelledError as any other.
            SgldError: what went wrong, `WorkerDied` included; the next job finds a working group.
        """
        unfinished = {index: Item(index, params) for index, params in enumerate(items)}
        shown: set[tuple[int, int]] = set()

        def follow(event: Event) -> None:
            if event.item not in unfinished:
                return  # the call was cancelled
            if isinstance(event, OutputReady):
                del unfinished[event.item]
            elif isinstance(event, Preview):
                if (event.item, event.index) in shown:
                    return  # by the try before
                shown.add((event.item, event.index))
            emit(event)

        try:
            async with self._turn:
                await self._generate_all(job_id, unfinished, previews, follow)
        finally:
            unfinished.clear()
        self._note_return()

    async def _generate_all(self, job_id: str, unfinished: Mapping[int, Item], previews: int, emit: Emit) -> None:
        """Try until nothing is unfinished; `emit` takes finished items away."""
        deaths = 0  # during the item under way
        while unfinished:
            before = len(unfinished)
            try:
                await self._generate(Generate(job_id, tuple(unfinished.values()), previews), emit)
            except WorkerDied as error:
                deaths = deaths + 1 if len(unfinished) == before else 1
                if deaths > self.settings.worker_retries or self.state == "stopped":
                    raise
                log.warning("%s; the output is tried again", error)
                error.__traceback__ = error.__context__ = None  # they hold `emit`, and all that it collects

    async def _generate(self, command: Generate, emit: Emit) -> None:
        token = CancelToken()  # a queued job holds no descriptor
        future = self._submit(self.group.run, command, self._on_loop(emit), token)
        future.add_done_callback(lambda _: token.close())
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            token.set()
            raise

    async def set_lora(self, loras: Sequence[LoraUse], merge_mode: MergeMode = "auto") -> LoraState:
        """Let these adapters hold from now on, in the parts of the model that they are for, and know them by name.

        Files are sought and downloaded at once; the change waits for its turn among the generations.

        Raises:
            BadRequest: an adapter that is not there, or does not fit; nothing has changed then.
        """
        check_loras(loras, self._loaded(), "lora_path")
        found = await self.adapters.resolve(loras, "lora_path", local=True)
        return await self._adapt(SetLora(tuple(found), merge_mode), lambda: self.adapters.register(loras, found))

    async def merge_lora(self, target: str = "all", strength: float = 1.0) -> LoraState:
        """Let the adapters that were last set hold again, with this strength. Raises BadRequest if there are none."""
        check_lora_target(target, self._loaded())
        return await self._adapt(MergeLora(target, strength))

    async def unmerge_lora(self, target: str = "all") -> LoraState:
        """Take all adapters of `target` away: every weight is what it was."""
        check_lora_target(target, self._loaded())
        return await self._adapt(UnmergeLora(target))

    async def list_loras(self) -> LoraState:
        """What the workers say that holds; `group.loras` is the same without waiting for a turn."""
        return await self._adapt(ListLoras())

    def steady(self) -> asyncio.Lock:
        """While this is held, no adapters are set or taken away: all outputs of a job are made alike."""
        return self._steady

    async def _adapt(self, command: LoraCommand, then: Callable[[], None] = lambda: None) -> LoraState:
        """Carry it out to its end, even if the caller is cancelled meanwhile; `then` follows a success."""

        async def change() -> LoraState:
            state: LoraState = await self._submit(self.group.run, command)
            then()
            await self._remember()
            return state

        async with self._steady, self._turn:
            changing = asyncio.create_task(change())
            changing.add_done_callback(_retrieve)
            state = await asyncio.shield(changing)
        self._note_return()
        return state

    def _loaded(self) -> ModelInfo:
        if self.info is None:
            raise NotReady("the model is not loaded yet; try again soon")
        return self.info

    def _note_return(self) -> None:
        """The group is back after a death, whoever got it there."""
        if self.state in ("restarting", "failed"):
            self._become_ready()

    async def stop(self) -> None:
        """Let the running job end, stop the workers, and free the thread; once."""
        if self.state == "stopped":
            return
        self.state = "stopped"
        self.group.close()
        self._unwatch()
        if self._reviving is not None and not self._reviving.done():
            self.kill()
            await asyncio.wait([self._reviving])
        await self._in_executor(self.group.stop)
        self._executor.shutdown(wait=False)  # idle now, and joining it would block the loop

    def kill(self) -> None:
        """End the workers at once, from the loop: the command under way fails with `WorkerDied`."""
        for pid in self.group.pids:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)

    def _submit(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        future.add_done_callback(_retrieve)
        return future

    async def _in_executor(self, function: Callable[..., T], *args: Any) -> T:
        """`function` on the executor thread; it runs to its end even if the caller is cancelled."""
        return await asyncio.shield(self._submit(function, *args))

    def _on_loop(self, emit: Emit) -> Emit:
        loop = asyncio.get_running_loop()

        def from_thread(event: Event) -> None:
            loop.call_soon_threadsafe(emit, event)

        return from_thread

    def _become_ready(self) -> None:
        if self.state != "stopped":
            self.state = "ready"
            self._unwatch()
            self._watch()

    def _watch(self) -> None:
        """Hear of a death while idle: the loop watches copies of the sentinels; it never talks to a rank."""
        loop = asyncio.get_running_loop()
        self._watched = [os.dup(sentinel) for sentinel in self.group.sentinels]
        for descriptor in self._watched:
            loop.add_reader(descriptor, self._on_death)

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
                await self._in_executor(self.group.revive)
            except WorkerDied as error:
                if self.state != "stopped":
                    log.warning("a worker died while the model was loaded again: %s", error)
            except (SgldError, OSError) as error:
                log.error("the model could not be loaded again: %s", error)
                break
            else:
                self._become_ready()
                return
            if self.state == "stopped":
                return
        self.state = "failed"


async def _forget(_: LoraPlan) -> None:
    """For an engine whose adapters end with it."""


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Take note of a failure whose awaiter may be gone."""
    if not done.cancelled() and (error := done.exception()):
        log.debug("a command ended with %r", error)
