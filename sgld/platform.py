"""Platform: what differs between a CPU and a CUDA machine. The only module that names `torch.cuda`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from sgld.errors import BadRequest

T = TypeVar("T")


class Prefetcher(Protocol):
    """Reads weights beside the computation."""

    def start(self, read: Callable[[], T]) -> Callable[[], T]:
        """Begin to read. Return a function that waits for the value."""


@attrs.frozen
class Platform(ABC):
    """Chosen once per rank and passed down."""

    name: ClassVar[str]
    backend: ClassVar[str]  # of torch.distributed, for tensors
    dtype: ClassVar[torch.dtype]  # of weights whose precision nobody chose
    biased_attention_is_fast: ClassVar[bool]  # an additive bias costs attention nothing
    ranks_share_memory: ClassVar[bool]
    offloads_to_files: ClassVar[bool]  # weights that are not needed now wait in their files; else in host memory

    @abstractmethod
    def device(self, rank: int) -> torch.device:
        """Return the device of a rank."""

    @abstractmethod
    def set_up(self, rank: int, world: int) -> None:
        """Prepare the calling process to be that rank."""

    @property
    @abstractmethod
    def gpu(self) -> str | None:
        """Name the GPU: `sm90` for an NVIDIA one of compute capability 9.0, `rocm` for an AMD one."""

    @abstractmethod
    def pin(self, x: Tensor) -> Tensor:
        """Copy a tensor to host memory from which copies to the device run beside the computation."""

    @abstractmethod
    def prefetcher(self) -> Prefetcher:
        """Make a prefetcher, which keeps the order of its reads."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Return the most bytes that this process has held so far."""

    @abstractmethod
    def free_memory(self) -> int:
        """Return the bytes that this rank, with all that share its memory, could still take."""

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Check that an error means: the allocator is out of memory."""

    @abstractmethod
    def release_memory(self) -> None:
        """Hand unused memory back to the device."""


@attrs.frozen
class Cpu(Platform):
    """Processes on the host; the cores are shared out among them."""

    name = "cpu"
    backend = "gloo"
    dtype = torch.float32
    biased_attention_is_fast = True
    ranks_share_memory = True
    offloads_to_files = True

    def device(self, rank: int) -> torch.device:
        return torch.device("cpu")

    def set_up(self, rank: int, world: int) -> None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))

    gpu = None

    def pin(self, x: Tensor) -> Tensor:
        return x

    def prefetcher(self) -> Prefetcher:
        return _Thread()

    def synchronize(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 1024 * int(_fields(Path("/proc/self/status"))["VmHWM"].split()[0])  # rusage counts the parent's too

    def free_memory(self) -> int:
        return min([available_memory(), *room_in_groups()])

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)

    def release_memory(self) -> None:
        return None


@attrs.frozen
class Cuda(Platform):
    """One NVIDIA GPU a rank."""

    name = "cuda"
    backend = "nccl"
    dtype = torch.bfloat16
    biased_attention_is_fast = False  # a bias rules out the flash kernel
    ranks_share_memory = False
    offloads_to_files = False

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank)

    def set_up(self, rank: int, world: int) -> None:
        if world > (devices := torch.cuda.device_count()):
            raise BadRequest(f"{world} for this machine, which has {devices}", field="num_gpus")
        torch.cuda.set_device(rank)

    @property
    def gpu(self) -> str | None:
        if torch.version.hip is not None:
            return "rocm"
        major, minor = torch.cuda.get_device_capability()
        return f"sm{major}{minor}"

    def pin(self, x: Tensor) -> Tensor:
        return x.pin_memory()

    def prefetcher(self) -> Prefetcher:
        return _Stream()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def free_memory(self) -> int:
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by the allocator, for later
        return torch.cuda.mem_get_info()[0] + held

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError | MemoryError)

    def release_memory(self) -> None:
        torch.cuda.empty_cache()


class _Thread:
    """Reads in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sgld-prefetch")

    def start(self, read: Callable[[], T]) -> Callable[[], T]:
        return self._pool.submit(read).result


class _Stream:
    """Copies in a stream of its own. Whoever drops a value first waits for the device: its memory is used anew."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def start(self, read: Callable[[], T]) -> Callable[[], T]:
        with torch.cuda.stream(self._stream):
            value = read()

        def wait() -> T:
            torch.cuda.current_stream().wait_stream(self._stream)
            return value

        return wait


def available_memory(file: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes that Linux could give to processes without swapping."""
    return 1024 * int(_fields(file)["MemAvailable"].split()[0])


def _fields(file: Path) -> dict[str, str]:
    """Parse a file of lines such as `VmHWM:  123 kB`."""
    return dict(line.split(":", 1) for line in file.read_text().splitlines())


def room_in_groups(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the bytes left under each memory limit of this process's control groups (v2 and v1)."""
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / limit
            if folder.is_relative_to(top) and file.is_file() and (text := file.read_text().strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(text) - int((folder / used).read_text()) + int(stat.get(cache, 0))


def choose_platform() -> Platform:
    """Choose CUDA if a GPU answers, else the CPU."""
    return Cuda() if torch.cuda.is_available() else Cpu()
