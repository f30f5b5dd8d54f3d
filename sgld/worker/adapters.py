"""The LoRA adapters of a rank: those that are configured, and those that one output brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from sgld.errors import BadRequest
from sgld.messages import LoraPart, LoraState, MergeMode, SetLora, UnmergeLora
from sgld.nn.lora import AdapterCache, LoraLayers, WeightedAdapter
from sgld.nn.lora_formats import Adapter
from sgld.nn.parallel import Mesh
from sgld.params import LoraUse
from sgld.worker.run_context import Stopped

CACHE_BYTES = 2**31  # of adapters in host memory, for each rank
SHOWN_KEYS = 5


@attrs.frozen
class ComponentAdapters:
    """The adapters of one component, fitted to its layers."""

    merge_mode: MergeMode = "auto"
    loras: tuple[LoraUse, ...] = ()
    weighted: tuple[WeightedAdapter, ...] = ()
    skipped: int = 0  # keys that fit no layer

    def add(self, lora: LoraUse, weighted: WeightedAdapter, skipped: int) -> ComponentAdapters:
        """Return these adapters and one more."""
        return ComponentAdapters(
            self.merge_mode, (*self.loras, lora), (*self.weighted, weighted), self.skipped + skipped
        )


Configuration = dict[str, ComponentAdapters]  # by component


class Adapters:
    """Apply adapters to the layers of a model, on all ranks or on none.

    Every change is prepared on all ranks first. The configured adapters are applied at once. The adapters of an output
    replace them until the next output.
    """

    def __init__(self, layers: Mapping[str, LoraLayers], mesh: Mesh):
        self._layers, self._mesh = layers, mesh
        self._cache = AdapterCache(CACHE_BYTES)
        self._configured: Configuration = {}
        self._used = False  # true once any adapter was requested, on all ranks alike

    def set(self, command: SetLora) -> LoraState:
        """Replace the adapters of every component that `command` targets. Return the state of these components.

        Raises `BadRequest` when an adapter does not fit. Nothing changes then.
        """
        with self._all_ranks():
            found = self._fit(command.loras, command.merge_mode)
        self._configure(self._configured | found)
        return LoraState(
            {
                name: LoraPart(part.loras, part.merge_mode, self._layers[name].mode, part.skipped)
                for name, part in found.items()
            }
        )

    def unmerge(self, command: UnmergeLora) -> LoraState:
        """Take the adapters of the target away. Every weight is restored bit for bit."""
        self._configure({n: part for n, part in self._configured.items() if command.target not in ("all", n)})
        return LoraState()

    def activate(self, loras: Sequence[LoraUse]) -> list[str]:
        """Apply `loras` for one output, or the configured adapters when there are none. Return warnings for the user.

        Raises `BadRequest` for the field `loras`.
        """
        if not self._used and not loras:
            return []
        self._used = True
        with self._all_ranks():
            wanted = self._fit_own(loras) if loras else self._configured
            self._apply(wanted)
        skipped = sum(part.skipped for part in wanted.values()) if loras else 0
        return [f"loras: {skipped} keys fit no layer and were left out"] if skipped else []

    def release(self) -> None:
        """Free the memory of merged weights that are not in use."""
        for layers in self._layers.values():
            layers.release()

    def _fit_own(self, loras: Sequence[LoraUse]) -> Configuration:
        try:
            return self._fit(loras, "auto")
        except BadRequest as error:
            raise error.renamed("loras") from None

    def _fit(self, loras: Sequence[LoraUse], merge_mode: MergeMode) -> Configuration:
        """Read adapters and fit them to the components they target."""
        found: Configuration = {}
        for lora in loras:
            assert lora.path is not None
            adapter = self._cache.read(Path(lora.path))
            skipped = set(self._foreign_keys(lora, adapter))  # a key that several components skip counts once
            counted = 0
            for name in self._components(lora, adapter):
                fitted = self._layers[name].fit(adapter, strict=lora.strict, alpha=lora.alpha)
                skipped.update(fitted.skipped)
                before = found.get(name, ComponentAdapters(merge_mode))
                weighted = WeightedAdapter(fitted, lora.strength)
                found[name] = before.add(attrs.evolve(lora, target=name), weighted, len(skipped) - counted)
                counted = len(skipped)
        return found

    def _foreign_keys(self, lora: LoraUse, adapter: Adapter) -> list[str]:
        """Return the keys for components that this model lacks. Raise `BadRequest` when `lora` is strict."""
        keys = [
            stored.key
            for name, layers in adapter.layers.items()
            if name not in self._layers
            for parts in layers.values()
            for stored in parts.values()
        ]
        if keys and lora.strict:
            listed = ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
            reason = f"holds {len(keys)} keys for parts that this model has not: {listed}"
            raise BadRequest(f"{adapter.file.name!r} {reason}", field="lora_path")
        return keys

    def _components(self, lora: LoraUse, adapter: Adapter) -> list[str]:
        """Return the components that the adapter changes. Raise `BadRequest` when there are none."""
        if lora.target != "all":
            return [lora.target]
        found = [name for name in self._layers if adapter.has(name)]
        if not found:
            raise BadRequest(f"{adapter.file.name!r} holds nothing for this model", field="lora_path")
        return found

    def _configure(self, wanted: Configuration) -> None:
        """Apply the adapters. They count as configured once every rank has applied them."""
        self._used = True
        with self._all_ranks():
            self._apply(wanted)
        self._configured = wanted

    def _apply(self, wanted: Configuration) -> None:
        for name, layers in self._layers.items():
            part = wanted.get(name, ComponentAdapters())
            layers.apply(part.weighted, part.merge_mode)

    @contextmanager
    def _all_ranks(self) -> Iterator[None]:
        """Fail on all ranks when one fails: its own error there, `Stopped` on the others."""
        try:
            yield
        except Exception:
            self._mesh.any(True)
            raise
        if self._mesh.any(False):
            raise Stopped("LoRA")
