"""WorkerGroup: ranks, and the one blocking call that gives them a command.

Only the executor thread calls into a group. Every command is answered by one terminal event from every rank;
anything else (a dead rank, a rank that fails while its peers wait in a collective, a cancel that is not heeded)
kills the whole group, and the next command finds a new one with the same model loaded. No tensor crosses the pipes,
so the parent never imports torch. Other threads read `status`, and call `close`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import attrs

from sgld.engine.cancel import CancelToken
from sgld.engine.forkserver import RankProcess, Target, start_rank
from sgld.engine.node import NodeListener, Remote, listen
from sgld.errors import BadRequest, JobCancelled, NotReady, SgldError, WorkerDied
from sgld.messages import (
    Cancel,
    Cancelled,
    Command,
    Done,
    Event,
    Failed,
    Generate,
    Load,
    Progress,
    RankAssignment,
    SharedFrames,
    Stop,
    Terminal,
    frames_of,
)
from sgld.params import ModelInfo

log = logging.getLogger(__name__)
Emit = Callable[[Event], None]


def _ignore(_: Event) -> None:
    """Drop the event."""


@attrs.frozen
class GroupStatus:
    """A group as other threads read it."""

    restarts: int = 0
    pids: tuple[int, ...] = ()  # of the ranks on this machine, rank 0 first


@attrs.frozen
class Patience:
    """Seconds that a group waits before it gives its ranks up."""

    after_failure: float = 10.0  # for the peers of a rank that failed
    after_cancel: float = 30.0  # for a cancelled step to end; at least three times the last step
    to_stop: float = 5.0


@attrs.define
class _Rank:
    """A rank on this machine. `Remote` is its counterpart on another."""

    number: int
    process: RankProcess
    connection: Connection

    @property
    def sentinel(self) -> int:
        return self.process.sentinel

    def join(self, seconds: float) -> None:
        self.process.join(seconds)

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.join()
        self.connection.close()
        self.process.close()

    def died(self) -> str:
        self.process.join(1)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"worker {self.number} died ({how})"


class WorkerGroup:
    """`size` ranks that each run `target(assignment, connection)`. A `node_listener` brings those of other nodes."""

    def __init__(
        self,
        size: int,
        target: Target,
        *,
        dist_timeout_s: int = 3600,
        patience: Patience | None = None,
        node_listener: NodeListener | None = None,
        worker_start: str = "forkserver",
    ):
        self.size = size
        self.status = GroupStatus()
        self._target = target
        self._worker_start = worker_start
        self._dist_timeout_s = dist_timeout_s
        self._patience = patience or Patience()
        self._node_listener = node_listener
        self._ranks: list[_Rank | Remote] = []
        self._rendezvous: tempfile.TemporaryDirectory[str] | None = None
        self._load: Load | None = None
        self._loaded = False  # true once the present ranks hold the model
        self._replay: dict[str, Command] = {}
        self._due: set[str] = set()  # of `_replay`: those that the present ranks have not carried out
        self._closed = False

    def sentinels(self) -> list[int]:
        """Return one new descriptor per rank, readable once that rank is gone. The caller closes them."""
        return [os.dup(rank.sentinel) for rank in self._ranks]

    def load(self, command: Load, emit: Emit = _ignore) -> ModelInfo:
        """Load a model, and nothing else. A restarted group loads it again."""
        self._replay, self._due = {}, set()
        info: ModelInfo = self._call(command, emit, None)
        self._load, self._loaded = command, True
        return info

    def run(self, command: Command, emit: Emit = _ignore, token: CancelToken | None = None) -> Any:
        """Give every rank `command`, block until all have answered, and return rank 0's value.

        Raises:
            JobCancelled: the token was set. A command that was not sent yet never reaches a rank.
            WorkerDied: the group was killed; the next call starts a new one.
            NotReady: new ranks lack the adapters that the output needs.
            SgldError: what the ranks failed with.
        """
        self.revive()
        if token is not None and token.is_set:
            raise JobCancelled("cancelled before it started")
        if _needs_configured(command) and self.catch_up():
            raise NotReady("the adapters that are set are gone; set them or others again, or unmerge them")
        return self._call(command, emit, token)

    def revive(self) -> None:
        """Replace the group when a rank has died, load the model again, and replay the commands of `set_replay`."""
        if first := next((rank for rank in self._ranks if wait([rank.sentinel], 0)), None):
            log.warning("%s; restarting the workers", first.died())
            self._restart()
        if self._load is not None and not self._loaded:
            self._call(self._load, _ignore, None)
            self._loaded, self._due = True, set(self._replay)
            self.catch_up()

    def set_replay(self, commands: Mapping[str, Command], done: Collection[str] | None = None) -> None:
        """Let new ranks carry out these commands after the model is loaded.

        The present ranks have carried out those of `done`, and none of them without `done`.
        """
        self._replay = dict(commands)
        self._due = set(commands) if done is None else (self._due & commands.keys()).difference(done)

    def catch_up(self) -> list[BadRequest]:
        """Replay the commands that the present ranks lack. Return the errors of those that fail."""
        errors: list[BadRequest] = []
        for name in sorted(self._due):
            try:
                self._call(self._replay[name], _ignore, None)
                self._due.discard(name)
            except BadRequest as error:
                log.error("the adapters that were set for %s cannot be set again: %s", name, error)
                errors.append(error)
        return errors

    def close(self) -> None:
        """Start no more ranks. Safe to call from any thread."""
        self._closed = True

    def stop(self) -> None:
        """Ask the ranks to stop, and kill those that do not."""
        for rank in self._ranks:
            try:
                rank.connection.send(Stop())
            except OSError:
                log.debug("worker %d had gone before it was stopped", rank.number)
        deadline = time.monotonic() + self._patience.to_stop
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        self.kill()
        if self._node_listener is not None:
            self._node_listener.close()

    def kill(self) -> None:
        """End every rank now and leave nothing behind."""
        ranks, self._ranks, self._loaded = self._ranks, [], False
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.close()
        if self._rendezvous is not None:
            self._rendezvous.cleanup()
            self._rendezvous = None
        self._publish()

    def _restart(self) -> None:
        self.status = attrs.evolve(self.status, restarts=self.status.restarts + 1)
        self.kill()

    def _publish(self) -> None:
        pids = tuple(rank.process.pid or 0 for rank in self._ranks if isinstance(rank, _Rank))
        self.status = attrs.evolve(self.status, pids=pids)

    def _start(self) -> None:
        if self._closed:
            raise WorkerDied("the workers are stopped")
        try:
            if self._node_listener is not None:
                self._start_nodes(self._node_listener)
                return
            self._rendezvous = tempfile.TemporaryDirectory(prefix="sgld-") if self.size > 1 else None
            store = Path(self._rendezvous.name) / "store" if self._rendezvous is not None else Path()
            self._start_ranks(
                [RankAssignment(number, self.size, store, self._dist_timeout_s) for number in range(self.size)]
            )
        except BaseException:
            self.kill()
            raise

    def _start_nodes(self, node_listener: NodeListener) -> None:
        """Send every rank its assignment once the ranks of all other nodes are connected."""
        self._ranks += node_listener.gather(lambda: self._closed)
        host = node_listener.address[0]
        with listen(host, 0) as listener:
            store = host, listener.getsockname()[1]
            rest = self._dist_timeout_s, node_listener.nnodes
            try:
                for remote in self._ranks:
                    remote.connection.send(RankAssignment(remote.number, self.size, store, *rest))
            except OSError as error:
                raise WorkerDied(f"another node has gone while the workers were started ({error.strerror})") from None
            local = range(self.size // node_listener.nnodes)
            self._start_ranks([RankAssignment(n, self.size, store, *rest, listener if n == 0 else None) for n in local])
        self._ranks.sort(key=lambda rank: rank.number)

    def _start_ranks(self, assignments: list[RankAssignment]) -> None:
        for assignment in assignments:
            ours, theirs = multiprocessing.Pipe()
            try:
                process = start_rank(self._worker_start, self._target, assignment, theirs, lambda: self._closed)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self._ranks.append(_Rank(assignment.rank, process, ours))
            self._publish()

    def _call(self, command: Command, emit: Emit, token: CancelToken | None) -> Any:
        if not self._ranks:
            self._start()
        call = _Call(self._ranks, command, emit, token, self._patience)
        try:
            return call.result()
        except _GroupLost as lost:
            self._restart()
            raise lost.error from None
        except SgldError:
            raise  # every rank has answered
        except BaseException:  # some have not: their answers must not meet the next command
            self.kill()
            raise


def _needs_configured(command: Command) -> bool:
    """Return true when an output of `command` brings no adapters of its own."""
    return isinstance(command, Generate) and not all(item.params.loras for item in command.items)


class _GroupLost(Exception):
    """The ranks can no longer be trusted. The caller gets `error`."""

    def __init__(self, error: SgldError):
        super().__init__(str(error))
        self.error = error


class _Call:
    """One command under way: the answers so far, and the time left for the rest."""

    def __init__(
        self, ranks: list[_Rank | Remote], command: Command, emit: Emit, token: CancelToken | None, patience: Patience
    ):
        self._ranks = ranks
        self._command = command
        self._emit = emit
        self._token = token
        self._patience = patience
        self._pending = {rank.connection: rank for rank in ranks}
        self._answers: dict[int, Terminal] = {}
        self._deadline: float | None = None
        self._step_started = time.monotonic()
        self._last_step_s = 0.0

    def result(self) -> Any:
        for rank in self._ranks:
            self._send(rank, self._command)
        while self._pending:
            self._wait()
        failures = [answer for answer in self._answers.values() if isinstance(answer, Failed)]
        if failures:
            raise self._error(failures[0])
        first = self._answers[0]
        if isinstance(first, Cancelled):
            raise JobCancelled(f"cancelled in {first.where}")
        assert isinstance(first, Done)
        return first.value

    def _wait(self) -> None:
        timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        sentinels = {rank.sentinel: rank for rank in self._pending.values()}
        token: list[Any] = [self._token] if self._token is not None else []
        ready = wait([*self._pending, *sentinels, *token], timeout)
        if not ready:
            raise self._out_of_patience()
        for item in ready:
            if isinstance(item, CancelToken):
                self._cancel()
            elif isinstance(item, Connection) and item in self._pending:
                self._receive(self._pending[item])
        # a rank may have answered and exited: its pipe is read to the end before its death counts
        for item in ready:
            if isinstance(item, int) and sentinels[item].connection in self._pending:
                self._drain(sentinels[item])

    def _drain(self, rank: _Rank | Remote) -> None:
        while rank.connection in self._pending and rank.connection.poll():
            self._receive(rank)
        if rank.connection in self._pending:
            raise self._lost(rank)

    def _receive(self, rank: _Rank | Remote) -> None:
        try:
            message = rank.connection.recv()
        except (EOFError, OSError):
            raise self._lost(rank) from None
        if (frames := frames_of(message)) is not None:
            self._attach(frames, rank)
        if isinstance(message, Terminal):
            self._answers[rank.number] = message
            del self._pending[rank.connection]
            if isinstance(message, Failed):
                self._allow(self._patience.after_failure)
            return
        if isinstance(message, Progress):
            now = time.monotonic()
            self._last_step_s, self._step_started = now - self._step_started, now
        self._emit(message)

    def _attach(self, frames: SharedFrames, rank: _Rank | Remote) -> None:
        try:
            frames.receive(rank.connection)
        except (EOFError, OSError):
            raise self._lost(rank) from None

    def _cancel(self) -> None:
        self._token = None
        if isinstance(self._command, Generate):
            self._send(self._ranks[0], Cancel(self._command.job_id))
            self._allow(max(self._patience.after_cancel, 3 * self._last_step_s))

    def _allow(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def _send(self, rank: _Rank | Remote, message: Command | Cancel) -> None:
        try:
            rank.connection.send(message)
        except OSError:
            raise self._lost(rank) from None

    def _lost(self, rank: _Rank | Remote) -> _GroupLost:
        reasons = [f", after worker {n} failed ({a.error})" for n, a in self._answers.items() if isinstance(a, Failed)]
        return _GroupLost(WorkerDied(f"{rank.died()} during the job{''.join(reasons)}"))

    def _out_of_patience(self) -> _GroupLost:
        silent = ", ".join(str(rank.number) for rank in self._pending.values())
        for number, answer in self._answers.items():
            if isinstance(answer, Failed):
                if isinstance(self._command, Load):
                    return _GroupLost(self._error(answer))
                reason = f"worker {number} failed alone ({answer.error}) and worker {silent} could not go on"
                return _GroupLost(WorkerDied(reason))
        return _GroupLost(JobCancelled(f"cancelled; worker {silent} did not stop in time and was killed"))

    def _error(self, failed: Failed) -> SgldError:
        if failed.trace:
            log.debug("a worker failed:\n%s", failed.trace)
        return failed.error
