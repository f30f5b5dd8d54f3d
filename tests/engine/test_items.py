"""Several outputs in one command: encoded once, sent one by one, and tried again one by one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

import sgld
from sgld.engine.cancel import CancelToken
from sgld.engine.engine import Engine
from sgld.engine.group import WorkerGroup
from sgld.errors import JobCancelled, SgldError, WorkerDied
from sgld.messages import Event, Generate, Item, Load, Preview, Progress, RankAssignment, batch_key
from sgld.params import OutputParams
from sgld.resolve import resolve
from sgld.settings import Settings
from sgld.worker.entry import serve
from tests.engine.outputs import Outputs, generate_one, ignore
from tests.engine.ranks import INFO, run_faulty
from tests.engine.test_engine import asked
from tests.engine.test_group import PATIENCE, job, works

PROMPT = "a red circle on a blue background"
STAGES = ["encode", "denoise", "decode"]


def load_counting(load: Load, *args: Any) -> Any:
    """The embedded model, which writes a line into its folder for each encoding."""
    from sgld.models import load_family

    family, log = load_family(load, *args), load.folder / "encodings"
    for name in ("encode", "encode_frames"):
        setattr(family, name, counted(getattr(family, name), log, name))
    return family


def counted(function: Any, log: Path, name: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{name}\n")
        return function(*args, **options)

    return call


def run_counting(assignment: RankAssignment, connection: Connection) -> None:
    serve(assignment, connection, load_counting)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(np.full((96, 96, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    source = Path(sgld.__file__).parent / "demo"
    return Path(shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


async def test_outputs_of_one_prompt_encode_it_once(folder: Path) -> None:
    async with Engine(Settings.of(model_path=str(folder)), WorkerGroup(1, run_counting)) as engine:
        info = await engine.load(ignore)

        def request(seed: int, **changes: Any) -> OutputParams:
            given = {"prompt": PROMPT, "num_frames": 1, "num_inference_steps": 3, "seed": seed}
            given |= {"image_path": [str(folder.parent / "picture.png")], "strength": 0.7}
            return resolve(given | changes, info).params

        def encodings() -> list[str]:
            lines = (folder / "encodings").read_text().split()
            (folder / "encodings").unlink()
            return sorted(lines)

        outputs = Outputs()
        items = [request(1), request(2), request(2**33), request(1, prompt="a green star")]
        await engine.generate("together", items[:3], outputs)
        assert await asyncio.to_thread(encodings) == ["encode", "encode_frames"]
        await engine.generate("another", items, ignore)
        assert await asyncio.to_thread(encodings) == 2 * ["encode"] + 2 * ["encode_frames"], "two prompts"
        alone = [await generate_one(engine, "alone", item) for item in items[:3]]
        assert await asyncio.to_thread(encodings) == 3 * ["encode"] + 3 * ["encode_frames"], "the control"
    for index, media in outputs.by_item.items():
        assert np.array_equal(media.frames.array, alone[index].frames.array)
        assert (media.seed, media.tokens) == (items[index].seed, alone[index].tokens)
        assert list(media.timings.stages_ms) == STAGES and len(media.timings.steps_ms) == 2
    assert not np.array_equal(alone[0].frames.array, alone[1].frames.array)


def test_items_that_differ_in_their_seed_share_their_encoding() -> None:
    one = OutputParams(prompt="a", seed=1)
    assert batch_key(one) == batch_key(attrs.evolve(one, seed=2))
    assert batch_key(one) != batch_key(attrs.evolve(one, num_inference_steps=2))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """Two ranks with the faulty family, and one retry."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "model_index.json").write_text("{}")
    settings = Settings.of(model_path=str(folder), worker_retries=1)
    async with Engine(settings, WorkerGroup(2, run_faulty, patience=PATIENCE)) as engine:
        assert await engine.load(ignore) == INFO
        yield engine


@pytest.mark.asyncio(loop_scope="module")
async def test_only_unfinished_items_are_tried_again(engine: Engine) -> None:
    """Two deaths, in two items, with one retry for each."""
    events: list[Event] = []
    victims, restarts = [1, 2], engine.status.restarts

    def kill(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.stage == "denoise" and event.item in victims[:1]:
            victims.pop(0)
            os.kill(engine.status.pids[0], signal.SIGKILL)

    outputs = Outputs(kill)
    await engine.generate("job", [asked(step_s=0.05)] * 3, outputs, previews=2)
    assert list(outputs.by_item) == [0, 1, 2]
    assert engine.status.restarts == restarts + 2
    starts = [e.item for e in events if isinstance(e, Progress) and (e.stage, e.step) == ("encode", 0)]
    assert starts == [0, 1, 1, 2, 2]
    previews = [(e.item, e.index) for e in events if isinstance(e, Preview)]
    assert sorted(previews) == [(item, index) for item in range(3) for index in range(2)]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_item_that_always_kills_fails_the_job_and_spares_what_was_finished(engine: Engine) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Progress) and (event.item, event.stage, event.step) == (1, "encode", 0):
            os.kill(engine.status.pids[1], signal.SIGKILL)

    outputs, restarts = Outputs(kill), engine.status.restarts
    with pytest.raises(WorkerDied):
        await engine.generate("job", [asked()] * 3, outputs)
    assert list(outputs.by_item) == [0]
    assert engine.status.restarts == restarts + 2


@pytest.mark.asyncio(loop_scope="module")
async def test_a_cancel_stops_the_items_to_come(engine: Engine) -> None:
    def cancel(event: Event) -> None:
        if isinstance(event, Progress) and event.item == 1 and event.stage == "denoise":
            making.cancel()

    outputs = Outputs(cancel)
    making = asyncio.create_task(engine.generate("job", [asked(step_s=0.05)] * 3, outputs))
    with pytest.raises(asyncio.CancelledError):
        await making
    assert list(outputs.by_item) == [0]
    pids = engine.status.pids
    await generate_one(engine, "next", asked())
    assert engine.status.pids == pids


def several(command: Generate) -> Generate:
    return attrs.evolve(command, items=tuple(Item(index, command.items[0].params) for index in range(3)))


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    """Two ranks with the faulty family."""
    group = WorkerGroup(2, run_faulty, patience=PATIENCE)
    group.load(Load(Settings(), Path("model")))
    yield group
    group.stop()


def test_rank_0_that_fails_alone_stops_its_peer_before_the_next_item(group: WorkerGroup) -> None:
    """While it decodes alone its peer waits at the next item; each still answers once, and both live on."""
    outputs = Outputs()
    assert works(group)
    pids = group.status.pids
    with pytest.raises(SgldError, match="boom") as caught:
        group.run(several(job(fault="raise", decode=2)), outputs)
    assert not isinstance(caught.value, WorkerDied)
    assert list(outputs.by_item) == [0]
    assert works(group)
    assert group.status.pids == pids


def test_a_cancel_in_the_decoding_of_an_item_stops_both_ranks(group: WorkerGroup) -> None:
    assert works(group)
    pids, token = group.status.pids, CancelToken()

    def cancel(event: Event) -> None:
        if isinstance(event, Progress) and (event.item, event.stage) == (1, "decode"):
            token.set()

    outputs = Outputs(cancel)
    with pytest.raises(JobCancelled, match="cancelled in decode"):
        group.run(several(job(decode_s=0.3)), outputs, token)
    token.close()
    assert list(outputs.by_item) == [0]
    assert works(group)
    assert group.status.pids == pids
