"""Engine: the asyncio face of the workers. `generate` and `serve` both drive this one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import anyio.to_thread

from sgld.engine.cancel import CancelToken
from sgld.engine.forkserver import prepare
from sgld.engine.group import Emit, WorkerGroup
from sgld.engine.lora import LoraRegistry, at_start
from sgld.engine.node import NodeListener
from sgld.engine.supervisor import EngineStatus, State, Supervisor, retrieve
from sgld.errors import ModelError, NotReady, WorkerDied
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


class Engine(AbstractAsyncContextManager["Engine"]):
    """A model on a worker group. Jobs take turns. Cancelling the task that awaits `generate` cancels the job."""

    def __init__(self, settings: Settings, group: WorkerGroup | None = None):
        self.info: ModelInfo | None = None
        self.adapters = LoraRegistry(settings)
        self._settings = settings
        self._group = group or WorkerGroup(
            settings.parallel.num_gpus,
            run_rank,
            dist_timeout_s=settings.parallel.dist_timeout,
            node_listener=NodeListener(settings) if settings.parallel.nnodes > 1 else None,
            worker_start=settings.parallel.worker_start,
        )
        self._supervisor = Supervisor(self._group)
        self._turn = asyncio.Lock()
        self._steady = asyncio.Lock()

    @property
    def state(self) -> State:
        return self._supervisor.state

    @property
    def status(self) -> EngineStatus:
        return self._supervisor.status

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let the running job end, and stop the workers. A second call does nothing."""
        await self._supervisor.stop()

    def kill(self) -> None:
        """Kill the workers from the loop. The command under way fails with `WorkerDied`."""
        self._supervisor.kill()

    async def load(self, emit: Emit) -> ModelInfo:
        """Resolve the model and its adapters, start the workers and load them. Downloads run in a thread."""
        self._supervisor.state = "loading"
        await anyio.to_thread.run_sync(prepare, self._settings.parallel.worker_start)
        command = await anyio.to_thread.run_sync(resolve_model, self._settings)
        loras = at_start(self._settings)
        found = await self.adapters.resolve(loras, "lora_path", local=True)
        try:
            self.info = await self._bring_up(command, found, emit)
        except WorkerDied as error:
            log.warning("%s while the model was loaded; it is tried once more", error)
            self.info = await self._bring_up(command, found, emit)
        if not self.adapters.restored:
            self.adapters.register(loras, found)
        await self.adapters.save()
        self._supervisor.become_ready()
        if self.info.backend != "native" and self._settings.model.backend == "auto":
            log.warning("%s: sgld has no native code for it; diffusers runs it (--backend diffusers)", self.info.name)
        if self._settings.parallel.num_gpus > 1:
            shares = " x ".join(f"{name} {degree}" for name, degree in self.info.degrees.items())
            log.info("%d workers: %s", self._settings.parallel.num_gpus, shares)
        if self.info.attention:
            log.info("attention: %s", ", ".join(f"{use} {kernel}" for use, kernel in self.info.attention.items()))
        return self.info

    async def _bring_up(self, command: Load, loras: list[LoraUse], emit: Emit) -> ModelInfo:
        """Load the model, and the adapters of the earlier server, or those of the settings."""
        info = await self._supervisor.run(self._group.load, command, _on_loop(emit))
        if self.adapters.restored:
            await self.adapters.refind()
            for reason in await self._supervisor.run(self.adapters.replay, self._group):
                raise ModelError(
                    f"the adapters that were set over HTTP cannot be set again: {reason.message}; put them back, or"
                    " give others with --lora-path, or another --output-path"
                )
        elif loras:
            check_loras(loras, info, "lora_path", "lora_target")
            await self._supervisor.run(self.adapters.apply, [SetLora(tuple(loras))], self._group)
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
        sent: set[tuple[int, int]] = set()

        def follow(event: Event) -> None:
            if event.item not in unfinished:
                return  # the call was cancelled
            if isinstance(event, OutputReady):
                del unfinished[event.item]
            elif isinstance(event, Preview):
                if (event.item, event.index) in sent:
                    return  # by the try before
                sent.add((event.item, event.index))
            emit(event)

        try:
            async with self._turn:
                await self._generate_all(job_id, unfinished, previews, follow)
        finally:
            unfinished.clear()
        self._supervisor.note_return()

    async def _generate_all(self, job_id: str, unfinished: Mapping[int, Item], previews: int, emit: Emit) -> None:
        """Try until nothing is unfinished; `emit` takes finished items away."""
        deaths = 0  # during the item under way
        while unfinished:
            before = len(unfinished)
            try:
                await self._generate(Generate(job_id, tuple(unfinished.values()), previews), emit)
            except WorkerDied as error:
                deaths = deaths + 1 if len(unfinished) == before else 1
                if deaths > self._settings.parallel.worker_retries or self.state == "stopped":
                    raise
                log.warning("%s; the output is tried again", error)
                error.__traceback__ = error.__context__ = None  # they hold `emit`, and all that it collects

    async def _generate(self, command: Generate, emit: Emit) -> None:
        token = CancelToken()  # a queued job holds no descriptor
        future = self._supervisor.submit(self._group.run, command, _on_loop(emit), token)
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
            await self._supervisor.submit(self.adapters.apply, commands(), self._group)
            then()
            await self.adapters.save()

        async with self._steady, self._turn:
            changing = asyncio.create_task(change())
            changing.add_done_callback(retrieve)
            await asyncio.shield(changing)
        self._supervisor.note_return()
        return self.adapters.state

    def _loaded(self) -> ModelInfo:
        if self.info is None:
            raise NotReady("the model is not loaded yet; try again soon")
        return self.info


def _on_loop(emit: Emit) -> Emit:
    """Return an emit for the executor thread that calls `emit` on the running loop."""
    loop = asyncio.get_running_loop()

    def from_thread(event: Event) -> None:
        loop.call_soon_threadsafe(emit, event)

    return from_thread
