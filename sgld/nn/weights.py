"""Load weights strictly: every tensor of a module, no other, in the right shape; and read config.json files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import attrs
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sgld.convert import fields_of, shorten, type_name
from sgld.errors import ModelError, nearest
from sgld.nn.blocks import set_compute_dtype
from sgld.nn.formats import SAFETENSORS, WHOLE, Share, Source, WeightFormat

M = TypeVar("M", bound=nn.Module)
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INERT = {"dropout", "in_channels", "clip_output"}  # keys of diffusers' components that change no output


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the model.

    Raises:
        ModelError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return value


def pick(config: dict[str, Any], cls: type[Any], file: Path) -> Any:
    """Build an attrs class from a component's config.json. null means the default.

    A configuration of transformers, which has a `model_type`, may hold keys of any task: those are passed over.

    Raises:
        ModelError: a key without a default is absent, has another type, or says what this class does not know.
    """
    fields = fields_of(cls)
    given = {name: value for name, value in config.items() if value is not None}
    lacking = [name for name, field in fields.items() if field.default is attrs.NOTHING and name not in given]
    if lacking:
        raise ModelError(f"{file}: has no {', '.join(lacking)}")
    unknown = [name for name in given if name not in fields and name not in INERT and not name.startswith("_")]
    if unknown and "model_type" not in config:
        raise ModelError(
            f"{file}: {unknown[0]}: {shorten(given[unknown[0]])} is not supported{nearest(unknown[0], fields)}"
        )
    values = {name: given[name] for name in fields if name in given}
    for name, value in values.items():
        _check_type(f"{file}: {name}", value, fields[name].type)
    return cls(**values)


def require(config: Mapping[str, object], file: Path, needed: Mapping[str, object]) -> None:
    """Raise `ModelError` where a component's config.json says something else; what it does not say is as needed."""
    for key, value in needed.items():
        if (given := config.get(key, value)) != value:
            raise ModelError(f"{file}: {key} is {given!r}; only {value!r} is supported")


class Architecture:
    """The numbers of a transformer's config.json; families subclass it with attrs."""

    supported: ClassVar[Mapping[str, object]] = {}  # the only value of a key that the code can follow; needs no field

    @property
    def num_attention_heads(self) -> int:
        """Return the heads of a block."""
        raise NotImplementedError

    @property
    def attention_head_dim(self) -> int:
        """Return the channels of a head."""
        raise NotImplementedError

    def fault(self) -> str | None:
        """Return the reason why numbers that are valid one by one cannot be used together."""
        return None


C = TypeVar("C", bound=Architecture)


def read_architecture(file: Path, cls: type[C]) -> C:
    """Read a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    given = read_json(file)
    require(given, file, cls.supported)
    numbers = fields_of(cls)
    config: C = pick({k: value for k, value in given.items() if k in numbers or k not in cls.supported}, cls, file)
    if (fault := config.fault()) is not None:
        raise ModelError(f"{file}: {fault}")
    return config


def _check_type(where: str, value: object, kind: Any) -> None:
    if not _fits(value, kind):
        raise ModelError(f"{where}: {shorten(value)} is not {'' if kind is bool else 'a valid '}{type_name(kind)}")


def _fits(value: object, kind: Any) -> bool:
    """Check the type of a value of a JSON file."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a component: one file, or the shards of an index."""
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ModelError(f"{index}: has no weight_map")
            for name, shard in shards.items():
                _check_type(f"{index}: weight_map: {name}", shard, str)
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(f"{folder}: no weights; expected {' or '.join(NAMES)}, or one's .index.json")


class Uninitialized(TorchFunctionMode):
    """Modules built under it draw no initial weights (on the meta device that would import torch's compiler)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":  # a slot of a C type has no module
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


Keeper = Callable[[nn.Module, Source], None]  # takes a module, and where its weights are


def load_module(
    build: Callable[[], M],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    tied: Mapping[str, str] | None = None,
    unused: Iterable[str] = (),
    offload: Keeper | None = None,
    share: Share = WHOLE,
    precise: Iterable[str] = (),
    weight_format: WeightFormat = SAFETENSORS,
) -> M:
    """Build a module and fill it with the weights of `folder`, ready for inference.

    `tied` names a tensor that may stand in the file under another name or twice. Tensors of the file whose names begin
    with one of `unused`, which may hold wildcards, are passed over. With `offload` only headers are read: the module
    goes there on the meta device, to be filled later. `build` makes a module of the size that `share` leaves of each
    tensor. Tensors that one of `precise` is part of the name of, between dots, are float32 whatever `dtype` is.

    Raises:
        ModelError: a file that is corrupt, or lacks tensors, or has more, or has other shapes.
    """
    with torch.device("meta"), Uninitialized():
        module = build()
        weight_format.prepare(module)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    files = weight_files(folder)
    found = {
        (tied or {}).get(header.key, header.key): header
        for header in weight_format.headers(files)
        if not any(fnmatchcase(header.key, f"{prefix}*") for prefix in unused)
    }
    where = files[0] if len(files) == 1 else folder
    _check(where, wanted, {name: share.shape(name, header.shape) for name, header in found.items()})
    stored = weight_format.source(found, dtype, device, share, frozenset(precise))
    set_compute_dtype(module, stored.kind)
    module.eval().requires_grad_(False)
    if offload is None:
        module.load_state_dict(dict(stored.read(wanted)), assign=True)
    else:
        offload(module, stored)
    return module


def _check(where: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    faults = [
        listed("missing", [name for name in wanted if name not in found]),
        listed("unexpected", [name for name in found if name not in wanted]),
        listed("of the wrong shape", wrong),
    ]
    if any(faults):
        raise ModelError(f"{where}: {'; '.join(filter(None, faults))}")


def listed(what: str, names: list[str]) -> str:
    """Write `5 tensors missing: a, b, c, ...`, or nothing."""
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s'[: len(names) > 1]} {what}: {shown}"
