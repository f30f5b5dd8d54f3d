"""Benchmarks of `sgld serve` on the embedded model: the real process, over loopback. Prints a Markdown table.

load      images: requests per second, and their p50 and p99, at 1, 8 and 64 clients
first     from a request to its first event, its first preview and its end
health    /health while a generation runs and 64 clients follow it, and while nothing runs
leak      growth of memory and of open descriptors over many generations, server and workers
journal   listing and starting with 10,000 finished jobs

Each part runs `--repeat` times on a server of its own; the table has the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import numpy as np
import psutil

from sgld import __version__
from sgld.params import OutputParams
from sgld.server.app import JOURNAL
from sgld.server.jobs.record import Artifact, JobRecord, Outcome, to_document
from sgld.server.jobs.sqlite import Journal

PROMPT = "a red circle moving right on a blue background"
CLIENTS = (1, 8, 64)
LISTENERS = 64
PROBE_S = 0.002  # between two probes
CLIP = {"num_frames": 5, "num_inference_steps": 2}
MODEL = "sgld/demo"
Figures = dict[str, float]
AIMS = {
    "/health p99 under load, ms": "< 25",
    "memory growth of the server, %": "< 2",
    "memory growth of the worker, %": "< 2",
    "descriptors gained": "0",
    "listing a page of 20, ms": "< 20",
    "listing a page of 20 in the middle, ms": "< 20",
}


@attrs.frozen
class Scale:
    """How much to measure."""

    requests: int = 256  # at each number of clients
    image_steps: int = 4
    streams: int = 10
    health_steps: int = 200
    generations: int = 500
    finished: int = 10_000
    listings: int = 200


QUICK = Scale(
    requests=64, image_steps=1, streams=2, health_steps=40, generations=30, finished=10_000, listings=20
)  # fmt: skip


@attrs.frozen
class Server:
    """A running `sgld serve`, and a client of it."""

    url: str
    process: psutil.Popen
    session: aiohttp.ClientSession
    listening_s: float  # from the start of the process until it answered

    async def post(self, path: str, **fields: Any) -> Any:
        """JSON in and out; raises for what is refused."""
        async with self.session.post(self.url + path, json={"prompt": PROMPT, **fields}) as answer:
            return await answer.json()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            return await answer.json()

    async def image(self, **fields: Any) -> None:
        await self.post("/v1/images/generations", **fields)

    async def events(self, path: str) -> AsyncIterator[str]:
        """The names of a job's events."""
        async with self.session.get(self.url + path) as answer:
            async for name in names_of(answer):
                yield name

    def worker(self) -> psutil.Process:
        """Rank 0."""
        return next(child for child in self.process.children(recursive=True) if child.name() == "sgld-rank0")


@asynccontextmanager
async def serving(folder: Path, *flags: str) -> AsyncIterator[Server]:
    """A server whose model is loaded, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sgld", "serve", "--port", str(port), "--output-path", str(folder), *flags]
    began = time.perf_counter()
    process = psutil.Popen(command, stderr=subprocess.DEVNULL)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(raise_for_status=True, connector=connector, timeout=timeout) as session:
            url = f"http://127.0.0.1:{port}"
            listening = await until_answered(session, f"{url}/liveness", process) - began
            await until_answered(session, f"{url}/health", process)
            yield Server(url, process, session, listening)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 60)


async def until_answered(session: aiohttp.ClientSession, url: str, process: psutil.Popen) -> float:
    """The time at which it first answered 200. Raises RuntimeError when the server ends before."""
    while process.poll() is None:
        with suppress(aiohttp.ClientError):
            async with session.get(url):
                return time.perf_counter()
        await asyncio.sleep(0.01)
    raise RuntimeError(f"the server ended with exit code {process.returncode}")


async def names_of(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The names of server-sent events as they come, of whatever size."""
    pending = b""
    async for chunk in answer.content.iter_any():
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"event: "):
                yield line[7:].decode()


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds it took."""
    start = time.perf_counter()
    await work
    return 1e3 * (time.perf_counter() - start)


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))


# The parts


async def bench_load(folder: Path, scale: Scale) -> Figures:
    """Closed loop: every client sends its next request when it has the answer to the last."""
    figures: Figures = {}
    async with serving(folder, "--max-queue", str(max(CLIENTS))) as server:
        for clients in CLIENTS:
            took: list[float] = []
            left = iter(range(max(scale.requests, 2 * clients)))

            async def ask(took: list[float] = took, left: Any = left) -> None:
                for seed in left:
                    took.append(await timed(server.image(seed=seed, num_inference_steps=scale.image_steps)))

            seconds = await timed(asyncio.gather(*(ask() for _ in range(clients)))) / 1e3
            name = f"{clients} client{'s' * (clients > 1)}"
            figures |= {
                f"{name}, requests/s": len(took) / seconds,
                f"{name}, p50, ms": percentile(took, 50),
                f"{name}, p99, ms": percentile(took, 99),
            }
    return figures


async def bench_first(folder: Path, scale: Scale) -> Figures:
    figures: dict[str, list[float]] = {}
    async with serving(folder) as server:
        for _ in range(scale.streams):
            for name, value in {**await time_stream(server), **await time_video(server)}.items():
                figures.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in figures.items()}


async def time_stream(server: Server) -> Figures:
    """A streamed image of the model's own number of steps."""
    start = time.perf_counter()
    body = {"prompt": PROMPT, "stream": True, "partial_images": 3}
    async with server.session.post(f"{server.url}/v1/images/generations", json=body) as answer:
        told = [1e3 * (time.perf_counter() - start) async for _ in names_of(answer)]
    return {"image stream, first partial, ms": told[0], "image stream, end, ms": told[-1]}


