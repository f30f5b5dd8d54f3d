"""ForkServer: a process that has imported torch and the worker once, and forks every rank.

A forked rank starts in tens of milliseconds, and ranks share the memory of the imports. The server never touches CUDA
and never runs a parallel region of torch, so a rank starts with neither a context nor threads. Requests cross a socket
pair: there is no file and no address that another user could reach.

`--worker-start spawn` starts each rank as a new interpreter instead, through multiprocessing.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import attrs

from sgld.errors import WorkerDied

if TYPE_CHECKING:  # a command starts the server before it imports numpy
    from sgld.messages import RankAssignment

Target = Callable[["RankAssignment", Connection], None]
MAX_DESCRIPTORS = 3  # of one request: lifeline, connection, listener
POLL_S = 0.2  # between two looks at whether the group was closed
Children = dict[int, tuple[int, Connection]]  # pid and lifeline, by a pipe that closes when the child ends
GONE = EOFError, BrokenPipeError, ConnectionResetError  # the errors of a connection whose other end is closed
UNKNOWN = 255  # exit code of a rank that outlived the fork server


class ForkedProcess:
    """A rank that the fork server has started.

    Its lifeline is a socket pair between the parent on one side, the rank and the server on the other. The rank exits
    when the parent's end closes. The server sends the exit code.
    """

    def __init__(self, pid: int, lifeline: Connection):
        self.pid = pid
        self.exitcode: int | None = None
        self._lifeline = lifeline

    @property
    def sentinel(self) -> int:
        """Return a descriptor that is readable once the process has ended."""
        return self._lifeline.fileno()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process has ended, for `timeout` seconds at most."""
        if self.exitcode is None and self._lifeline.poll(timeout):
            try:
                self.exitcode = self._lifeline.recv()
            except (EOFError, OSError):
                self.exitcode = UNKNOWN

    def kill(self) -> None:
        """Send SIGKILL, unless the process is known to have ended."""
        if self.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the lifeline."""
        self._lifeline.close()


RankProcess = ForkedProcess | SpawnProcess


class ForkServer:
    """The server process as its parent sees it. Methods are safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, or None while none runs."""
        return self._running[0].pid if self._running is not None else None

    def ensure_running(self) -> None:
        """Start the server unless it runs. Return at once: the server imports in the background."""
        with self._lock:
            self._connect()

    def fork(
        self, target: Target, assignment: RankAssignment, connection: Connection, closed: Callable[[], bool]
    ) -> ForkedProcess:
        """Start a process that runs `target(assignment, connection)`, with copies of all descriptors.

        Raises:
            WorkerDied: `closed` returned true, or the server ended, before the process began.
            OSError: the system has no room for a process.
        """
        lifeline, theirs = multiprocessing.Pipe()
        listener = [] if assignment.listener is None else [assignment.listener.fileno()]
        try:
            with theirs, self._lock:
                socket.send_fds(self._connect(), [b"\0"], [theirs.fileno(), connection.fileno(), *listener])
            lifeline.send((sys.path, Path.cwd()))
            lifeline.send((target, attrs.evolve(assignment, listener=None)))
            while not lifeline.poll(POLL_S):
                if closed():
                    raise WorkerDied("the workers are stopped")
            pid = lifeline.recv()
            if isinstance(pid, OSError):
                raise pid
            return ForkedProcess(pid, lifeline)
        except BaseException as error:
            lifeline.close()
            if isinstance(error, GONE):
                raise WorkerDied("the process that starts the workers died") from None
            raise

    def stop(self) -> None:
        """Kill the server, if one runs. Its ranks go on."""
        with self._lock:
            if self._running is not None:
                process, control = self._running
                self._running = None
                control.close()
                process.kill()
                process.wait()

    def _connect(self) -> socket.socket:
        if self._running is not None:
            process, control = self._running
            if process.poll() is None:
                return control
            control.close()
        control, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        command = [sys.executable, "-P", "-c", code]
        with theirs, interrupts_blocked():
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])
        self._running = process, control
        return control


FORK_SERVER = ForkServer()  # of this process: all groups share its imports
atexit.register(FORK_SERVER.stop)


def prepare(method: str) -> None:
    """Begin to import what ranks need, so that the first one starts sooner."""
    if method == "forkserver":
        FORK_SERVER.ensure_running()


def start_rank(
    method: str,
    target: Target,
    assignment: RankAssignment,
    connection: Connection,
    closed: Callable[[], bool] = lambda: False,
) -> RankProcess:
    """Start a process that runs `target(assignment, connection)`. Raises as `ForkServer.fork` does."""
    if method == "forkserver":
        return FORK_SERVER.fork(target, assignment, connection, closed)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_spawned, args=(target, assignment, connection), daemon=True)
    with interrupts_blocked():
        process.start()
    return process


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block SIGINT, so that children inherit the mask: the parent alone handles a terminal's interrupt."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------ in the server and its ranks


def serve(control_fd: int) -> NoReturn:
    """Import what ranks need, then fork one for each request until the parent is gone."""
    from sgld.worker.entry import name_process, preload

    name_process("sgld-forkserver")
    control = socket.socket(fileno=control_fd)
    gc.disable()
    with suppress(Exception):  # a rank fails by the same import and answers with it
        preload()
    gc.freeze()  # collections in a rank leave shared pages alone
    children: Children = {}
    while True:
        for ready in wait([control, *children]):
            if ready is control:
                _answer(control, children)
            else:
                assert isinstance(ready, int)
                os.close(ready)
                _report(*children.pop(ready))


def _answer(control: socket.socket, children: Children) -> None:
    """Fork a rank for one request. Exit when the parent is gone."""
    data, descriptors, _, _ = socket.recv_fds(control, 1, MAX_DESCRIPTORS)
    if not data:
        os._exit(0)
    lifeline = Connection(descriptors[0])
    alive, held = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(alive)
        with suppress(OSError), lifeline:
            lifeline.send(error)
    else:
        if pid == 0:
            control.close()
            os.close(alive)
            for descriptor, (_, other) in children.items():
                os.close(descriptor)
                other.close()
            _run_forked(lifeline, descriptors[1:])
        children[alive] = pid, lifeline
    for descriptor in (held, *descriptors[1:]):
        os.close(descriptor)


def _report(pid: int, lifeline: Connection) -> None:
    """Reap a child and send its exit code to the parent."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError), lifeline:
        lifeline.send(code)


def _run_forked(lifeline: Connection, descriptors: list[int]) -> NoReturn:
    """Be a rank until its target returns."""
    from sgld.worker.entry import exit_with_parent

    code = 1
    try:
        gc.enable()
        lifeline.send(os.getpid())
        sys.path[:], folder = lifeline.recv()
        os.chdir(folder)
        target, assignment = lifeline.recv()
        exit_with_parent(lifeline)
        listener = socket.socket(fileno=descriptors[1]) if len(descriptors) > 1 else None
        target(attrs.evolve(assignment, listener=listener), Connection(descriptors[0]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except GONE:  # the parent
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _run_spawned(target: Target, assignment: RankAssignment, connection: Connection) -> None:
    from sgld.worker.entry import exit_with_parent

    parent = multiprocessing.parent_process()
    assert parent is not None
    exit_with_parent(parent.sentinel)
    target(assignment, connection)
