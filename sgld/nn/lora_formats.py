"""LoRA adapters in files: reading every spelling of their keys, and fitting them to the layers of a model.

A key is `[prefix.]layer.part`. Prefixes say who wrote it, parts what it is; `_KEY` lists the parts. The layer is looked
up, never guessed: a model's own names, and its authors' original names, each dotted or (kohya) underscored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.nn.lora_files import bad_file, config_file, find_file, listed_names
from sgld.nn.weights import read_json

Shapes = Mapping[str, tuple[int, ...]]  # parameter -> shape
Renames = Sequence[tuple[str, str]]  # (pattern in our layer name, replacement), applied in order; see `Rows`

_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<pair>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|down|up|lora_magnitude_vector)"
    r"(?:\.(?P<slot>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
    r"|(?P<other>alpha|dora_scale|diff|diff_b|diff_m))"
)
_PARTS = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "up": "up", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_PREFIXES = (
    "base_model.model.", "peft_model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "transformer_2.",
    "lora_unet_", "lora_transformer_",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initializations that also rewrite the model's weights


# ------------------------------------------------------------------------------------------------------ reading


@attrs.frozen
class AlphaRules:
    """What holds for layers without an alpha of their own: PEFT's lora_alpha, alpha_pattern and use_rslora."""

    alpha: float | None = None
    pattern: Mapping[str, float] = attrs.field(factory=dict)
    rank_stabilized: bool = False

    def scale(self, layer: str, rank: int, own: float | None, override: float | None) -> float:
        """Return alpha / rank, or alpha / sqrt(rank). Alpha is the layer's, `override`, the rules' or the rank."""
        matching = (alpha for key, alpha in self.pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
        alphas = (own, override, next(matching, None), self.alpha)
        alpha = next((alpha for alpha in alphas if alpha is not None), None)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@attrs.frozen(eq=False)
class Stored:
    """A tensor of the file, as stored, in host memory, under the file's key."""

    key: str
    tensor: Tensor


@attrs.frozen(eq=False)
class Adapter:
    """A file's tensors by component (`transformer`, `transformer_2`), layer as spelled there, and part."""

    file: Path
    layers: Mapping[str, Mapping[str, Mapping[str, Stored]]]
    unknown: tuple[str, ...]  # keys that are no part of any known kind
    rules: AlphaRules

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors in host memory."""
        stored = (parts.values() for layers in self.layers.values() for parts in layers.values())
        return sum(s.tensor.nbytes for parts in stored for s in parts)

    def has(self, component: str) -> bool:
        """Return true if it has layers for a transformer. An adapter that names no `transformer_2` fits any."""
        return component in self.layers or "transformer_2" not in self.layers

    def part(self, component: str) -> Mapping[str, Mapping[str, Stored]]:
        """Return the layers for a transformer."""
        if "transformer_2" in self.layers:
            return self.layers.get(component, {})
        return self.layers.get("transformer", {})


def read_adapter(path: Path) -> Adapter:
    """Read the adapter in a safetensors file, or in a folder with one such file.

    Raises:
        BadRequest: no such file, several to choose from, a pickle, a corrupt file, or one without any LoRA key.
        NotBuilt: a PEFT adapter of another kind than LoRA.
    """
    file = find_file(path)
    tensors, metadata = _read(file)
    rules = _rules(file, config_file(path, file), metadata)
    return _sort(file, tensors, rules)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata. The tensors are copies, because the file may change."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - not a dict
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise bad_file(file, f"is corrupt or truncated: {error}") from None


def _sort(file: Path, tensors: Mapping[str, Tensor], rules: AlphaRules) -> Adapter:
    layers: dict[str, dict[str, dict[str, Stored]]] = {}
    unknown, slots = [], set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        part = _part(match) if match else None
        if match is None or part is None:
            unknown.append(key)
            continue
        slots.add(match["slot"])
        component, layer = _unprefixed(match["layer"])
        if match["other"] == "diff_m":
            layer, part = f"{layer}.modulation", "diff"
        parts = layers.setdefault(component, {}).setdefault(layer, {})
        if part in parts:
            raise bad_file(file, f"both {parts[part].key!r} and {key!r} are the {part} of one layer")
        if part == "alpha" and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            tensor = tensor.float()  # as kohya's tools write it
        if not _is_finite(tensor):
            raise bad_file(file, f"{key!r} holds values that are no finite floating-point numbers")
        parts[part] = Stored(key, tensor)
    if len(slots - {None}) > 1:
        raise bad_file(file, f"holds several adapters: {listed_names(sorted(slots - {None}))}; save them one by one")
    if not layers:
        raise bad_file(file, f"holds no LoRA key; it has {listed_names(unknown) or 'none at all'}")
    return Adapter(file, layers, tuple(unknown), rules)


def _is_finite(tensor: Tensor) -> bool:
    """Return true for floating-point numbers without NaN and infinity."""
    ends = tensor.float().aminmax() if tensor.numel() else ()
    return tensor.is_floating_point() and all(end.isfinite() for end in ends)


def _part(match: re.Match[str]) -> str | None:
    if match["pair"] is None:
        return match["other"]
    part = _PARTS[match["pair"]]
    if match["leaf"] == "bias":
        return "up_bias" if part == "up" else None
    return part


def _unprefixed(layer: str) -> tuple[str, str]:
    """Split a name into component and layer. Without a component it is the first transformer's."""
    component = "transformer"
    while prefix := next((p for p in _PREFIXES if layer.startswith(p) and layer != p), None):
        layer = layer.removeprefix(prefix)
        component = "transformer_2" if prefix == "transformer_2." else component
    return component, layer


def _rules(file: Path, config_file: Path | None, metadata: Mapping[str, str]) -> AlphaRules:
    """Read the rules from adapter_config.json, diffusers' copy in the metadata, or plain metadata."""
    config = _config(file, metadata)
    if config_file is not None:
        try:
            config = read_json(config_file)
        except ModelError as error:
            raise BadRequest(f"{error}", field="lora_path") from None
    _check_kind(file, config)
    named = {name: metadata[name] for name in ("lora_alpha", "network_alpha", "alpha") if name in metadata}
    if config.get("lora_alpha") is not None:
        named["adapter config's lora_alpha"] = config["lora_alpha"]
    alphas = {name: _number(file, name, value) for name, value in named.items()}
    if len(set(alphas.values())) > 1:
        raise bad_file(file, f"says two alphas: {', '.join(f'{name} {value}' for name, value in alphas.items())}")
    pattern = {key: _number(file, "alpha_pattern", value) for key, value in (config.get("alpha_pattern") or {}).items()}
    for key in pattern:
        _check_pattern(file, key)
    return AlphaRules(next(iter(alphas.values()), None), pattern, bool(config.get("use_rslora")))


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the PEFT config that diffusers stores, for one transformer or with its name before each key."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise bad_file(file, f"has metadata that is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise bad_file(file, "has a lora_adapter_metadata that is no JSON object")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        component, _, name = key.rpartition(".")
        parts.setdefault(component, {})[name] = value
    if len({json.dumps(_alpha_keys(part), sort_keys=True) for part in parts.values()}) > 1:
        raise NotBuilt(
            f"{file.name!r} has other alphas for each transformer; save each in a file of its own",
            field="lora_path",
        )
    return next(iter(parts.values()), {})


def _alpha_keys(config: Mapping[str, object]) -> dict[str, Any]:
    return {name: config.get(name) for name in ("lora_alpha", "alpha_pattern", "use_rslora", "peft_type")}


def _check_kind(file: Path, config: Mapping[str, object]) -> None:
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise NotBuilt(f"{file.name!r} is a {kind} adapter; only LoRA and DoRA are built", field="lora_path")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reason = f"was started with {start!r}, which changes the model's own weights; convert it to a plain LoRA"
        raise NotBuilt(f"{file.name!r} {reason}", field="lora_path")


def _check_pattern(file: Path, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise bad_file(file, f"has an alpha_pattern {pattern!r} that is no regular expression: {error}") from None


def _number(file: Path, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise bad_file(file, f"has {name} {value!r}; a finite number is needed")
    return number


# ------------------------------------------------------------------------------------------------------ fitting


@attrs.frozen(eq=False)
class Delta:
    """What an adapter adds to one layer at strength 1; tensors as stored.

    The weight's part is scale * up @ down + diff; with a `magnitude` (DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353) it is what turns W into magnitude * (W + part) / ||W + part||.
    """

    weight: str  # parameter
    bias: str | None  # parameter
    scale: float = 1.0
    down: Tensor | None = None  # [r, in, ...]
    up: Tensor | None = None  # [out, r, ...]
    diff: Tensor | None = None  # as the weight
    magnitude: Tensor | None = None  # [out, 1, ...], or [1, in, ...]
    up_bias: Tensor | None = None  # [out], times scale
    diff_b: Tensor | None = None  # [out]

    @property
    def changes_weight(self) -> bool:
        """Return true if it changes the weight."""
        return any(part is not None for part in (self.down, self.diff, self.magnitude))

    @property
    def changes_bias(self) -> bool:
        """Return true if it changes the bias."""
        return self.up_bias is not None or self.diff_b is not None


@attrs.frozen(eq=False)
class Fitted:
    """An adapter in terms of one model."""

    layers: Mapping[str, Delta]  # by the model's own layer names
    skipped: tuple[str, ...]  # `key (reason)`; empty where the fit was strict


class Misfit(Exception):
    """Why one layer of a file does not fit."""


def fit(
    adapter: Adapter,
    shapes: Shapes,
    original: Renames = (),
    component: str = "transformer",
    *,
    strict: bool = True,
    alpha: float | None = None,
) -> Fitted:
    """Fit the adapter's layers to `component`, a model with parameters of these shapes.

    `alpha` holds for layers without one of their own. Without `strict`, layers that do not fit are left out.

    Raises:
        BadRequest: any key matches no layer, or has no partner, or does not fit its shape; or none is left.
    """
    spelled = adapter.part(component)
    names = _vocabulary(list(spelled), shapes, original)
    faults = [f"{key} (no LoRA key that is known)" for key in adapter.unknown]
    layers: dict[str, Delta] = {}
    for name, parts in spelled.items():
        try:
            own = names.get(name)
            if own is None:
                raise Misfit("no such layer")
            layers |= {
                layer: _delta(layer, rows.of(parts), shapes, adapter.rules, name, alpha) for layer, rows in own.items()
            }
        except Misfit as reason:
            faults += [f"{stored.key} ({reason})" for stored in parts.values()]
    if faults and (strict or not layers):
        share = f"{len(faults)} of {sum(map(len, spelled.values())) + len(adapter.unknown)} keys"
        raise bad_file(adapter.file, f"does not fit the model's {component}: {share}: {listed_names(faults)}")
    if not layers:
        raise bad_file(adapter.file, f"holds nothing for the model's {component}")
    return Fitted(layers, tuple(faults))


@attrs.frozen
class Rows:
    """Which outputs of a layer of the file belong to a layer of ours.

    Several of our layers may be one in the file: they are renamed to its name and `#0`, `#1`, ..., in the order of its
    rows. A layer whose rows stand in another order is renamed to the name and its pieces, all of one size: `#1#0` has
    the halves swapped. A layer that has several names in such files is renamed to all of them, with `|` between.
    """

    pieces: tuple[slice, ...] = ()  # none: all of them
    total: int = 0

    def of(self, parts: Mapping[str, Stored]) -> Mapping[str, Stored]:
        """Cut the parts to some outputs of the layer. Raises `Misfit`."""
        if not self.pieces:
            return parts
        return {name: part if name in _SHARED else self._cut(name, part) for name, part in parts.items()}

    def _cut(self, name: str, part: Stored) -> Stored:
        x = part.tensor
        if x.ndim == 0 or len(x) != self.total:
            raise Misfit(f"{name} {list(x.shape)}; {self.total} rows are needed")
        return Stored(part.key, torch.cat([x[rows] for rows in self.pieces]) if self.pieces[1:] else x[self.pieces[0]])


_SHARED = ("down", "alpha")
Names = Mapping[str, Mapping[str, Rows]]  # spelling -> layers of ours


def _vocabulary(spelled: Iterable[str], shapes: Shapes, original: Renames) -> Names:
    """Return the names in the spelling that knows most of them."""
    layers = {
        name.removesuffix(".weight"): shape[0] if shape else 1
        for name, shape in shapes.items()
        if not name.endswith(".bias")
    }
    own = {layer: {layer: Rows()} for layer in layers}
    authors = _authors(layers, original)
    ways = [own, authors, _underscored(own), _underscored(authors)]
    return max(ways, key=lambda way: sum(name in way for name in spelled))


def _authors(layers: Mapping[str, int], renames: Renames) -> Names:
    """Return the authors' names, from our layers' names and sizes."""
    found: dict[str, dict[str, list[int]]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for layer, size in layers.items():
        for spelled in _renamed(layer, renames).split("|"):
            name, *marks = spelled.split("#")
            found.setdefault(name, {})[layer] = pieces = [int(mark) for mark in marks]
            sizes.setdefault(name, {}).update((piece, size // len(pieces)) for piece in pieces)
    return {name: {layer: _rows(p, sizes[name]) for layer, p in own.items()} for name, own in found.items()}


def _rows(pieces: Sequence[int], sizes: Mapping[int, int]) -> Rows:
    """Return the rows of some pieces of a fused layer, from the sizes of all pieces."""
    starts = {piece: sum(size for i, size in sizes.items() if i < piece) for piece in pieces}
    return Rows(tuple(slice(start, start + sizes[i]) for i, start in starts.items()), sum(sizes.values()))


def _renamed(layer: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        layer = re.sub(pattern, replacement, layer)
    return layer


def _underscored(names: Names) -> Names:
    """Spell names with `_` for every dot. Leave out names that several layers would share."""
    spelled: dict[str, list[Mapping[str, Rows]]] = {}
    for name, layers in names.items():
        spelled.setdefault(name.replace(".", "_"), []).append(layers)
    return {name: same[0] for name, same in spelled.items() if all(layers == same[0] for layers in same)}


def _delta(
    layer: str, parts: Mapping[str, Stored], shapes: Shapes, rules: AlphaRules, spelled: str, alpha: float | None
) -> Delta:
    """Check the parts of one layer, and return its delta. Raises `Misfit`."""
    weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
    bias = f"{layer}.bias" if f"{layer}.bias" in shapes else None
    shape, stored = shapes[weight], {name: part.tensor for name, part in parts.items()}
    down, up, diff = stored.get("down"), stored.get("up"), stored.get("diff")
    if (down is None) != (up is None):
        raise Misfit(f"has lora_{'B without A' if down is None else 'A without B'}")
    scale = 1.0
    if down is not None and up is not None:
        rank = _rank(down, up, shape)
        scale = rules.scale(spelled, rank, _alpha(stored.get("alpha")), alpha)
    elif diff is None and "diff_b" not in stored:
        raise Misfit(f"only {listed_names(list(parts))}, no weights")
    elif "up_bias" in stored:
        raise Misfit("has a bias of lora_B without lora_B")
    if diff is not None and tuple(diff.shape) != shape:
        raise Misfit(f"diff {list(diff.shape)}; the layer has {list(shape)}")
    for name in ("up_bias", "diff_b"):
        _check_bias(name, stored.get(name), shapes[bias] if bias else None)
    return Delta(
        weight, bias, scale, down, up, diff, _magnitude(stored, shape), stored.get("up_bias"), stored.get("diff_b")
    )


def _rank(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> int:
    """Return the rank of a pair that fits the weight. Raises `Misfit`."""
    pair = f"A {list(down.shape)} and B {list(up.shape)}"
    if len(shape) < 2 or min(down.ndim, up.ndim) < 2:
        raise Misfit(f"{pair}; the layer has {list(shape)}")
    if down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise Misfit(f"{pair} have no common rank")
    inner, outer = tuple(down.shape[1:]), tuple(up.shape)
    trailing = (1,) * (down.ndim - len(shape))  # a linear layer's pair may be written as a 1 x 1 convolution's
    if inner != shape[1:] + trailing or outer[0] != shape[0] or set(outer[2:]) - {1}:
        raise Misfit(f"{pair}; the layer has {list(shape)}")
    return down.shape[0]


def _alpha(stored: Tensor | None) -> float | None:
    if stored is None:
        return None
    if stored.numel() != 1:
        raise Misfit(f"alpha {list(stored.shape)}; one number is needed")
    return float(stored)


def _check_bias(name: str, given: Tensor | None, shape: tuple[int, ...] | None) -> None:
    if given is not None and tuple(given.shape) != shape:
        raise Misfit(f"{name} {list(given.shape)}; the layer has {'no bias' if shape is None else list(shape)}")


def _magnitude(stored: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Shape DoRA's magnitude [out, 1, ...] from PEFT's vector. kohya's `dora_scale` may also be [1, in, ...]."""
    vector, scale = stored.get("magnitude"), stored.get("dora_scale")
    if vector is None and scale is None:
        return None
    if vector is not None and scale is not None:
        raise Misfit("has two DoRA magnitudes")
    given = scale if vector is None else vector
    assert given is not None
    ones = (1,) * (len(shape) - 1)
    if vector is None and len(shape) > 1 and shape[1] > 1 and tuple(given.shape) == (1, shape[1], *ones[1:]):
        return given
    if given.numel() != shape[0]:
        raise Misfit(f"DoRA magnitude {list(given.shape)}; the layer has {list(shape)}")
    return given.reshape(shape[0], *ones)
