"""Hook: how a generation reports its progress, hears of a cancel, and times itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from sgld.messages import Cancel, Event, Note, Preview, Progress, SharedFrames, Tokens, send
from sgld.nn.parallel import Mesh

PROGRESS_S = 0.1  # between two reports within one stage, at least: each wakes two threads of the parent


class Stopped(Exception):
    """A cancel was heard; all ranks stop in the same place."""

    def __init__(self, where: str):
        super().__init__(f"stopped in {where}")
        self.where = where


class RunContext:
    """One generation's line to the executor. The same calls are made on every rank; rank 0 talks."""

    def __init__(self, job_id: str, mesh: Mesh, connection: Connection, synchronize: Callable[[], None] = lambda: None):
        self.job_id = job_id
        self.stages_ms: dict[str, float] = {}
        self.steps_ms: list[float] = []
        self.tokens = Tokens()
        self._mesh = mesh
        self._connection = connection
        self._synchronize = synchronize  # a GPU's kernels have not run when their launch returns
        self._stage, self._total, self._step = "", 0, 0
        self._told = 0.0  # when progress was last reported
        self._cancelled = False

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        """Time `name` and report its start, its end and some of its steps; a cancel is heard on the way in."""
        self._stage, self._total, self._step = name, total, 0
        self.raise_if_cancelled_on_all_ranks()
        self._tell()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.stages_ms[name] = self.stages_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        if self._step < total:
            self._step = total
            self._tell()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the current stage: all ranks agree whether to stop, then it is timed.

        The last one is always reported; others unless a report has just gone out.
        """
        self.raise_if_cancelled_on_all_ranks()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.steps_ms.append(1e3 * (time.perf_counter() - start))
        self._step += 1
        if self._step == self._total or time.perf_counter() - self._told >= PROGRESS_S:
            self._tell()

    def raise_if_cancelled_on_all_ranks(self) -> None:
        """Raise `Stopped` on every rank alike once a cancel for this job has arrived."""
        if self._mesh.agree(self._heard()):
            raise Stopped(self._where)

    def raise_if_cancelled(self) -> None:
        """The same in the middle of what rank 0 does alone, while its peers have ended: no collective."""
        if self._heard():
            raise Stopped(self._where)

    def _heard(self) -> bool:
        while self._mesh.rank == 0 and not self._cancelled and self._connection.poll():
            message = self._connection.recv()
            self._cancelled = isinstance(message, Cancel) and message.job_id == self.job_id
        return self._cancelled

    @property
    def _where(self) -> str:
        return f"{self._stage}, step {self._step + 1} of {self._total}"

    def from_rank0(self, like: Tensor, work: Callable[[], Tensor]) -> Tensor:
        """What `work` makes on rank 0, a tensor like `like`, on every rank. Where it fails, the other ranks stop."""
        made = torch.empty_like(like, device=self._mesh.device)
        try:
            if self._mesh.rank == 0:
                made = work().to(made.device)
        except BaseException:
            self._mesh.agree(True)
            raise
        if self._mesh.agree(False):
            raise Stopped(self._where)
        return self._mesh.share(made)

    def preview(
        self, index: int, decode: Callable[[Callable[[], None]], Tensor], parallel_decode: bool = False
    ) -> None:
        """Send the frame u8 [1, H, W, 3] of `decode(raise_if_cancelled)`, after a step that is not the last.

        A cancel ends the decoding, on rank 0 alone or, with `parallel_decode`, on all ranks. They agree on it at their
        next step.
        """
        try:
            frames = decode(self.raise_if_cancelled_on_all_ranks if parallel_decode else self.raise_if_cancelled)
        except Stopped:
            return
        if self._mesh.rank == 0:
            self._send(Preview(self.job_id, index, self._step, self._total, SharedFrames.of(frames.numpy())))

    def _tell(self) -> None:
        self._told = time.perf_counter()
        self._send(Progress(self.job_id, self._stage, self._step, self._total))

    def note(self, text: str) -> None:
        """A warning for the user."""
        self._send(Note(self.job_id, text))

    def _send(self, event: Event) -> None:
        if self._mesh.rank == 0:
            send(self._connection, event)
