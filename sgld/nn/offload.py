"""Offload weights: load each component's when it is needed, and drop them afterwards.

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

from sgld.errors import BadRequest
from sgld.nn.formats import Source
from sgld.nn.runner import BlockRunner, PlainRunner
from sgld.nn.weights import Keeper
from sgld.platform import Platform
from sgld.settings import TRANSFORMERS, Settings

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
        found = {block: f"{name}.{i}." for name in layers for i, block in module.get_submodule(name).named_children()}
        self._index = {block: i for i, block in enumerate(found)}
        self._blocks = [[name for name in self._shapes if name.startswith(prefix)] for prefix in found.values()]
        in_blocks = set(itertools.chain(*self._blocks))
        self._always = [name for name in self._shapes if name not in in_blocks]
        self._prefetcher = platform.prefetcher()
        self._coming: tuple[int, Callable[[], dict[str, Tensor]]] | None = None  # the block that is read ahead
        self._held = False
        self._fill(self._placeholders)

    @property
    def held_bytes(self) -> int:
        """Return the most bytes loaded at once: the whole module, or two blocks and the weights outside all blocks."""
        sizes = sorted((self._bytes(names) for names in self._blocks), reverse=True)
        return self._bytes(self._always) + sum(sizes[:2])

    def change(self, changes: Mapping[str, Change]) -> None:
        """Change these weights, and no others, each time that they are loaded."""
        self.drop()
        self._changes = changes

    def load(self) -> None:
        """Load the weights; of a module in blocks only those outside the blocks, for `visit` loads the others."""
        if not self._held:
            self._fill(self._read(self._always))
            self._held = True

    def drop(self) -> None:
        """Drop all weights."""
        self._coming = None
        if self._held:
            self._fill(self._placeholders)
            self._held = False

    def visit(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield each block with its weights loaded, and read the next one's meanwhile."""
        for block in blocks:
            i = self._index[block]
            ready = self._coming[1] if self._coming is not None and self._coming[0] == i else self._start(i)
            self._fill(ready())
            following = (i + 1) % len(self._blocks)
            self._coming = following, self._start(following)
            yield block
            self._platform.synchronize()  # what still computes with the weights
            self._fill({name: self._placeholders[name] for name in self._blocks[i]})

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


class OffloadRunner(PlainRunner):
    """Runs blocks whose weights are loaded one block ahead."""

    def __init__(self, weights: Offloaded):
        self._weights = weights

    def visit(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        return self._weights.visit(blocks)


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
        """Build from the settings. Raises `BadRequest` for a flag that no component of the model answers to."""
        asked = {flag: names for flag, names in OFFLOADED.items() if settings.get(flag)}
        for flag, names in asked.items():
            if not any(name in components for name in names):
                raise BadRequest(f"this model has no {names[0]}; leave it out", field=flag)
        layerwise = asked.pop("dit_layerwise_offload", ())
        return cls(platform, settings.memory.pin_cpu_memory, set(itertools.chain(*asked.values())), layerwise)

    def keeper(self, name: str, layers: Sequence[str] = ()) -> Keeper | None:
        """Return the taker of a component for `load_module`, or None. `layers` names its lists of blocks."""
        if name not in self._whole and name not in self._layerwise:
            return None

        def keep(module: nn.Module, stored: Source) -> None:
            by_layer = layers if name in self._layerwise else ()
            self._parts[name] = Offloaded(module, stored, self._platform, self._pin, by_layer)

        return keep

    def changer(self, name: str) -> Callable[[Mapping[str, Change]], None] | None:
        """Return the taker of changes to an offloaded component's weights, or None."""
        return self._parts[name].change if name in self._parts else None

    def runner(self, name: str) -> BlockRunner:
        """Return the runner of a transformer's blocks."""
        return OffloadRunner(self._parts[name]) if name in self._parts and name in self._layerwise else PlainRunner()

    def held_bytes(self, name: str) -> int:
        """Return the bytes that loading the component adds to the resident weights."""
        return self._parts[name].held_bytes if name in self._parts else 0

    def need(self, name: str) -> None:
        """Load the component's weights and drop those of every other offloaded one."""
        for other, part in self._parts.items():
            if other != name:
                part.drop()
        if name in self._parts:
            self._parts[name].load()

    def release_all(self) -> None:
        """Drop all offloaded weights."""
        for part in self._parts.values():
            part.drop()
