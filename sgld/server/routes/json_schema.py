"""JSON Schemas of the attrs classes that read and write the wire."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, Union

import attrs

from sgld.convert import Field, Kind, Knob, default_of, fields_of, knob_of, unstructure
from sgld.params import MAX_LORAS, MAX_PROMPT_CHARACTERS, LoraUse, ModelInfo, SamplingParams
from sgld.server.http.body import LOCAL_FILES
from sgld.server.http.schema import OPENAI_QUALITIES, Doc
from sgld.server.service import Service

Schema: TypeAlias = dict[str, Any]
SIZE = r"^$|^auto$|^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
NULL: Schema = {"type": "null"}
WHOLE: dict[str, Schema] = {  # fields whose schema is not that of their type
    "size": {"type": "string", "pattern": SIZE},
    "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
    "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
}
BESIDE: dict[str, Schema] = {  # other spellings of a value, of OpenAI's client and the replaced system's
    "seconds": {"type": "string", "pattern": "^[0-9]{1,4}$"},
    "output_format": {"enum": ["jpg"]},
    "quality": {"enum": list(OPENAI_QUALITIES)},
}


# Requests


def request_fields(cls: type, service: Service, *, form: bool = False) -> dict[str, Schema]:
    """Map each usable field of a request, and each alias, to its JSON Schema. A form spells lists `name[]`.

    `refused_fields` lists the fields that are left out.
    """
    refused = refused_fields(cls, service.info)
    found: dict[str, Schema] = {}
    for name, field in fields_of(cls).items():
        if name == "loras":
            found |= _adapter_fields(service, form)
        elif name not in refused:
            found |= _spellings(field, cls, service, form)
    return found


def refused_fields(cls: type, info: ModelInfo | None) -> dict[str, str]:
    """Map each field of a request that gets 400 to the reason: this version, or this model, cannot use it."""
    unbuilt = {
        name: f"not built yet: {knob_of(field).pending}"
        for name, field in fields_of(cls).items()
        if knob_of(field).pending and not knob_of(field).built
    }
    if cls is not SamplingParams:
        return unbuilt
    return {**unbuilt, **LOCAL_FILES, **(info.unsupported if info is not None else {})}


def _spellings(field: Field, cls: type, service: Service, form: bool) -> dict[str, Schema]:
    """Map the name of a field and its aliases, and `name[]` in a form, to their schemas."""
    name, meta, default = field.name, knob_of(field), _default(field, cls, service)
    unknown = meta.per_model and default is None
    shown = "the model's own" if unknown else meta.shown_default
    options = [{**option, **_model_rules(name, service, option)} for option in options_of(field)]
    found: dict[str, Schema] = {}
    for spelling, schema in (_form_fields(name, options) if form else {name: nullable(union(options))}).items():
        found[spelling] = {"description": f"{meta.help}; default: {shown}" if shown else meta.help, **schema}
        if default is not None and not spelling.endswith("[]"):
            found[spelling]["default"] = unstructure(default)
        for alias in meta.aliases:
            found[spelling.replace(name, alias)] = {"description": f"the same as {name}", **schema}
    return found


def _adapter_fields(service: Service, form: bool) -> dict[str, Schema]:
    """Describe `loras` and `lora`: adapters by nickname, or as objects, which a form brings as JSON text."""
    whole = {"type": "object", "properties": request_fields(LoraUse, service), "additionalProperties": False}
    text = {"type": "string", "minLength": 1, "description": "nickname" + ", or an adapter as JSON text" * form}
    several = {"type": "array", "items": text if form else {"anyOf": [text, whole]}, "maxItems": MAX_LORAS}
    help = {"description": knob_of(fields_of(SamplingParams)["loras"]).help}
    one = {"description": "the same as loras, for one"}
    if form:
        return {"lora": {**text, **one}, "loras[]": {**help, **several}}
    return {"lora": {**one, "anyOf": [text, whole, NULL]}, "loras": {**help, **nullable(several)}}


def _default(field: Field, cls: type, service: Service) -> object:
    """Return the value of a field that a request leaves out; None where only the model knows it."""
    if cls is not SamplingParams:
        return default_of(field)
    unknown = knob_of(field).per_model and service.info is None and field.name not in service.sampling
    return None if unknown else service.default(field.name)


def _model_rules(name: str, service: Service, option: Schema) -> Schema:
    """Return what the loaded model demands of a field, beside the field's own range."""
    if service.info is None:
        return {}
    if name in ("height", "width"):
        return {"multipleOf": service.info.size_multiple}
    if name == "max_sequence_length" and service.info.max_tokens is not None:
        return {"maximum": min(option["maximum"], service.info.max_tokens)}
    return {}


