"""Every row of the failure table, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from sgld.engine.cancel import CancelToken
from sgld.engine.group import Patience, WorkerGroup
from sgld.errors import JobCancelled, ModelError, OutOfMemory, SgldError, WorkerDied
from sgld.messages import Event, Generate, Item, Load, Preview, Progress
from sgld.params import OutputParams
from sgld.settings import Settings
from sgld.worker.run_context import PROGRESS_S
from tests.engine.outputs import run_one
from tests.engine.ranks import INFO, run_faulty

PATIENCE = Patience(after_failure=1.0, after_cancel=1.0, to_stop=5.0)
STEPS = 4


def job(name: str = "job", steps: int = STEPS, **fault: Any) -> Generate:
    params = OutputParams(prompt=json.dumps(fault), seed=1, num_frames=5, num_inference_steps=steps, fps=8)
    return Generate(name, (Item(0, params),))


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerGroup]:
    """Two ranks with the faulty family loaded; tests leave it usable."""
    group = WorkerGroup(2, run_faulty, patience=PATIENCE)
    assert group.load(Load(Settings(), Path("model"))) == INFO
    yield group
    group.stop()


@pytest.fixture
def token() -> Iterator[CancelToken]:
    token = CancelToken()
    yield token
    token.close()


def works(group: WorkerGroup) -> bool:
    made = run_one(group, job("proof"))
    return bool((made.frames.array == STEPS).all())


def dies(group: WorkerGroup) -> bool:
    """Wait until a rank of that group is gone."""
    sentinels = group.sentinels()
    try:
        return bool(wait(sentinels, 5))
    finally:
        for descriptor in sentinels:
            os.close(descriptor)


def test_frames_progress_and_timings_come_back(shared: WorkerGroup) -> None:
    events: list[Event] = []
    made = run_one(shared, job(), events.append)
    assert made.frames.shape == (5, 16, 16, 3)
    assert (made.frames.array == STEPS).all()
    assert (made.seed, made.fps) == (1, 8)
    assert len(made.timings.steps_ms) == STEPS
    assert set(made.timings.stages_ms) == {"encode", "denoise", "decode"}
    assert denoised(events)[0] == 0 and denoised(events)[-1] == STEPS


def denoised(events: list[Event]) -> list[int]:
    """The steps that were reported."""
    return [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"]


def test_slow_steps_are_all_reported_and_fast_ones_at_most_ten_a_second(shared: WorkerGroup) -> None:
    slow, fast = list[Event](), list[Event]()
    shared.run(job(step_s=PROGRESS_S), slow.append)
    assert denoised(slow) == list(range(STEPS + 1))
    made = run_one(shared, job(steps=40, step_s=0.02), fast.append)
    steps = denoised(fast)
    assert (steps[0], steps[-1]) == (0, 40) and sorted(set(steps)) == steps
    assert 2 < len(steps) <= 2 + made.timings.stages_ms["denoise"] / 1e3 / PROGRESS_S


def with_previews(command: Generate) -> Generate:
    return attrs.evolve(command, previews=3)


def test_previews_come_back_with_their_frames(shared: WorkerGroup) -> None:
    events: list[Event] = []
    made = run_one(shared, with_previews(job()), events.append)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(p.index, p.step, p.total, p.frames.shape) for p in previews] == [
        (i, i + 1, STEPS, (1, 16, 16, 3)) for i in range(3)
    ]
    assert all((p.frames.array == p.step).all() for p in previews)
    assert (made.frames.array == STEPS).all()
    shared.run(job(), events.append)
    assert sum(isinstance(event, Preview) for event in events) == 3


def test_a_cancel_is_heard_while_rank_0_decodes_a_preview(shared: WorkerGroup, token: CancelToken) -> None:
    works(shared)
    before = shared.status.pids

    def cancel_early(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise":
            threading.Timer(0.3, token.set).start()

    started = time.monotonic()
    with pytest.raises(JobCancelled, match="cancelled in denoise, step 2 of 4"):
        shared.run(with_previews(job(decode_s=60)), cancel_early, token)
    assert time.monotonic() - started < 20
    assert shared.status.pids == before
    assert works(shared)


def test_a_rank_that_dies_between_a_preview_and_its_frames(shared: WorkerGroup) -> None:
    with pytest.raises(WorkerDied, match="worker 0 died"):
        shared.run(with_previews(job(fault="exit before the descriptor")))
    assert works(shared)


def test_the_same_exception_on_all_ranks_fails_the_job_and_keeps_the_group(shared: WorkerGroup) -> None:
    works(shared)
    before = shared.status.pids
    with pytest.raises(SgldError, match="ValueError: boom") as caught:
        shared.run(job(fault="raise", step=2))
    assert not isinstance(caught.value, WorkerDied)
    assert shared.status.pids == before
    assert works(shared)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_fails_while_its_peer_sits_in_a_collective(shared: WorkerGroup, rank: int) -> None:
    works(shared)
    before = shared.status.pids
    with pytest.raises(WorkerDied, match=f"worker {rank} failed alone .*boom"):
        shared.run(job(fault="raise", rank=rank, step=2))
    assert works(shared)
    assert not set(shared.status.pids) & set(before)
    assert not any(psutil.pid_exists(pid) for pid in before)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_exits_while_busy(shared: WorkerGroup, rank: int) -> None:
    with pytest.raises(WorkerDied, match=f"worker {rank} died|worker {1 - rank} failed alone"):
        shared.run(job(fault="exit", rank=rank, step=2))
    assert works(shared)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_busy(shared: WorkerGroup, rank: int) -> None:
    works(shared)
    victim = shared.status.pids[rank]

    def kill_at_step_2(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step >= 2:
            os.kill(victim, signal.SIGKILL)

    with pytest.raises(WorkerDied):
        shared.run(job(steps=200, step_s=0.02), kill_at_step_2)
    assert works(shared)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_idle_costs_no_job(shared: WorkerGroup, rank: int) -> None:
    works(shared)
    restarts = shared.status.restarts
    os.kill(shared.status.pids[rank], signal.SIGKILL)
    assert dies(shared)
    assert works(shared)
    assert shared.status.restarts == restarts + 1


def test_out_of_memory_fails_one_job_and_the_next_is_correct(shared: WorkerGroup) -> None:
    works(shared)
    before = shared.status.pids
    with pytest.raises(OutOfMemory, match="out of memory"):
        shared.run(job(fault="oom", step=1))
    assert shared.status.pids == before
    assert works(shared)


def test_cancel_stops_all_ranks_within_a_step(shared: WorkerGroup, token: CancelToken) -> None:
    works(shared)
    before, seen = shared.status.pids, list[int]()

    def cancel_at_step_3(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise":
            seen.append(event.step)
            if event.step >= 3:
                token.set()

    with pytest.raises(JobCancelled, match="cancelled in denoise"):
        shared.run(job(steps=1000, step_s=0.1), cancel_at_step_3, token)
    assert max(seen) <= 4, "the job went on after the step in which it was cancelled"
    assert shared.status.pids == before
    assert works(shared)


def test_cancel_during_a_step_that_does_not_end_kills_the_group(shared: WorkerGroup, token: CancelToken) -> None:
    works(shared)
    before = shared.status.pids
    threading.Timer(0.3, token.set).start()
    started = time.monotonic()
    with pytest.raises(JobCancelled, match="did not stop in time"):
        shared.run(job(fault="hang", step=2), token=token)
    assert time.monotonic() - started < 30
    assert works(shared)
    assert not set(shared.status.pids) & set(before)


def test_cancel_is_heard_while_rank_0_decodes_alone(shared: WorkerGroup, token: CancelToken) -> None:
    works(shared)
    before = shared.status.pids

    def cancel_in_decode(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "decode":
            token.set()

    started = time.monotonic()
    with pytest.raises(JobCancelled, match="cancelled in decode"):
        shared.run(job(decode_s=60), cancel_in_decode, token)
    assert time.monotonic() - started < 20
    assert shared.status.pids == before
    assert works(shared)


def test_a_queued_cancel_never_reaches_a_rank(shared: WorkerGroup, token: CancelToken) -> None:
    seen: list[Event] = []
    token.set()
    with pytest.raises(JobCancelled):
        shared.run(job(), seen.append, token)
    assert seen == []


def test_a_stale_cancel_does_not_touch_the_next_job(shared: WorkerGroup, token: CancelToken) -> None:

    def cancel_at_the_end(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.step) == ("decode", 1):
            token.set()

    shared.run(job("one"), cancel_at_the_end, token)
    assert works(shared)


def test_ranks_ignore_the_terminal_s_interrupt(shared: WorkerGroup) -> None:
    works(shared)
    before = shared.status.pids
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert works(shared)
    assert shared.status.pids == before


def test_a_model_that_cannot_be_loaded_is_a_typed_error(tmp_path: Path) -> None:
    group = WorkerGroup(2, run_faulty, patience=PATIENCE)
    try:
        with pytest.raises(ModelError, match="model_index.json is missing"):
            group.load(Load(Settings(), tmp_path / "broken"))
        with pytest.raises(WorkerDied, match="exit code 3"):
            group.load(Load(Settings(), tmp_path / "dies"))
    finally:
        group.stop()


def test_a_load_that_fails_after_a_restart_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    group = WorkerGroup(1, run_faulty, patience=PATIENCE)
    try:
        (tmp_path / "broken").mkdir()
        folder.symlink_to(tmp_path / "fine")
        group.load(Load(Settings(), folder))
        folder.unlink()
        folder.symlink_to(tmp_path / "broken")
        os.kill(group.status.pids[0], signal.SIGKILL)
        assert dies(group)
        for _ in range(2):
            with pytest.raises(ModelError):
                group.run(job())
        folder.unlink()
        folder.symlink_to(tmp_path / "fine")
        assert works(group)
    finally:
        group.stop()


def test_an_answer_that_nobody_took_never_meets_the_next_command(shared: WorkerGroup) -> None:
    works(shared)

    def fail(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise":
            raise RuntimeError("the follower fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        shared.run(job(steps=2), fail)
    made = run_one(shared, job())
    assert len(made.timings.steps_ms) == STEPS


def test_a_closed_group_starts_nothing() -> None:
    group = WorkerGroup(1, run_faulty, patience=PATIENCE)
    group.close()
    with pytest.raises(WorkerDied, match="stopped"):
        group.load(Load(Settings(), Path("model")))
    assert group.status.pids == ()


def test_stop_leaves_no_process_and_no_descriptor() -> None:
    me = psutil.Process()
    group = WorkerGroup(2, run_faulty, patience=PATIENCE)
    group.load(Load(Settings(), Path("model")))
    group.stop()
    children, descriptors = len(me.children(recursive=True)), me.num_fds()
    for _ in range(2):
        group = WorkerGroup(2, run_faulty, patience=PATIENCE)
        group.load(Load(Settings(), Path("model")))
        assert works(group)
        pids = group.status.pids
        group.stop()
        assert not any(psutil.pid_exists(pid) for pid in pids)
    assert len(me.children(recursive=True)) == children
    assert me.num_fds() <= descriptors


ORPHANS = """
from pathlib import Path
import time
from sgld.settings import Settings
from sgld.engine.group import WorkerGroup
from sgld.messages import Load
from tests.engine.ranks import run_faulty
from tests.engine.test_group import job

if __name__ == "__main__":
    group = WorkerGroup(2, run_faulty)
    group.load(Load(Settings(), Path("model")))
    print(*group.status.pids, flush=True)
    group.run(job(fault="hang", rank=0, step=2)) if {busy} else time.sleep(600)
"""


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_the_parent(tmp_path: Path, busy: bool) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS.format(busy=busy))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        ranks = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
        assert len(ranks) == 2 and all(rank.is_running() for rank in ranks)
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
