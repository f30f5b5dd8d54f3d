"""Benchmarks of several workers sharing one picture: a random Wan of about 300 M parameters, over gloo.

ulysses, ring   one denoising step on two workers against one; bytes that a worker sends in it, against the formula
cfg             two guidance branches on two workers, against one after the other on one

Each worker has one thread. One worker and two take turns in one run, on the same weights; the table has the medians.
Two workers that wait for each other run as fast as the slower core of the moment. On a virtual machine the host may
slow them down, or take them away: `stolen` is the share of the cores' busy time, while one worker ran and while two
did, in which they did not run. `ceiling` is the speed-up of two workers that each do their share of Ulysses' step and
exchange nothing until its end: what the machine gives two processes. `asleep` is the time of two workers that let their
cores sleep while they wait for heads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sgld.messages import RankAssignment
from sgld.models.wan_transformer import TextKeys, WanConfig, WanTransformer
from sgld.nn import parallel
from sgld.nn.attention import TORCH
from sgld.nn.parallel import Axis, Degrees, Mesh
from sgld.platform import Cpu

CONFIG = WanConfig(
    num_attention_heads=8, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=512, freq_dim=256,
    ffn_dim=4096, num_layers=18,
)  # fmt: skip
LENGTHS = {768: (3, 32, 32), 2304: (9, 32, 32)}  # tokens: latent frames, height and width
WAYS = {"ulysses": Degrees(ulysses=2), "ring": Degrees(ring=2), "cfg": Degrees(cfg=2)}
AIMS = {("ulysses", 768): 1.8, ("ulysses", 2304): 1.93, ("cfg", 768): 1.95, ("cfg", 2304): 1.95}
TEXT_TOKENS = 64


class Exchanges:
    """Those of attention, as the formulas have them: the bytes that this rank sends; while `silent`, none are sent."""

    def __init__(self) -> None:
        self.sent, self.silent = 0, False
        all_to_all, pass_on = Axis.all_to_all, Axis.pass_on

        def heads(axis: Axis, x: torch.Tensor) -> Callable[[], torch.Tensor]:
            self.sent += x.nbytes * (axis.size - 1) // axis.size
            return (lambda: x) if self.silent else all_to_all(axis, x)

        def passed(axis: Axis, x: torch.Tensor) -> Callable[[], torch.Tensor]:
            self.sent += x.nbytes
            return (lambda: x) if self.silent else pass_on(axis, x)

        Axis.all_to_all, Axis.pass_on = heads, passed  # type: ignore[method-assign, assignment]


def formula(way: str, tokens: int, workers: int = 2) -> int:
    """Bytes that one worker sends in a step: four times its tokens' share (q, k, v, output), or keys and values."""
    own = tokens // workers * CONFIG.dim * 4
    return CONFIG.num_layers * (4 * own * (workers - 1) // workers if way == "ulysses" else 2 * own * (workers - 1))


def processor_time() -> tuple[int, int]:
    """Ticks in which the cores ran, and in which the host ran something else (proc(5), /proc/stat)."""
    first, *_ = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, first.split()[1:])
    return user + nice + system + irq + softirq, steal


def stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share that was stolen meanwhile."""
    ran, taken = (b - a for a, b in zip(before, after, strict=True))
    return taken / max(1, ran + taken)


def new_transformer(mesh: Mesh) -> WanTransformer:
    """The same random weights on every rank."""
    torch.manual_seed(0)
    model = WanTransformer(CONFIG, mesh, TORCH).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def measure(mesh: Mesh, way: str, repeat: int) -> dict[int, dict[str, float]]:
    """Seconds of a step on one worker and on two, by tokens; the bytes sent, and how far the answers are apart."""
    alone = new_transformer(Mesh.solo())
    split = mesh.split(WAYS[way])
    shared = WanTransformer(CONFIG, split, TORCH).eval().requires_grad_(False)
    shared.load_state_dict(alone.state_dict(), assign=True)
    keys = alone.text_keys(torch.randn(2, TEXT_TOKENS, CONFIG.text_dim, generator=torch.Generator().manual_seed(1)))
    exchanges = Exchanges()
    return {tokens: _turns(mesh, way, split, alone, shared, keys, tokens, repeat, exchanges) for tokens in LENGTHS}


@torch.inference_mode()
def _turns(
    mesh: Mesh, way: str, split: Mesh, alone: WanTransformer, shared: WanTransformer, keys: TextKeys, tokens: int,
    repeat: int, exchanges: Exchanges,
) -> dict[str, float]:  # fmt: skip
    x = torch.randn(1, CONFIG.in_channels, *LENGTHS[tokens], generator=torch.Generator().manual_seed(2))
    t = torch.tensor(500.0)

    def one() -> torch.Tensor:
        rows = (0, 1) if way == "cfg" else (0,)
        return torch.cat([alone(x, t, keys.row(row)) for row in rows])

    def both() -> torch.Tensor:
        if way == "cfg":
            return split.cfg.gather(shared(x, t, keys.row(split.cfg.index)), 0)
        step: torch.Tensor = shared(x, t, keys.row(0))
        return step

    def timed() -> tuple[torch.Tensor, float]:
        begun = time.perf_counter()
        made = both()
        mesh.barrier()
        return made, time.perf_counter() - begun

    singles, doubles, silents, sleepers, apart = [], [], [], [], 0.0
    taken: list[tuple[float, float]] = []
    for turn in range(repeat + 1):
        silent = asleep = math.nan
        if way == "ulysses":
            exchanges.silent = True
            silent = timed()[1]
            exchanges.silent = False
            awake, parallel.AWAKE_S = parallel.AWAKE_S, 0.0
            asleep = timed()[1]
            parallel.AWAKE_S = awake
        exchanges.sent = 0
        at_start, started = processor_time(), time.perf_counter()
        single = one() if mesh.rank == 0 else None
        middle = time.perf_counter()
        mesh.barrier()
        at_middle = processor_time()
        double, seconds = timed()
        if turn and single is not None:
            singles.append(middle - started)
            doubles.append(seconds)
            silents.append(silent)
            sleepers.append(asleep)
            taken.append((stolen(at_start, at_middle), stolen(at_middle, processor_time())))
            apart = max(apart, float((single - double).abs().max()))
    if mesh.rank:
        return {}
    return {
        "one worker, s": statistics.median(singles),
        "two workers, s": statistics.median(doubles),
        "speed-up": statistics.median(a / b for a, b in zip(singles, doubles, strict=True)),
        "ceiling": statistics.median(a / b for a, b in zip(singles, silents, strict=True)),
        "asleep, s": statistics.median(sleepers),
        "stolen from one": statistics.median(one for one, _ in taken),
        "stolen from two": statistics.median(two for _, two in taken),
        "largest difference": apart,
        "bytes sent": exchanges.sent,
    }


def _rank(rank: int, store: Path, way: str, repeat: int, out: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    mesh = Mesh.join(RankAssignment(rank, 2, store, 600), Cpu())
    out.send(measure(mesh, way, repeat))
    mesh.leave()


def run(way: str, repeat: int) -> dict[int, dict[str, float]]:
    """`measure` in two processes; the first one's figures."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(2)]
        ranks = [
            context.Process(target=_rank, args=(rank, Path(folder) / "store", way, repeat, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        answer: dict[int, dict[str, float]] = pipes[0][0].recv()
        for process in ranks:
            process.join()
    return answer


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], help="which to run (default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="counted turns (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    print("| way | tokens | one, s | two, s | asleep | stolen | speed-up | ceiling | aim | MB sent | formula | apart |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for way in args.ways or WAYS:
        figures[way] = run(way, args.repeat)
        for tokens, seen in figures[way].items():
            sent = f"{seen['bytes sent'] / 1e6:.2f} | {formula(way, tokens) / 1e6:.2f}" if way != "cfg" else " | "
            taken = ", ".join(f"{seen[f'stolen from {who}']:.0%}" for who in ("one", "two"))
            print(
                f"| {way} | {tokens} | {seen['one worker, s']:.2f} | {seen['two workers, s']:.2f} "
                f"| {seen['asleep, s']:.2f} | {taken} "
                f"| {seen['speed-up']:.2f} | {seen['ceiling']:.2f} | {AIMS.get((way, tokens), '')} | {sent} "
                f"| {seen['largest difference']:.1e} |",
                flush=True,
            )
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