def _form_fields(name: str, options: list[Schema]) -> dict[str, Schema]:
    """Split the options of a field: a form writes one value under `name`, and the entries of a list under `name[]`."""
    single = [option for option in options if option.get("type") != "array"]
    lists = [option for option in options if option.get("type") == "array"]
    found = {name: union(single)} if single else {}
    return found | ({f"{name}[]": union(lists)} if lists else {})


def options_of(field: Field) -> list[Schema]:
    """List the schemas of the values that a field of a request takes, null left out."""
    if field.name in WHOLE:
        return [WHOLE[field.name]]
    kinds = [kind for kind in _kinds(field.type) if kind is not types.NoneType]
    options = [_limited(type_schema(kind, _refuse_class), knob_of(field)) for kind in kinds]
    return [*options, *([BESIDE[field.name]] if field.name in BESIDE else [])]


def _refuse_class(cls: type) -> Schema:
    raise TypeError(f"{cls.__name__} cannot stand in a request")


def _limited(schema: Schema, meta: Knob) -> Schema:
    """Add the range and the choices of a knob to the schema of its value, or of each entry of a list."""
    if schema["type"] == "array":
        return {**schema, "items": _limited(schema["items"], meta)}
    if schema["type"] in ("integer", "number"):
        limits = {"minimum": meta.min, "exclusiveMinimum": meta.above, "maximum": meta.max}
        return {**schema, **{name: limit for name, limit in limits.items() if limit is not None}}
    choices = list(meta.built if meta.pending else meta.choices)
    return {**schema, "enum": choices} if choices else schema


# Types


def type_schema(kind: Kind, refer: Callable[[type], Schema]) -> Schema:
    """Return the JSON Schema of a Python type; `refer` gives that of an attrs class."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        inner, doc = type_schema(arguments[0], refer), arguments[1]
        assert isinstance(doc, Doc)
        return {"description": doc.help, **inner, **({"enum": list(doc.choices)} if doc.choices else {})}
    if origin in (Union, types.UnionType):
        schema = union([type_schema(each, refer) for each in arguments if each is not types.NoneType])
        return nullable(schema) if types.NoneType in arguments else schema
    if origin in (list, tuple):
        return {"type": "array", "items": type_schema(arguments[0], refer)}
    if origin is dict:
        return {"type": "object", "additionalProperties": type_schema(arguments[1], refer)}
    if kind is Any:
        return {}
    assert isinstance(kind, type)
    if attrs.has(kind):
        return refer(kind)
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]}


def _kinds(kind: Kind) -> tuple[Kind, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def union(options: list[Schema]) -> Schema:
    """Return the schema of a value that fits one of several."""
    if len(options) == 1:
        return options[0]
    if all("enum" in option for option in options):
        return {"enum": [value for option in options for value in option["enum"]]}
    return {"anyOf": options}


def nullable(schema: Schema) -> Schema:
    """Return the schema of a value that may also be null, which for a request means: left out."""
    if "enum" in schema:
        kind = {"type": [schema["type"], "null"]} if "type" in schema else {}
        return {**schema, **kind, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    own = {key: value for key, value in schema.items() if key == "description"}
    options = schema.get("anyOf") or [{key: value for key, value in schema.items() if key != "description"}]
    return {**own, "anyOf": [*options, NULL]}


def required(schema: Schema) -> Schema:
    """Return the schema of a field that must be there, and be neither null nor empty."""
    bare = {key: value for key, value in schema.items() if key != "default"}
    if "anyOf" in schema:
        return {**bare, "anyOf": [required(option) for option in schema["anyOf"] if option != NULL]}
    kind = next(kind for kind in (schema["type"], *schema["type"]) if kind in ("string", "array"))
    return {**bare, "type": kind, **({"minLength": 1} if kind == "string" else {"minItems": 1})}
