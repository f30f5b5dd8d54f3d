"""LoRA adapters at work on a model: merged into its weights, or beside them; and a cache of adapters that were read.

Per module one `LoraLayers`: `fit` an adapter (nothing changes), then `apply` all that shall hold from now on.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from sgld.nn.lora_files import config_file, find_file
from sgld.nn.lora_formats import Adapter, Delta, Fitted, Renames, fit, read_adapter

Mode = Literal["auto", "merge", "dynamic"]
MERGEABLE = (torch.float32, torch.bfloat16, torch.float16)
CACHED_NUMBERS = 2**17  # float32, that a core keeps at hand

Layer = nn.Linear | _ConvNd  # what can be computed beside


@attrs.frozen
class WeightedAdapter:
    """A fitted adapter with its strength; 0 is the same as its absence."""

    adapter: Fitted
    strength: float = attrs.field(default=1.0)

    @strength.validator
    def _is_finite(self, attribute: Any, value: float) -> None:
        if not math.isfinite(value):
            raise BadRequest(f"{value}; a finite number is needed", field="strength")


@attrs.frozen(eq=False)
class Part:
    """One layer's delta with its strength."""

    delta: Delta
    strength: float


# --------------------------------------------------------------------------------------------------- arithmetic


def joined(parts: Sequence[tuple[Delta, float | Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Join all pairs to one up [out, R] and down [R, in], with their strengths, in the precision of `like`."""
    pairs = [(d.up, d.down, strength * d.scale) for d, strength in parts if d.up is not None and d.down is not None]
    up = torch.cat([up.to(like).flatten(1) * factor for up, _, factor in pairs], 1)
    return up, torch.cat([down.to(like).flatten(1) for _, down, _ in pairs])


def add_linear(total: Tensor, parts: Sequence[tuple[Delta, float]]) -> None:
    """total += strength * (scale * up @ down + diff) of each, in float32; `total` is contiguous."""
    if any(delta.up is not None for delta, _ in parts):
        total.view(len(total), -1).addmm_(*joined(parts, total))
    for delta, strength in parts:
        if delta.diff is not None:
            total.add_(delta.diff.to(total), alpha=strength)


def dora_factor(delta: Delta, changed: Tensor) -> Tensor:
    """Return magnitude / ||W + part||, of the shape of the magnitude. `changed` is W + part."""
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
    """Copy to contiguous float32."""
    return x.to(device, torch.float32, memory_format=torch.contiguous_format, copy=True)


def bias_change(parts: Sequence[Part], device: torch.device) -> Tensor | None:
    """Sum what adapters add to the bias, float32."""
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


def merged_weight(base: Tensor, parts: Sequence[Part], out: Tensor | None = None) -> Tensor:
    """Add adapters to a base weight, in `out` or in a new tensor on the base's device. Round once.

    On a CPU, pairs go a few rows at a time, which stay in its cache while they are float32.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format) if out is None else out
    if out.dtype == torch.float32 and out.is_contiguous():
        add_changes(out.copy_(base), base, parts)
        return out
    plain = all(part.delta.diff is None and part.delta.magnitude is None for part in parts)
    if not plain or out.device.type != "cpu":
        total = _float32(base, out.device)
        add_changes(total, base, parts)
        return out.copy_(total)
    up, down = joined([(part.delta, part.strength) for part in parts], torch.empty(0))
    rows = max(1, CACHED_NUMBERS // down.shape[1])
    total = torch.empty(rows, down.shape[1])
    for start in range(0, len(up), rows):
        some = up[start : start + rows]
        summed = total[: len(some)].copy_(base[start : start + rows].flatten(1)).addmm_(some, down)
        out[start : start + rows].flatten(1).copy_(summed)
    return out


def merged_bias(base: Tensor, parts: Sequence[Part], out: Tensor | None = None) -> Tensor:
    """Add adapters to a bias."""
    out = torch.empty_like(base) if out is None else out
    change = bias_change(parts, out.device)
    assert change is not None
    return out.copy_(change.add_(base.to(out.device)))


# ------------------------------------------------------------------------------------------------------- dynamic


class DynamicLora:
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

    def _factor(self, weight: Tensor, delta: Delta) -> Tensor | float:
        """Compute DoRA's factor of each output, float32 [out, 1]."""
        if delta.magnitude is None:
            return 1.0
        changed = _float32(weight, self._device)
        add_linear(changed, [(delta, 1.0)])
        return dora_factor(delta, changed).flatten(1)

    def _gains(self, parts: Sequence[Part], factors: Sequence[Tensor | float]) -> Tensor | None:
        found = zip(parts, factors, strict=True)
        gains = [part.strength * (factor - 1).flatten() for part, factor in found if isinstance(factor, Tensor)]
        return torch.stack(gains).sum(0) if gains else None

    def _joined(
        self, layer: Layer, parts: Sequence[Part], factors: Sequence[Tensor | float]
    ) -> tuple[Tensor, Tensor] | None:
        """Join down [R, in, ...] and up [out, R] of all parts that have them."""
        if all(part.delta.up is None for part in parts):
            return None
        scaled = [(part.delta, part.strength * factor) for part, factor in zip(parts, factors, strict=True)]
        up, down = joined(scaled, torch.empty(0, device=self._device))
        down = down if isinstance(layer, nn.Linear) else down.view(-1, *layer.weight.shape[1:])
        return self._cast(down), self._cast(up)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._dtype)

    def _shaped(self, layer: Layer, x: Tensor | None) -> Tensor | None:
        """Shape a value for each output so that it broadcasts over the layer's output."""
        if x is None:
            return None
        return self._cast(x if isinstance(layer, nn.Linear) else x.view(-1, *(1,) * (layer.weight.ndim - 2)))


def _is_dense(layer: Layer, delta: Delta) -> bool:
    """Return true if the delta of a layer is no product of two small matrices."""
    grouped = isinstance(layer, _ConvNd) and layer.groups > 1
    across_inputs = delta.magnitude is not None and delta.magnitude.shape[0] != layer.weight.shape[0]
    return delta.diff is not None or grouped or across_inputs


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Apply the layer with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight.flatten(1))
    y: Tensor = layer._conv_forward(x, weight, None)
    return y


def _gathered(layer: Layer, y: Tensor) -> Tensor:
    """Move the channels to the end."""
    return y if isinstance(layer, nn.Linear) else y.movedim(-layer.weight.ndim + 1, -1)


def _spread(layer: Layer, y: Tensor) -> Tensor:
    """Move the channels back to where the layer has them."""
    return y if isinstance(layer, nn.Linear) else y.movedim(-1, -layer.weight.ndim + 1)


# ------------------------------------------------------------------------------------------------------- a module

Setting = tuple[tuple[WeightedAdapter, ...], Mode]
Change = Callable[..., Tensor]  # (base, out=None) -> merged
Offload = Callable[[Mapping[str, Change]], None]  # takes the changes of weights that come and go


class LoraLayers:
    """The adapters of one module. Merging starts from the base, happens in float32 and is rounded once.

    The base of every changed weight stays in host memory, so that taking adapters away restores it bit for bit. Where
    the module itself lies there, base and merged weights take each other's place in the parameters and nothing is
    copied; the merged weights of the last few settings are kept, in `keep_bytes`, which the active one may exceed.
    On a GPU, weights are written in place. Of an offloaded module, `offload` takes what is to happen to each weight
    when it comes. Fitting and applying read tensors: they belong where computing happens, not on an event loop.
    """

    def __init__(
        self,
        module: nn.Module,
        original: Renames = (),
        component: str = "transformer",
        keep_bytes: int = 0,
        offload: Offload | None = None,
    ):
        self.module = module
        self._original, self._component, self._keep_bytes, self._offload = original, component, keep_bytes, offload
        self._base: dict[str, Tensor] = {}
        self._merged: OrderedDict[Setting, dict[str, Tensor]] = OrderedDict()  # the active one is the last
        self._changed: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self._fitted: WeakKeyDictionary[Adapter, dict[tuple[bool, float | None], Fitted]] = WeakKeyDictionary()
        self.active: tuple[WeightedAdapter, ...] = ()
        self.mode: Mode = "merge"  # of the active ones: `merge` or `dynamic`

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of merged weights, the active ones included."""
        return sum(tensor.nbytes for tensors in self._merged.values() for tensor in tensors.values())

    def fit(self, adapter: Adapter, *, strict: bool = True, alpha: float | None = None) -> Fitted:
        """Fit an adapter to this module. Nothing changes. Raises `BadRequest` as `lora_formats.fit` does."""
        known, key = self._fitted.setdefault(adapter, {}), (strict, alpha)
        if key not in known:
            shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
            known[key] = fit(adapter, shapes, self._original, self._component, strict=strict, alpha=alpha)
        return known[key]

    @torch.no_grad()
    def apply(self, uses: Sequence[WeightedAdapter], mode: Mode = "auto") -> None:
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
            rest = self._hook(layers) if mode == "dynamic" else layers
            self._hold((wanted, mode), rest)
        except BaseException:
            self.clear()
            raise
        self.active, self.mode = wanted, mode

    @torch.no_grad()
    def clear(self) -> None:
        """Take all adapters away: every weight is what it was, bit for bit."""
        self._unhook()
        self._hold(((), "merge"), {})
        self.active = ()

    def release(self) -> None:
        """Give up the merged weights of settings that are not active, and the bases of weights that are untouched."""
        self._merged = OrderedDict(item for item in self._merged.items() if item[0] == (self.active, self.mode))
        self._base = {name: base for name, base in self._base.items() if name in self._changed}

    def _choose(self, layers: Mapping[str, list[Part]], mode: Mode) -> Mode:
        deltas = [part.delta for parts in layers.values() for part in parts]
        odd = [d for d in deltas if self.module.get_parameter(d.weight).dtype not in MERGEABLE]
        if not odd:
            return "merge" if mode == "auto" else mode
        dtype = str(self.module.get_parameter(odd[0].weight).dtype).removeprefix("torch.")
        if mode == "merge":
            raise NotBuilt(f"weights of type {dtype} cannot be merged; use dynamic", field="merge_mode")
        if any(delta.magnitude is not None for delta in odd):
            raise NotBuilt(f"lora_path: DoRA on weights of type {dtype} is not built yet in this version of sgld")
        return "dynamic"

    def _hold(self, setting: Setting, layers: Mapping[str, list[Part]]) -> None:
        """Let these changes hold, and put the base wherever there is none."""
        changes = _changes(layers)
        if self._offload is not None:
            self._offload(changes)
            return
        merged = self._merged.pop(setting, None) or self._merge(changes)
        if merged and all(tensor.device.type == "cpu" for tensor in merged.values()):
            self._merged[setting] = merged
        for name, tensor in merged.items():
            self._put(name, tensor)
        self._restore(self._changed - merged.keys())

    def _merge(self, changes: Mapping[str, Change]) -> dict[str, Tensor]:
        spare = self._make_room(sum(self.module.get_parameter(name).nbytes for name in changes))
        merged = {name: self._blank(name, spare) for name in changes}
        for name, change in changes.items():
            change(self._base[name], out=merged[name])
        return merged

    def _make_room(self, nbytes: int) -> dict[str, Tensor]:
        """Drop what was used least recently until so much more may be kept; answers with the tensors, for new use."""
        spare: dict[str, Tensor] = {}
        while self._merged and self.kept_bytes + nbytes > self._keep_bytes:
            spare |= self._merged.popitem(last=False)[1]
        return spare

    def _blank(self, name: str, spare: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor for the merged parameter, and keep its base from now on."""
        parameter = self.module.get_parameter(name)
        on_cpu = parameter.device.type == "cpu"
        if name not in self._base:
            self._base[name] = parameter.data if on_cpu else parameter.to("cpu", copy=True).pin_memory()
        if on_cpu:
            return spare[name] if name in spare else torch.empty(parameter.shape, dtype=parameter.dtype)
        self._changed.add(name)
        return parameter.data

    def _put(self, name: str, tensor: Tensor) -> None:
        """Replace the parameter's storage, or write into it where that is on another device."""
        parameter = self.module.get_parameter(name)
        if tensor.device == parameter.device:
            parameter.data = tensor
        else:
            parameter.copy_(tensor)
        self._changed.add(name)

    def _restore(self, names: set[str]) -> None:
        for name in list(names):
            self._put(name, self._base[name])
            self._changed.discard(name)

    def _hook(self, layers: Mapping[str, list[Part]]) -> dict[str, list[Part]]:
        """Compute beside linear layers and convolutions; answers with the layers that are neither.

        The bases come back first: DoRA's factors are against them.
        """
        self._restore(self._changed)
        rest = {}
        for name, parts in layers.items():
            layer = self.module.get_submodule(name) if parts[0].delta.weight != name else None
            weighed = any(part.delta.magnitude is not None for part in parts)
            if isinstance(layer, Layer) and not (weighed and self._offload):
                self._hooks.append(layer.register_forward_hook(DynamicLora(layer, parts)))
            else:
                rest[name] = parts
        return rest

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _changes(layers: Mapping[str, list[Part]]) -> dict[str, Change]:
    """Return the change of each parameter, from base to merged."""
    changes: dict[str, Change] = {}
    for parts in layers.values():
        delta = parts[0].delta
        if any(part.delta.changes_weight for part in parts):
            changes[delta.weight] = partial(merged_weight, parts=parts)
        if delta.bias is not None and any(part.delta.changes_bias for part in parts):
            changes[delta.bias] = partial(merged_bias, parts=parts)
    return changes


def _by_layer(uses: Sequence[WeightedAdapter]) -> dict[str, list[Part]]:
    layers: dict[str, list[Part]] = {}
    for use in uses:
        for name, delta in use.adapter.layers.items():
            layers.setdefault(name, []).append(Part(delta, use.strength))
    return layers


# --------------------------------------------------------------------------------------------------------- cache


class AdapterCache:
    """Adapters in host memory, the least recently used dropped first.

    An adapter at work keeps its tensors until it is replaced, whatever the limit.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._adapters: OrderedDict[Path, tuple[Stamp, Adapter]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the cached adapters."""
        return sum(adapter.nbytes for _, adapter in self._adapters.values())

    def read(self, path: Path) -> Adapter:
        """Read the adapter of a file or folder, unless an unchanged copy is cached. Blocks.

        Raises:
            BadRequest: as `read_adapter` does.
        """
        stamp = _stamp(path)
        held = self._adapters.pop(path, None)
        adapter = held[1] if held and held[0] == stamp else read_adapter(path)
        if adapter.nbytes <= self._limit_bytes:
            self._adapters[path] = stamp, adapter
        while self.nbytes > self._limit_bytes:
            self._adapters.popitem(last=False)
        return adapter


Stamp = tuple[Path, tuple[tuple[int, int], ...]]  # the file, and (mtime in ns, size) of it and of its config


def _stamp(path: Path) -> Stamp:
    """Identify the version of a file. Raises `BadRequest` when there is no such file."""
    file = find_file(path)
    states = [entry.stat() for entry in (file, config_file(path, file)) if entry is not None]
    return file, tuple((state.st_mtime_ns, state.st_size) for state in states)
