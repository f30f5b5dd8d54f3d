"""Where values come from: config file < environment < command line, merged as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import yaml
from yaml.constructor import ConstructorError

from sgld import config
from sgld.convert import Values, fields_of, knob_of, once
from sgld.errors import BadRequest, SgldError, UnknownField, nearest
from sgld.settings import COMPONENTS

MAP_SUFFIXES = (".json", ".yaml", ".yml")
DOTTED = ("vae_config", "component_paths", "component_attention_backends")
_SPARE = {"output_file_name": "output_file_path"}  # which gives the name too
_WRAPPERS = ("pipeline_config",)  # the replaced system nests vae_config in it


@attrs.frozen
class Layer:
    """Values from one place, or from several laid over each other, and how each was written there."""

    values: Values
    spelled: dict[str, str]  # knob -> `--num-gpus`, `config.yaml: num_gpus` or `SGLANG_S3_BUCKET_NAME`

    def spell(self, name: str) -> str:
        """Return the user's spelling of a knob, of an entry's map, or of a map's first entry."""
        if name not in self.spelled and _SPARE.get(name) in self.spelled:
            name = _SPARE[name]
        head, dot, rest = name.partition(".")
        entries = [spelled for other, spelled in self.spelled.items() if other.startswith(f"{name}.")]
        return self.spelled.get(name) or [*entries, self.spelled.get(head, head) + dot + rest][0]

    def is_flag(self, name: str) -> bool:
        """Check that the command line set a knob."""
        return self.spelled.get(name, "").startswith("--")

    @contextmanager
    def spelling(self) -> Iterator[None]:
        """Respell the knob in errors raised inside as the user wrote it."""
        try:
            yield
        except SgldError as error:
            raise self._respelled(error) from error

    def _respelled(self, error: SgldError) -> SgldError:
        if isinstance(error, UnknownField) and error.field is None and error.param is not None:
            return error.renamed(self.spell(error.param), f"unknown key{error.hint}")
        return error if error.field is None else error.renamed(self.spell(error.field))


def gather(file: str | None, typed: Layer) -> Layer:
    """Merge config file < environment < command line."""
    return stack(*([read_file(file)] if file is not None else []), read_environment(), typed)


def stack(*layers: Layer) -> Layer:
    """Lay layers over each other; later ones win."""
    given = (name for layer in layers for name in layer.spelled.items())
    return Layer(merge(*(layer.values for layer in layers)), dict(given))


def normalize(values: Mapping[str, object], where: str) -> Layer:
    """Rename keys to the knobs' names: resolve dashes, aliases, dotted and component keys; drop null.

    Raises:
        UnknownField: naming the key, its place and the nearest known one.
        BadRequest: two keys for one knob.
    """
    merged = Layer({}, {})
    spelled: dict[str, str] = {}  # knob -> key
    for key, value in values.items():
        name = key.replace("-", "_")
        if value is None and name in config.known_names():
            continue
        if name in _WRAPPERS and isinstance(value, Mapping):
            merged = stack(merged, normalize(value, where))
            continue
        placed, name = _placed(name, value, key, where)
        if name in merged.spelled and name not in DOTTED:
            raise BadRequest(f"{where}: {key!r} and {spelled[name]!r} both set {name}; give one of them", name)
        spelled[name] = key
        merged = stack(merged, Layer(placed, {name: f"{where}: {key}"}))
    return merged


def _placed(name: str, value: object, key: str, where: str) -> tuple[Values, str]:
    """Place one value; return it with its dotted name."""
    head, _, rest = name.partition(".")
    if rest and head in _WRAPPERS:
        return _placed(rest, value, key, where)
    if rest and head in DOTTED:
        return {head: {rest: value}}, name
    component = name.removesuffix("_path")
    if component in COMPONENTS and component != name:
        return {"component_paths": {component: value}}, f"component_paths.{component}"
    name = config.ALIASES.get(name, name)
    if name not in config.SECTION_OF:
        raise UnknownField(f"{where}: unknown key {key!r}{nearest(key.replace('-', '_'), config.known_names())}", key)
    if name in DOTTED and isinstance(value, Mapping):
        value = {str(inner).replace("-", "_"): item for inner, item in value.items() if item is not None}
    return {name: value}, name


def merge(*layers: Mapping[str, object]) -> Values:
    """Merge layers: later ones win, null never does, and maps of knobs are merged key by key."""
    merged: Values = {}
    for layer in layers:
        for name, value in layer.items():
            if value is None:
                continue
            old = merged.get(name)
            if name in DOTTED and isinstance(old, Mapping) and isinstance(value, Mapping):
                value = merge(old, value)
            merged[name] = value
    return merged


def read_file(path: str) -> Layer:
    """Read a JSON or YAML config file and normalize its keys."""
    values = read_map(path, "--config")
    return normalize(values, path)


def read_map(path: str, param: str) -> Values:
    """Read the map of names to values in a .json, .yaml or .yml file."""
    file = config.user_path(path, param)
    if file.suffix.lower() not in MAP_SUFFIXES:
        raise BadRequest(f"{path!r} must end in {' or '.join(MAP_SUFFIXES)}", field=param)
    try:
        text = file.read_text(encoding="utf-8-sig")
        json_file = file.suffix.lower() == ".json"
        values = json.loads(text, object_pairs_hook=once) if json_file else yaml.load(text, _Yaml)
    except OSError as error:
        raise BadRequest(f"{path!r} cannot be read: {error.strerror}", field=param) from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = file.suffix[1:].lower()
        raise BadRequest(f"{path!r} is not valid {kind}: {_one_line(error)}", field=param) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BadRequest(f"{path!r} must hold a map of names to values", field=param)
    return values


class _Yaml(yaml.SafeLoader):
    """YAML in which no key stands twice in a map."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_environment() -> Layer:
    """Read the knobs that environment variables set."""
    fields = {name: field for cls in config.SECTIONS for name, field in fields_of(cls).items()}
    variables = {name: env for name, field in fields.items() if (env := knob_of(field).env)}
    found = config.environment(*variables.values())
    spelled = {name: variable for name, variable in variables.items() if found.get(variable)}
    return Layer({n: config.from_text(found[v], fields[n].type) for n, v in spelled.items()}, spelled)
