"""`/v1/set_lora` and its kin: the LoRA adapters of every request without adapters of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

from aiohttp import web

from sgld.convert import shorten, structure
from sgld.engine.lora import NamedAdapter
from sgld.errors import BadRequest
from sgld.messages import LoraPart, LoraState, MergeMode
from sgld.params import LoraUse
from sgld.server.http.auth import require_admin
from sgld.server.http.body import read_body
from sgld.server.http.describe import BODY_ERRORS, Described
from sgld.server.http.schema import (
    ActiveLora,
    LoadedLora,
    LoraChanged,
    LoraList,
    MergeLoraFields,
    SetLoraFields,
    UnmergeLoraFields,
    body,
)
from sgld.server.service import SERVICE

routes = web.RouteTableDef()
T = TypeVar("T")
ERRORS = (*BODY_ERRORS, 403, 500, 503)


@routes.post("/v1/set_lora")
@Described(
    answer=LoraChanged,
    body=SetLoraFields,
    required=("lora_nickname",),
    example={"lora_nickname": "sketch", "lora_path": "owner/name", "strength": 0.8},
    errors=ERRORS,
)
async def set_lora(request: web.Request) -> web.Response:
    """Replace the adapters of the model, once the running job has ended."""
    require_admin(request)
    service = request.app[SERVICE]
    fields = structure((await read_body(request, SetLoraFields)).values, SetLoraFields)
    service.loaded()
    loras = _requested(fields)
    state = await service.engine.set_lora(loras, cast(MergeMode, fields.merge_mode))
    names = ", ".join(str(lora.nickname) for lora in loras)
    targets, strengths = (", ".join(words) for words in (_targets(loras), _strengths(loras)))
    message = f"Successfully set LoRA adapter(s): {names} (target: {targets}, strength: {strengths})"
    return _changed(message + _skipped(state, loras))


@routes.post("/v1/merge_lora_weights")
@Described(answer=LoraChanged, body=MergeLoraFields, example={"strength": 0.5}, errors=ERRORS)
async def merge(request: web.Request) -> web.Response:
    """Apply the adapters that were last set again, each with this strength."""
    require_admin(request)
    service = request.app[SERVICE]
    fields = structure((await read_body(request, MergeLoraFields, empty=True)).values, MergeLoraFields)
    service.loaded()
    await service.engine.merge_lora(fields.target, fields.strength)
    return _changed(f"Successfully merged LoRA weights (target: {fields.target}, strength: {fields.strength:.2f})")


@routes.post("/v1/unmerge_lora_weights")
@Described(answer=LoraChanged, body=UnmergeLoraFields, example={"target": "all"}, errors=ERRORS)
async def unmerge(request: web.Request) -> web.Response:
    """Take the adapters away and restore every weight. Their names stay known."""
    require_admin(request)
    service = request.app[SERVICE]
    fields = structure((await read_body(request, UnmergeLoraFields, empty=True)).values, UnmergeLoraFields)
    service.loaded()
    await service.engine.unmerge_lora(fields.target)
    return _changed(f"Successfully unmerged LoRA weights (target: {fields.target})")


@routes.get("/v1/list_loras")
@Described(answer=LoraList, errors=(503,))
async def list_loras(request: web.Request) -> web.Response:
    """List the adapters that have a name, and those applied to each component of the model."""
    service = request.app[SERVICE]
    service.loaded()
    adapters = service.engine.adapters
    named = [LoadedLora(name, known.reference) for name, known in adapters.known.items()]
    parts = adapters.state.parts
    active = {name: _active(adapters.known, part) for name, part in parts.items() if part.applied is not None}
    return web.json_response(body(LoraList(named, active)))


def _active(known: Mapping[str, NamedAdapter], part: LoraPart) -> list[ActiveLora]:
    names, strengths = [str(lora.nickname) for lora in part.loras], [lora.strength for lora in part.loras]
    return [
        ActiveLora(
            nickname=name,
            nicknames=names,
            path=known[name].reference if name in known and str(known[name].path) == lora.path else str(lora.path),
            merged=part.applied == "merge",
            mode=str(part.applied),
            strength=lora.strength,
            strengths=strengths,
        )
        for name, lora in zip(names, part.loras, strict=True)
    ]


def _requested(fields: SetLoraFields) -> list[LoraUse]:
    """Return one entry for each nickname. A single value holds for all, except a path."""
    names = [fields.lora_nickname] if isinstance(fields.lora_nickname, str) else fields.lora_nickname or []
    if not names or "" in names:
        raise BadRequest("it names no adapter; give a name, or a list of names", field="lora_nickname")
    if len(set(names)) < len(names):
        raise BadRequest(f"{shorten(names)}: each adapter needs a name of its own", field="lora_nickname")
    if isinstance(fields.lora_path, str) and len(names) > 1:
        reason = f"a single path for {len(names)} nicknames; give a list with a path or null for each"
        raise BadRequest(f"{reason}", field="lora_path")
    count = len(names)
    paths = _each("lora_path", fields.lora_path, count)
    targets, strengths = _each("target", fields.target, count), _each("strength", fields.strength, count)
    alphas = _each("lora_alpha", fields.lora_alpha, count)
    return [
        LoraUse(name, path, strength, target, alpha, fields.strict)
        for name, path, strength, target, alpha in zip(names, paths, strengths, targets, alphas, strict=True)
    ]


def _each(name: str, value: T | list[T], count: int) -> list[T]:
    """Return one value for each adapter."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{len(value)} given for {count} nicknames", field=name)
    return value


def _targets(loras: list[LoraUse]) -> list[str]:
    found = [lora.target for lora in loras]
    return found if len(set(found)) > 1 else found[:1]


def _strengths(loras: list[LoraUse]) -> list[str]:
    found = [f"{lora.strength:.2f}" for lora in loras]
    return found if len(set(found)) > 1 else found[:1]


def _skipped(state: LoraState, loras: list[LoraUse]) -> str:
    """Say how many keys of the components that were set were left out."""
    names = {lora.nickname for lora in loras}
    count = sum(part.skipped for part in state.parts.values() if {lora.nickname for lora in part.loras} <= names)
    return f"; {count} keys fit no layer and were left out" if count else ""


def _changed(message: str) -> web.Response:
    return web.json_response(body(LoraChanged(message)))
