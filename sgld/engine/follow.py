"""follow: what `sgld serve` does on every node but the first. It runs ranks, and never imports torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from sgld.engine.group import interrupts_blocked, spawn
from sgld.engine.node import Handshake, PeerConnection, call, numbers
from sgld.errors import BadRequest
from sgld.messages import RankAssignment, Refused
from sgld.settings import Settings
from sgld.worker.entry import run_rank

log = logging.getLogger(__name__)
RETRY_S = 0.5  # between two tries to reach node 0
TO_STOP_S = 5.0  # for ranks that were told to stop, from when the first has ended


def follow(settings: Settings, target: Callable[[RankAssignment, Connection], None] = run_rank) -> int:
    """Be one group's ranks of this node after the other's, until node 0 stops them, or an interrupt comes.

    Raises BadRequest when node 0 was started with other settings.
    """
    try:
        while not _one_group(settings, target):
            log.warning("the group is gone; its workers here were killed")
            time.sleep(RETRY_S)
    except KeyboardInterrupt:
        log.info("interrupted; the workers of this node are stopped")
    return 0


def _one_group(settings: Settings, target: Callable[[RankAssignment, Connection], None]) -> bool:
    """Run the ranks of one group to its end; whether they were told to stop."""
    each = settings.parallel.num_gpus // settings.parallel.nnodes
    ranks = range(each * settings.parallel.node_rank, each * (settings.parallel.node_rank + 1))
    lines: list[PeerConnection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in ranks:
            lines.append(_reach(settings.parallel.node_address(), Handshake.of(settings, rank)))
        try:
            seats = _seats(lines)
        except (EOFError, OSError):
            return False
        log.info("node %d joins with workers %s", settings.parallel.node_rank, numbers(ranks))
        with interrupts_blocked():
            for line in lines:
                processes.append(spawn(target, seats[line.connection], line.connection))
        return _were_stopped(processes, lines)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()
        for line in lines:
            line.close()


def _reach(address: tuple[str, int], hello: Handshake) -> PeerConnection:
    """A line to node 0, however long it takes."""
    told = False
    while True:
        try:
            return call(address, hello)
        except OSError as error:
            if not told:
                log.info("waiting for node 0 at %s:%d (%s)", *address, error.strerror or error)
            told = True
        time.sleep(RETRY_S)


def _seats(lines: list[PeerConnection]) -> dict[Connection, RankAssignment]:
    """What node 0 says on each line once all nodes are there. Raises EOFError or OSError when it goes meanwhile."""
    seats: dict[Connection, RankAssignment] = {}
    while len(seats) < len(lines):
        for connection in wait([line.connection for line in lines if line.connection not in seats]):
            assert isinstance(connection, Connection)
            assignment = connection.recv()
            if isinstance(assignment, Refused):
                raise BadRequest(assignment.reason)
            seats[connection] = assignment
    return seats


def _were_stopped(processes: list[BaseProcess], lines: list[PeerConnection]) -> bool:
    """Wait until a rank has ended or node 0 hung up. Ranks end with 0 only when they were told to."""
    running = {process.sentinel: process for process in processes}
    wait([*running, *(line.hangup for line in lines)])
    deadline = time.monotonic() + TO_STOP_S
    while running and (ended := wait(list(running), max(0.0, deadline - time.monotonic()))):
        for sentinel in ended:
            assert isinstance(sentinel, int)
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                log.warning("%s ended with exit code %d", process.name, process.exitcode)
                return False
    return len(running) < len(processes)
