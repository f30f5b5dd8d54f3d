"""RunContext: progress, cancellation and timings of one output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from sgld.messages import Cancel, Event, Media, Note, OutputReady, Preview, Progress, SharedFrames, Tokens, send
from sgld.nn.parallel import Mesh

PROGRESS_S = 0.1  # between two reports within one stage, at least: each wakes two threads of the parent


class Stopped(Exception):
    """A cancel arrived. All ranks stop in one place."""

    def __init__(self, where: str):
        super().__init__(f"stopped in {where}")
        self.where = where


class RunContext:
    """One output's connection to the executor. Every rank makes the same calls, and rank 0 sends.

    `more` says that further items of the command follow: then a rank 0 that fails alone must stop its peers.
    """

    def __init__(
        self,
        job_id: str,
        mesh: Mesh,
        connection: Connection,
        synchronize: Callable[[], None] = lambda: None,
        *,
        item: int = 0,
        more: bool = False,
    ):
        self.job_id, self.item = job_id, item
        self.stages_ms: dict[str, float] = {}
        self.steps_ms: list[float] = []
        self.tokens = Tokens()
        self._mesh = mesh
        self._connection = connection
        self._synchronize = synchronize  # a GPU's kernels have not run when their launch returns
        self._more = more
        self._stage, self._total, self._step = "", 0, 0
        self._reported = 0.0  # when progress was last sent
        self._cancelled = False

    @contextmanager
    def stage(self, name: str, total: int = 1, done: int = 0) -> Iterator[None]:
        """Time a stage of `total` steps, of which `done` were made before, and report its start, steps and end.

        Raises:
            Stopped: a cancel arrived before the stage.
        """
        self._stage, self._total, self._step = name, total, done
        self.raise_if_cancelled_on_all_ranks()
        self._report()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.stages_ms[name] = self.stages_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        if self._step < total:
            self._step = total
            self._report()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step of the current stage, and report it if it is the last or no report has just been sent.

        Raises:
            Stopped: a cancel arrived before the step.
        """
        self.raise_if_cancelled_on_all_ranks()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.steps_ms.append(1e3 * (time.perf_counter() - start))
        self._step += 1
        if self._step == self._total or time.perf_counter() - self._reported >= PROGRESS_S:
            self._report()

    def agree(self, flag: bool) -> bool:
        """Return rank 0's flag on every rank."""
        return self._mesh.agree(flag)

    def raise_if_cancelled_on_all_ranks(self) -> None:
        """Raise `Stopped` on every rank once rank 0 has received a cancel of this job. All ranks must call it."""
        if self._mesh.agree(self._is_cancelled()):
            raise Stopped(self._where)

    def raise_if_cancelled(self) -> None:
        """Raise `Stopped` on rank 0 alone, in work that its peers take no part in. No collective runs."""
        if self._is_cancelled():
            raise Stopped(self._where)

    def _is_cancelled(self) -> bool:
        while self._mesh.rank == 0 and not self._cancelled and self._connection.poll():
            message = self._connection.recv()
            self._cancelled = isinstance(message, Cancel) and message.job_id == self.job_id
        return self._cancelled

    @property
    def _where(self) -> str:
        return f"{self._stage}, step {self._step + 1} of {self._total}"

    @contextmanager
    def rank0_alone(self) -> Iterator[None]:
        """Wrap the work that rank 0 does alone at the end of an item: where it fails, its peers make no further item.

        Raises:
            Stopped: on the other ranks, when rank 0 has failed or stopped.
        """
        try:
            yield
        except BaseException:
            if self._more and self._mesh.rank == 0:
                self._mesh.agree(True)
            raise
        if self._more and self._mesh.agree(False):
            raise Stopped(self._where)

    def from_rank0(self, like: Tensor, work: Callable[[], Tensor]) -> Tensor:
        """Run `work` on rank 0 and return its tensor, shaped like `like`, on every rank.

        Raises:
            Stopped: on the other ranks, when `work` has failed.
        """
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
            shared = SharedFrames.of(frames.numpy())
            self._send(Preview(self.job_id, index, self._step, self._total, shared, self.item))

    def note(self, text: str) -> None:
        """Send a warning for the user."""
        self._send(Note(self.job_id, text, self.item))

    def output(self, media: Media) -> None:
        """Send the finished output."""
        self._send(OutputReady(self.job_id, self.item, media))

    def _report(self) -> None:
        self._reported = time.perf_counter()
        self._send(Progress(self.job_id, self._stage, self._step, self._total, self.item))

    def _send(self, event: Event) -> None:
        if self._mesh.rank == 0:
            send(self._connection, event)
