"""Flags from attrs classes: one declaration gives the flag, its help and its parsing.

Dashes and underscores are the same; `--flag`, `--flag true|false` and `--no-flag` set a switch; nothing may be
abbreviated; a mistyped flag is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias

import attrs

from sgld import config
from sgld.cli.sources import MAP_SUFFIXES, Layer, merge, read_map
from sgld.convert import (
    MAP,
    Field,
    Kind,
    Knob,
    Values,
    default_of,
    describe_range,
    fields_of,
    knob_of,
    once,
    shorten,
    type_name,
)
from sgld.errors import BadRequest, SgldError, UnknownField, nearest
from sgld.settings import ATTENTION_ROLES, COMPONENTS, TITLES, TRANSFORMERS, ModelSettings, VaeConfig

RESOLUTIONS = {"4k": (3840, 2160), "2k": (2560, 1440), "1080p": (1920, 1080), "720p": (1280, 720)}
EPILOG = "Dashes and underscores are the same in a flag. A switch is set by --flag, --flag true|false or --no-flag."
_FLAG = re.compile(r"--[\w.-]+")
Group: TypeAlias = "argparse._ArgumentGroup"
_ABSENT: Values = {"default": argparse.SUPPRESS}


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors in place of its exit."""

    def error(self, message: str) -> NoReturn:
        reason = message.removeprefix("argument ")
        raise BadRequest(re.sub(r": ignored explicit argument (.*)", r": it takes no value, not even \1", reason))


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=min(shutil.get_terminal_size().columns, 120))


