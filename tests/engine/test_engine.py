"""The engine on a running loop: order, cancellation, deaths while idle, and a loop that stays free."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgld.engine.cancel import CancelToken
from sgld.engine.engine import Engine
from sgld.engine.group import WorkerGroup
from sgld.errors import SgldError, WorkerDied
from sgld.messages import Event, Progress
from sgld.params import OutputParams
from sgld.settings import Settings
from tests.engine.outputs import generate_one, ignore
from tests.engine.ranks import INFO, run_faulty
from tests.engine.test_group import PATIENCE, STEPS


def asked(steps: int = STEPS, **fault: Any) -> OutputParams:
    return OutputParams(prompt=json.dumps(fault), seed=1, num_inference_steps=steps, fps=8)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """One rank with the faulty family, loaded."""
    group = WorkerGroup(1, run_faulty, patience=PATIENCE)
    (tmp_path / "model_index.json").write_text("{}")
    async with Engine(Settings.of(model_path=str(tmp_path)), group) as engine:
        assert await engine.load(ignore) == INFO
        assert engine.state == "ready"
        yield engine


async def test_jobs_run_in_order_and_the_loop_stays_free(engine: Engine) -> None:
    order: list[str] = []

    def follow(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.step) == ("denoise", STEPS):
            order.append(event.job_id)

    gaps: list[float] = []
    beating = asyncio.create_task(heartbeat(gaps))
    made = await asyncio.gather(*(generate_one(engine, name, asked(step_s=0.05), follow) for name in "abc"))
    beating.cancel()
    assert order == ["a", "b", "c"]
    assert all((media.frames.array == STEPS).all() for media in made)
    assert len(gaps) > 50, "the loop did not run while the ranks worked"
    assert max(gaps) < 0.5, "something held the loop"


async def heartbeat(gaps: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        gaps.append(time.perf_counter() - before)


async def test_cancelling_the_task_stops_its_job_and_spares_the_next(engine: Engine) -> None:
    reached = asyncio.Event()

    def follow(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step >= 2:
            reached.set()

    long = asyncio.create_task(generate_one(engine, "long", asked(1000, step_s=0.05), follow))
    waiting = asyncio.create_task(generate_one(engine, "waiting", asked(), ignore))
    queued = asyncio.create_task(generate_one(engine, "queued", asked(), ignore))
    await reached.wait()
    pids = engine.status.pids
    queued.cancel()
    long.cancel()
    for task in (long, queued):
        with pytest.raises(asyncio.CancelledError):
            await task
    made = await asyncio.wait_for(waiting, 20)
    assert (made.frames.array == STEPS).all()
    assert engine.status.pids == pids


async def test_a_failed_job_leaves_the_engine_ready(engine: Engine) -> None:
    with pytest.raises(SgldError, match="boom"):
        await generate_one(engine, "bad", asked(fault="raise", step=2), ignore)
    assert engine.state == "ready"
    await generate_one(engine, "good", asked(), ignore)


@pytest.mark.parametrize("busy", [False, True])
async def test_a_killed_rank_is_replaced_without_being_asked(engine: Engine, busy: bool) -> None:
    before = engine.status.pids
    if busy:
        long = asyncio.create_task(generate_one(engine, "long", asked(1000, step_s=0.05), ignore))
        await asyncio.sleep(0.5)
    os.kill(before[0], signal.SIGKILL)
    if busy:
        with pytest.raises(WorkerDied):
            await long
    async with asyncio.timeout(60):
        while engine.state != "restarting":
            await asyncio.sleep(0.01)
        while engine.state != "ready":
            await asyncio.sleep(0.05)
    assert engine.status.pids != before
    assert engine.status.restarts == 1
    await generate_one(engine, "after", asked(), ignore)


async def test_stop_waits_for_the_running_job(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    engine = Engine(Settings.of(model_path=str(tmp_path)), WorkerGroup(1, run_faulty, patience=PATIENCE))
    await engine.load(ignore)
    running = asyncio.create_task(generate_one(engine, "a", asked(step_s=0.05), ignore))
    await asyncio.sleep(0.05)
    await engine.stop()
    assert ((await running).frames.array == STEPS).all()
    assert engine.status.pids == ()


async def test_a_cancel_that_meets_completion_has_one_winner(engine: Engine) -> None:
    """Cancelling at any moment around the end gives the result or CancelledError, never anything else."""
    outcomes = set()
    for delay in range(40):
        task = asyncio.create_task(generate_one(engine, "race", asked(1), ignore))
        for _ in range(delay):
            await asyncio.sleep(0.0005)
        task.cancel()
        try:
            outcomes.add(type(await task).__name__)
        except asyncio.CancelledError:
            outcomes.add("cancelled")
    assert outcomes <= {"Media", "cancelled"}
    assert (await generate_one(engine, "after", asked(), ignore)).seed == 1


async def test_set_after_close_does_nothing() -> None:
    token = CancelToken()
    token.close()
    token.set()


async def test_queued_jobs_hold_no_descriptor(engine: Engine) -> None:
    me = psutil.Process()
    running = asyncio.create_task(generate_one(engine, "long", asked(1000, step_s=0.05), ignore))
    await asyncio.sleep(0)
    before = me.num_fds()
    queued = [asyncio.create_task(generate_one(engine, f"queued {i}", asked(), ignore)) for i in range(100)]
    await asyncio.sleep(0.1)
    assert me.num_fds() < before + 10
    for task in (running, *queued):
        task.cancel()
    done, _ = await asyncio.wait([running, *queued])
    assert all(task.cancelled() for task in done)


async def test_stop_during_a_restart_does_not_load_the_model_again(engine: Engine) -> None:
    os.kill(engine.status.pids[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while engine.state != "restarting":
            await asyncio.sleep(0.01)
    await engine.stop()
    assert engine.status.pids == ()
    assert engine.state == "stopped"
