"""Flags from attrs classes: one declaration gives the flag, its help and its parsing.

Dashes and underscores are the same; `--flag`, `--flag true|false` and `--no-flag` set a switch; nothing may be
abbreviated; a mistyped flag is an error with the nearest name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import attrs
import yaml

from sgld import config
from sgld.convert import Knob, default_of, describe_range, fields_of, knob_of, plain, type_name
from sgld.errors import BadRequest, SgldError, UnknownField, nearest

RESOLUTIONS = {"4k": (3840, 2160), "2k": (2560, 1440), "1080p": (1920, 1080), "720p": (1280, 720)}


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors in place of its exit."""

    def error(self, message: str) -> NoReturn:
        raise BadRequest(message.removeprefix("argument "))


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=min(shutil.get_terminal_size().columns, 120))


def flag_of(name: str) -> str:
    """`num_gpus` -> `--num-gpus`."""
    return "--" + name.replace("_", "-")


def parser_for(command: str, description: str, sections: Iterable[type]) -> _Parser:
    """A parser with the knobs of `sections` as flags, in their groups."""
    parser = _Parser(
        prog=f"sgld {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
        usage="%(prog)s [flags]",
    )
    groups: dict[str, Any] = {}
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON or YAML file of these names; the command line wins",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the merged configuration and exit", default=argparse.SUPPRESS
    )
    for cls in sections:
        for name, field in fields_of(cls).items():
            meta = knob_of(field)
            group = groups.setdefault(meta.group, None) or parser.add_argument_group(meta.group)
            groups[meta.group] = group
            _add(group, name, field, meta)
    for component in config.COMPONENTS:
        _add_text(
            groups[config.MODEL],
            f"component_paths.{component}",
            [f"{component}_path"],
            f"folder or id of another {component}",
        )
    if "size" in groups:
        for resolution, (width, height) in RESOLUTIONS.items():
            groups["size"].add_argument(
                f"--{resolution}",
                dest="resolution",
                action="append_const",
                const=resolution,
                default=argparse.SUPPRESS,
                help=f"{width} x {height}",
            )
    return parser


