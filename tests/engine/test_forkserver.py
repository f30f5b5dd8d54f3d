"""Ranks from the fork server and from spawn, and the end of the server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sgld.engine.engine import Engine
from sgld.engine.forkserver import FORK_SERVER, ForkServer, RankProcess, start_rank
from sgld.engine.group import WorkerGroup
from sgld.errors import WorkerDied
from sgld.messages import Frames, Load, RankAssignment
from sgld.resolve import resolve
from sgld.settings import Settings
from tests.engine.outputs import generate_one
from tests.engine.ranks import INFO, run_faulty, run_report
from tests.engine.test_group import PATIENCE, dies, works

METHODS = ("forkserver", "spawn")
ASSIGNMENT = RankAssignment(0, 1, Path())


def report(method: str, assignment: RankAssignment = ASSIGNMENT) -> tuple[dict[str, Any], RankProcess, Connection]:
    """Start a rank, and return what it says of itself."""
    ours, theirs = Pipe()
    with theirs:
        process = start_rank(method, run_report, assignment, theirs)
    return ours.recv(), process, ours


def end(process: RankProcess, connection: Connection, how: object) -> int | None:
    """Tell a rank how to end. Return its exit code."""
    connection.send(how)
    assert wait([process.sentinel], 20)
    process.join()
    code = process.exitcode
    process.close()
    connection.close()
    return code


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_finds_the_same_process(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found, process, connection = report(method, RankAssignment(0, 1, Path(), listener=listener))
        assert found["listens"] == listener.getsockname()
    assert found["name"] == "sgld-rank0"
    assert found["folder"] == str(tmp_path)
    assert found["policy"] == {"OMP_WAIT_POLICY": "passive"}
    assert found["stdin"] == "/dev/null"
    if method == "forkserver":
        assert found["threads"] == 2, "its own, and the one that watches the parent"
        assert signal.SIGINT in found["blocked"]
    assert (found["parent"] == "sgld-forkserver") == (method == "forkserver")
    assert end(process, connection, SystemExit(0)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("how", "code"), [
    (SystemExit(0), 0), (SystemExit(7), 7), (ValueError("boom"), 1), (signal.SIGKILL, -9), (signal.SIGTERM, -15),
])  # fmt: skip
def test_exit_codes(method: str, how: object, code: int) -> None:
    _, process, connection = report(method)
    assert end(process, connection, how) == code


def test_a_rank_holds_nothing_of_the_others() -> None:
    """Else a rank would not see that its own parent has gone, and descriptors would add up."""
    first, *one = report("forkserver")
    second, *other = report("forkserver")
    assert second["descriptors"] == first["descriptors"]
    assert [end(*rank, SystemExit(0)) for rank in (one, other)] == [0, 0]  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.stop()


def test_a_start_that_is_given_up_while_the_server_imports(
    server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process that it forks later finds no parent, and ends without a word."""
    ours, theirs = Pipe()
    with theirs:
        with pytest.raises(WorkerDied, match="the workers are stopped"):
            server.fork(run_report, ASSIGNMENT, theirs, lambda: True)
        next_rank = server.fork(run_report, ASSIGNMENT, theirs, lambda: False)
    lost = [child for child in psutil.Process(server.pid).children() if child.pid != next_rank.pid]
    assert psutil.wait_procs(lost, 20)[1] == []
    assert ours.recv()["name"] == "sgld-rank0" and end(next_rank, ours, SystemExit(0)) == 0
    assert capfd.readouterr().err == ""


def test_a_server_that_dies_while_it_imports(server: ForkServer) -> None:
    server.ensure_running()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    ours, theirs = Pipe()
    with ours, theirs, pytest.raises(WorkerDied, match="the process that starts the workers died"):
        server.fork(run_report, ASSIGNMENT, theirs, lambda: bool(os.kill(server.pid or 0, signal.SIGKILL)))


def test_stop_leaves_nothing(server: ForkServer) -> None:
    us = psutil.Process()
    before = us.num_fds()
    server.ensure_running()
    process = psutil.Process(server.pid)
    server.ensure_running()
    assert server.pid == process.pid, "it is started once"
    server.stop()
    server.stop()
    assert not process.is_running() and us.num_fds() == before


def test_ranks_outlive_the_server_and_the_next_ones_get_another() -> None:
    group = WorkerGroup(2, run_faulty, patience=PATIENCE)
    try:
        assert group.load(Load(Settings(), Path("model"))) == INFO
        server = psutil.Process(FORK_SERVER.pid)
        server.send_signal(signal.SIGINT)
        assert works(group) and server.is_running(), "a terminal's interrupt is the parent's to handle"
        ranks = [psutil.Process(pid) for pid in group.status.pids]
        server.kill()
        server.wait(20)
        assert works(group) and group.status.restarts == 0
        ranks[0].kill()
        assert dies(group)
        assert works(group) and group.status.restarts == 1
        assert FORK_SERVER.pid != server.pid
        assert psutil.wait_procs(ranks, timeout=20)[1] == []
    finally:
        group.stop()


def test_the_parent_never_imports_torch(tmp_path: Path) -> None:
    """Nor does it leave a process or a file."""
    code = "import sys; from sgld.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    words = ("generate", "--prompt", "x", "--num-frames", "1", "--num-inference-steps", "1", "--output-path", "out")
    (tmp_path / "tmp").mkdir()
    variables = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        family: list[psutil.Process] = []
        for line in run.stderr:
            if line.startswith("seed"):
                family = psutil.Process(run.pid).children(recursive=True)
    assert run.returncode == 0
    gone, alive = psutil.wait_procs(family, timeout=20)  # they hear of the parent's end by themselves
    assert (len(gone), alive) == (2, [])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_exit_that_waits_for_no_thread_leaves_no_process() -> None:
    """Its fork server is reaped: an orphan would stay a zombie under a PID 1 that reaps nothing."""
    code = (
        "import threading, time; from sgld.cli.process import exit_now; from sgld.engine.forkserver import FORK_SERVER;"
        "threading.Thread(target=time.sleep, args=(60,)).start(); FORK_SERVER.ensure_running();"
        "print(FORK_SERVER.pid, flush=True); exit_now(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3 and not psutil.pid_exists(int(done.stdout)), done


async def picture(**settings: Any) -> Frames:
    async with Engine(Settings.of(**settings)) as engine:
        info = await engine.load(lambda event: None)
        asked = {"prompt": "a red circle", "num_frames": 5, "num_inference_steps": 2, "seed": 3}
        return (await generate_one(engine, "job", resolve(asked, info).params)).frames.array.copy()


@pytest.mark.parametrize("workers", [1, 2])
async def test_both_ways_make_the_same_picture(workers: int) -> None:
    forked, spawned = [await picture(num_gpus=workers, worker_start=method) for method in METHODS]
    assert forked.std() > 10
    assert np.array_equal(forked, spawned)


def test_a_spawned_group_comes_back() -> None:
    group = WorkerGroup(2, run_faulty, patience=PATIENCE, worker_start="spawn")
    try:
        group.load(Load(Settings(), Path("model")))
        os.kill(group.status.pids[0], signal.SIGKILL)
        assert dies(group)
        assert works(group) and group.status.restarts == 1
    finally:
        group.stop()