async def time_video(server: Server) -> Figures:
    """A clip of the model's own length and number of steps."""
    start = time.perf_counter()
    video = await server.post("/v1/videos", previews=1)
    told: Figures = {}
    async for name in server.events(f"/v1/videos/{video['id']}/events"):
        passed = 1e3 * (time.perf_counter() - start)
        told.setdefault("video, first event, ms", passed)
        if name == "preview":
            told["video, preview, ms"] = passed
        told["video, end, ms"] = passed
    return told


async def bench_health(folder: Path, scale: Scale) -> Figures:
    async with serving(folder) as server:
        idle = await probe(server, asyncio.create_task(asyncio.sleep(2)))
        video = await server.post("/v1/videos", num_inference_steps=scale.health_steps)
        address = f"{server.url}/v1/videos/{video['id']}/events"
        ready, child = multiprocessing.Pipe(duplex=False)
        # in a process of their own, for what they do must not delay what is measured here
        listeners = multiprocessing.get_context("spawn").Process(target=listen, args=(address, child))
        await asyncio.to_thread(listeners.start)
        child.close()
        await asyncio.to_thread(ready.recv)
        busy = await probe(server, asyncio.create_task(asyncio.to_thread(listeners.join)))
        if listeners.exitcode != 0:
            raise RuntimeError("a listener did not hear the end")
    return {
        "/health p50 idle, ms": percentile(idle, 50),
        "/health p99 idle, ms": percentile(idle, 99),
        "/health p50 under load, ms": percentile(busy, 50),
        "/health p99 under load, ms": percentile(busy, 99),
        "/health probes under load": float(len(busy)),
    }


async def probe(server: Server, meanwhile: asyncio.Task[None]) -> list[float]:
    """Milliseconds of each `/health`, one after the other, until `meanwhile` ends."""
    took: list[float] = []
    while not meanwhile.done():
        took.append(await timed(server.get("/health")))
        await asyncio.sleep(PROBE_S)
    await meanwhile
    return took


def listen(address: str, ready: Connection) -> None:
    """Follow a job with many clients to its end; tells `ready` when all have had their first event."""

    async def follow(session: aiohttp.ClientSession, first: asyncio.Event) -> str:
        heard = []
        async with session.get(address) as answer:
            async for name in names_of(answer):
                heard.append(name)
                first.set()
        return heard[-1]

    async def everybody() -> list[str]:
        firsts = [asyncio.Event() for _ in range(LISTENERS)]
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            following = [asyncio.create_task(follow(session, first)) for first in firsts]
            await asyncio.gather(*(first.wait() for first in firsts))
            ready.send(None)
            return await asyncio.gather(*following)

    sys.exit(set(asyncio.run(everybody())) != {"completed"})


