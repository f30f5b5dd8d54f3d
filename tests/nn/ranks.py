"""Real ranks: processes that meet over gloo."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sgld.messages import RankAssignment
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu

_kept: list[ProcessPoolExecutor] = []  # one process each; what they import takes longer than most of their work


def _rank(rank: int, world: int, store: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    mesh = Mesh.join(RankAssignment(rank, world, store, 60), Cpu())
    answer = work(mesh, *args)
    mesh.leave()
    return answer


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def on_ranks(world: int, store: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(mesh, *args)` in that many processes, which meet in the file `store`; their answers.

    The processes stay for the next call, unless one of them fails.
    """
    _kept.extend(_process() for _ in range(world - len(_kept)))
    calls = [_kept[rank].submit(_rank, rank, world, store, work, args) for rank in range(world)]
    wait(calls)
    if any(call.exception() for call in calls):
        while _kept:
            _kept.pop().shutdown()
    return [call.result() for call in calls]


def in_fresh_process(store: Path, work: Callable[..., Any], *args: Any) -> Any:
    """Call `work(mesh, *args)` in a process of its own, of which nothing stays: for what measures memory."""
    with _process() as process:
        return process.submit(_rank, 0, 1, store, work, args).result()
