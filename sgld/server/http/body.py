"""Request bodies: JSON or multipart in, sampling values, API fields and files out."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio.to_thread
import attrs
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from sgld import config
from sgld.convert import (
    MAX_CHARACTERS,
    MAX_ENTRIES,
    Field,
    Values,
    cut,
    fields_of,
    knob_of,
    refuse_unbuilt,
    shorten,
    structure,
)
from sgld.errors import BadRequest, NotBuilt, SgldError, UnknownField, nearest
from sgld.params import MAX_LORAS, LoraUse, SamplingParams
from sgld.server.http.schema import OPENAI_QUALITIES

T = TypeVar("T")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_FORM_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_FIXED = {"save_output": True, "return_frames": False, "return_file_paths_only": True}  # over HTTP always so
LOCAL_FILES = {
    "image_path": "local paths are refused; upload the picture, or give its address",
    "mask_path": "local paths are refused; upload the mask, or give its address",
}
MAX_DEPTH = 32
"""Levels of lists and objects in a body, far below what would exhaust the interpreter's stack."""
MAX_COMMAS = 100_000
"""In JSON: more than two prompts can have, and so few values that nobody notices the parser, which stops the loop."""
_ENCODINGS = ("identity", "gzip", "deflate", "br", "zstd")  # what aiohttp decodes; the last two where it can
_EXTRAS = ("extra_body", "extra_json", "extra_params")
_ADAPTERS, _IDENTITIES = ("lora", "loras"), ("nickname", "path")
_OPENAI_FORMATS = {"jpg": "jpeg"}
_TOO_DEEP = f"it has more than {MAX_DEPTH} levels"
_MADE_OF = {"height": "size", "width": "size", "num_frames": "seconds"}


@attrs.frozen
class Upload:
    """A file of a form."""

    field: str
    name: str
    data: bytes = attrs.field(repr=False)


@attrs.frozen
class Body:
    """What a request brought."""

    values: Values
    files: list[Upload]
    addresses: list[str] = attrs.field(factory=list)  # of pictures, once they are taken from the values

    def digest(self) -> str:
        """Return a digest that equal requests share, however they are written."""
        text = json.dumps(self.values, sort_keys=True, ensure_ascii=False)
        files = [f"{file.field} {hashlib.sha256(file.data).hexdigest()}" for file in self.files]
        return hashlib.sha256("\n".join([text, *files, *self.addresses]).encode(errors="surrogatepass")).hexdigest()


async def read_body(request: web.Request, fields: type, *, empty: bool = False) -> Body:
    """Read the body as plain values and files. A form's text becomes its field's type.

    Raises:
        BadRequest: neither a JSON object nor a form, a field that stands twice, or a query beside the body.
        TooLarge: through aiohttp, a body of more bytes, or a form of more fields, than the server takes.
    """
    for name in request.query:
        raise UnknownField(f"unknown query parameter {shorten(name)}; every field goes into the body", name)
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity")
    if encoding.lower() not in _ENCODINGS:
        raise BadRequest(f"Content-Encoding: {shorten(encoding)} is not one of gzip, deflate", hdrs.CONTENT_ENCODING)
    if request.content_type == "multipart/form-data":
        values, files = await _read_form(request, fields)
    else:
        values, files = await _read_json(request, empty), []
    values = _merge_extras(values)
    for name, value in values.items():
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            raise _too_many(name, len(value), "entries", MAX_ENTRIES)
    return Body(values, files)


def _too_many(name: str, count: int, of: str, most: int) -> BadRequest:
    return BadRequest(f"{cut(name)}: {count} {of} are too many; at most {most} are allowed", name)


def read_query(request: web.Request, cls: type[T]) -> T:
    """Read the query as an object of `cls`.

    Raises:
        UnknownField: a parameter that `cls` does not have, with the nearest one.
        BadRequest: one of the wrong type or range, or given twice.
    """
    fields, values = fields_of(cls), Values()
    for name, text in request.query.items():
        if name in values:
            raise BadRequest(f"{cut(name)}: given several times; give it once", name)
        values[name] = config.from_text(text, fields[name].type) if name in fields else text
    return structure(values, cls)


async def _read_json(request: web.Request, empty: bool) -> Values:
    text = bytearray()
    try:
        async for chunk in request.content.iter_any():  # request.read() would hold it until the answer
            text += chunk
            if len(text) > request.client_max_size:
                raise web.HTTPRequestEntityTooLarge(request.client_max_size, len(text))
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest(f"the body cannot be read: {_reason(error)}") from None
    if empty and not text:
        return {}
    try:
        values = await anyio.to_thread.run_sync(_parse, text)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest("the body must be a JSON object")
    return values


