"""Real ranks with a family that fails on request: the prompt is JSON such as {"fault": "raise", "rank": 1, "step": 2}.

Everything but the model is the real thing: processes, pipes, gloo, hook and sampler.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL.Image import Image
from torch import Generator, Tensor

from sgld.config import environment
from sgld.errors import ModelError
from sgld.messages import Load, RankAssignment, SharedFrames
from sgld.models.base import Conditioning, DiffusionModel
from sgld.nn.parallel import Mesh
from sgld.nn.runner import StepContext
from sgld.params import ModelInfo, SamplingParams
from sgld.worker.entry import prepare_process, serve

INFO = ModelInfo(
    "Faulty", "video", {"height": 16, "width": 16, "num_frames": 5, "fps": 8, "num_inference_steps": 4}, 8, 4, ()
)
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


class FaultyFamily(DiffusionModel):
    """Decodes to frames full of its own rank's step count; obeys the fault in the prompt."""

    info = INFO
    scheduler = SCHEDULER

    def __init__(self, mesh: Mesh):
        self.parts = SimpleNamespace(mesh=mesh)  # type: ignore[assignment]
        self.fault: dict[str, Any] = {}
        self.step = 0
        self.decodings = 0
        self.num_frames = 0

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        self.fault = json.loads(params.prompt)
        self.decodings = 0
        self.num_frames = params.num_frames
        return Conditioning(params), []

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        self.step = 0
        return torch.randn(1, 4, 2, 2, 2, generator=generator)

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return 1.0

    def velocities(
        self, x: Tensor, t: Tensor, condition: Any, step: StepContext | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.step += 1
        time.sleep(self.fault.get("step_s", 0.0))
        if self.fault.get("step") == self.step and self.fault.get("rank", self.mesh.rank) == self.mesh.rank:
            self._fail(self.fault["fault"])
        self.mesh.all.gather(x, 0)  # a collective: peers wait here for a rank that failed alone
        return torch.zeros_like(x), None

    def after_output(self) -> None:
        """Nothing is offloaded."""

    def _fail(self, fault: str) -> None:
        if fault == "raise":
            raise ValueError("boom")
        if fault == "oom":
            raise MemoryError("cannot allocate")
        if fault == "exit":
            os._exit(9)
        if fault == "hang":
            time.sleep(600)

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        if self.fault.get("fault") == "exit before the descriptor":
            SharedFrames.send = lambda *_: os._exit(9)  # type: ignore[method-assign]
        return self.decode(x0, raise_if_cancelled)[:1]

    def decode(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        if self.mesh.rank != 0:
            return torch.empty(0, dtype=torch.uint8)
        self.decodings += 1
        if self.fault.get("decode") == self.decodings:
            self._fail(self.fault["fault"])
        for _ in range(int(100 * self.fault.get("decode_s", 0))):
            raise_if_cancelled()
            time.sleep(0.01)
        return torch.full((self.num_frames, 16, 16, 3), self.step, dtype=torch.uint8)


def load_faulty(load: Load, mesh: Mesh, platform: object, progress: object) -> FaultyFamily:
    if load.folder.resolve().name == "broken":
        raise ModelError("model_index.json is missing")
    if load.folder.name == "dies":
        os._exit(3)
    return FaultyFamily(mesh)


def run_report(assignment: RankAssignment, connection: Connection) -> None:
    """Send what this process is like, then end as the parent says: by an exception or a signal."""
    prepare_process(assignment)
    listener = assignment.listener
    connection.send({
        "parent": Path(f"/proc/{os.getppid()}/comm").read_text().strip(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "name": Path("/proc/self/comm").read_text().strip(),
        "folder": str(Path.cwd()),
        "policy": environment("OMP_WAIT_POLICY"),
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "stdin": str(Path("/proc/self/fd/0").readlink()),
        "listens": listener is not None and listener.getsockname(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    })  # fmt: skip
    how = connection.recv()
    if isinstance(how, BaseException):
        raise how
    os.kill(os.getpid(), how)


def run_faulty(assignment: RankAssignment, connection: Connection) -> None:
    """The spawn target."""
    serve(assignment, connection, load_faulty)
