"""Several nodes: two of them on this machine, each with processes of its own, which meet at one address."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from PIL import Image

from sgld.config import settings_of
from sgld.engine.cancel import CancelToken
from sgld.engine.engine import Engine
from sgld.engine.follow import follow
from sgld.engine.group import WorkerGroup
from sgld.engine.node import Handshake, NodeListener, PeerConnection, call
from sgld.errors import BadRequest, JobCancelled, SgldError, WorkerDied
from sgld.hub.hub import resolve_model
from sgld.messages import Event, Load, Progress, RankAssignment, Refused
from sgld.settings import Settings
from sgld.worker.interface import interface_to
from tests.cli.command import sgld
from tests.engine.outputs import generate_one
from tests.engine.ranks import INFO, run_faulty
from tests.engine.test_engine import asked, ignore
from tests.engine.test_group import PATIENCE, STEPS, dies, job, works
from tests.processes import ranks_of

PICTURE = ("--prompt", "a red ball", "--seed", "3", "--num-frames", "1", "--num-inference-steps", "2")


_started: list[BaseProcess] = []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def settings(**others: Any) -> Settings:
    return Settings.of(num_gpus=2, nnodes=2, dist_init_addr=f"127.0.0.1:{free_port()}", **others)


def run_follower(own: Settings) -> None:
    """The spawn target: `sgld serve` on node 1, with the faulty family."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(follow(own, run_faulty))


def follower(own: Settings) -> BaseProcess:
    process = get_context("spawn").Process(target=run_follower, args=(own.evolve(node_rank=1),))
    process.start()
    _started.append(process)
    return process


@pytest.fixture(scope="module", autouse=True)
def no_follower_is_left() -> Iterator[None]:
    """Python waits for them at its end, and one whose node 0 has failed would wait as well."""
    yield
    for process in _started:
        process.terminate()
        process.join()


def group_of(own: Settings) -> WorkerGroup:
    return WorkerGroup(2, run_faulty, patience=PATIENCE, node_listener=NodeListener(own))


def rank_of(node: BaseProcess) -> int:
    """Return the process id of the rank that runs on that node."""
    (rank,) = ranks_of(node.pid)
    return rank.pid