async def bench_leak(folder: Path, scale: Scale) -> Figures:
    """Images, streams and clips in turn. The first ones fill caches that are bounded, and are not counted."""
    async with serving(folder) as server:
        processes = [server.process, server.worker()]
        warm = max(4, scale.generations * 3 // 10)
        for number in range(warm):
            await generate(server, number)
        before = [await asyncio.to_thread(usage, process) for process in processes]
        for number in range(scale.generations):
            await generate(server, number)
        after = [await asyncio.to_thread(usage, process) for process in processes]
    growth = [100 * (now[0] / then[0] - 1) for then, now in zip(before, after, strict=True)]
    return {
        "generations": float(scale.generations),
        "memory of the server, MiB": after[0][0] / 2**20,
        "memory growth of the server, %": growth[0],
        "memory of the worker, MiB": after[1][0] / 2**20,
        "memory growth of the worker, %": growth[1],
        "descriptors gained": float(sum(now[1] - then[1] for then, now in zip(before, after, strict=True))),
    }


async def generate(server: Server, number: int) -> None:
    """One of the three kinds of requests, to its end."""
    if number % 3 == 0:
        await server.image(num_inference_steps=2)
    elif number % 3 == 1:
        body = {"prompt": PROMPT, "stream": True, "partial_images": 1, "num_inference_steps": 2}
        async with server.session.post(f"{server.url}/v1/images/generations", json=body) as answer:
            await answer.read()
    else:
        video = await server.post("/v1/videos", **CLIP)
        ends = [name async for name in server.events(f"/v1/videos/{video['id']}/events")][-1]
        if ends != "completed":
            raise RuntimeError(f"{video['id']} ended with {ends}")
        async with server.session.get(f"{server.url}/v1/videos/{video['id']}/content") as answer:
            await answer.read()


def usage(process: psutil.Process) -> tuple[int, int]:
    """Bytes that are its own, and open descriptors, once clients' connections have been closed."""
    return process.memory_full_info().uss, process.num_fds()


async def bench_journal(folder: Path, scale: Scale) -> Figures:
    async with serving(folder / "empty", "--warmup", "off") as server:
        empty = server.listening_s
    ids = await fill_journal(folder / "full", scale.finished)
    async with serving(folder / "full", "--warmup", "off") as server:
        page = [await timed(server.get("/v1/videos")) for _ in range(scale.listings)]
        middle = f"/v1/videos?after={ids[len(ids) // 2]}"
        rest = [await timed(server.get(middle)) for _ in range(scale.listings)]
        large = [await timed(server.get("/v1/videos?limit=100")) for _ in range(scale.listings)]
        full = server.listening_s
        memory = server.process.memory_full_info().uss
    return {
        "finished jobs": float(scale.finished),
        "listing a page of 20, ms": statistics.median(page),
        "listing a page of 20 in the middle, ms": statistics.median(rest),
        "listing a page of 100, ms": statistics.median(large),
        "start until it listens, no jobs, s": empty,
        "start until it listens, s": full,
        "memory of the server with these jobs, MiB": memory / 2**20,
    }


async def fill_journal(folder: Path, count: int) -> list[str]:
    """A journal of completed videos; their ids."""
    now = time.time()
    params = OutputParams(prompt=PROMPT, height=96, width=96, num_frames=17, fps=8, seed=1)
    records = {}
    for number in range(count):
        id, created_at = f"video_{uuid.uuid4().hex}", now - count + number
        job = JobRecord(id, "video", "", (params,), "mp4", 1.0, MODEL, created_at=created_at, attempts=1)
        done = Outcome("completed", artifacts=(Artifact(f"{id}.mp4", "video/mp4", 7000, 1, 17),))
        records[id] = to_document(job.end(done, 604_800))
    journal = await Journal.open(folder / JOURNAL)
    await journal.put_many({("job", id): record for id, record in records.items()})
    await journal.close()
    return list(records)


PARTS: dict[str, Callable[[Path, Scale], Awaitable[Figures]]] = {
    "load": bench_load,
    "first": bench_first,
    "health": bench_health,
    "leak": bench_leak,
    "journal": bench_journal,
}


def measure(part: str, scale: Scale, repeat: int) -> Figures:
    """The medians of a part."""
    runs = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(asyncio.run(measured(part, Path(folder), scale)))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


async def measured(part: str, folder: Path, scale: Scale) -> Figures:
    return await PARTS[part](folder, scale)


def table(figures: dict[str, Figures]) -> str:
    """Markdown: one row for each figure."""
    rows = ["| part | figure | value | aim |", "|---|---|---:|---:|"]
    for part, found in figures.items():
        rows += [f"| {part} | {name} | {value:.3g} | {AIMS.get(name, '')} |" for name, value in found.items()]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which to run (default: all)")
    parser.add_argument("--repeat", type=int, help="runs of each part (default: 3; 1 with --quick)")
    parser.add_argument("--generations", type=int, help=f"of leak (default: {Scale().generations})")
    parser.add_argument("--quick", action="store_true", help="a trial: the figures mean little")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    scale = QUICK if options.quick else Scale()
    if options.generations is not None:
        scale = attrs.evolve(scale, generations=options.generations)
    repeat = options.repeat or (1 if options.quick else 3)
    figures = {part: measure(part, scale, repeat) for part in options.parts or PARTS}
    print(table(figures))
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "load": os.getloadavg()[0]}
    print(f"\nsgld {__version__}, medians of {repeat}, {machine['cores']} cores, load {machine['load']:.1f}")
    if options.json is not None:
        report = {"sgld": __version__, "machine": machine, "repeat": repeat, "figures": figures}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