async def _read_form(request: web.Request, fields: type) -> tuple[Values, list[Upload]]:
    try:
        form = await request.post()
    except (ValueError, LookupError, RuntimeError, web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest(f"the body is not a valid form: {_reason(error)}") from None
    values: Values = {}
    files: list[Upload] = []
    for key, value in form.items():
        if isinstance(value, web.FileField):
            data = await anyio.to_thread.run_sync(value.file.read)
            files.append(Upload(key.removesuffix("[]"), value.filename, data))
        elif isinstance(value, str):
            _place(values, key, value, fields)
        else:
            raise BadRequest(f"{cut(key)}: it is neither text nor a file", key)
    return values, files


def _reason(error: Exception) -> str:
    """Format aiohttp's error about a body; name only the kind of an error that quotes its bytes."""
    if isinstance(error, HttpProcessingError):
        return type(error).__name__
    return " ".join(str(error).split()).removeprefix("400, message: ")


def _place(values: Values, key: str, text: str, fields: type) -> None:
    """Put `a`, `a[]`, `a[b]`, `a[b][c][]` or `a[][b]` where it belongs."""
    match = _FORM_KEY.fullmatch(key)
    if match is None:
        raise BadRequest(f"{shorten(key)}: it is not a field name such as a, a[] or a[b]", key)
    name, *steps = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
    if len(steps) >= MAX_DEPTH:
        raise BadRequest(f"{shorten(key)}: {len(steps)} levels are too many; at most {MAX_DEPTH - 1} are allowed", key)
    value = _form_value(name, steps, text, fields)
    target: Any = values
    for step in steps:
        kind = dict if step else list
        if isinstance(target, dict):
            target = target.setdefault(name, kind())
        else:
            target = _only_object(target, step, key) if step else None
        name = step
        if not isinstance(target, kind):
            raise BadRequest(f"{cut(key)}: it contradicts another field of that name", key)
    if isinstance(target, list):
        target.append(value)
    elif name in target:
        raise BadRequest(f"{cut(key)}: given several times; give it once, or as {cut(key)}[]", key)
    else:
        target[name] = value


def _only_object(items: list[object], name: str, key: str) -> Values:
    """Return the one object of a list that is written as `a[][name]`.

    Of several, as OpenAI's client writes them, nobody could say which value belongs to which.
    """
    found: Values = next((item for item in items if isinstance(item, dict)), {})
    if name in found or {name, *found} >= set(_IDENTITIES):
        field = key.partition("[")[0]
        reason = f"a form cannot say which of them it is of; give each as JSON text in {cut(field)}[]"
        raise BadRequest(f"{cut(key)}: {reason}", key)
    if not found:
        items.append(found)
    return found


def _form_value(name: str, steps: list[str], text: str, fields: type) -> object:
    known = fields_of(fields).get(name) or fields_of(SamplingParams).get(config.ALIASES.get(name, name))
    if name in _ADAPTERS and steps and steps[-1]:
        known = fields_of(LoraUse).get(steps[-1])
    if known is None:
        return text
    if "dict" in str(known.type) and text.lstrip().startswith("{"):
        return _json_text(name, text)
    return config.from_text(text, known.type)


def _json_text(name: str, text: str) -> object:
    try:
        return _parse(text)
    except ValueError as error:
        raise BadRequest(f"it is not valid JSON: {error}", field=name) from None


def _parse(text: str | bytearray) -> object:
    """Parse JSON. Raises ValueError, and BadRequest for a key that stands twice in one object."""
    if (text.count(",") if isinstance(text, str) else text.count(b",")) > MAX_COMMAS:
        raise ValueError(f"it has more than {MAX_COMMAS} commas")
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level: list[object] = [values]
    depth = 0
    while level := [child for value in level for child in _children(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
    return values


def _once(pairs: list[tuple[str, object]]) -> Values:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"{cut(twice)}: given several times; give it once", twice)
    return values


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _merge_extras(values: Values) -> Values:
    """Merge `extra_body` of the client libraries into the top level, which wins."""
    merged: Values = {}
    for name in _EXTRAS:
        extra = values.pop(name, None)
        if isinstance(extra, str):
            extra = _json_text(name, extra)
        if extra is not None and not isinstance(extra, dict):
            raise BadRequest(f"{shorten(extra)} is not an object", field=name)
        merged |= extra or {}
    return merged | values


def split(body: Mapping[str, object], cls: type[T]) -> tuple[T, Values, list[str]]:
    """Split a body into API fields as `cls`, the given sampling values, and warnings.

    Raises:
        UnknownField: a parameter neither knows, with the nearest one.
    """
    api: Values = {}
    sampling: Values = {}
    sent: dict[str, str] = {}
    own, shared = fields_of(cls), fields_of(SamplingParams)
    for key, value in _adapters(body).items():
        name = config.ALIASES.get(key, key)
        if name in sampling:
            raise BadRequest(f"{sent[name]} is given too; give one of them", field=key)
        if key in own:
            api[key] = value
        elif name in LOCAL_FILES and value is not None:
            raise NotBuilt(f"{LOCAL_FILES[name]}", field=key)
        elif name in shared:
            sampling[name], sent[name] = value, key
        elif key in _FIXED:
            _check_fixed(key, value)
        elif name in config.SECTION_OF:
            raise NotBuilt("the server decides it, not a request", field=key)
        else:
            raise UnknownField(f"unknown parameter {shorten(key)}{nearest(key, _usable(own, shared))}", key)
    _respell(api)
    fields = structure(api, cls)
    refuse_unbuilt(fields)
    sampling |= _size(api.get("size"), sampling)
    return fields, *_quality(sampling, fields)


def _usable(*known: Mapping[str, Field]) -> Iterator[str]:
    """List the names, and their aliases, that a request may set."""
    for fields in known:
        for name, field in fields.items():
            knob = knob_of(field)
            if name not in LOCAL_FILES and (knob.built or not knob.pending):
                yield from (name, *knob.aliases)


@contextmanager
def as_sent(values: Mapping[str, object]) -> Iterator[None]:
    """Rename the field of an error to the body's field it was read from: `n`, `size`, `seconds`."""
    try:
        yield
    except SgldError as error:
        sent = _sent_as(error.param, values)
        if sent is None:
            raise
        made = (
            f"{shorten(values[sent])}: {error.param} {error.text}" if sent == _MADE_OF.get(error.param or "") else None
        )
        raise error.renamed(sent, made) from None


def _sent_as(field: str | None, values: Mapping[str, object]) -> str | None:
    """Find another field of the body that a sampling field was read from."""
    if field is None or values.get(field) is not None:
        return None
    aliases = [name for name in values if config.ALIASES.get(name) == field]
    made_of = _MADE_OF.get(field)
    return aliases[0] if aliases else made_of if made_of is not None and values.get(made_of) is not None else None


def _respell(api: Values) -> None:
    """Convert OpenAI's spellings: seconds as text, and jpg for jpeg."""
    if isinstance(seconds := api.get("seconds"), str):
        api["seconds"] = config.from_text(seconds, int)
    if isinstance(format := api.get("output_format"), str):
        api["output_format"] = _OPENAI_FORMATS.get(format, format)


def _check_fixed(key: str, value: object) -> None:
    """Check a field of `sgld generate` that has one value over HTTP."""
    if value is not None and value is not _FIXED[key]:
        fixed = str(_FIXED[key]).lower()
        raise NotBuilt(f"{shorten(value)} is not possible over HTTP, where it is always {fixed}", field=key)


def _adapters(body: Mapping[str, object]) -> Values:
    """Convert `lora`, one adapter, to `loras`. An adapter may be its nickname alone; a form brings JSON."""
    values, given = dict(body), [name for name in ("lora", "loras") if body.get(name) is not None]
    if len(given) > 1:
        raise BadRequest("loras is given too; give one of them", field="lora")
    for name in given:
        value = _parsed(name, values.pop(name))
        listed = value if isinstance(value, list) else [value]
        if name == "loras" and value is not listed:
            raise BadRequest(f"{shorten(value)} is not a list of adapters", field="loras")
        if len(listed) > MAX_LORAS:
            raise _too_many(name, len(listed), "adapters", MAX_LORAS)
        items = [_parsed(name, item) for item in listed]
        values["loras"] = [{"nickname": item} if isinstance(item, str) else item for item in items]
    values.pop("lora", None)
    return values


def _parsed(name: str, value: object) -> object:
    """Parse text that looks like JSON, unless it is longer than any text may be."""
    if isinstance(value, str) and len(value) <= MAX_CHARACTERS and value.lstrip()[:1] in ("{", "["):
        return _json_text(name, value)
    return value


def _size(size: str | None, sampling: Mapping[str, object]) -> dict[str, int]:
    if size in (None, "", "auto"):
        return {}
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise BadRequest(f"{shorten(size)} must be WIDTHxHEIGHT, such as 640x480, or auto", field="size")
    sides = {"width": int(match[1]), "height": int(match[2])}
    for name, side in sides.items():
        if sampling.get(name) not in (None, side):
            raise BadRequest(f"{size!r} contradicts {name} {shorten(sampling[name])}; give one of them", field="size")
    return sides


def _quality(sampling: Values, fields: object) -> tuple[Values, list[str]]:
    """Drop OpenAI's values that have no effect here, with a warning for each."""
    warnings = []
    if (word := sampling.get("quality")) in OPENAI_QUALITIES:
        sampling = {**sampling, "quality": None}
        if word not in ("auto", "standard"):
            warnings.append(f"quality: {word!r} changes nothing: every picture is made at the model's full quality")
    for name in ("style", "input_fidelity"):
        if getattr(fields, name, None) is not None:
            warnings.append(f"{name}: {getattr(fields, name)!r} changes nothing: no model here has a use for it")
    return sampling, warnings


def require_prompt(sampling: Mapping[str, object]) -> None:
    """Check that the request has a prompt."""
    prompt = sampling.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRequest(f"{shorten(prompt)} is not a text that says what to show", field="prompt")