class _Keep(argparse.Action):
    """Store the words of a flag, and how the user spelled it; a list goes on where it was left."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        value = self.const if self.nargs == 0 else values
        if not isinstance(value, list) and self.dest in namespace.spelled:
            also = {option_string, namespace.spelled[self.dest]} - {option_string}
            raise BadRequest(f"{option_string}: given twice{''.join(f', as {other} too' for other in also)}", self.dest)
        if isinstance(value, list):
            value = [*getattr(namespace, self.dest, []), *value]
        setattr(namespace, self.dest, value)
        namespace.spelled[self.dest] = option_string


@attrs.frozen
class Parsed:
    """What a command line says."""

    layer: Layer
    config: str | None = None
    print_config: bool = False
    help: bool = False


def flag_of(name: str) -> str:
    """Spell the flag of a knob: `num_gpus` -> `--num-gpus`."""
    return "--" + name.replace("_", "-")


def parser_for(command: str, description: str, sections: Iterable[type]) -> _Parser:
    """Build a parser with the knobs of `sections` as flags, in their groups."""
    parser = _Parser(
        prog=f"sgld {command}",
        description=description,
        epilog=EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=_Help,
        usage="%(prog)s [flags]",
    )
    _add_general(parser.add_argument_group("general"))
    groups: dict[str, Group] = {}
    for cls in sections:
        for name, field in fields_of(cls).items():
            title = knob_of(field).group or TITLES[cls]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add(groups[title], name, field)
    for component in COMPONENTS:
        _add_component(groups[TITLES[ModelSettings]], component)
    if "size" in groups:
        _add_resolutions(groups["size"])
    return parser


def _add_general(group: Group) -> None:
    group.add_argument("-h", "--help", action="store_true", help="show this help (switch; default: off)", **_ABSENT)
    group.add_argument(
        "--config",
        action=_Keep,
        metavar="FILE",
        help="values by the names below; the command line wins (.json, .yaml or .yml file; default: none)",
        **_ABSENT,
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print the merged configuration, which --config takes back, and exit (switch; default: off)",
        **_ABSENT,
    )


def _add(group: Group, name: str, field: Field) -> None:
    kinds, meta = [field.type, *typing.get_args(field.type)], knob_of(field)
    spellings = [flag_of(spelling) for spelling in (name, *meta.aliases)]
    common = {"dest": name, "action": _Keep, "help": help_of(field), **_ABSENT}
    if bool in kinds:
        group.add_argument(*spellings, nargs="?", const="true", metavar="true|false", **common)
        off = [f"--no-{spelling[2:]}" for spelling in spellings]
        group.add_argument(*off, nargs=0, const="false", **{**common, "help": argparse.SUPPRESS})
    elif name == "prompt" or any(typing.get_origin(kind) is list for kind in kinds):
        group.add_argument(*spellings, nargs="+", metavar=_metavar(kinds, meta), **common)
    else:
        group.add_argument(*spellings, metavar=_metavar(kinds, meta), **common)
    if name == "component_attention_backends":
        roles = [f"{component}.{role}" for component in TRANSFORMERS for role in ATTENTION_ROLES]
        for part in (*COMPONENTS, *roles):
            _add_hidden(group, f"{name}.{part}")
    if isinstance(field.type, type) and attrs.has(field.type):
        for inner, inner_field in fields_of(field.type).items():
            _add(group, f"{name}.{inner}", inner_field)


def _add_component(group: Group, component: str) -> None:
    """Add `--vae-path`, and its other spelling `--component-paths.vae`."""
    dest = f"component_paths.{component}"
    text = f"another {component} (folder or Hugging Face id; default: the model's own)"
    group.add_argument(flag_of(f"{component}_path"), dest=dest, action=_Keep, metavar="TEXT", help=text, **_ABSENT)
    _add_hidden(group, dest)


def _add_hidden(group: Group, dest: str) -> None:
    group.add_argument(flag_of(dest), dest=dest, action=_Keep, help=argparse.SUPPRESS, **_ABSENT)


def _add_resolutions(group: Group) -> None:
    for name, (width, height) in RESOLUTIONS.items():
        text = f"width {width} and height {height} (switch; default: off)"
        group.add_argument(f"--{name}", dest="resolution", action="append_const", const=name, help=text, **_ABSENT)


def _metavar(kinds: Sequence[Kind], meta: Knob) -> str:
    names = {int: "N", float: "X"}
    numbers = [names[kind] for kind in (*kinds, _item(kinds)) if kind in names]
    return numbers[0] if numbers else "NAME" if meta.choices else "TEXT"


def help_of(field: Field) -> str:
    """Write the help of a flag: purpose, allowed values, default."""
    meta = knob_of(field)
    allowed = ", ".join(meta.choices) if meta.choices else type_name(field.type)
    if meta.min is not None or meta.max is not None or meta.above is not None:
        allowed += f", {describe_range(meta)}"
    parts = [allowed, f"default: {_shown_default(field, meta)}"]
    if meta.env:
        parts.append(f"env {meta.env}")
    if meta.pending:
        besides = f" beside {', '.join(map(str, meta.built))}" if meta.built else ""
        parts.append(f"not built yet{besides}: {meta.pending}")
    return f"{meta.help} ({'; '.join(parts)})".replace("%", "%%")


def _shown_default(field: Field, meta: Knob) -> str:
    if meta.per_model:
        return "the model's own"
    default = default_of(field)
    if meta.shown_default or default in (None, {}, [], "") or attrs.has(type(default)):
        return meta.shown_default or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def parse(parser: _Parser, words: Iterable[str]) -> Parsed:
    """Parse the flags to plain values under the knobs' names.

    Raises:
        UnknownField: no such flag, with the nearest one.
        BadRequest: a flag without its value, a stray word, or a value that is no map where one is needed.
    """
    words = [_dashed(word) for word in words]
    try:
        namespace, extra = parser.parse_known_args(words, argparse.Namespace(spelled={}))
    except BadRequest as error:
        known = {option for action in parser._actions for option in action.option_strings}
        raise BadRequest(error.message + _dash_hint(error.message, words, known), error.param) from None
    general = {name: vars(namespace).pop(name) for name in ("config", "print_config", "help") if name in namespace}
    if general.get("help"):
        return Parsed(Layer({}, {}), help=True)
    if extra:
        raise _unknown(extra[0], [option for action in parser._actions for option in action.option_strings])
    spelled: dict[str, str] = vars(namespace).pop("spelled")
    spelled.pop("config", None)
    resolution: list[str] = vars(namespace).pop("resolution", [])
    values: Values = {}
    for name, text in vars(namespace).items():
        head, _, rest = name.partition(".")
        value = _value(name, text, spelled[name])
        value = {rest: value} if rest else value
        _check_once(head, values.get(head), value, spelled)
        values = merge(values, {head: value})
    return Parsed(_with_resolution(Layer(values, spelled), resolution), **general)


def _check_once(head: str, old: object, new: object, spelled: Mapping[str, str]) -> None:
    """Refuse a map's entry that stands in a flag for the whole map and in a flag of its own."""
    for entry in sorted(old.keys() & new.keys()) if isinstance(old, dict) and isinstance(new, dict) else ():
        raise BadRequest(f"{spelled[head]} and {spelled[f'{head}.{entry}']} both set {entry}; give one of them", head)