@attrs.define
class Nodes:
    """A group of two ranks, one on each node."""

    own: Settings
    group: WorkerGroup
    other: BaseProcess

    @property
    def pids(self) -> list[int]:
        return [*self.group.status.pids, rank_of(self.other)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The faulty family loaded on both; tests leave them usable. Stopping the group ends node 1 too."""
    own = settings()
    nodes = Nodes(own, group_of(own), follower(own))
    assert nodes.group.load(Load(Settings(), Path("model"))) == INFO
    yield nodes
    pids = nodes.pids
    nodes.group.stop()
    nodes.other.join(20)
    assert nodes.other.exitcode == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = f"sgld{os.getpid()}a", f"sgld{os.getpid()}b"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ve0", "netns", names[0], "type", "veth", "peer", "name", "ve0", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "ve0")
            for link in ("lo", "ve0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def start(*words: str, folder: Path, space: str | None = None) -> subprocess.Popen[str]:
    """`sgld ...` in a new folder, and in that network namespace."""
    folder.mkdir()
    inside = () if space is None else ("ip", "netns", "exec", space)
    command = [*inside, sys.executable, "-m", "sgld", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.int64]:
    """The picture that one worker makes."""
    folder = tmp_path_factory.mktemp("alone")
    made = sgld("generate", *PICTURE, folder=folder)
    assert made.returncode == 0, made.stderr
    return pixels(folder / made.stdout.strip())


@pytest.mark.parametrize(("workers", "apart"), [(4, False), (2, True)], ids=["one network", "two network namespaces"])
def test_two_nodes_make_the_picture_of_one(
    workers: int, apart: bool, alone: npt.NDArray[np.int64], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Fails when a rank takes another's part, or a node's ranks are not told apart; and apart, when they listen on the
    wrong interface."""
    spaces: tuple[str | None, ...] = request.getfixturevalue("namespaces") if apart else (None, None)
    address = "10.77.0.1:29500" if apart else f"127.0.0.1:{free_port()}"
    flags = ("--num-gpus", str(workers), "--nnodes", "2", "--dist-init-addr", address)
    numbered = ("--node-rank", "1", "--port", "1")
    with (
        start("serve", *flags, *numbered, folder=tmp_path / "second", space=spaces[1]) as second,
        start("generate", *flags, *PICTURE, folder=tmp_path / "first", space=spaces[0]) as first,
    ):
        try:
            made, told = first.communicate(timeout=120)
            assert first.returncode == 0, told
            _, followed = second.communicate(timeout=20)
        finally:
            first.kill()
            second.kill()
    assert second.returncode == 0, followed
    assert f"node 1 joins with workers {'2, 3' if workers == 4 else '1'}" in followed
    assert "--port: ignored" in followed
    assert "listening" not in followed
    assert f"{workers} workers: cfg 2 x ring 1 x ulysses {workers // 2}" in told
    assert alone.std() > 10
    assert np.abs(pixels(tmp_path / "first" / made.strip()) - alone).max() <= 1


def pixels(file: Path) -> npt.NDArray[np.int64]:
    return np.asarray(Image.open(file)).astype(np.int64)


async def test_a_rank_of_another_node_killed_while_idle_is_replaced_without_being_asked(tmp_path: Path) -> None:
    """Fails when its death is not seen, or when what it sends is taken for its death."""
    (tmp_path / "model_index.json").write_text("{}")
    own = settings().evolve(model_path=str(tmp_path))
    other = follower(own)
    async with Engine(own, group_of(own)) as engine:
        assert await engine.load(ignore) == INFO
        made = await generate_one(engine, "before", asked(), ignore)
        assert (made.frames.array == STEPS).all()
        assert (engine.state, engine.status.restarts) == ("ready", 0)
        os.kill(rank_of(other), signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.state != "restarting":
                await asyncio.sleep(0.01)
            while engine.state != "ready":
                await asyncio.sleep(0.05)
        assert engine.status.restarts == 1
        await generate_one(engine, "after", asked(), ignore)
        assert engine.status.restarts == 1
    await asyncio.to_thread(other.join, 20)
    assert other.exitcode == 0


def test_a_rank_of_another_node_killed_while_busy(nodes: Nodes) -> None:
    assert works(nodes.group)
    before = nodes.pids

    def kill_at_step_2(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step >= 2:
            os.kill(before[1], signal.SIGKILL)

    with pytest.raises(WorkerDied, match="worker 1 of another node is gone|worker 0 failed alone"):
        nodes.group.run(job(steps=200, step_s=0.02), kill_at_step_2)
    assert works(nodes.group)
    assert not set(before) & set(nodes.pids)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_while_its_peer_on_another_node_sits_in_a_collective(nodes: Nodes, rank: int) -> None:
    """Fails when the peer, which hears of nothing, is not killed by its own node."""
    assert works(nodes.group)
    before = nodes.pids
    with pytest.raises(WorkerDied, match=f"worker {rank} failed alone .*boom"):
        nodes.group.run(job(fault="raise", rank=rank, step=2))
    assert works(nodes.group)
    assert not set(before) & set(nodes.pids)


def test_both_ranks_fail_alike_and_the_group_lives(nodes: Nodes) -> None:
    assert works(nodes.group)
    before = nodes.pids
    with pytest.raises(SgldError, match="ValueError: boom"):
        nodes.group.run(job(fault="raise", step=2))
    assert works(nodes.group)
    assert nodes.pids == before


def test_a_cancel_stops_ranks_on_both_nodes_in_the_same_step(nodes: Nodes) -> None:
    assert works(nodes.group)
    before = nodes.pids
    with closing(CancelToken()) as token:

        def cancel_at_step_3(event: Event) -> None:
            if isinstance(event, Progress) and event.stage == "denoise" and event.step >= 3:
                token.set()

        with pytest.raises(JobCancelled, match="cancelled in denoise"):
            nodes.group.run(job(steps=1000, step_s=0.1), cancel_at_step_3, token)
    assert works(nodes.group)
    assert nodes.pids == before


def test_a_node_that_went_away_is_waited_for(nodes: Nodes) -> None:
    assert works(nodes.group)
    rank = rank_of(nodes.other)
    nodes.other.terminate()
    nodes.other.join(20)
    assert nodes.other.exitcode == 0
    assert not psutil.pid_exists(rank)
    assert dies(nodes.group)
    nodes.other = follower(nodes.own)
    assert works(nodes.group)


def test_a_follower_loads_no_torch() -> None:
    code = "import sys, sgld.engine.follow; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def node_listener() -> Iterator[NodeListener]:
    node_listener = NodeListener(settings())
    yield node_listener
    node_listener.close()


def test_strangers_and_nodes_that_do_not_fit_are_turned_away(node_listener: NodeListener) -> None:
    closed = threading.Event()
    right = Handshake(1, 2, 2, Settings().model.model_path)
    wrong = {
        "model_path: '/other' here and 'sgld/demo' on node 0": attrs.evolve(right, model_path="/other"),
        "num_gpus: 4 here and 2 on node 0": attrs.evolve(right, num_gpus=4),
        "version: '0' here": attrs.evolve(right, version="0"),
        "rank 2 is none of 1 to 1": attrs.evolve(right, rank=2),
        "rank 0 is none of 1 to 1": attrs.evolve(right, rank=0),
    }
    with ThreadPoolExecutor(1) as executor:
        gathering = executor.submit(node_listener.gather, closed.is_set)
        try:
            for hello in [*wrong.values()]:
                with closing(reach(node_listener, hello)) as line:
                    assert isinstance(refused := line.connection.recv(), Refused)
                    assert wrong_of(refused, wrong) == hello
            for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x02[]", b"\0\0\0\x02{}", b'\0\0\0\x0b{"rank": 1}', b""):
                with socket.create_connection(node_listener.address) as stranger:
                    stranger.sendall(noise)
            with closing(reach(node_listener, right)) as line:
                (remote,) = gathering.result(20)
                assert not wait([remote.sentinel], 0)
                line.connection.send("here")
                assert remote.connection.recv() == "here"
            assert wait([remote.sentinel], 5)
            remote.close()
        finally:
            closed.set()


def wrong_of(refused: Refused, wrong: dict[str, Handshake]) -> Handshake:
    return next(hello for told, hello in wrong.items() if refused.reason.startswith(told))


def reach(node_listener: NodeListener, hello: Handshake) -> PeerConnection:
    """A line, as soon as the gate is open."""
    while True:
        try:
            return call(node_listener.address, hello)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_two_nodes_of_one_number(node_listener: NodeListener) -> None:
    own = NodeListener(Settings.of(num_gpus=3, nnodes=3, dist_init_addr=f"127.0.0.1:{node_listener.address[1]}"))
    hello = Handshake(1, 3, 3, Settings().model.model_path)
    closed = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        gathering = executor.submit(own.gather, closed.is_set)
        try:
            with closing(reach(own, hello)), closing(reach(own, hello)) as second:
                assert "node_rank: worker 1 is there already" in second.connection.recv().reason
        finally:
            closed.set()
        with pytest.raises(WorkerDied, match="stopped"):
            gathering.result(20)
    own.close()


def test_nodes_that_do_not_come(node_listener: NodeListener) -> None:
    absent = NodeListener(
        Settings.of(num_gpus=4, nnodes=2, dist_init_addr=f"127.0.0.1:{node_listener.address[1]}", dist_timeout=1)
    )
    with pytest.raises(WorkerDied, match=r"workers 2, 3 did not come to 127.0.0.1:\d+ within 1 s"):
        absent.gather(lambda: False)
    absent.close()


def test_an_address_that_is_taken_or_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address, reason in ((f"127.0.0.1:{taken.getsockname()[1]}", "in use"), ("192.0.2.200:5", "assign")):
            node_listener = NodeListener(Settings.of(num_gpus=2, nnodes=2, dist_init_addr=address))
            with pytest.raises(SgldError, match=f"dist_init_addr: cannot listen on {address}: .*{reason}"):
                node_listener.gather(lambda: False)


def test_a_follower_with_other_settings_ends() -> None:
    own = settings()
    group = group_of(own)
    with ThreadPoolExecutor(1) as executor:
        loading = executor.submit(group.load, Load(Settings(), Path("model")))
        with pytest.raises(BadRequest, match="model_path: 'elsewhere' here and 'sgld/demo' on node 0"):
            follow(own.evolve(node_rank=1, model_path="elsewhere"), run_faulty)
        group.close()
        with pytest.raises(WorkerDied, match="stopped"):
            loading.result(20)
    group.stop()


@pytest.mark.parametrize(("values", "told"), [
    ({"num_gpus": 2, "nnodes": 2}, "dist_init_addr: it is required when nnodes > 1"),
    ({"num_gpus": 3, "nnodes": 2}, "nnodes: 2 does not divide num_gpus (3)"),
    ({"num_gpus": 2, "nnodes": 2, "node_rank": 2}, "node_rank: 2 must be less than nnodes (2)"),
    ({"node_rank": 1}, "node_rank: 1 must be less than nnodes (1)"),
    ({"dist_init_addr": "a:1"}, "dist_init_addr: it has no effect without nnodes above 1"),
    *(({"num_gpus": 2, "nnodes": 2, "dist_init_addr": address}, f"dist_init_addr: '{address}' is no host:port")
      for address in ("10.0.0.1", "0.0.0.0:5", ":5", "host:0", "host:65536", "host:x", "::1:5", "")),
])  # fmt: skip
def test_arguments_that_fit_no_nodes(values: dict[str, Any], told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        settings_of(values)
    assert caught.value.message.startswith(told)


def test_only_node_0_generates(tmp_path: Path) -> None:
    words = ("--num-gpus", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "127.0.0.1:5")
    refused = sgld("generate", *words, *PICTURE, folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "only node 0 makes outputs; run `sgld serve` on the others" in refused.stderr


def test_a_rank_takes_the_device_of_its_number_on_its_own_machine() -> None:
    seats = [RankAssignment(rank, 6, ("10.0.0.1", 5), nnodes=2) for rank in range(6)]
    assert [assignment.local_rank for assignment in seats] == [0, 1, 2, 0, 1, 2]
    assert {assignment.local_world for assignment in seats} == {3}


def test_secrets_stay_with_node_0() -> None:
    own = Settings.of(api_key="key", s3_secret_access_key="secret")
    load = resolve_model(own)
    assert load.settings == own.evolve(api_key=None, s3_secret_access_key=None)


def test_the_interface_that_leads_there() -> None:
    assert interface_to("127.0.0.1", 1) == "lo"
