"""Weight formats: how a component's weights are stored, which layers compute with them, and how they are read.

The format of today's checkpoints is `SafetensorsFormat`. A quantized one swaps linear layers in `prepare`, and reads
their scales beside their weights; inputs are cast to a module's `compute_dtype`, never to the type of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.nn.parallel import Axis

MAPPED_TENSORS = 16  # that one mapping of a file serves: its pages count as ours until it is closed


@attrs.frozen
class Header:
    """Where a tensor is stored."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]


@attrs.frozen
class Share:
    """The part of a module that one rank of `axis` has: of some tensors an equal part along one dimension."""

    axis: Axis
    dims: Callable[[str], int | None]  # by name; None: the whole tensor

    def shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this rank's part."""
        dim = self.dims(name)
        return tuple(n // self.axis.size if i == dim else n for i, n in enumerate(whole))

    def cut(self, name: str, whole: Any) -> Tensor:
        """Read this rank's part of a slice of safetensors, and nothing else."""
        dim = self.dims(name)
        each = 0 if dim is None else whole.get_shape()[dim] // self.axis.size
        own = slice(self.axis.index * each, (self.axis.index + 1) * each)
        part: Tensor = whole[(slice(None),) * (dim or 0) + (slice(None) if dim is None else own,)]
        return part


WHOLE = Share(Axis(), lambda _: None)


@attrs.frozen
class Source(ABC):
    """Where a module's tensors come from, and what becomes of them: a type, and a device."""

    dtype: torch.dtype
    device: torch.device

    def kind(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self.dtype

    @abstractmethod
    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors to the device."""


@attrs.frozen
class SafetensorsSource(Source):
    """Tensors in safetensors files, whose headers were checked."""

    headers: Mapping[str, Header]  # by the module's name
    share: Share = WHOLE
    precise: frozenset[str] = frozenset()  # parts of names, between dots, of what is float32

    def kind(self, name: str) -> torch.dtype:
        return self.dtype if self.precise.isdisjoint(name.split(".")) else torch.float32

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors; on a CPU they are the mapped files themselves where these hold the type that is wanted.

        Raises:
            ModelError: a file is not what it was.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        for file, inside in by_file.items():
            for i in range(0, len(inside), MAPPED_TENSORS):
                with _open(file) as tensors:
                    for name in inside[i : i + MAPPED_TENSORS]:
                        try:
                            tensor = self._get(tensors, name)
                        except SafetensorError as error:
                            raise ModelError(f"{file}: it has changed since it was checked: {error}") from None
                        yield name, tensor.to(self.device, self.kind(name))

    def _get(self, file: Any, name: str) -> Tensor:
        key = self.headers[name].key
        whole: Tensor = file.get_tensor(key) if self.share is WHOLE else self.share.cut(name, file.get_slice(key))
        return whole


class WeightFormat(Protocol):
    """A way to store weights."""

    def prepare(self, module: nn.Module) -> None:
        """Swap layers of a module on the meta device for the layers that compute with this format."""

    def headers(self, files: Sequence[Path]) -> Iterator[Header]:
        """Read the names and shapes of all tensors in files. Raises `ModelError`."""

    def source(
        self,
        headers: Mapping[str, Header],
        dtype: torch.dtype,
        device: torch.device,
        share: Share,
        precise: frozenset[str],
    ) -> Source:
        """Return the source of a module's tensors, by the module's names."""


class SafetensorsFormat:
    """Full-precision weights in safetensors files."""

    def prepare(self, module: nn.Module) -> None:
        """Leave every layer as it is."""

    def headers(self, files: Sequence[Path]) -> Iterator[Header]:
        for file in files:
            with _open(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    yield Header(file, key, tuple(tensors.get_slice(key).get_shape()))

    def source(
        self,
        headers: Mapping[str, Header],
        dtype: torch.dtype,
        device: torch.device,
        share: Share,
        precise: frozenset[str],
    ) -> Source:
        return SafetensorsSource(dtype, device, headers, share, precise)


SAFETENSORS = SafetensorsFormat()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: corrupt or truncated: {error}") from None