def _add(group: Any, name: str, field: attrs.Attribute[Any], meta: Knob) -> None:
    if attrs.has(field.type) if isinstance(field.type, type) else False:
        for inner, inner_field in fields_of(typing.cast(type, field.type)).items():
            _add(group, f"{name}.{inner}", inner_field, knob_of(inner_field))
        return
    spellings = [flag_of(name), *(flag_of(alias) for alias in meta.aliases)]
    help_text = f"{meta.help} ({describe(field)})".replace("%", "%%")
    kinds = [field.type, *typing.get_args(field.type)]
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
    if bool in kinds:
        group.add_argument(*spellings, nargs="?", const="true", metavar="true|false", **common)
        group.add_argument(
            *(f"--no-{spelling[2:]}" for spelling in spellings),
            action="store_const",
            const="false",
            dest=name,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    elif name == "prompt" or any(typing.get_origin(kind) is list for kind in kinds):
        group.add_argument(*spellings, nargs="+", metavar=_metavar(field), **common)
    else:
        group.add_argument(*spellings, metavar=_metavar(field), **common)
    if name == "component_attention_backends":
        for component in config.COMPONENTS:
            _add_text(group, f"{name}.{component}", [], argparse.SUPPRESS)


def _add_text(group: Any, dest: str, names: list[str], help_text: str) -> None:
    spellings = [flag_of(name) for name in [*names, dest]]
    group.add_argument(*spellings[:1], dest=dest, default=argparse.SUPPRESS, metavar="TEXT", help=help_text)
    for spelling in spellings[1:]:
        group.add_argument(spelling, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _metavar(field: attrs.Attribute[Any]) -> str:
    kinds = {int: "N", float: "X"}
    options = [kind for kind in [field.type, *typing.get_args(field.type)] if kind in kinds]
    return kinds[options[0]] if options else "TEXT"


def describe(field: attrs.Attribute[Any]) -> str:
    """Allowed values and default of a knob, as its help shows them."""
    meta = knob_of(field)
    parts = [", ".join(meta.choices) if meta.choices else type_name(field.type)]
    if meta.min is not None or meta.max is not None or meta.above is not None:
        parts[0] += f", {describe_range(meta)}"
    if meta.env:
        parts.append(f"env {meta.env}")
    parts.append(f"default: {_shown_default(field, meta)}")
    if meta.pending:
        parts.append(f"not built yet: {meta.pending}")
    return "; ".join(parts)


def _shown_default(field: attrs.Attribute[Any], meta: Knob) -> str:
    if meta.per_model:
        return "the model's own"
    default = default_of(field)
    if meta.shown_default or default in (None, {}, [], ""):
        return meta.shown_default or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def parse(parser: _Parser, words: list[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """The flags as plain values under the knobs' names, and the namespace for `config` and `print_config`."""
    namespace, extra = parser.parse_known_args([_dashed(word) for word in words])
    if extra:
        raise _unknown(extra[0], [option for action in parser._actions for option in action.option_strings])
    raw = {
        name: value for name, value in vars(namespace).items() if name not in ("config", "print_config", "resolution")
    }
    values = config.normalize({name: _value(name, text) for name, text in raw.items()}, "command line")
    return config.merge(values, _resolution(namespace, values)), namespace


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _unknown(word: str, known: list[str]) -> SgldError:
    if word.startswith("-"):
        flag = word.partition("=")[0]
        return UnknownField(f"unknown flag {flag}{nearest(flag, known)}", flag)
    return BadRequest(f"unexpected argument {word!r}; values belong to a flag, such as --prompt")


def _resolution(namespace: argparse.Namespace, values: Mapping[str, Any]) -> dict[str, int]:
    chosen: list[str] = getattr(namespace, "resolution", [])
    if not chosen:
        return {}
    clash = [flag_of(name) for name in ("width", "height") if name in values] + [f"--{name}" for name in chosen[1:]]
    if clash:
        raise BadRequest(f"--{chosen[0]} and {clash[0]} both set the size; give one of them", "width")
    width, height = RESOLUTIONS[chosen[0]]
    return {"width": width, "height": height}


def _value(name: str, text: Any) -> Any:
    """A flag's words as a plain value of its field's type."""
    head, _, rest = name.partition(".")
    field = fields_of(config.SECTION_OF[head])[head]
    if rest and head == "vae_config":
        field = fields_of(config.VaeConfig)[rest]
    elif rest:
        return text
    if any(typing.get_origin(kind) is dict for kind in [field.type, *typing.get_args(field.type)]):
        return _map(head, text)
    if isinstance(text, list):
        words = [config.from_text(word, _item(field.type)) for word in text]
        return words[0] if len(words) == 1 and name in ("seed", "prompt") else words
    return config.from_text(text, field.type)


def _item(kind: Any) -> Any:
    lists = [option for option in [kind, *typing.get_args(kind)] if typing.get_origin(option) is list]
    return typing.get_args(lists[0])[0] if lists else str


def _map(name: str, text: str) -> dict[str, Any]:
    """A map from JSON text, from a JSON or YAML file, or from `key=value,key=value`."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise BadRequest(f"{name}: {text!r} is not valid JSON: {error}", name) from None
        return typing.cast(dict[str, Any], value)
    if text.endswith((".json", ".yaml", ".yml")):
        try:
            return typing.cast(dict[str, Any], yaml.safe_load(Path(text).expanduser().read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise BadRequest(f"{name}: {text!r} cannot be read: {error}", name) from None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and equals for key, equals, _ in pairs):
        raise BadRequest(f"{name}: {text!r} is neither JSON, a file, nor key=value,key=value", name)
    return {key: yaml.safe_load(value) if name != "component_attention_backends" else value for key, _, value in pairs}


def show(values: Mapping[str, Any], sections: Iterable[type]) -> str:
    """The merged configuration as YAML that `--config` takes back; null stands for a default of the model's."""
    whole: dict[str, Any] = {}
    for cls in sections:
        for name, field in fields_of(cls).items():
            meta = knob_of(field)
            value = values.get(name, None if meta.per_model else plain(default_of(field)))
            whole[name] = "***" if meta.secret and value else value
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
