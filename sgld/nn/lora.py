"""LoRA adapters at work on a model: merged into its weights, or beside them; and a cache of adapters that were read.

Per module one `LoraLayers`: `fit` an adapter (nothing changes), then `apply` all that shall hold from now on.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from sgld.errors import BadRequest, NotBuilt
from sgld.nn.lora_formats import Adapter, Delta, Fitted, Renames, config_file, find_file, fit, read_adapter

Mode = Literal["auto", "merge", "dynamic"]
MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)

Layer = nn.Linear | _ConvNd  # what can be computed beside


@attrs.frozen
class Use:
    """A fitted adapter with its strength; 0 is the same as its absence."""

    adapter: Fitted
    strength: float = attrs.field(default=1.0)

    @strength.validator
    def _is_finite(self, attribute: Any, value: float) -> None:
        if not math.isfinite(value):
            raise BadRequest(f"strength: {value}; a finite number is needed", "strength")


@attrs.frozen(eq=False)
class Part:
    """One layer's delta with its strength."""

    delta: Delta
    strength: float


# --------------------------------------------------------------------------------------------------- arithmetic


def add_linear(total: Tensor, parts: Sequence[tuple[Delta, float]]) -> None:
    """total += strength * (scale * up @ down + diff) of each, in float32; all pairs as one; `total` is contiguous."""
    pairs = [(d.up, d.down, strength * d.scale) for d, strength in parts if d.up is not None and d.down is not None]
    if pairs:
        up = torch.cat([up.to(total).flatten(1) * factor for up, _, factor in pairs], 1)
        down = torch.cat([down.to(total).flatten(1) for _, down, _ in pairs])
        total.view(len(total), -1).addmm_(up, down)
    for delta, strength in parts:
        if delta.diff is not None:
            total.add_(delta.diff.to(total), alpha=strength)


