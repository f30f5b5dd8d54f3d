"""What crosses between the loop, the executor thread and the ranks: commands, events, frames.

Commands go down (executor -> every rank), events come up (rank -> executor -> loop). Every command is answered by
exactly one terminal event (`Done`, `Failed` or `Cancelled`) from every rank.
"""

from __future__ import annotations

import mmap
import os
import socket
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import numpy.typing as npt

from sgld.config import Settings
from sgld.params import LoraUse, OutputParams

Frames = npt.NDArray[np.uint8]  # [N, H, W, 3]
MergeMode = Literal["auto", "merge", "dynamic"]


@attrs.frozen
class RankAssignment:
    """A rank's place in its group: what it is told when it is spawned.

    Ranks of one machine meet through a file, so that no port is ever chosen; those of several at a host and port, where
    rank 0 has the socket that listens.
    """

    rank: int
    world: int
    rendezvous: Path | tuple[str, int]
    dist_timeout_s: int = 3600
    nnodes: int = 1
    listener: socket.socket | None = None

    @property
    def local_world(self) -> int:
        """How many ranks each machine has."""
        return self.world // self.nnodes

    @property
    def local_rank(self) -> int:
        """This rank's number among those of its machine, which is its device's."""
        return self.rank % self.local_world


@attrs.frozen
class Refused:
    """What another node hears instead of its ranks' seats when it does not fit into the group."""

    reason: str


@attrs.frozen
class Load:
    """Load the model of `settings` from `folder` (component overrides already resolved to folders)."""

    settings: Settings
    folder: Path
    component_folders: dict[str, Path] = attrs.field(factory=dict)


@attrs.frozen
class Generate:
    """Make one output: At most `previews` pictures are sent on the way."""

    job_id: str
    params: OutputParams
    previews: int = 0


@attrs.frozen
class Cancel:
    """Stop that job at its next step; stale when it has ended."""

    job_id: str


@attrs.frozen
class Stop:
    """Leave the loop and exit."""


@attrs.frozen
class SetLora:
    """Let these adapters hold from now on, in every component that they are for, in place of those that held there.

    Their paths are files or folders of this machine.
    """

    loras: tuple[LoraUse, ...]
    merge_mode: MergeMode = "auto"


@attrs.frozen
class MergeLora:
    """Let the adapters that were last set for `target` hold again, each with this strength."""

    target: str = "all"
    strength: float = 1.0


@attrs.frozen
class UnmergeLora:
    """Take the adapters of `target` away; they are still known to `MergeLora`."""

    target: str = "all"


@attrs.frozen
class ListLoras:
    """Tell what holds."""


LoraCommand = SetLora | MergeLora | UnmergeLora | ListLoras
Command = Load | Generate | LoraCommand


@attrs.frozen
class LoraPart:
    """The adapters that were last set for one component, which is their target."""

    loras: tuple[LoraUse, ...]
    merge_mode: MergeMode  # as it was asked for
    applied: MergeMode | None  # merge or dynamic; None: they were taken away
    skipped: int = 0  # keys that fit no layer

    def commands(self) -> list[LoraCommand]:
        """What brings ranks that have just loaded the model to this."""
        found: list[LoraCommand] = [SetLora(self.loras, self.merge_mode)]
        if self.applied is None:
            found.append(UnmergeLora(self.loras[0].target))
        return found


@attrs.frozen
class LoraState:
    """What holds for requests without adapters of their own; the answer to every LoRA command."""

    parts: dict[str, LoraPart] = attrs.field(factory=dict)  # by component


@attrs.frozen
class Progress:
    """Rank 0 finished `step` of `total` in `stage` (load, encode, denoise or decode).

    A stage's first (0) and last are always sent, others at most ten a second.
    """

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
class Preview:
    """Preview `index` (from 0) of an output: what the clean latents were thought to be after `step` of `total`."""

    job_id: str
    index: int
    step: int
    total: int
    frames: SharedFrames  # [1, H, W, 3]


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
    """The command was stopped."""

    where: str


Event = Progress | Note | Preview
Terminal = Done | Failed | Cancelled


@attrs.frozen
class Timings:
    """Milliseconds by stage and by denoising step, and the rank's peak memory in bytes."""

    stages_ms: dict[str, float]
    steps_ms: list[float]
    peak_memory_bytes: int


@attrs.frozen
class Tokens:
    """What one output cost in tokens: those of its prompt, and those of the latents that were denoised."""

    prompt: int = 0
    latent: int = 0


@attrs.frozen(eq=False)
class Audio:
    """Sound as it leaves rank 0; seconds of it are small enough to be pickled."""

    samples: npt.NDArray[np.float32]  # [channels, samples] in [-1, 1]
    rate: int  # samples a second


@attrs.frozen
class Media:
    """A finished output as it leaves rank 0."""

    frames: SharedFrames
    fps: int
    seed: int
    timings: Timings
    tokens: Tokens = Tokens()
    audio: Audio | None = None


class SharedFrames:
    """Frames u8 [N, H, W, 3] in an anonymous memory file.

    Pickled it is a shape alone; its descriptor follows over the same pipe (`send`, `receive`), never its pixels, so
    Docker's small /dev/shm does not bound them.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._fd: int | None = None

    @classmethod
    def of(cls, frames: Frames) -> SharedFrames:
        """A shared copy of `frames`."""
        shared = cls(frames.shape)
        descriptor = os.memfd_create("sgld-frames")
        os.ftruncate(descriptor, frames.nbytes)
        shared._map(descriptor)
        shared.array[:] = frames
        return shared

    def send(self, connection: Connection) -> None:
        """Pass the descriptor on; call it right after the message that holds these frames was sent."""
        assert self._fd is not None
        send_handle(connection, self._fd, os.getppid())

    def receive(self, connection: Connection) -> None:
        """Take the descriptor that follows the message. Raises OSError or EOFError when the sender has gone."""
        self._map(recv_handle(connection))

    def _map(self, descriptor: int) -> None:
        self._fd = descriptor
        size = int(np.prod(self.shape))
        self.array: Frames = np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedFrames, (self.shape,)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)  # the mapping lives on until the last view of the array is gone


def frames_of(message: object) -> SharedFrames | None:
    """The frames whose descriptor follows that message."""
    if isinstance(message, Preview):
        return message.frames
    return message.value.frames if isinstance(message, Done) and isinstance(message.value, Media) else None


def send(connection: Connection, message: Event | Terminal) -> None:
    """Send a message, and the descriptor of its frames where it has any. Raises OSError when the parent has gone."""
    connection.send(message)
    if (frames := frames_of(message)) is not None:
        frames.send(connection)
