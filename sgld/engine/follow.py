"""follow: `sgld serve` on every node but the first. It runs ranks, and never imports torch."""

from __future__ import annotations

import logging
import time
from multiprocessing.connection import Connection, wait
from typing import cast

from sgld.engine.forkserver import RankProcess, Target, prepare, start_rank
from sgld.engine.node import Handshake, PeerConnection, call, numbers
from sgld.errors import BadRequest
from sgld.messages import RankAssignment, Refused
from sgld.settings import Settings
from sgld.worker.entry import run_rank

log = logging.getLogger(__name__)
RETRY_S = 0.5  # between two tries to reach node 0
TO_STOP_S = 5.0  # for the other ranks, once the first has stopped


def follow(settings: Settings, target: Target = run_rank) -> int:
    """Run the ranks of this node for one group after the other, until node 0 stops them or an interrupt comes.

    Raises BadRequest when node 0 was started with other settings.
    """
    prepare(settings.parallel.worker_start)
    try:
        while not _run_group(settings, target):
            log.warning("the group is gone; its workers here were killed")
            time.sleep(RETRY_S)
    except KeyboardInterrupt:
        log.info("interrupted; the workers of this node are stopped")
    return 0


def _run_group(settings: Settings, target: Target) -> bool:
    """Run the ranks of one group to its end. Return true when node 0 stopped them."""
    per_node = settings.parallel.num_gpus // settings.parallel.nnodes
    ranks = range(per_node * settings.parallel.node_rank, per_node * (settings.parallel.node_rank + 1))
    peers: list[PeerConnection] = []
    processes: list[RankProcess] = []
    try:
        for rank in ranks:
            peers.append(_reach(settings.parallel.node_address(), Handshake.of(settings, rank)))
        try:
            assignments = _receive_assignments(peers)
        except (EOFError, OSError):
            return False
        log.info("node %d joins with workers %s", settings.parallel.node_rank, numbers(ranks))
        for peer in peers:
            assignment = assignments[peer.connection]
            processes.append(start_rank(settings.parallel.worker_start, target, assignment, peer.connection))
        return _were_stopped(processes, peers)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()
        for peer in peers:
            peer.close()


def _reach(address: tuple[str, int], handshake: Handshake) -> PeerConnection:
    """Connect to node 0, however long it takes."""
    logged = False
    while True:
        try:
            return call(address, handshake)
        except OSError as error:
            if not logged:
                log.info("waiting for node 0 at %s:%d (%s)", *address, error.strerror or error)
            logged = True
        time.sleep(RETRY_S)


def _receive_assignments(peers: list[PeerConnection]) -> dict[Connection, RankAssignment]:
    """Receive what node 0 sends once all nodes are connected.

    Raises EOFError or OSError when node 0 goes away, and BadRequest when it refuses a rank.
    """
    assignments: dict[Connection, RankAssignment] = {}
    while len(assignments) < len(peers):
        for ready in wait([peer.connection for peer in peers if peer.connection not in assignments]):
            connection = cast(Connection, ready)
            assignment = connection.recv()
            if isinstance(assignment, Refused):
                raise BadRequest(assignment.reason)
            assignments[connection] = assignment
    return assignments


def _were_stopped(processes: list[RankProcess], peers: list[PeerConnection]) -> bool:
    """Wait until a rank ends or node 0 hangs up. Ranks end with 0 only when they were stopped."""
    running = {process.sentinel: process for process in processes}
    wait([*running, *(peer.hangup for peer in peers)])
    deadline = time.monotonic() + TO_STOP_S
    while running and (ended := wait(list(running), max(0.0, deadline - time.monotonic()))):
        for sentinel in ended:
            process = running.pop(cast(int, sentinel))
            process.join()
            if process.exitcode:
                log.warning("process %s ended with exit code %d", process.pid, process.exitcode)
                return False
    return len(running) < len(processes)
