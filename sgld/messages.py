"""Messages between the loop, the executor thread and the ranks: commands, events, frames.

Commands go down (executor -> every rank), events come up (rank 0 -> executor -> loop). Every rank answers every command
with exactly one terminal event: `Done`, `Failed` or `Cancelled`.
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

from sgld.errors import SgldError
from sgld.params import LoraUse, OutputParams
from sgld.settings import Settings

Frames = npt.NDArray[np.uint8]  # [N, H, W, 3]
MergeMode = Literal["auto", "merge", "dynamic"]


@attrs.frozen
class RankAssignment:
    """A rank's place in its group, passed to the process at its start.

    Ranks of one machine meet through a file, so no port is ever chosen. Ranks of several machines meet at a host and
    port, where rank 0 has the listening socket.
    """

    rank: int
    world: int
    rendezvous: Path | tuple[str, int]
    dist_timeout_s: int = 3600
    nnodes: int = 1
    listener: socket.socket | None = None

    @property
    def local_world(self) -> int:
        """Return the number of ranks on each machine."""
        return self.world // self.nnodes

    @property
    def local_rank(self) -> int:
        """Return this rank's number on its machine, which is also its device's."""
        return self.rank % self.local_world


@attrs.frozen
class Refused:
    """The answer to a node that does not fit into the group, in place of its ranks' assignments."""

    reason: str


@attrs.frozen
class Load:
    """Load the model of `settings` from `folder` (component overrides already resolved to folders)."""

    settings: Settings
    folder: Path
    component_folders: dict[str, Path] = attrs.field(factory=dict)


@attrs.frozen
class Item:
    """One output of a job: `params` has one prompt and one integer seed. Events carry the item's `index`."""

    index: int
    params: OutputParams


def batch_key(params: OutputParams) -> OutputParams:
    """Return a value that is equal for items which differ in their seed alone: they share their encoding."""
    return attrs.evolve(params, seed=0)


@attrs.frozen
class Generate:
    """Make the items in turn, and send each as `OutputReady`. At most `previews` pictures precede each of them."""

    job_id: str
    items: tuple[Item, ...]
    previews: int = 0


@attrs.frozen
class Cancel:
    """Stop the job at its next step. A job that has ended ignores it."""

    job_id: str


@attrs.frozen
class Stop:
    """Leave the loop and exit."""


@attrs.frozen
class SetLora:
    """Replace the adapters of every component that `loras` target. The answer is a `LoraState` of these components.

    Paths are files or folders of this machine.
    """

    loras: tuple[LoraUse, ...]
    merge_mode: MergeMode = "auto"


@attrs.frozen
class UnmergeLora:
    """Take the adapters of `target` away. The answer is an empty `LoraState`."""

    target: str = "all"


LoraCommand = SetLora | UnmergeLora
Command = Load | Generate | LoraCommand


@attrs.frozen
class LoraPart:
    """The adapters last set for one component."""

    loras: tuple[LoraUse, ...]
    merge_mode: MergeMode  # as requested
    applied: MergeMode | None  # merge or dynamic; None: they were taken away
    skipped: int = 0  # keys that fit no layer


@attrs.frozen
class LoraState:
    """The adapters for requests without adapters of their own."""

    parts: dict[str, LoraPart] = attrs.field(factory=dict)  # by component


@attrs.frozen
class Progress:
    """Rank 0 finished `step` of `total` in `stage` (load, encode, denoise or decode) of an item.

    A stage's first step (0) and last are always sent, others at most ten a second.
    """

    job_id: str
    stage: str
    step: int
    total: int
    item: int = 0


@attrs.frozen
class Note:
    """A warning that the user must see, such as a prompt that was cut."""

    job_id: str
    text: str
    item: int = 0


@attrs.frozen
class Preview:
    """Preview `index` (from 0) of an item: the estimate of its clean latents after `step` of `total`."""

    job_id: str
    index: int
    step: int
    total: int
    frames: SharedFrames  # [1, H, W, 3]
    item: int = 0


@attrs.frozen
class OutputReady:
    """An item is finished. `Done` follows after the last one."""

    job_id: str
    item: int
    media: Media


@attrs.frozen
class Done:
    """The command succeeded. Rank 0 carries the value of a load or of a LoRA command."""

    value: Any = None


@attrs.frozen
class Failed:
    """The command failed with an error; `trace` is its traceback on the rank."""

    error: SgldError
    trace: str = ""


@attrs.frozen
class Cancelled:
    """The command was stopped."""

    where: str


Event = Progress | Note | Preview | OutputReady
Terminal = Done | Failed | Cancelled


@attrs.frozen
class Timings:
    """Milliseconds by stage and by denoising step, and the rank's peak memory in bytes."""

    stages_ms: dict[str, float]
    steps_ms: list[float]
    peak_memory_bytes: int


@attrs.frozen
class Tokens:
    """Tokens of one output: of its prompt, and of its latents."""

    prompt: int = 0
    latent: int = 0


@attrs.frozen(eq=False)
class Audio:
    """Sound as it leaves rank 0, small enough to be pickled."""

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

    Its pickle holds the shape alone. The file's descriptor follows over the same pipe (`send`, `receive`) in place of
    the pixels, so Docker's small /dev/shm sets no limit.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._fd: int | None = None

    @classmethod
    def of(cls, frames: Frames) -> SharedFrames:
        """Return a shared copy of `frames`."""
        shared = cls(frames.shape)
        descriptor = os.memfd_create("sgld-frames")
        os.ftruncate(descriptor, frames.nbytes)
        shared._map(descriptor)
        shared.array[:] = frames
        return shared

    def send(self, connection: Connection) -> None:
        """Send the descriptor, right after the message that holds these frames."""
        assert self._fd is not None
        send_handle(connection, self._fd, os.getppid())

    def receive(self, connection: Connection) -> None:
        """Receive the descriptor that follows the message. Raises OSError or EOFError when the sender has gone."""
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
    """Return the frames whose descriptor follows `message`, if any."""
    if isinstance(message, Preview):
        return message.frames
    return message.media.frames if isinstance(message, OutputReady) else None


def send(connection: Connection, message: Event | Terminal) -> None:
    """Send a message, then the descriptor of its frames, if any. Raises OSError when the parent has gone."""
    connection.send(message)
    if (frames := frames_of(message)) is not None:
        frames.send(connection)
