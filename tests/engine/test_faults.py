"""Two workers of the embedded model, killed at any moment: the job is made again, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from sgld.engine.engine import Engine
from sgld.errors import WorkerDied
from sgld.messages import Event, Frames, Preview, Progress
from sgld.params import OutputParams
from sgld.resolve import resolve
from sgld.settings import Settings
from tests.engine.outputs import generate_one, ignore

pytestmark = pytest.mark.asyncio(loop_scope="module")
REQUEST = {"prompt": "a red circle on a blue background", "num_frames": 1, "num_inference_steps": 4, "seed": 3}


def asked(engine: Engine) -> OutputParams:
    assert engine.info is not None
    return resolve(REQUEST, engine.info).params


def kill_at(engine: Engine, stage: str, step: int, rank: int) -> Callable[[Event], None]:
    """Kills that worker the first time that stage comes to that step."""
    victims = [engine.status.pids[rank]]

    def follow(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.step) == (stage, step) and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    return follow


def entries(folder: Path) -> int:
    return len(list(folder.iterdir()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    async with Engine(Settings.of(num_gpus=2, worker_retries=1, vae_sp=True)) as engine:
        await engine.load(ignore)
        yield engine


async def made(engine: Engine, follow: Callable[[Event], None] = ignore) -> Frames:
    return (await generate_one(engine, "job", asked(engine), follow)).frames.array.copy()


@pytest.mark.parametrize(("stage", "step", "rank"), [
    ("encode", 0, 0), ("encode", 0, 1), ("denoise", 0, 1), ("denoise", 4, 0), ("decode", 0, 0),
    ("decode", 0, 1),
])  # fmt: skip
async def test_a_job_is_made_again_and_those_that_wait_are_made(
    engine: Engine, stage: str, step: int, rank: int
) -> None:
    expected = await made(engine)
    restarts = engine.status.restarts
    killed, queued = await asyncio.gather(made(engine, kill_at(engine, stage, step, rank)), made(engine))
    assert engine.status.restarts == restarts + 1, "nobody was killed"
    assert np.array_equal(killed, expected)
    assert np.array_equal(queued, expected)


async def test_nothing_is_left_of_the_killed(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    us = psutil.Process()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    await made(engine, kill_at(engine, "denoise", 0, 1))
    await made(engine)
    files = entries(tmp_path)
    descriptors, children = us.num_fds(), len(us.children(recursive=True))
    for rank in (0, 1, 0):
        await made(engine, kill_at(engine, "denoise", 0, rank))
    assert us.num_fds() <= descriptors
    assert entries(tmp_path) == files > 0
    assert len(us.children(recursive=True)) == children
    assert not [child for child in us.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]


async def test_a_cancel_while_both_decode(engine: Engine) -> None:
    """Which they share; a long clip, so that it comes in time."""
    assert engine.info is not None
    clip = resolve(REQUEST | {"num_frames": 33, "num_inference_steps": 1}, engine.info).params
    ended: list[float] = []

    def cancel(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.step) == ("decode", 0):
            job.cancel()
        if isinstance(event, Progress) and (event.stage, event.step) == ("decode", 1):
            ended.append(event.step)

    pids = engine.status.pids
    job = asyncio.ensure_future(engine.generate("job", [clip], cancel))
    with pytest.raises(asyncio.CancelledError):
        await job
    assert not ended, "it came too late"
    expected = await made(engine)
    assert expected.any()
    assert engine.status.pids == pids, "a worker was killed for it"


async def test_previews_that_both_decode(engine: Engine) -> None:
    """They show what one worker's show."""

    async def shown(engine: Engine) -> list[NDArray[np.int64]]:
        found: list[NDArray[np.int64]] = []

        def follow(event: Event) -> None:
            if isinstance(event, Preview):
                found.append(event.frames.array.astype(int))

        await engine.generate("job", [asked(engine)], follow, 2)
        return found

    async with Engine(Settings()) as single:
        await single.load(ignore)
        alone = await shown(single)
    together = await shown(engine)
    assert len(together) == len(alone) == 2
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(together, alone, strict=True))
    assert np.abs(alone[0] - alone[1]).max() > 20


async def test_a_job_that_always_kills_fails_in_the_end() -> None:
    async with Engine(Settings.of(worker_retries=1)) as engine:
        await engine.load(ignore)

        def kill_always(event: Event) -> None:
            if isinstance(event, Progress) and event.stage == "encode" and event.step == 0:
                os.kill(engine.status.pids[0], signal.SIGKILL)

        with pytest.raises(WorkerDied):
            await engine.generate("job", [asked(engine)], kill_always)
        assert engine.status.restarts == 2
        await made(engine)


async def test_two_groups_on_one_machine_keep_apart() -> None:
    async with Engine(Settings.of(num_gpus=2)) as one, Engine(Settings.of(num_gpus=2, ulysses_degree=2)) as other:
        await asyncio.gather(one.load(ignore), other.load(ignore))
        branches, heads = await asyncio.gather(made(one), made(other))
    assert np.abs(branches.astype(int) - heads.astype(int)).max() <= 1
