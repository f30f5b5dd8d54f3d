"""Knobs, and the one strict converter that turns plain dicts into them.

A knob is an attrs field made by `knob(...)`. Its metadata carries the help text, the allowed values and the
feature it waits for; flags, config keys, request fields and documents are all derived from it.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, TypeAlias, TypeVar, Union

import attrs
from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError
from cattrs.errors import AttributeValidationNote, ClassValidationError
from cattrs.gen import make_dict_structure_fn

from sgld.errors import BadRequest, NotBuilt, SgldError, UnknownField, nearest

T = TypeVar("T")
Field: TypeAlias = "attrs.Attribute[Any]"
Values: TypeAlias = dict[str, Any]  # plain values by name, from the wire or a file
Kind: TypeAlias = object  # a class, or a form such as `list[int] | None`
Hook: TypeAlias = Callable[[object, Kind], object]
MAX_CHARACTERS = 32768
MAX_ENTRIES = 1000
"""Limits of a text, and of a list or map, that a knob takes. The event loop walks all of it."""
_VALUE_CHARACTERS = 120
MAP = "map of names to values"


@attrs.frozen
class Knob:
    """Metadata of a knob: all but its name, type and default."""

    help: str
    group: str = ""
    choices: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    above: float | None = None
    aliases: tuple[str, ...] = ()
    env: str | None = None
    pending: str | None = None  # the feature this knob waits for
    built: tuple[object, ...] = ()  # of a pending knob: the values that work today, beside the default
    per_model: bool = False  # absent means: the model's own value
    serve_only: bool = False
    secret: bool = False
    shown_default: str | None = None
    synonyms: Mapping[str, str] = attrs.field(factory=dict)  # other spelling of a choice -> the choice


def knob(
    default: object,
    help: str,
    *,
    group: str = "",
    choices: tuple[str, ...] = (),
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    aliases: tuple[str, ...] = (),
    env: str | None = None,
    pending: str | None = None,
    built: tuple[object, ...] = (),
    per_model: bool = False,
    serve_only: bool = False,
    secret: bool = False,
    shown_default: str | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> Any:
    """Declare an attrs field as a knob. Copy a list or dict default for each instance."""
    assert not (secret and choices), "an error about a choice shows the value"
    meta = Knob(
        help=help, group=group, choices=choices, min=min, max=max, above=above, aliases=aliases, env=env,
        pending=pending, built=built, per_model=per_model, serve_only=serve_only, secret=secret,
        shown_default=shown_default, synonyms=synonyms or {},
    )  # fmt: skip
    common: dict[str, Any] = {"metadata": {"knob": meta}, "validator": _check, "repr": not secret}
    if synonyms:
        common["converter"] = lambda value: synonyms.get(value, value)
    if isinstance(default, list | dict):
        return attrs.field(factory=default.copy, **common)
    return attrs.field(default=default, **common)


def _check(_: object, field: Field, value: object) -> None:
    """Check the range and the choices of a value, or of each entry of a list."""
    meta = knob_of(field)
    for item in value if isinstance(value, list | tuple) else [value]:
        if item is None or isinstance(item, dict):
            continue
        if meta.choices and item not in meta.choices:
            allowed = ", ".join(meta.choices)
            raise BadRequest(
                f"{shorten(item)} is not one of {allowed}{nearest(str(item), meta.choices)}", field=field.name
            )
        if isinstance(item, int | float) and not isinstance(item, bool):
            _check_range(field.name, item, meta)


def _check_range(name: str, value: float, meta: Knob) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"{value} is not a finite number", field=name)
    low = (meta.min is not None and value < meta.min) or (meta.above is not None and value <= meta.above)
    high = meta.max is not None and value > meta.max
    if low or high:
        raise BadRequest(f"{shorten(value)} is out of range; allowed is {describe_range(meta)}", field=name)


def describe_range(meta: Knob) -> str:
    """Describe the range of a knob: `1 to 10`, `at least 1`, `more than 0, at most 9`, `at most 5`."""
    if meta.min is not None and meta.max is not None:
        return f"{meta.min} to {meta.max}"
    if meta.above is not None:
        return f"more than {meta.above}" + (f", at most {meta.max}" if meta.max is not None else "")
    return f"at least {meta.min}" if meta.min is not None else f"at most {meta.max}"


def fields_of(cls: type) -> dict[str, Field]:
    """Map the name of each attrs field to the field, with its type resolved."""
    attrs.resolve_types(cls)
    return {field.name: field for field in attrs.fields(cls)}


def knob_of(field: Field) -> Knob:
    """Return the metadata of a knob."""
    meta: Knob = field.metadata["knob"]
    return meta


def type_name(kind: Kind) -> str:
    """Name a type for users: `int`, `number`, `true or false`, `list of int`."""
    options = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in options)
    if typing.get_origin(kind) in (list, tuple):
        return f"list of {type_name(options[0])}"
    if not isinstance(kind, type) or kind is dict or attrs.has(kind):
        return MAP
    return {bool: "true or false", int: "int", float: "number", str: "text"}.get(kind, kind.__name__)


def shorten(value: object) -> str:
    """Format a value for an error: one line, not too long."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _VALUE_CHARACTERS:
            break
    return cut(text)