def dora_factor(delta: Delta, changed: Tensor) -> Tensor:
    """magnitude / ||W + part||, of the shape of the magnitude; `changed` is W + part."""
    assert delta.magnitude is not None
    m = delta.magnitude.to(changed)
    across = [dim for dim, size in enumerate(m.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(changed, dim=across, keepdim=True)
    return m / norm


def add_changes(total: Tensor, base: Tensor, parts: Sequence[Part]) -> None:
    """total += what these adapters add to the weight, in float32; each counts against the base alone."""
    add_linear(total, [(part.delta, part.strength) for part in parts if part.delta.magnitude is None])
    for part in parts:
        if part.delta.magnitude is not None:
            changed = _float32(base, total.device)
            add_linear(changed, [(part.delta, 1.0)])
            changed.mul_(dora_factor(part.delta, changed)).sub_(base.to(total))
            total.add_(changed, alpha=part.strength)


def _float32(x: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy."""
    return x.to(device, torch.float32, memory_format=torch.contiguous_format, copy=True)


def bias_change(parts: Sequence[Part], device: torch.device) -> Tensor | None:
    """What these adapters together add to the bias, float32."""
    terms = [
        bias.to(device, torch.float32) * factor
        for part in parts
        for bias, factor in (
            (part.delta.diff_b, part.strength),
            (part.delta.up_bias, part.strength * part.delta.scale),
        )
        if bias is not None
    ]
    return torch.stack(terms).sum(0) if terms else None


# ------------------------------------------------------------------------------------------------------- dynamic


class Beside:
    """A forward hook: y + gain * (y - b) + up(down(x)) + diff(x) + bias, in the precision of the weights.

    The pairs of all adapters stand as one; `gain` and the rows of `up` carry DoRA's factor of each output.
    """

    def __init__(self, layer: Layer, parts: Sequence[Part]):
        weight = layer.weight
        self._dtype, self._device = weight.dtype if weight.dtype in MERGEABLE else torch.bfloat16, weight.device
        dense = [part for part in parts if _is_dense(layer, part.delta)]
        paired = [part for part in parts if part not in dense]
        self._diff = self._dense(weight, dense) if dense else None
        factors = [self._factor(weight, part.delta) for part in paired]
        self._gain = self._shaped(layer, self._gains(paired, factors))
        self._pair = self._joined(layer, paired, factors)
        self._bias = self._shaped(layer, bias_change(parts, self._device))

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        assert isinstance(layer, Layer)
        (x,) = args
        if self._gain is not None:
            bias = self._shaped(layer, layer.bias)
            y = y + self._gain * (y if bias is None else y - bias)
        if self._pair is not None:
            down, up = self._pair
            y = y + _spread(layer, F.linear(_gathered(layer, _apply(layer, x, down)), up))
        if self._diff is not None:
            y = y + _apply(layer, x, self._diff)
        return y if self._bias is None else y + self._bias

    def _dense(self, weight: Tensor, parts: Sequence[Part]) -> Tensor:
        total = torch.zeros(weight.shape, device=self._device)
        add_changes(total, weight, parts)
        return self._cast(total)

    def _factor(self, weight: Tensor, delta: Delta) -> Tensor | None:
        """DoRA's factor of each output, float32 [out]."""
        if delta.magnitude is None:
            return None
        changed = _float32(weight, self._device)
        add_linear(changed, [(delta, 1.0)])
        return dora_factor(delta, changed).flatten()

    def _gains(self, parts: Sequence[Part], factors: Sequence[Tensor | None]) -> Tensor | None:
        gains = [
            part.strength * (factor - 1) for part, factor in zip(parts, factors, strict=True) if factor is not None
        ]
        return torch.stack(gains).sum(0) if gains else None

    def _joined(
        self, layer: Layer, parts: Sequence[Part], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor] | None:
        """down [R, in, ...] and up [out, R] of all parts that have them."""
        downs, ups = [], []
        for part, factor in zip(parts, factors, strict=True):
            d = part.delta
            if d.down is not None and d.up is not None:
                up = d.up.to(self._device, torch.float32).flatten(1) * (part.strength * d.scale)
                ups.append(up if factor is None else factor[:, None] * up)
                down = d.down.to(self._device, torch.float32)
                downs.append(down.flatten(1) if isinstance(layer, nn.Linear) else down)
        return (self._cast(torch.cat(downs)), self._cast(torch.cat(ups, 1))) if downs else None

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._dtype)

    def _shaped(self, layer: Layer, x: Tensor | None) -> Tensor | None:
        """A value for each output, to be broadcast over the layer's output."""
        if x is None:
            return None
        return self._cast(x if isinstance(layer, nn.Linear) else x.view(-1, *(1,) * (layer.weight.ndim - 2)))


def _is_dense(layer: Layer, delta: Delta) -> bool:
    """Whether a layer's delta cannot stand as a pair of small ones."""
    grouped = isinstance(layer, _ConvNd) and layer.groups > 1
    across_inputs = delta.magnitude is not None and delta.magnitude.shape[0] != layer.weight.shape[0]
    return delta.diff is not None or grouped or across_inputs


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight.flatten(1))
    y: Tensor = layer._conv_forward(x, weight, None)
    return y


def _gathered(layer: Layer, y: Tensor) -> Tensor:
    """Channels last."""
    return y if isinstance(layer, nn.Linear) else y.movedim(-layer.weight.ndim + 1, -1)


def _spread(layer: Layer, y: Tensor) -> Tensor:
    """Channels where the layer has them."""
    return y if isinstance(layer, nn.Linear) else y.movedim(-1, -layer.weight.ndim + 1)


# ------------------------------------------------------------------------------------------------------- a module


class LoraLayers:
    """The adapters of one module. Merging happens in float32 and is rounded once.

    The base of every weight that was ever touched stays in host memory, so that taking adapters away restores it bit
    for bit. So do the merged weights of the last few settings, up to `keep_bytes`: coming back to one is a copy.
    Fitting and applying read tensors, so they belong where computing happens, not on an event loop.
    """

    def __init__(self, module: nn.Module, original: Renames = (), component: str = "transformer", keep_bytes: int = 0):
        self._module, self._original, self._component = module, original, component
        self._keep_bytes = keep_bytes
        self._base: dict[str, Tensor] = {}
        self._kept: OrderedDict[tuple[Use, ...], dict[str, Tensor]] = OrderedDict()
        self._changed: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self._fitted: WeakKeyDictionary[Adapter, dict[tuple[bool, float | None], Fitted]] = WeakKeyDictionary()
        self.active: tuple[Use, ...] = ()
        self.mode: Mode = "merge"  # of the active ones: `merge` or `dynamic`

    @property
    def base_bytes(self) -> int:
        """Host memory that the bases take."""
        return sum(base.nbytes for base in self._base.values())

    @property
    def kept_bytes(self) -> int:
        """Host memory that the merged weights of earlier settings take."""
        return sum(tensor.nbytes for kept in self._kept.values() for tensor in kept.values())

    def fit(self, adapter: Adapter, *, strict: bool = True, alpha: float | None = None) -> Fitted:
        """The adapter in terms of this module; nothing changes. Raises `BadRequest` as `lora_formats.fit` does."""
        known, key = self._fitted.setdefault(adapter, {}), (strict, alpha)
        if key not in known:
            shapes = {name: tuple(p.shape) for name, p in self._module.named_parameters()}
            known[key] = fit(adapter, shapes, self._original, self._component, strict=strict, alpha=alpha)
        return known[key]

    @torch.no_grad()
    def apply(self, uses: Sequence[Use], mode: Mode = "auto") -> None:
        """Let these adapters, and no others, hold from now on; the very same again costs nothing.

        `auto` merges where the weights are of a type that can be merged. After a failure while weights are written no
        adapter holds.

        Raises:
            NotBuilt: `merge`, or DoRA, on weights of another type: quantized ones. Nothing changes then.
        """
        wanted = tuple(use for use in uses if use.strength != 0)
        layers = _by_layer(wanted)
        mode = self._choose(layers, mode)
        if (wanted, mode) == (self.active, self.mode):
            return
        try:
            self._unhook()
            if mode == "dynamic":
                self._merge(self._hook(layers))
            elif wanted in self._kept:
                self._recall(wanted)
            else:
                self._merge(layers)
                self._keep(wanted)
        except BaseException:
            self.clear()
            raise
        self.active, self.mode = wanted, mode

    @torch.no_grad()
    def clear(self) -> None:
        """Take all adapters away: every weight is what it was, bit for bit."""
        self._unhook()
        self._restore(self._changed)
        self.active = ()

    def release(self) -> None:
        """Give up the host memory of bases whose weights are untouched now, and of earlier settings."""
        self._kept.clear()
        self._base = {name: base for name, base in self._base.items() if name in self._changed}

    def _choose(self, layers: Mapping[str, list[Part]], mode: Mode) -> Mode:
        deltas = [part.delta for parts in layers.values() for part in parts]
        odd = [d for d in deltas if self._module.get_parameter(d.weight).dtype not in MERGEABLE]
        if not odd:
            return "merge" if mode == "auto" else mode
        dtype = str(self._module.get_parameter(odd[0].weight).dtype).removeprefix("torch.")
        if mode == "merge":
            raise NotBuilt(f"merge_mode: weights of type {dtype} cannot be merged; use dynamic", "merge_mode")
        if any(delta.magnitude is not None for delta in odd):
            raise NotBuilt(f"lora_path: DoRA on weights of type {dtype} is not built yet in this version of sgld")
        return "dynamic"

    def _merge(self, layers: Mapping[str, list[Part]]) -> None:
        """Write base + change into all these layers, and the base into those changed before."""
        wanted = set()
        for parts in layers.values():
            delta = parts[0].delta
            if any(part.delta.changes_weight for part in parts):
                wanted.add(delta.weight)
                self._write(self._touch(delta.weight), self._base[delta.weight], parts)
            change = bias_change(parts, self._module.get_parameter(delta.weight).device)
            if delta.bias is not None and change is not None:
                wanted.add(delta.bias)
                bias = self._touch(delta.bias)
                bias.copy_(change.add_(self._base[delta.bias].to(bias.device)))
        self._restore(self._changed - wanted)

    def _keep(self, uses: tuple[Use, ...]) -> None:
        if sum(self._module.get_parameter(name).nbytes for name in self._changed) > self._keep_bytes or not uses:
            return
        self._kept[uses] = {name: self._module.get_parameter(name).to("cpu", copy=True) for name in self._changed}
        while self.kept_bytes > self._keep_bytes:
            self._kept.popitem(last=False)

    def _recall(self, uses: tuple[Use, ...]) -> None:
        self._kept.move_to_end(uses)
        for name, merged in self._kept[uses].items():
            self._touch(name).copy_(merged)
        self._restore(self._changed - self._kept[uses].keys())

    def _write(self, weight: Tensor, base: Tensor, parts: Sequence[Part]) -> None:
        """weight = base + changes; in place where its own type is float32."""
        if weight.dtype == torch.float32 and weight.is_contiguous():
            add_changes(weight.copy_(base), base, parts)
        else:
            total = _float32(base, weight.device)
            add_changes(total, base, parts)
            weight.copy_(total)

    def _touch(self, name: str) -> nn.Parameter:
        """That parameter, once its base is kept and it counts as changed."""
        parameter = self._module.get_parameter(name)
        if name not in self._base:
            on_gpu = parameter.device.type == "cuda"
            base = torch.empty_like(parameter, device="cpu", requires_grad=False, pin_memory=on_gpu)
            self._base[name] = base.copy_(parameter)
        self._changed.add(name)
        return parameter

    def _restore(self, names: set[str]) -> None:
        for name in list(names):
            self._module.get_parameter(name).copy_(self._base[name])
            self._changed.discard(name)

    def _hook(self, layers: Mapping[str, list[Part]]) -> dict[str, list[Part]]:
        """Compute beside linear layers and convolutions; answers with the layers that are neither.

        The bases come back first: DoRA's factors are against them.
        """
        self._restore(self._changed)
        rest = {}
        for name, parts in layers.items():
            layer = self._module.get_submodule(name) if parts[0].delta.weight != name else None
            if isinstance(layer, Layer):
                self._hooks.append(layer.register_forward_hook(Beside(layer, parts)))
            else:
                rest[name] = parts
        return rest

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _by_layer(uses: Sequence[Use]) -> dict[str, list[Part]]:
    layers: dict[str, list[Part]] = {}
    for use in uses:
        for name, delta in use.adapter.layers.items():
            layers.setdefault(name, []).append(Part(delta, use.strength))
    return layers


# --------------------------------------------------------------------------------------------------------- cache


Stamp = tuple[Path, tuple[tuple[int, int], ...]]  # the file, and (mtime in ns, size) of it and of its config


@attrs.frozen
class Source:
    """Where an adapter lies: a file or a folder, and which file of it."""

    path: Path
    weight_name: str | None = None


class AdapterCache:
    """Adapters in host memory, the least recently used dropped first; nicknames outlive what is dropped.

    An adapter at work keeps its tensors until it is replaced, whatever the limit.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.nicknames: dict[str, Source] = {}
        self._adapters: OrderedDict[Source, tuple[Stamp, Adapter]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of the cached adapters."""
        return sum(adapter.nbytes for _, adapter in self._adapters.values())

    def read(self, path: Path, weight_name: str | None = None, nickname: str | None = None) -> Adapter:
        """That adapter, read unless an unchanged copy is here; `nickname` names it from now on. Blocks.

        Raises:
            BadRequest: as `read_adapter` does; the nickname is not given then.
        """
        source = Source(path, weight_name)
        adapter = self._load(source)
        if nickname is not None:
            self.nicknames[nickname] = source
        return adapter

    def named(self, nickname: str) -> Adapter:
        """The adapter that had this nickname last, read again where it was dropped or has changed. Blocks.

        Raises:
            BadRequest: nobody gave this nickname; or as `read_adapter` does.
        """
        if nickname not in self.nicknames:
            known = ", ".join(sorted(self.nicknames)) or "none"
            raise BadRequest(f"lora_nickname: no adapter {nickname!r}; known: {known}", "lora_nickname")
        return self._load(self.nicknames[nickname])

    def forget(self, nickname: str) -> None:
        """Drop a nickname, and its adapter from memory unless another nickname means it too."""
        source = self.nicknames.pop(nickname, None)
        if source is not None and source not in self.nicknames.values():
            self._adapters.pop(source, None)

    def _load(self, source: Source) -> Adapter:
        stamp = _stamp(source)
        held = self._adapters.pop(source, None)
        adapter = held[1] if held and held[0] == stamp else read_adapter(source.path, source.weight_name)
        if adapter.nbytes <= self.limit_bytes:
            self._adapters[source] = stamp, adapter
        while self.nbytes > self.limit_bytes:
            self._adapters.popitem(last=False)
        return adapter


def _stamp(source: Source) -> Stamp:
    """Raises `BadRequest` when there is no such file."""
    file = find_file(source.path, source.weight_name)
    states = [entry.stat() for entry in (file, config_file(source.path, file)) if entry is not None]
    return file, tuple((state.st_mtime_ns, state.st_size) for state in states)
