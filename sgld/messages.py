"""What crosses between the loop, the executor thread and the ranks: commands, events, frames.

Commands go down (executor -> every rank), events come up (rank -> executor -> loop). Every command is answered by
exactly one terminal event (`Done`, `Failed` or `Cancelled`) from every rank.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from sgld.config import Settings
from sgld.params import SamplingParams

Frames = npt.NDArray[np.uint8]  # [N, H, W, 3]


@attrs.frozen
class Seat:
    """A rank's place in its group: what it is told when it is spawned."""

    rank: int
    world: int
    store: Path  # rendezvous file, so that no port is ever chosen
    dist_timeout_s: int


@attrs.frozen
class Load:
    """Load the model of `settings` from `folder` (component overrides already resolved to folders)."""

    settings: Settings
    folder: Path
    component_folders: dict[str, Path] = attrs.field(factory=dict)


@attrs.frozen
class Generate:
    """Make one output: `params` holds one prompt and one seed."""

    job_id: str
    params: SamplingParams


@attrs.frozen
class Cancel:
    """Stop that job at its next step; stale when it has ended."""

    job_id: str


@attrs.frozen
class Stop:
    """Leave the loop and exit."""


Command = Load | Generate


@attrs.frozen
class Progress:
    """Rank 0 finished `step` of `total` in `stage` (load, encode, denoise or decode)."""

    job_id: str
    stage: str
    step: int
    total: int


@attrs.frozen
class Note:
    """A warning that the user must see, such as a prompt that was cut."""

    job_id: str
    text: str


@attrs.frozen
class Done:
    """The command succeeded; rank 0 carries its value."""

    value: Any = None


@attrs.frozen
class Failed:
    """The command failed with a typed error (see `errors.from_code`)."""

    code: str
    message: str
    param: str | None = None
    trace: str = ""


@attrs.frozen
class Cancelled:
    """The command was stopped before `step`."""

    step: int


Event = Progress | Note
Terminal = Done | Failed | Cancelled


@attrs.frozen
class Timings:
    """Milliseconds by stage and by denoising step, and the rank's peak memory in bytes."""

    stages_ms: dict[str, float]
    steps_ms: list[float]
    peak_memory_bytes: int


@attrs.frozen
class Media:
    """A finished output as it leaves rank 0."""

    frames: SharedFrames
    fps: int
    seed: int
    timings: Timings


class SharedFrames:
    """Frames u8 [N, H, W, 3] in an anonymous memory file.

    Pickling passes the file descriptor, never the pixels, so Docker's small /dev/shm does not bound them.
    """

    def __init__(self, shape: tuple[int, ...], fd: int | None = None):
        self.shape = shape
        size = int(np.prod(shape))
        self._fd = os.memfd_create("sgld-frames") if fd is None else fd
        if fd is None:
            os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        self.array: Frames = np.frombuffer(self._map, np.uint8).reshape(shape)

    @classmethod
    def of(cls, frames: Frames) -> SharedFrames:
        """A shared copy of `frames`."""
        shared = cls(frames.shape)
        shared.array[:] = frames
        return shared

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.shape, DupFd(self._fd))

    def __del__(self) -> None:
        os.close(self._fd)  # the mapping lives on until the last view of the array is gone


def _attach(shape: tuple[int, ...], fd: Any) -> SharedFrames:
    return SharedFrames(shape, fd.detach())
