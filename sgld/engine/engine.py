"""Engine: the asyncio face of the workers. `generate` and `serve` both drive this one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, TypeVar

import anyio.to_thread
import attrs

from sgld.engine.cancel import CancelToken
from sgld.engine.forkserver import prepare
from sgld.engine.group import Emit, WorkerGroup
from sgld.engine.lora import LoraRegistry, at_start
from sgld.engine.node import NodeListener
from sgld.errors import BadRequest, ModelError, NotReady, SgldError, WorkerDied
from sgld.hub.hub import resolve_model
from sgld.messages import (
    Event,
    Generate,
    Item,
    Load,
    LoraCommand,
    LoraState,
    MergeMode,
    OutputReady,
    Preview,
    SetLora,
    UnmergeLora,
)
from sgld.params import LoraUse, ModelInfo, OutputParams, check_lora_target, check_loras
from sgld.settings import Settings
from sgld.worker.entry import run_rank

log = logging.getLogger(__name__)
T = TypeVar("T")
State = Literal["new", "loading", "ready", "restarting", "failed", "stopped"]
REVIVALS = 3  # tries to get a group back before the engine says failed


@attrs.frozen
class EngineStatus:
    """An engine as its users read it."""

    state: State
    restarts: int  # of the ranks, since the start
    pids: tuple[int, ...]  # of the ranks on this machine, rank 0 first


class Engine:
    """One worker group behind one executor thread. Cancelling the task that awaits `generate` cancels the job.

    States: new -> loading -> ready <-> restarting; failed when the model cannot be loaded again; stopped.
    """

    def __init__(self, settings: Settings, group: WorkerGroup | None = None):
        self.settings = settings
        self.state: State = "new"
        self.info: ModelInfo | None = None
        self.adapters = LoraRegistry(settings)
        node_listener = NodeListener(settings) if settings.parallel.nnodes > 1 else None
        self._group = group or WorkerGroup(
            settings.parallel.num_gpus,
            run_rank,
            dist_timeout_s=settings.parallel.dist_timeout,
            node_listener=node_listener,
            worker_start=settings.parallel.worker_start,
        )
        self._executor = ThreadPoolExecutor(1, "sgld-executor")
        self._watched: list[int] = []
        self._reviving: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._steady = asyncio.Lock()

    @property
    def status(self) -> EngineStatus:
        """Return the present status. The executor thread replaces the part of the group as a whole."""
        group = self._group.status
        return EngineStatus(self.state, group.restarts, group.pids)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def load(self, emit: Emit) -> ModelInfo:
        """Resolve the model and its adapters, start the workers and load them. Downloads run in a thread."""
        self.state = "loading"
        await anyio.to_thread.run_sync(prepare, self.settings.parallel.worker_start)
        command = await anyio.to_thread.run_sync(resolve_model, self.settings)
        loras = at_start(self.settings)
        found = await self.adapters.resolve(loras, "lora_path", local=True)
        try:
            self.info = await self._bring_up(command, found, emit)
        except WorkerDied as error:
            log.warning("%s while the model was loaded; it is tried once more", error)
            self.info = await self._bring_up(command, found, emit)
        if not self.adapters.restored:
            self.adapters.register(loras, found)
        await self.adapters.save()
        self._become_ready()
        if self.info.backend != "native" and self.settings.model.backend == "auto":
            log.warning("%s: sgld has no native code for it; diffusers runs it (--backend diffusers)", self.info.name)
        if self.settings.parallel.num_gpus > 1:
            shares = " x ".join(f"{name} {degree}" for name, degree in self.info.degrees.items())
            log.info("%d workers: %s", self.settings.parallel.num_gpus, shares)
        if self.info.attention:
            log.info("attention: %s", ", ".join(f"{use} {kernel}" for use, kernel in self.info.attention.items()))
        return self.info

    async def _bring_up(self, command: Load, loras: list[LoraUse], emit: Emit) -> ModelInfo:
        """Load the model, and the adapters of the earlier server, or those of the settings."""
        info = await self._in_executor(self._group.load, command, self._on_loop(emit))
        if self.adapters.restored:
            await self.adapters.refind()
            for reason in await self._in_executor(self._replay_loras):
                raise ModelError(
                    f"the adapters that were set over HTTP cannot be set again: {reason.message}; put them back, or"
                    " give others with --lora-path, or another --output-path"
                )
        elif loras:
            check_loras(loras, info, "lora_path", "lora_target")
            await self._in_executor(self._change_loras, [SetLora(tuple(loras))])
        return info

    async def generate(self, job_id: str, items: Sequence[OutputParams], emit: Emit, previews: int = 0) -> None:
        """Make one output for each of `items`, in turn. Jobs run one at a time, in the order of their calls.

        `emit` is called on the loop with every event, and never after this call has ended. `OutputReady` brings each
        output as soon as it is finished, exactly once. `Preview` comes at most `previews` times for each, and at most
        once a step before the last. After a worker's death the items that are not finished are tried again, each up to
        `worker_retries` times.

        Raises:
            errors.JobCancelled: never; a cancelled task raises asyncio.CancelledError as any other.
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
                if deaths > self.settings.parallel.worker_retries or self.state == "stopped":
                    raise
                log.warning("%s; the output is tried again", error)
                error.__traceback__ = error.__context__ = None  # they hold `emit`, and all that it collects

    async def _generate(self, command: Generate, emit: Emit) -> None:
        token = CancelToken()  # a queued job holds no descriptor
        future = self._submit(self._group.run, command, self._on_loop(emit), token)
        future.add_done_callback(lambda _: token.close())
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            token.set()
            raise

    async def set_lora(self, loras: Sequence[LoraUse], merge_mode: MergeMode = "auto") -> LoraState:
        """Replace the adapters of the components that `loras` target, and register the nicknames.

        Files are looked up and downloaded at once. The change waits for its turn among the generations.

        Raises:
            BadRequest: an adapter is missing or does not fit. Nothing has changed then.
        """
        check_loras(loras, self._loaded(), "lora_path")
        found = await self.adapters.resolve(loras, "lora_path", local=True)
        commands: list[LoraCommand] = [SetLora(tuple(found), merge_mode)]
        return await self._adapt(lambda: commands, lambda: self.adapters.register(loras, found))

    async def merge_lora(self, target: str = "all", strength: float = 1.0) -> LoraState:
        """Apply the adapters that were last set for `target`, with this strength. Raise BadRequest without any."""
        check_lora_target(target, self._loaded())
        return await self._adapt(lambda: self.adapters.merging(target, strength))

    async def unmerge_lora(self, target: str = "all") -> LoraState:
        """Take all adapters of `target` away. Every weight is restored."""
        check_lora_target(target, self._loaded())
        return await self._adapt(lambda: [UnmergeLora(target)])

    def steady(self) -> asyncio.Lock:
        """Return the lock that keeps the adapters as they are, so that all outputs of a job are made alike."""
        return self._steady

    async def _adapt(
        self, commands: Callable[[], list[LoraCommand]], then: Callable[[], None] = lambda: None
    ) -> LoraState:
        """Carry out the commands of that turn, even if the caller is cancelled. Call `then` after a success."""

        async def change() -> None:
            await self._submit(self._change_loras, commands())
            then()
            await self.adapters.save()

        async with self._steady, self._turn:
            changing = asyncio.create_task(change())
            changing.add_done_callback(_retrieve)
            await asyncio.shield(changing)
        self._note_return()
        return self.adapters.state

    def _change_loras(self, commands: list[LoraCommand]) -> None:
        """Carry out each command and keep the plan of new ranks in step. Runs on the executor thread."""
        for command in commands:
            changed = self.adapters.update(command, self._group.run(command))
            self._group.set_replay(self.adapters.commands(), changed)

    def _replay_loras(self) -> list[BadRequest]:
        self._group.set_replay(self.adapters.commands())
        return self._group.catch_up()

    def _loaded(self) -> ModelInfo:
        if self.info is None:
            raise NotReady("the model is not loaded yet; try again soon")
        return self.info

    def _note_return(self) -> None:
        """Become ready again once a command has found the group back."""
        if self.state in ("restarting", "failed"):
            self._become_ready()

    async def stop(self) -> None:
        """Let the running job end, stop the workers and free the thread. A second call does nothing."""
        if self.state == "stopped":
            return
        self.state = "stopped"
        self._group.close()
        self._unwatch()
        if self._reviving is not None and not self._reviving.done():
            self.kill()
            await asyncio.wait([self._reviving])
        await self._in_executor(self._group.stop)
        self._executor.shutdown(wait=False)  # idle now, and joining it would block the loop

    def kill(self) -> None:
        """Kill the workers from the loop. The command under way fails with `WorkerDied`."""
        for pid in self.status.pids:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)

    def _submit(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        future.add_done_callback(_retrieve)
        return future

    async def _in_executor(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the executor thread, to its end even if the caller is cancelled."""
        return await asyncio.shield(self._submit(function, *args))

    def _on_loop(self, emit: Emit) -> Emit:
        loop = asyncio.get_running_loop()

        def from_thread(event: Event) -> None:
            loop.call_soon_threadsafe(emit, event)

        return from_thread

    def _become_ready(self) -> None:
        if self.state != "stopped":
            self.state = "ready"
            self._submit(self._group.sentinels).add_done_callback(self._watch)

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
                await self._in_executor(self._group.revive)
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


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Log a failure whose awaiter may be gone."""
    if not done.cancelled() and (error := done.exception()):
        log.debug("a command ended with %r", error)
