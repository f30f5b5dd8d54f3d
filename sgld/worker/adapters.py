"""The LoRA adapters of a rank: those that are configured, and those that one output brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from sgld.errors import BadRequest
from sgld.messages import LoraPart, LoraState, MergeLora, MergeMode, SetLora, UnmergeLora
from sgld.nn.lora import AdapterCache, LoraLayers, WeightedAdapter
from sgld.nn.lora_formats import Adapter
from sgld.nn.parallel import Mesh
from sgld.params import LoraUse
from sgld.worker.run_context import Stopped

CACHE_BYTES = 2**31  # of adapters in host memory, for each rank
SHOWN_KEYS = 5


@attrs.frozen
class Setting:
    """What one component shall hold."""

    part: LoraPart
    uses: tuple[WeightedAdapter, ...]

    @property
    def active(self) -> tuple[WeightedAdapter, ...]:
        """The adapters, unless they were taken away."""
        return self.uses if self.part.applied is not None else ()


class Adapters:
    """Every change is first made ready on all ranks: where one of them fails, none has changed.

    What is configured is decided here and written into the weights at once; an output's own adapters replace it until
    the next output asks for something else.
    """

    def __init__(self, layers: Mapping[str, LoraLayers], mesh: Mesh):
        self._layers, self._mesh = layers, mesh
        self._cache = AdapterCache(CACHE_BYTES)
        self._settings: dict[str, Setting] = {}
        self._used = False  # whether any was ever asked for, on all ranks alike

    @property
    def state(self) -> LoraState:
        """What is configured."""
        return LoraState({name: setting.part for name, setting in self._settings.items()})

    def set(self, command: SetLora) -> LoraState:
        """Replace the adapters of every component that these are for. Raises `BadRequest`, and nothing changes."""
        with self._together():
            settings = self._settings | self._settings_of(command.loras, command.merge_mode)
        return self._configure(settings)

    def merge(self, command: MergeLora) -> LoraState:
        """The adapters that were last set, with another strength. Raises `BadRequest` where there are none."""
        names = self._known(command.target)
        if not names:
            raise BadRequest(f"no adapter was set for {command.target!r}; set one first", field="target")
        settings = dict(self._settings)
        for name in names:
            part, uses = settings[name].part, settings[name].uses
            loras = tuple(attrs.evolve(lora, strength=command.strength) for lora in part.loras)
            settings[name] = Setting(
                attrs.evolve(part, loras=loras, applied=part.merge_mode),
                tuple(attrs.evolve(use, strength=command.strength) for use in uses),
            )
        return self._configure(settings)

    def unmerge(self, command: UnmergeLora) -> LoraState:
        """Take them away; where there are none, nothing is to do."""
        taken = {
            name: attrs.evolve(self._settings[name], part=attrs.evolve(self._settings[name].part, applied=None))
            for name in self._known(command.target)
        }
        return self._configure(self._settings | taken)

    def activate(self, loras: Sequence[LoraUse]) -> list[str]:
        """Let these hold for one output; without any, the configured ones. Answers with warnings for the user."""
        if not self._used and not loras:
            return []
        self._used = True
        with self._together():
            settings = self._brought(loras) if loras else self._settings
            self._apply(settings)
        skipped = sum(setting.part.skipped for setting in settings.values()) if loras else 0
        return [f"loras: {skipped} keys fit no layer and were left out"] if skipped else []

    def _brought(self, loras: Sequence[LoraUse]) -> dict[str, Setting]:
        """Those of one output, whose faults are told by the name of its own field."""
        try:
            return self._settings_of(loras, "auto")
        except BadRequest as error:
            raise error.renamed("loras") from None

    def release(self) -> None:
        """Give up the memory of merged weights that are kept for later outputs."""
        for layers in self._layers.values():
            layers.release()

    def _settings_of(self, asked: Sequence[LoraUse], merge_mode: MergeMode) -> dict[str, Setting]:
        """Read and fitted, by component."""
        found: dict[str, Setting] = {}
        for lora in asked:
            assert lora.path is not None
            adapter = self._cache.read(Path(lora.path))
            counted = set(self._strangers(lora, adapter))  # keys that fit nowhere, each told of once
            told = 0
            for name in self._components(lora, adapter):
                fitted = self._layers[name].fit(adapter, strict=lora.strict, alpha=lora.alpha)
                part = found[name].part if name in found else LoraPart((), merge_mode, merge_mode)
                uses = found[name].uses if name in found else ()
                loras = *part.loras, attrs.evolve(lora, target=name)
                counted.update(fitted.skipped)
                part = attrs.evolve(part, loras=loras, skipped=part.skipped + len(counted) - told)
                told = len(counted)
                found[name] = Setting(part, (*uses, WeightedAdapter(fitted, lora.strength)))
        return found

    def _strangers(self, lora: LoraUse, adapter: Adapter) -> list[str]:
        """Keys for parts that this model has not. Raises `BadRequest` where `lora` is strict."""
        others = [
            stored.key
            for name, layers in adapter.layers.items()
            if name not in self._layers
            for parts in layers.values()
            for stored in parts.values()
        ]
        if others and lora.strict:
            shown = ", ".join(others[:SHOWN_KEYS]) + (", ..." if len(others) > SHOWN_KEYS else "")
            reason = f"holds {len(others)} keys for parts that this model has not: {shown}"
            raise BadRequest(f"{adapter.file.name!r} {reason}", field="lora_path")
        return others

    def _components(self, lora: LoraUse, adapter: Adapter) -> list[str]:
        """Those that it changes. Raises `BadRequest` where there are none."""
        if lora.target != "all":
            return [lora.target]
        found = [name for name in self._layers if adapter.has(name)]
        if not found:
            raise BadRequest(f"{adapter.file.name!r} holds nothing for this model", field="lora_path")
        return found

    def _known(self, target: str) -> list[str]:
        return [name for name in self._settings if target in ("all", name)]

    def _configure(self, settings: dict[str, Setting]) -> LoraState:
        """Write them into the weights; they count as configured once every rank has done so."""
        self._used = True
        with self._together():
            self._apply(settings)
        self._settings = {name: self._told(name, setting) for name, setting in settings.items()}
        return self.state

    def _told(self, name: str, setting: Setting) -> Setting:
        """With the mode that its layers have chosen."""
        applied = self._layers[name].mode if setting.part.applied is not None else None
        return attrs.evolve(setting, part=attrs.evolve(setting.part, applied=applied))

    def _apply(self, settings: Mapping[str, Setting]) -> None:
        for name, layers in self._layers.items():
            setting = settings.get(name)
            layers.apply(setting.active if setting else (), setting.part.merge_mode if setting else "auto")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Where this fails on one rank, it fails on all: the others stop, and the caller hears of the fault."""
        try:
            yield
        except Exception:
            self._mesh.any(True)
            raise
        if self._mesh.any(False):
            raise Stopped("LoRA")
