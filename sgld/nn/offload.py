"""Residency: which components hold their weights now, where some of them wait elsewhere until they are needed.

On CUDA they wait in host memory, pinned if asked; on a CPU in their files, which are mapped anew. Meanwhile the
parameters are placeholders: of the right shape, type and device, but with a single number behind them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from sgld.config import TRANSFORMERS, Settings
from sgld.errors import BadRequest
from sgld.nn.weights import Keeper, Source
from sgld.platform import Platform

Change = Callable[[Tensor], Tensor]  # a weight as it is stored, to the weight as it shall be; never in place
PAGE_BYTES = 4096


class Offloaded:
    """A module whose weights come when they are needed; with `layers`, lists of blocks in it, block by block."""

    def __init__(self, module: nn.Module, stored: Source, platform: Platform, pin: bool, layers: Sequence[str] = ()):
        self.module, self._stored, self._platform = module, stored, platform
        self._changes: Mapping[str, Change] = {}
        tensors, tied = module.state_dict(keep_vars=True), dict[int, list[str]]()
        for name, tensor in tensors.items():
            tied.setdefault(id(tensor), []).append(name)
        self._names = {names[0]: names for names in tied.values()}  # all that one tensor has
        self._shapes = {name: tensors[name].shape for name in self._names}
        self._placeholders = {
            name: torch.empty((), dtype=stored.kind(name), device=stored.device).expand(shape)
            for name, shape in self._shapes.items()
        }
        self._host: dict[str, Tensor] | None = None
        if not platform.offloads_to_files:
            host = attrs.evolve(stored, device=torch.device("cpu"))
            self._host = {name: platform.pin(x) if pin else x for name, x in host.read(self._shapes)}
        blocks = [f"{name}.{i}." for name in layers for i in range(len(module.get_submodule(name)))]  # type: ignore[arg-type]
        self._blocks = [[name for name in self._shapes if name.startswith(block)] for block in blocks]
        in_blocks = set(itertools.chain(*self._blocks))
        self._always = [name for name in self._shapes if name not in in_blocks]
        self._prefetcher = platform.prefetcher()
        self._coming: Callable[[], dict[str, Tensor]] | None = None  # the first block, for the next walk
        self._held = False
        self._fill(self._placeholders)

    @property
    def held_bytes(self) -> int:
        """What the module takes at most while it is needed: all of it, or two blocks and what stands around them."""
        sizes = sorted((self._bytes(names) for names in self._blocks), reverse=True)
        return self._bytes(self._always) + sum(sizes[:2])

    def change(self, changes: Mapping[str, Change]) -> None:
        """Let these weights, and no others, differ from what is stored, from the next time they come."""
        self.drop()
        self._changes = changes

    def load(self) -> None:
        """Bring the weights; of a module in layers those outside them, for `walk` brings the others."""
        if not self._held:
            self._fill(self._read(self._always))
            self._held = True

    def drop(self) -> None:
        """Let all weights go."""
        self._coming = None
        if self._held:
            self._fill(self._placeholders)
            self._held = False

    def walk(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Each of the layers with its weights until the next is asked for, which is read meanwhile."""
        coming, self._coming = self._coming or self._start(0), None
        for i, block in enumerate(blocks):
            self._fill(coming())
            coming = self._start((i + 1) % len(self._blocks))
            yield block
            self._platform.synchronize()  # what still computes with the weights
            self._fill({name: self._placeholders[name] for name in self._blocks[i]})
        self._coming = coming

    def _start(self, i: int) -> Callable[[], dict[str, Tensor]]:
        return self._prefetcher.start(partial(self._read, self._blocks[i], touch=True))

    @torch.inference_mode(False)
    def _read(self, names: Iterable[str], touch: bool = False) -> dict[str, Tensor]:
        if self._host is None:
            found = dict(self._stored.read(names))
        else:
            found = {name: self._host[name].to(self._stored.device, non_blocking=True) for name in names}
        if touch and self._host is None:
            for x in found.values():  # a mapped file is read when it is looked at
                x.flatten()[:: PAGE_BYTES // x.element_size()].sum()
        return {name: self._changes[name](x) if name in self._changes else x for name, x in found.items()}

    @torch.inference_mode(False)
    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        for first, x in tensors.items():
            parameter = nn.Parameter(x, requires_grad=False)
            for name in self._names[first]:
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, parameter)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._stored.kind(name).itemsize * math.prod(self._shapes[name]) for name in names)


OFFLOADED = {  # by the flag: the components, and the VAE's encoder, which is loaded apart
    "text_encoder_cpu_offload": ("text_encoder", "text_encoder_2", "text_encoder_3", "connectors"),
    "image_encoder_cpu_offload": ("image_encoder",),
    "dit_cpu_offload": TRANSFORMERS,
    "dit_layerwise_offload": TRANSFORMERS,
    "vae_cpu_offload": ("vae", "vae_encoder", "audio_vae", "vocoder"),
}


class Offloader:
    """The components of one model, by name: of the offloaded ones a single one holds its weights at a time."""

    def __init__(self, platform: Platform, pin: bool, whole: Container[str] = (), layerwise: Container[str] = ()):
        self._platform, self._pin, self._whole, self._layerwise = platform, pin, whole, layerwise
        self._parts: dict[str, Offloaded] = {}

    @classmethod
    def of(cls, settings: Settings, platform: Platform, components: Container[str]) -> Offloader:
        """As the settings ask. Raises `BadRequest` for a flag that no component of the model answers to."""
        asked = {flag: names for flag, names in OFFLOADED.items() if getattr(settings, flag)}
        for flag, names in asked.items():
            if not any(name in components for name in names):
                raise BadRequest(f"this model has no {names[0]}; leave it out", field=flag)
        layerwise = asked.pop("dit_layerwise_offload", ())
        return cls(platform, settings.pin_cpu_memory, set(itertools.chain(*asked.values())), layerwise)

    def keeper(self, name: str, layers: Sequence[str] = ()) -> Keeper | None:
        """Where `load_module` leaves that component; None for one that stays. `layers` names its lists of blocks."""
        if name not in self._whole and name not in self._layerwise:
            return None

        def keep(module: nn.Module, stored: Source) -> None:
            by_layer = layers if name in self._layerwise else ()
            self._parts[name] = Offloaded(module, stored, self._platform, self._pin, by_layer)

        return keep

    def changer(self, name: str) -> Callable[[Mapping[str, Change]], None] | None:
        """Where changes of that component's weights go, if it is offloaded."""
        return self._parts[name].change if name in self._parts else None

    def walker(self, name: str) -> Callable[[Iterable[nn.Module]], Iterator[nn.Module]]:
        """How to go through its list of blocks."""
        return self._parts[name].walk if name in self._parts and name in self._layerwise else iter

    def held_bytes(self, name: str) -> int:
        """What needing that component adds to the weights that stay."""
        return self._parts[name].held_bytes if name in self._parts else 0

    def need(self, name: str) -> None:
        """Let that component hold its weights, and no other offloaded one; it may be one that stays."""
        for other, part in self._parts.items():
            if other != name:
                part.drop()
        if name in self._parts:
            self._parts[name].load()

    def release_all(self) -> None:
        """Let all offloaded weights go."""
        for part in self._parts.values():
            part.drop()