def _dash_hint(message: str, words: Sequence[str], known: Container[str]) -> str:
    """Suggest how to write a value that was taken for a flag."""
    flags = message.partition(":")[0].split("/")
    for flag, value in pairwise(words):
        if flag in flags and value.startswith("-") and value.partition("=")[0] not in known:
            return f"; did you mean {flag}={shlex.quote(value)}?"
    return ""


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if _FLAG.fullmatch(flag) else word


def _unknown(word: str, known: list[str]) -> SgldError:
    if not word.startswith("-"):
        return BadRequest(f"unexpected argument {word!r}; values belong to a flag, such as --prompt")
    flag = word.partition("=")[0]
    name = flag.lstrip("-").replace("-", "_").removeprefix("no_")
    if config.ALIASES.get(name, name) in config.SECTION_OF and flag_of(name) not in known:
        return UnknownField(f"{flag} is a flag of `sgld generate` only", flag)
    return UnknownField(f"unknown flag {flag}{nearest(flag, known)}", flag)


def _with_resolution(layer: Layer, chosen: list[str]) -> Layer:
    if not chosen:
        return layer
    first, *others = [f"--{name}" for name in chosen]
    clash = [layer.spelled[name] for name in ("width", "height") if name in layer.values] + others
    if clash:
        raise BadRequest(f"{first} and {clash[0]} both set the size; give one of them", "width")
    width, height = RESOLUTIONS[chosen[0]]
    return Layer({**layer.values, "width": width, "height": height}, {**layer.spelled, "width": first, "height": first})


def _value(name: str, text: Any, flag: str) -> object:
    """Convert the words of a flag to a plain value of its field's type."""
    head, _, rest = name.partition(".")
    field = fields_of(config.SECTION_OF[head])[head]
    if rest and head == "vae_config":
        field = fields_of(VaeConfig)[rest]
    elif rest:
        return text
    kinds = [field.type, *typing.get_args(field.type)]
    if type_name(field.type) == MAP or any(typing.get_origin(kind) is dict for kind in kinds):
        return _map(text, flag, numbers=typing.get_args(field.type) != (str, str))
    item = _item(kinds)
    if isinstance(text, list) and isinstance(item, type) and attrs.has(item):
        return [_map(word, flag, numbers=True) for word in text]
    if isinstance(text, list):
        parts = [part for word in text for part in word.split(",")] if item is int else text
        words = [config.from_text(word, item) for word in parts]
        return words[0] if len(words) == 1 and name in ("seed", "prompt") else words
    return config.from_text(text, field.type)


def _item(kinds: Sequence[Kind]) -> Kind:
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    return typing.get_args(lists[0])[0] if lists else str


def _map(text: str, flag: str, numbers: bool) -> object:
    """Read a map from JSON text, from a JSON or YAML file, or from `key=value,key=value`."""
    if text.lstrip().startswith("{"):
        return _json(text, flag)
    pairs = [pair.partition("=") for pair in text.split(",")]
    if all(key and equals for key, equals, _ in pairs):
        try:
            return once([(key.strip(), _json_or_text(value) if numbers else value) for key, _, value in pairs])
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{shorten(text)}: {error}", field=flag) from None
    if text.lower().endswith(MAP_SUFFIXES):
        return read_map(text, flag)
    raise BadRequest(f"{text!r} is neither JSON, nor a file, nor key=value,key=value", field=flag)


def _json(text: str, flag: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{shorten(text)} is not valid JSON: {error}", field=flag) from None


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
