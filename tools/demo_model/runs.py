"""What every stage needs: batches by (seed, stage, step), workers that share gradients, checkpoints and a log."""

import math
import random
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Run:
    """A training run: its work folder and its seed, from which every batch is drawn anew by stage and step.

    Workers are single-threaded processes that average their gradients once a step: on few, shared cores that is far
    faster than threads, which meet after every operation.
    """

    workdir: Path
    seed: int
    rank: int = 0
    workers: int = 1

    def folder(self, name: str) -> Path:
        """A stage's result folder."""
        return self.workdir / name

    def shared_rng(self, stage: str, step: int) -> random.Random:
        """A generator that all workers have alike, for what must match: the kind of batch."""
        return random.Random(f"{self.seed}/{stage}/{step}")

    def own_rng(self, stage: str, step: int) -> random.Random:
        """A generator for this worker's batch; seeds torch's own generator alike."""
        name = f"{self.seed}/{stage}/{step}/{self.rank}"
        torch.manual_seed(zlib.crc32(name.encode()))
        return random.Random(name)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the workers' gradients in place."""
        if self.workers == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.workers
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self, stage: str, step: int, **parts: Any) -> None:
        """Writes a checkpoint of everything with a `state_dict`, whole or not at all."""
        if self.rank:
            return
        path = self.workdir / f"{stage}.ckpt"
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"step": step, **state}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, stage: str, **parts: Any) -> int:
        """Loads a stage's checkpoint where there is one; returns the steps already done."""
        path = self.workdir / f"{stage}.ckpt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def log(self, line: str) -> None:
        """Prints a line at once, from the first worker alone."""
        if not self.rank:
            print(line, flush=True)


def cosine(part: float, floor: float = 0.02) -> float:
    """A half cosine from 1 at part 0 to `floor` at part 1."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _work(rank: int, stage: Callable[[Run], object], workdir: Path, seed: int, workers: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    stage(Run(workdir, seed, rank, workers))
    dist.destroy_process_group()


def run_workers(stage: Callable[[Run], object], workdir: Path, seed: int, workers: int) -> None:
    """Runs a stage in `workers` processes; `stage` must be importable, for they are spawned."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (stage, workdir, seed, workers, f"{folder}/meeting")
        spawn(_work, arguments, nprocs=workers)  # type: ignore[no-untyped-call]