def cut(text: str, most: int = _VALUE_CHARACTERS) -> str:
    """Cut text to at most that many characters, with three dots for the rest."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _pieces(value: object) -> Iterator[str]:
    """Yield `repr` of a plain value piece by piece, so that a large one need not be formatted to its end."""
    if isinstance(value, str):
        yield repr(value[:_VALUE_CHARACTERS])
    elif isinstance(value, list | dict):
        first, last = "{}" if isinstance(value, dict) else "[]"
        yield first
        for i, item in enumerate(value):
            yield ", " * (i > 0)
            yield from _pieces(item)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[item])
        yield last
    else:
        yield repr(value)


def _wrong(value: object, kind: Kind) -> ValueError:
    return ValueError(f"{shorten(value)} is not {'' if kind is bool else 'a valid '}{type_name(kind)}")


class _TooLong(Exception):
    """A value that is too long for every type of a union."""


def _check_length(value: Sized, most: int, of: str) -> None:
    if len(value) > most:
        raise _TooLong(f"{len(value)} {of} are too many; at most {most} are allowed")


def _exactly(kind: type) -> Hook:
    """Make a hook that takes values of exactly this type: no int(12.7), no bool("false")."""

    def hook(value: object, _: Kind) -> object:
        if type(value) is not kind:
            raise _wrong(value, kind)
        return value

    return hook


def _text(value: object, _: Kind) -> str:
    """Accept text that UTF-8 can encode; a model can read, and a file can hold, no other."""
    if not isinstance(value, str):
        raise _wrong(value, str)
    _check_length(value, MAX_CHARACTERS, "characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shorten(value)} is not valid Unicode") from None
    return value


def _number(value: object, _: Kind) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, float)
    try:
        return float(value)
    except OverflowError:
        raise _wrong(value, float) from None


def _is_union(kind: Kind) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _union(value: object, kind: Kind) -> object:
    """Structure a value as the first type of a union that takes it; None only where the union has it."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    for option in typing.get_args(kind):
        if option is type(None):
            continue
        try:
            return _CONVERTER.structure(value, option)
        except (ValueError, TypeError, BaseValidationError):
            continue
    raise _wrong(value, kind)


def _sequence(kind: Kind) -> Hook:
    """Make a hook for lists or tuples of one item type; a string is no list."""
    [item, *_], make = typing.get_args(kind), tuple if typing.get_origin(kind) is tuple else list

    def hook(value: object, _: Kind) -> object:
        if not isinstance(value, list | tuple):
            raise _wrong(value, kind)
        _check_length(value, MAX_ENTRIES, "entries")
        return make(_CONVERTER.structure(entry, item) for entry in value)

    return hook


def _mapping(kind: Kind) -> Hook:
    """Make a hook for maps of text to values of one type."""
    item = typing.get_args(kind)[1]

    def hook(value: object, _: Kind) -> object:
        if not isinstance(value, Mapping):
            raise _wrong(value, kind)
        _check_length(value, MAX_ENTRIES, "entries")
        if not all(isinstance(key, str) for key in value):
            raise _wrong(value, kind)
        return {key: _CONVERTER.structure(entry, item) for key, entry in value.items()}

    return hook


