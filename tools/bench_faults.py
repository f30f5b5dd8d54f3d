"""Kill workers of the embedded model again and again: how long until the group is back, and what is left behind.

A worker, chosen in turn, gets SIGKILL at a stage, chosen in turn: idle, encode, denoise, decode. The job under way is
tried again once; another one waits behind it. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from sgld.engine.engine import Engine
from sgld.engine.forkserver import FORK_SERVER
from sgld.messages import Event, OutputReady, Progress
from sgld.params import OutputParams
from sgld.resolve import resolve
from sgld.settings import Settings

REQUEST = {"prompt": "a red circle on a blue background", "num_frames": 5, "num_inference_steps": 8, "seed": 3}
STAGES = ("idle", "encode", "denoise", "decode")
MIB = 2**20


def left_behind() -> dict[str, float]:
    """Count descriptors, children and zombies of this process, and its memory and that of all its children."""
    us = psutil.Process()
    children = us.children(recursive=True)
    return {
        "descriptors": us.num_fds(),
        "children": len(children),
        "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
        "memory, MiB": us.memory_info().rss / MIB,
        "children's share of memory, MiB": sum(child.memory_full_info().pss for child in children) / MIB,
    }


class Killer:
    """An emit that kills one worker once, at the start of a stage."""

    def __init__(self, engine: Engine, stage: str, rank: int):
        self._victim = engine.status.pids[rank]
        self._stage = stage
        self.killed_at: float | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.stage == self._stage and self.killed_at is None:
            self.kill()

    def kill(self) -> None:
        os.kill(self._victim, signal.SIGKILL)
        self.killed_at = time.perf_counter()


async def one_kill(engine: Engine, params: OutputParams, stage: str, rank: int) -> tuple[float, bytes]:
    """Return the seconds from a kill until the workers hold the model again, and the frames of the job that was hit."""
    killer, restarts = Killer(engine, stage, rank), engine.status.restarts
    hit = asyncio.create_task(frames_of(engine, "hit", params, killer))
    behind = asyncio.create_task(frames_of(engine, "behind", params, _ignore))
    if stage == "idle":
        await asyncio.gather(hit, behind)
        killer.kill()
        await until(lambda: engine.state == "restarting")
    else:
        await until(lambda: killer.killed_at is not None)
    await until(lambda: engine.status.restarts > restarts and engine.state == "ready" and len(engine.status.pids) > 0)
    assert killer.killed_at is not None
    seconds = time.perf_counter() - killer.killed_at
    frames = await hit
    assert await behind == frames
    return seconds, frames


async def frames_of(engine: Engine, name: str, params: OutputParams, follow: Callable[[Event], None]) -> bytes:
    """Make one output and return its frames."""
    made: list[bytes] = []

    def emit(event: Event) -> None:
        if isinstance(event, OutputReady):
            made.append(event.media.frames.array.tobytes())
        follow(event)

    await engine.generate(name, [params], emit)
    return made[0]


async def until(condition: Callable[[], bool]) -> None:
    """Look every 5 ms until the condition holds."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def _ignore(_: Event) -> None:
    pass


async def measure(kills: int, workers: int, worker_start: str) -> dict[str, float]:
    """Return the figures of that many kills."""
    async with Engine(Settings.of(num_gpus=workers, worker_retries=1, worker_start=worker_start)) as engine:
        info = await engine.load(_ignore)
        params = resolve(REQUEST, info).params
        _, expected = await one_kill(engine, params, "denoise", 0)
        gc.collect()
        before = left_behind()
        seconds = []
        for turn in range(kills):
            stage, rank = STAGES[turn % len(STAGES)], turn // len(STAGES) % workers
            took, frames = await one_kill(engine, params, stage, rank)
            assert frames == expected, "another picture"
            seconds.append(took)
        gc.collect()
        after = left_behind()
    figures = {
        "kills": float(kills),
        "back after, median, s": statistics.median(seconds),
        "back after, most, s": max(seconds),
    }
    for name, value in after.items():
        figures[name] = value
        figures[f"{name}, gained"] = value - before[name]
    FORK_SERVER.stop()
    figures["processes left at the end"] = len(psutil.Process().children(recursive=True))
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="(default: 50)")
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--worker-start", choices=("forkserver", "spawn"), default="forkserver")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    figures = asyncio.run(measure(args.kills, args.workers, args.worker_start))
    for name, value in figures.items():
        print(f"| {name} | {value:.2f} |")
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
