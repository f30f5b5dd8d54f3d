"""Benchmarks of sgld on the embedded model: medians, and ratios taken in one run. Prints a table, then JSON.

warm      seconds of one clip and of one image, model loaded
cold      wall seconds of `sgld generate`, process start included, clip and image
loop      gaps of the event loop while a generation runs, milliseconds
spine     a request through the engine against the same sampling in this process, run in turns

`tools/bench faults`, `lora`, `parallel` and `server` measure killed workers, LoRA adapters against diffusers, several
workers sharing one picture, and `sgld serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgld import __version__
from sgld.config import set_default_environment
from sgld.engine.engine import Engine
from sgld.hub.hub import resolve_model
from sgld.messages import Event
from sgld.params import ModelInfo, OutputParams
from sgld.resolve import resolve
from sgld.settings import Settings

PROMPT = "a red circle moving right on a blue background"
Figures = dict[str, float]


def asked(info: ModelInfo, seed: int, **given: Any) -> OutputParams:
    """The benchmark's request."""
    return resolve({"prompt": PROMPT, "seed": seed, **given}, info).params


def ignore(_: Event) -> None:
    """An emit that follows nothing."""


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of `values` lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def timed(engine: Engine, params: OutputParams) -> float:
    """Seconds of one request through the engine."""
    start = time.perf_counter()
    await engine.generate("bench", [params], ignore)
    return time.perf_counter() - start


async def bench_warm(repeat: int) -> Figures:
    async with Engine(Settings()) as engine:
        info = await engine.load(ignore)
        clip = [await timed(engine, asked(info, seed)) for seed in range(repeat + 1)][1:]
        image = [await timed(engine, asked(info, seed, num_frames=1)) for seed in range(repeat + 1)][1:]
    return {"warm clip, s": statistics.median(clip), "warm image, s": statistics.median(image)}


async def bench_loop(repeat: int) -> Figures:
    gaps: list[float] = []

    async def heartbeat() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(1e3 * (time.perf_counter() - start) - 1)

    async with Engine(Settings()) as engine:
        info = await engine.load(ignore)
        beating = asyncio.create_task(heartbeat())
        for seed in range(repeat):
            await timed(engine, asked(info, seed))
        beating.cancel()
    return {
        "loop gap p50, ms": percentile(gaps, 0.5),
        "loop gap p99, ms": percentile(gaps, 0.99),
        "loop gap max, ms": max(gaps),
    }


async def bench_cold(repeat: int) -> Figures:
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("clip", []), ("image", ["--num-frames", "1"])):
            command = [sys.executable, "-m", "sgld", "generate", "--prompt", PROMPT, "--seed", "1", "--overwrite"]
            command += ["--output-path", folder, *flags]
            seconds = [await asyncio.to_thread(_wall, command) for _ in range(repeat + 1)][1:]
            figures[f"cold sgld generate, {name}, s"] = statistics.median(seconds)
    help_command = [sys.executable, "-m", "sgld", "generate", "--help"]
    figures["sgld generate --help, s"] = statistics.median([_wall(help_command) for _ in range(repeat + 1)])
    return figures


def _wall(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


class Silence:
    """In place of a rank's pipe: nothing arrives, and what is sent is dropped."""

    def poll(self) -> bool:
        return False

    def send(self, _: object) -> None:
        return None


def same_process() -> Callable[[OutputParams], float]:
    """The family loaded here, and a function that times its sampling."""
    from sgld.models import load_family
    from sgld.nn.parallel import Mesh
    from sgld.platform import choose_platform
    from sgld.worker.run_context import RunContext
    from sgld.worker.sampler import sample

    machine = choose_platform()
    machine.set_up(0, 1)
    mesh = Mesh.solo(machine.device(0))
    family = load_family(resolve_model(Settings()), mesh, machine, lambda done, total: None)

    def run(params: OutputParams) -> float:
        start = time.perf_counter()
        sample(family, params, RunContext("bench", mesh, Silence(), machine.synchronize))  # type: ignore[arg-type]
        return time.perf_counter() - start

    return run


async def bench_spine(repeat: int) -> Figures:
    direct = same_process()
    rows = []
    async with Engine(Settings()) as engine:
        info = await engine.load(ignore)
        for seed in range(repeat + 1):
            before = time.process_time()
            through = await timed(engine, asked(info, seed))
            spent = 1e3 * (time.process_time() - before)  # by this process alone: the rank is another
            rows.append((through, direct(asked(info, seed)), spent))
    through, alone, spent = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    ratio = statistics.median(a / b for a, b, _ in rows[1:])
    return {
        "through the engine, s": through,
        "in the same process, s": alone,
        "spine overhead, %": 100 * (ratio - 1),
        "the parent's CPU time for a request, ms": spent,
    }


BENCHES = {"warm": bench_warm, "cold": bench_cold, "loop": bench_loop, "spine": bench_spine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="which to run (default: all)")
    parser.add_argument("--repeat", type=int, default=7, help="counted runs of each (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    set_default_environment(OMP_WAIT_POLICY="passive")  # as the ranks do, so that both sides of a ratio wait alike
    figures: Figures = {}
    for name in options.names or BENCHES:
        figures |= asyncio.run(BENCHES[name](options.repeat))
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:10.3f}")
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "load": os.getloadavg()[0]}
    report = json.dumps({"sgld": __version__, "machine": machine, "repeat": options.repeat, "figures": figures})
    print(report)
    if options.json is not None:
        options.json.write_text(report + "\n")


if __name__ == "__main__":
    main()