def _attrs_class(cls: type, converter: Converter) -> Hook:
    """Make a hook for an attrs class. None means the default, at every level; an unknown key is an error."""
    inner: Callable[[Mapping[str, object], Kind], object] = make_dict_structure_fn(cls, converter)
    known = fields_of(cls)

    def hook(value: object, kind: Kind) -> object:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(value, cls)
        for name in value:  # the first unknown key ends it, however many there are
            if name not in known:
                raise ClassValidationError("unknown key", [ForbiddenExtraKeysError(None, cls, {name})], cls)
        return inner({name: item for name, item in value.items() if item is not None}, kind)

    return hook


def _has_origin(*origins: type) -> Callable[[Kind], bool]:
    return lambda kind: typing.get_origin(kind) in origins


def _strict_converter() -> Converter:
    converter = Converter(detailed_validation=True, unstruct_collection_overrides={tuple: list})
    for kind in (bool, int):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook_func(_is_union, _union)
    converter.register_structure_hook_factory(_has_origin(list, tuple), _sequence)
    converter.register_structure_hook_factory(_has_origin(dict), _mapping)
    converter.register_structure_hook_factory(attrs.has, _attrs_class)
    return converter


_CONVERTER = _strict_converter()


def structure(values: Mapping[str, object], cls: type[T]) -> T:
    """Build an attrs object from plain values, strictly. None means the default.

    Raises:
        UnknownField: a key that is no field; the error names the nearest field.
        BadRequest: a wrong type or range; the error names the field, the value and what is allowed, but no secret.
    """
    fields_of(cls)  # resolves the string annotations that cattrs reads
    try:
        return _CONVERTER.structure(values, cls)
    except BaseValidationError as group:
        raise _first_error(group, cls) from None


def unstructure(value: object) -> Any:
    """Turn attrs objects, and lists and maps of them, into plain JSON values."""
    return _CONVERTER.unstructure(value)


def _first_error(error: BaseException, cls: type, path: str = "") -> SgldError:
    """Convert the first leaf of a cattrs error group to an error of ours, with its dotted path."""
    for note in getattr(error, "__notes__", []):
        if isinstance(note, AttributeValidationNote):
            path = f"{path}.{note.name}" if path else note.name
    if isinstance(error, BaseExceptionGroup):
        return _first_error(error.exceptions[0], cls, path)
    if isinstance(error, ForbiddenExtraKeysError):
        [name] = error.extra_fields
        full = f"{path}.{name}" if path else name
        return UnknownField(f"unknown key {shorten(full)}", full, hint=nearest(name, fields_of(error.cl)))
    if isinstance(error, SgldError):  # from a validator, which knows only the field's own name
        return error.renamed(f"{path}.{error.field}") if path else error
    field = fields_of(cls).get(path)
    if field is not None and knob_of(field).secret:
        return BadRequest(f"its value is not a valid {type_name(field.type)}", field=path)
    return BadRequest(f"{error}", field=path)


@attrs.frozen
class Unbuilt:
    """A knob that asks for a feature which is not built yet."""

    name: str  # dotted
    value: object
    knob: Knob


def unbuilt(instance: object, prefix: str = "") -> Iterator[Unbuilt]:
    """List the knobs of `instance` that are set but wait for their feature."""
    for name, field in fields_of(type(instance)).items():
        value = getattr(instance, name)
        if attrs.has(type(value)):
            yield from unbuilt(value, f"{prefix}{name}." if "knob" in field.metadata else prefix)
            continue
        meta = knob_of(field)
        if meta.pending and value != default_of(field) and value not in meta.built:
            yield Unbuilt(prefix + name, value, meta)


def refuse_unbuilt(*instances: object, spell: Callable[[str], str] = str) -> None:
    """Raise `NotBuilt` if knobs wait for their feature, naming all. `spell` maps a name to the user's spelling."""
    found = [knob for instance in instances for knob in unbuilt(instance)]
    if not found:
        return
    first, *others = found
    value, instead = "", "leave it out"
    if first.knob.built:
        value, instead = f"{shorten(first.value)} is ", f"use {' or '.join(map(str, first.knob.built))}"
    also = f"; nor are {', '.join(spell(knob.name) for knob in others)}" if others else ""
    raise NotBuilt(
        f"{value}not built yet in this version of sgld ({first.knob.pending}); {instead}{also}",
        first.name,
        field=spell(first.name),
    )


def default_of(field: Field) -> Any:
    """Return the default of a field."""
    default: Any = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def once(pairs: list[tuple[str, T]]) -> dict[str, T]:
    """Build a dict of pairs. Raises ValueError for a key that stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values
