"""Request bodies: JSON or multipart text in, sampling values and API fields out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
import attrs
from aiohttp import web

from sgld import config
from sgld.convert import fields_of, knob, structure
from sgld.errors import BadRequest, NotBuilt, UnknownField, nearest
from sgld.params import SamplingParams

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_FIXED = {"save_output": True, "return_frames": False, "return_file_paths_only": True}  # over HTTP always so
_OPENAI_QUALITY = ("auto", "standard")  # words of OpenAI's that ask for the default


@attrs.frozen
class ImageFields:
    """Fields of an image request beside `SamplingParams`."""

    model: str | None = knob(None, "model id")
    size: str | None = knob(None, "WIDTHxHEIGHT; empty or auto is the model's own")
    data_type: str = knob("image", "what this route makes", choices=("image",))
    response_format: str = knob("b64_json", "how the picture comes back", choices=("b64_json", "url"))
    output_format: str = knob("png", "file format", choices=("png", "jpeg", "webp"))
    user: str | None = knob(None, "end user, for your own records")


@attrs.frozen
class VideoFields:
    """Fields of a video request beside `SamplingParams`."""

    model: str | None = knob(None, "model id")
    size: str | None = knob(None, "WIDTHxHEIGHT; empty or auto is the model's own")
    data_type: str = knob("video", "what this route makes", choices=("video",))
    seconds: int | None = knob(None, "length; times fps, rounded to a length the model can make", min=1, max=3600)
    user: str | None = knob(None, "end user, for your own records")


async def read_body(request: web.Request, fields: type) -> dict[str, Any]:
    """The body as plain values; multipart text is read as its field's type.

    Raises:
        BadRequest: neither a JSON object nor a form, or a file where none is taken.
    """
    if request.content_type == "multipart/form-data":
        form = await request.post()
        for name in form:
            if len(form.getall(name)) > 1:
                raise BadRequest(f"{name}: given {len(form.getall(name))} times; give it once", name)
        return {name: _form_value(name, value, fields) for name, value in form.items()}
    try:
        body = await anyio.to_thread.run_sync(json.loads, await request.read())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _form_value(name: str, value: str | web.FileField | bytes | bytearray, fields: type) -> Any:
    if not isinstance(value, str):
        raise NotBuilt(f"{name}: file input is not built yet in this version of sgld", name)
    known = fields_of(fields).get(name) or fields_of(SamplingParams).get(name)
    return config.from_text(value, known.type) if known else value


def split(body: Mapping[str, Any], cls: type[Any]) -> tuple[Any, dict[str, Any]]:
    """API fields as `cls`, and the sampling values that were given.

    Raises:
        UnknownField: a parameter neither knows, with the nearest one.
    """
    api: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    own, shared = fields_of(cls), fields_of(SamplingParams)
    for key, value in body.items():
        name = config.ALIASES.get(key, key)
        if name in sampling:
            raise BadRequest(f"{key}: {name} is given too; give one of them", key)
        if key in own:
            api[key] = value
        elif name in shared:
            sampling[name] = value
        elif key in _FIXED:
            _check_fixed(key, value)
        elif name in config.SECTION_OF:
            raise NotBuilt(f"{key}: the server decides it, not a request", key)
        else:
            raise UnknownField(f"unknown parameter {key!r}{nearest(key, [*own, *shared, *config.ALIASES])}", key)
    if isinstance(seconds := api.get("seconds"), str):  # OpenAI writes it as text
        api["seconds"] = config.from_text(seconds, int)
    fields = structure(api, cls)
    size = _size(fields.size)
    for name in size:
        if sampling.get(name) not in (None, size[name]):
            raise BadRequest(f"size: {fields.size!r} contradicts {name} {sampling[name]}; give one of them", "size")
    return fields, {**sampling, **size, **_quality(sampling)}


def _check_fixed(key: str, value: Any) -> None:
    """Fields of `sgld generate` that have one meaning here."""
    if value is not None and value is not _FIXED[key]:
        fixed = str(_FIXED[key]).lower()
        raise NotBuilt(f"{key}: {value!r} is not possible over HTTP, where it is always {fixed}", key)


def _size(size: str | None) -> dict[str, int]:
    if size in (None, "", "auto"):
        return {}
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise BadRequest(f"size: {size!r} must be WIDTHxHEIGHT, such as 640x480, or auto", "size")
    return {"width": int(match[1]), "height": int(match[2])}


def _quality(sampling: Mapping[str, Any]) -> dict[str, None]:
    return {"quality": None} if sampling.get("quality") in _OPENAI_QUALITY else {}


def require_prompt(sampling: Mapping[str, Any]) -> None:
    """Every request names what to show."""
    prompt = sampling.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRequest(f"prompt: {prompt!r} is not a text that says what to show", "prompt")
