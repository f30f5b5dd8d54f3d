"""Real ranks: processes that meet over gloo."""

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sgld.messages import Seat
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu


def _rank(rank: int, world: int, store: Path, work: Callable[..., Any], args: tuple[Any, ...], out: Connection) -> None:
    torch.set_num_threads(1)
    try:
        mesh = Mesh.join(Seat(rank, world, store, 60), Cpu())
        out.send((True, work(mesh, *args)))
        mesh.leave()
    except Exception:
        out.send((False, traceback.format_exc()))


def on_ranks(world: int, store: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(mesh, *args)` in that many processes, which meet in the file `store`; their answers."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, world, store, work, args, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    answers = [pipe[0].recv() for pipe in pipes]
    for process in processes:
        process.join()
    assert all(ok for ok, _ in answers), answers
    return [value for _, value in answers]
