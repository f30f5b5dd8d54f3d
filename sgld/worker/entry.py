"""run_rank: the main function of a worker process. Receive a command, carry it out, answer once."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgld import config
from sgld.errors import OutOfMemory, SgldError, first_line
from sgld.messages import (
    Audio,
    Cancel,
    Cancelled,
    Command,
    Done,
    Event,
    Failed,
    Generate,
    Load,
    LoraCommand,
    LoraState,
    Media,
    Progress,
    RankAssignment,
    SetLora,
    SharedFrames,
    Stop,
    Terminal,
    Timings,
    send,
)
from sgld.params import ModelInfo, OutputParams
from sgld.worker.interface import interface_to

if TYPE_CHECKING:
    from sgld.worker.run_context import RunContext
    from sgld.worker.sampler import SharedEncoding


def run_rank(assignment: RankAssignment, connection: Connection) -> None:
    """Serve commands until `Stop`, or until the group is gone. Only `Stop` makes a rank exit with 0."""
    from sgld.models import load_family

    serve(assignment, connection, load_family)


def serve(assignment: RankAssignment, connection: Connection, load_family: Callable[..., Any]) -> None:
    """Serve commands with that loader of models. Tests bring one that fails on purpose."""
    try:
        prepare_process(assignment)
        worker = Worker(assignment, connection, load_family)
    except Exception as error:
        connection.send(_failed(error))
        sys.exit(1)
    try:
        worker.run()
    finally:
        worker.mesh.leave()


class Worker:
    """A rank: its mesh, and the model it has loaded."""

    def __init__(self, assignment: RankAssignment, connection: Connection, load_family: Callable[..., Any]):
        from sgld.nn.parallel import Mesh
        from sgld.platform import choose_platform

        self.platform = choose_platform()
        self.platform.set_up(assignment.local_rank, assignment.local_world)
        self.mesh = Mesh.join(assignment, self.platform)
        self._connection = connection
        self._load_family = load_family
        self._family: Any = None
        self._adapters: Any = None

    def run(self) -> None:
        while (command := self._next()) is not None:
            answer = self._answer(command)
            with suppress(BrokenPipeError, ConnectionResetError):  # the group is gone, and `_next` will say so
                send(self._connection, answer)

    def _next(self) -> Command | None:
        """Receive the next command, or None for `Stop`. Drop a late `Cancel`. Exit when the group is gone."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                sys.exit(1)
            if isinstance(message, Stop):
                return None
            if not isinstance(message, Cancel):
                command: Command = message
                return command

    def _answer(self, command: Command) -> Terminal:
        from sgld.worker.run_context import Stopped

        try:
            if isinstance(command, Load):
                return Done(self._load(command))
            if isinstance(command, Generate):
                self._generate(command)
                return Done()
            return Done(self._adapt(command))
        except Stopped as stopped:
            return Cancelled(stopped.where)
        except Exception as error:  # the one place where a rank's fault becomes its answer
            failed = _failed(error, out_of_memory=self.platform.is_out_of_memory(error))
        gc.collect()
        self.platform.release_memory()
        return failed

    def _load(self, command: Load) -> ModelInfo | None:
        from sgld.models.base import OpaquePipeline
        from sgld.worker import solvers
        from sgld.worker.adapters import Adapters

        self._family = self._adapters = None
        family = self._load_family(command, self.mesh, self.platform, self._loading)
        if not isinstance(family, OpaquePipeline):
            solvers.check(family.scheduler)
        self._family, self._adapters = family, Adapters(family.lora, self.mesh)
        return family.info if self.mesh.rank == 0 else None

    def _loading(self, step: int, total: int) -> None:
        self._emit(Progress("", "load", step, total))

    def _generate(self, command: Generate) -> None:
        from sgld.worker.run_context import RunContext
        from sgld.worker.sampler import SharedEncoding

        shared = SharedEncoding()
        for item in command.items:
            more = item is not command.items[-1]
            context = RunContext(
                command.job_id, self.mesh, self._connection, self.platform.synchronize, item=item.index, more=more
            )
            self._make(item.params, context, command.previews, shared)

    def _make(self, params: OutputParams, context: RunContext, previews: int, shared: SharedEncoding) -> None:
        """Make one output, and send it from rank 0."""
        from sgld.worker.sampler import sample

        for warning in self._adapters.activate(params.loras):
            context.note(warning)
        needs = self._family.info.memory_needs(params)
        if max(needs.values(), default=0) > self.platform.free_memory():
            self._adapters.release()
        frames, sound = sample(self._family, params, context, previews, shared)
        with context.rank0_alone():
            if self.mesh.rank == 0:
                timings = Timings(context.stages_ms, context.steps_ms, self.platform.peak_memory())
                audio = None if sound is None else Audio(sound.samples.float().cpu().numpy(), sound.rate)
                shared_frames = SharedFrames.of(frames.numpy())
                context.output(Media(shared_frames, params.fps, params.seed, timings, context.tokens, audio))

    def _adapt(self, command: LoraCommand) -> LoraState | None:
        adapters = self._adapters
        state: LoraState = adapters.set(command) if isinstance(command, SetLora) else adapters.unmerge(command)
        return state if self.mesh.rank == 0 else None

    def _emit(self, event: Event) -> None:
        if self.mesh.rank == 0:
            self._connection.send(event)


def _failed(error: Exception, *, out_of_memory: bool = False) -> Failed:
    trace = "".join(traceback.format_exception(error))
    if out_of_memory:
        hint = "ask for fewer frames, a smaller size, or more workers"
        return Failed(OutOfMemory(f"out of memory: {hint} ({first_line(error)})"), trace)
    if isinstance(error, SgldError):
        return Failed(error, trace)
    return Failed(SgldError(f"{type(error).__name__}: {first_line(error)}"), trace)


def preload() -> None:
    """Import everything that a rank needs before it loads a model. Touch neither CUDA nor torch's threads."""
    _wait_passively()
    from sgld.models import REGISTRY

    modules = {f"sgld.models.{entry.partition(':')[0]}" for entry in REGISTRY.values()}
    for name in ("sgld.worker.adapters", "sgld.worker.sampler", *sorted(modules)):
        importlib.import_module(name)


def exit_with_parent(sentinel: int | Connection) -> None:
    """End this process as soon as `sentinel` is readable, in the middle of a collective or a long step too."""

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="sgld-parent-watch", daemon=True).start()


def name_process(name: str) -> None:
    """Name this process for `ps` and `top`, in at most 15 characters."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def prepare_process(assignment: RankAssignment) -> None:
    """Set the signals, standard output, name and environment of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output belongs to the parent: its last line is a path
    name_process(f"sgld-rank{assignment.rank}")
    _wait_passively()
    # workers of one machine talk over loopback alone
    interface = "lo" if isinstance(assignment.rendezvous, Path) else interface_to(*assignment.rendezvous)
    if interface is not None:
        config.set_default_environment(GLOO_SOCKET_IFNAME=interface)


def _wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait: those that spin starve the other processes."""
    config.set_default_environment(OMP_WAIT_POLICY="passive")  # read as torch is imported
