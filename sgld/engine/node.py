"""Node: the lines between the machines of one group.

A rank of another node has for its end of the pipe a connection to the one address where node 0 listens, so the
executor thread talks to it as to a rank of its own. A line's end is a rank's death, and closing it kills the rank.
Whoever reaches the address takes part: nobody proves who he is, and what is said after the `Handshake` is pickled.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait

import attrs

from sgld import __version__
from sgld.config import Settings
from sgld.errors import SgldError, WorkerDied
from sgld.messages import Refused

log = logging.getLogger(__name__)
HELLO_BYTES, HELLO_S = 10_000, 5  # the most that a stranger may say, and how long it may take
POLL_S = 0.2  # between two looks at whether the group was closed
# a machine that no longer answers is gone after 10 + 3 * 5 seconds
PROBES = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


@attrs.frozen
class Handshake:
    """The first word on a line: which rank it is for, and what must be alike on all nodes."""

    rank: int
    nnodes: int
    num_gpus: int
    model_path: str
    version: str = __version__

    @classmethod
    def of(cls, settings: Settings, rank: int) -> Handshake:
        """That of a node with these settings."""
        return cls(rank, settings.nnodes, settings.num_gpus, settings.model_path)

    def fault(self, own: Handshake) -> str | None:
        """Why node 0, whose word would be `own`, cannot take this rank in."""
        for name, value in attrs.asdict(own).items():
            if name != "rank" and getattr(self, name) != value:
                return f"{name}: {getattr(self, name)!r} here and {value!r} on node 0; all nodes need the same"
        first = own.num_gpus // own.nnodes
        return (
            None if first <= self.rank < own.num_gpus else f"rank {self.rank} is none of {first} to {own.num_gpus - 1}"
        )


class PeerConnection:
    """A connection to another machine, and a descriptor, `hangup`, that is readable once the other end is gone."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in PROBES.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
        self.connection = Connection(sock.detach())
        self._epoll = select.epoll()
        self._epoll.register(self.connection.fileno(), select.EPOLLRDHUP)
        self.hangup = self._epoll.fileno()

    def close(self) -> None:
        """Hang up."""
        self._epoll.close()
        self.connection.close()


@attrs.frozen
class Remote:
    """A rank on another node, as its group sees it."""

    number: int
    line: PeerConnection

    @property
    def connection(self) -> Connection:
        return self.line.connection

    @property
    def sentinel(self) -> int:
        return self.line.hangup

    def died(self) -> str:
        return f"worker {self.number} of another node is gone"

    def join(self, seconds: float) -> None:
        wait([self.sentinel], seconds)

    def kill(self) -> None:
        """Its node sees the end of the line, and kills it."""
        self.line.close()

    def close(self) -> None:
        self.line.close()


class NodeListener:
    """Where node 0 takes in the ranks of the other nodes, each time that the group starts."""

    def __init__(self, settings: Settings):
        self.nnodes = settings.nnodes
        self.address = settings.node_address()
        self._own = Handshake.of(settings, 0)
        self._patience_s = settings.dist_timeout
        self._listener: socket.socket | None = None

    def gather(self, closed: Callable[[], bool]) -> list[Remote]:
        """Wait for all ranks of the other nodes; in their order. Raises WorkerDied once `closed`, or when none come."""
        host, port = self.address
        where = f"{host}:{port}"
        self._listener = self._listener or listen(host, port)
        wanted = range(self._own.num_gpus // self.nnodes, self._own.num_gpus)
        log.info("waiting at %s for workers %s of other nodes", where, numbers(wanted))
        found: dict[int, Remote] = {}
        deadline = time.monotonic() + self._patience_s
        try:
            while len(found) < len(wanted):
                if closed():
                    raise WorkerDied("the workers are stopped")
                if time.monotonic() > deadline:
                    absent = numbers(number for number in wanted if number not in found)
                    raise WorkerDied(f"workers {absent} did not come to {where} within {self._patience_s} s")
                if wait([self._listener], POLL_S):
                    self._welcome(PeerConnection(self._listener.accept()[0]), found)
                _forget_gone(found)
        except BaseException:
            for remote in found.values():
                remote.close()
            raise
        return [found[number] for number in wanted]

    def _welcome(self, line: PeerConnection, found: dict[int, Remote]) -> None:
        """Hear who calls, and let him wait among those `found`, or turn him away."""
        try:
            hello = _hear(line)
            _forget_gone(found)
            if (fault := hello.fault(self._own)) is None and hello.rank in found:
                fault = f"node_rank: worker {hello.rank} is there already; each node needs a number of its own"
            if fault is None:
                found[hello.rank] = Remote(hello.rank, line)
                return
            log.warning("another node was turned away: %s", fault)
            line.connection.send(Refused(fault))
        except (OSError, EOFError, ValueError, TypeError) as error:
            log.warning("a caller at %s:%d was no node of ours (%s)", *self.address, type(error).__name__)
        line.close()

    def close(self) -> None:
        """Let the address go."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _forget_gone(found: dict[int, Remote]) -> None:
    """Drop those whose node hung up while they waited for the others."""
    for remote in [remote for remote in found.values() if wait([remote.sentinel], 0)]:
        found.pop(remote.number).close()


def numbers(ranks: Iterable[int]) -> str:
    """`2, 3`."""
    return ", ".join(map(str, ranks))


def _hear(line: PeerConnection) -> Handshake:
    """The first word. Raises OSError, EOFError, ValueError or TypeError for what is none."""
    with socket.socket(fileno=line.connection.fileno()) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HELLO_S, 0))
            hello = Handshake(**json.loads(line.connection.recv_bytes(HELLO_BYTES)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        finally:
            sock.detach()
    return hello


def call(address: tuple[str, int], hello: Handshake) -> PeerConnection:
    """A line to node 0, on which the seat of that rank will come. Raises OSError when nobody answers."""
    line = PeerConnection(socket.create_connection(address, HELLO_S))
    try:
        line.connection.send_bytes(json.dumps(attrs.asdict(hello)).encode())
    except BaseException:
        line.close()
        raise
    return line


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at that address of this machine alone. Raises SgldError when it cannot be had."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise SgldError(f"cannot listen on {host}:{port}: {reason}", field="dist_init_addr") from None
