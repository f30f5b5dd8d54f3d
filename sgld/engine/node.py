"""Node: the connections between the machines of one group.

A rank of another node is connected to the one address where node 0 listens, so the executor thread talks to it as to
a rank of its own. The end of a connection is the death of its rank, and closing it kills the rank. Anyone who reaches
the address can take part: callers do not prove who they are, and messages after the `Handshake` are pickled.
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
from sgld.errors import SgldError, WorkerDied
from sgld.messages import Refused
from sgld.settings import Settings

log = logging.getLogger(__name__)
HANDSHAKE_BYTES, HANDSHAKE_S = 10_000, 5  # limits of the first message of a caller
POLL_S = 0.2  # between two looks at whether the group was closed
# a machine that no longer answers is gone after 10 + 3 * 5 seconds
PROBES = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


@attrs.frozen
class Handshake:
    """The first message of a connection: its rank, and what must be equal on all nodes."""

    rank: int
    nnodes: int
    num_gpus: int
    model_path: str
    version: str = __version__

    @classmethod
    def of(cls, settings: Settings, rank: int) -> Handshake:
        """Return the handshake of a node with these settings."""
        return cls(rank, settings.parallel.nnodes, settings.parallel.num_gpus, settings.model.model_path)

    def fault(self, own: Handshake) -> str | None:
        """Return why node 0, whose handshake is `own`, cannot take this rank in, or None."""
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
        """Close the connection."""
        self._epoll.close()
        self.connection.close()


@attrs.frozen
class Remote:
    """A rank on another node, as its group sees it."""

    number: int
    peer: PeerConnection

    @property
    def connection(self) -> Connection:
        return self.peer.connection

    @property
    def sentinel(self) -> int:
        return self.peer.hangup

    def died(self) -> str:
        return f"worker {self.number} of another node is gone"

    def join(self, seconds: float) -> None:
        wait([self.sentinel], seconds)

    def kill(self) -> None:
        """Close the connection, so that the node of the rank kills it."""
        self.peer.close()

    def close(self) -> None:
        self.peer.close()


class NodeListener:
    """Take in the ranks of the other nodes on node 0, each time the group starts."""

    def __init__(self, settings: Settings):
        self.nnodes = settings.parallel.nnodes
        self.address = settings.parallel.node_address()
        self._own = Handshake.of(settings, 0)
        self._patience_s = settings.parallel.dist_timeout
        self._listener: socket.socket | None = None

    def gather(self, closed: Callable[[], bool]) -> list[Remote]:
        """Wait for all ranks of the other nodes and return them in order.

        Raises WorkerDied once `closed` returns true, or when ranks are missing after `dist_timeout`.
        """
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
                _drop_lost(found)
        except BaseException:
            for remote in found.values():
                remote.close()
            raise
        return [found[number] for number in wanted]

    def _welcome(self, peer: PeerConnection, found: dict[int, Remote]) -> None:
        """Read the handshake of a caller. Add its rank to `found`, or refuse it."""
        try:
            handshake = _read_handshake(peer)
            _drop_lost(found)
            if (fault := handshake.fault(self._own)) is None and handshake.rank in found:
                fault = f"node_rank: worker {handshake.rank} is there already; each node needs a number of its own"
            if fault is None:
                found[handshake.rank] = Remote(handshake.rank, peer)
                return
            log.warning("another node was turned away: %s", fault)
            peer.connection.send(Refused(fault))
        except (OSError, EOFError, ValueError, TypeError) as error:
            log.warning("a caller at %s:%d was no node of ours (%s)", *self.address, type(error).__name__)
        peer.close()

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _drop_lost(found: dict[int, Remote]) -> None:
    """Drop ranks whose node hung up while they waited for the others."""
    for remote in [remote for remote in found.values() if wait([remote.sentinel], 0)]:
        found.pop(remote.number).close()


def numbers(ranks: Iterable[int]) -> str:
    """Format ranks as `2, 3`."""
    return ", ".join(map(str, ranks))


def _read_handshake(peer: PeerConnection) -> Handshake:
    """Read the first message. Raise OSError, EOFError, ValueError or TypeError unless it is a handshake."""
    with socket.socket(fileno=peer.connection.fileno()) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HANDSHAKE_S, 0))
            handshake = Handshake(**json.loads(peer.connection.recv_bytes(HANDSHAKE_BYTES)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        finally:
            sock.detach()
    return handshake


def call(address: tuple[str, int], handshake: Handshake) -> PeerConnection:
    """Connect to node 0, which sends the assignment of the rank later. Raise OSError when nobody answers."""
    peer = PeerConnection(socket.create_connection(address, HANDSHAKE_S))
    try:
        peer.connection.send_bytes(json.dumps(attrs.asdict(handshake)).encode())
    except BaseException:
        peer.close()
        raise
    return peer


def listen(host: str, port: int) -> socket.socket:
    """Listen at one address of this machine. Raise SgldError when that fails."""
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise SgldError(f"cannot listen on {host}:{port}: {reason}", field="dist_init_addr") from None
