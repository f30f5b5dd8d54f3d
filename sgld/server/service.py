"""Turn requests into jobs: the state that all handlers share."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio.to_thread
import attrs
from aiohttp import web

from sgld import media
from sgld.convert import default_of, fields_of, shorten
from sgld.engine.engine import Engine
from sgld.errors import BadRequest, Forbidden, NotReady, UnknownModel
from sgld.params import ModelInfo, SamplingParams
from sgld.resolve import Resolved, resolve
from sgld.server.http.auth import IDENTITY, OWNER
from sgld.server.http.body import Body, as_sent, read_body
from sgld.server.http.fetch import Fetcher
from sgld.server.http.pictures import PictureSource, check_sources, find_sources, read_sources
from sgld.server.http.schema import CommonFields
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.inputs import StoredPictures
from sgld.server.jobs.job import Job
from sgld.server.jobs.record import JobRecord
from sgld.server.jobs.service import JobService
from sgld.settings import Settings

F = TypeVar("F", bound=CommonFields)
KEY, MAX_KEY_CHARACTERS = "Idempotency-Key", 255


@attrs.frozen
class ParsedRequest(Generic[F]):
    """A request in sgld's own fields."""

    fields: F
    sampling: dict[str, Any]
    format: str
    previews: int
    notes: list[str]


@attrs.frozen
class RequestSpec(Generic[F]):
    """What is particular to one kind of request."""

    kind: str  # image or video
    fields: type  # of the body, beside SamplingParams
    parse: Callable[[Service, dict[str, Any], Sequence[PictureSource]], ParsedRequest[F]]
    pictures: tuple[str, ...] = ()  # fields of the body that bring pictures
    before: JobRecord | None = None  # the job that a remix repeats


@attrs.define
class Service:
    """The engine, its jobs, and the description of the model once it is loaded."""

    settings: Settings
    sampling: dict[str, Any]  # the operator's defaults, over the model's and under a request's
    engine: Engine
    jobs: JobService
    fetcher: Fetcher
    started_at: int
    info: ModelInfo | None = None
    warm: bool = False

    @property
    def model_id(self) -> str:
        return self.settings.model.served_model_name or self.settings.model.model_path

    @property
    def ready(self) -> bool:
        return self.warm and self.engine.state == "ready"

    @property
    def uploads(self) -> Path:
        """Return the folder of the pictures that clients sent."""
        return self.jobs.uploads

    def loaded(self) -> ModelInfo:
        """Return the description of the model. Raises NotReady while it loads."""
        if self.info is None or not self.warm:
            raise NotReady(f"the model is {self.engine.state}; try again soon")
        return self.info

    def default(self, name: str) -> Any:
        """Return the value of a sampling field that a request does not give."""
        own = self.info.defaults if self.info is not None else {}
        return {**own, **self.sampling}.get(name, default_of(fields_of(SamplingParams)[name]))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that this server does not serve. Raises UnknownModel."""
        if name not in (None, self.model_id, self.settings.model.model_path):
            raise UnknownModel(f"{shorten(name)} is not served here; {self.model_id!r} is", field="model")

    async def submit(self, request: web.Request, spec: RequestSpec[F]) -> tuple[Job, F]:
        """Queue the job of a request, or return the job that its Idempotency-Key belongs to.

        Nothing of the body is held while the job waits.

        Raises:
            SgldError: a refusal; its field is one of the body.
        """
        body = await read_body(request, spec.fields)
        sources = find_sources(body, spec.pictures)
        asked = spec.parse(self, body.values, sources)
        info = self.loaded()
        check_sources(sources, info.pictures.max, self.model_id)
        async with self._pictures(sources, spec.before) as pictures:
            with as_sent(body.values):
                resolved = self._resolve(asked, pictures, spec)
            if spec.before is None:
                resolved = await self._find_adapters(resolved)
            record = await self._new_record(request, spec, asked, resolved, pictures.names, body)
            queued = await self.jobs.submit(record)
        if queued.id != record.id:
            await uploads.remove(pictures.names, self.uploads)
        return queued, asked.fields

    def _pictures(
        self, sources: Sequence[PictureSource], before: JobRecord | None
    ) -> AbstractAsyncContextManager[StoredPictures]:
        if before is not None:  # which may be deleted before this one ends
            return uploads.copied(before.params, self.uploads)
        return uploads.stored(read_sources(sources, self.fetcher), self.uploads, self.loaded().pictures.shape_from)

    def _resolve(self, asked: ParsedRequest[F], pictures: StoredPictures, spec: RequestSpec[F]) -> Resolved:
        base = self.sampling if spec.before is None else {}
        given = {**asked.sampling, **pictures.sampling}
        resolved = resolve(given, self.loaded(), base=base, picture=pictures.size)
        media.check_encodable(asked.format, resolved.spec, self.jobs.outputs.describe(resolved.params))
        return resolved

    async def _find_adapters(self, resolved: Resolved) -> Resolved:
        """Add the files of the adapters: registered ones, or downloaded now. Raises BadRequest for local paths."""
        if not resolved.params.loras:
            return resolved
        return resolved.evolve(loras=await self.engine.adapters.resolve(resolved.params.loras, "loras", local=False))

    async def _new_record(
        self,
        request: web.Request,
        spec: RequestSpec[F],
        asked: ParsedRequest[F],
        resolved: Resolved,
        inputs: list[str],
        body: Body,
    ) -> JobRecord:
        priority = asked.fields.priority
        if priority == "high" and not request[IDENTITY].admin:
            raise Forbidden("high needs an admin key; low and normal are allowed", field="priority")
        key = request.headers.get(KEY)
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
            raise BadRequest(f"1 to {MAX_KEY_CHARACTERS} characters are allowed", field=KEY)
        digest = "" if key is None else f"{request.method} {request.path} {await anyio.to_thread.run_sync(body.digest)}"
        return JobRecord(
            f"{spec.kind}_{uuid.uuid4().hex}",
            spec.kind,
            request[OWNER],
            resolved.outputs,
            asked.format,
            cost=resolved.cost,
            model=self.model_id,
            priority=priority,
            previews=asked.previews,
            remixed_from=spec.before.id if spec.before is not None else None,
            inputs=tuple(inputs),
            idempotency_key=key,
            digest=digest,
            notes=(*asked.notes, *resolved.notes),
        )


SERVICE = web.AppKey("service", Service)
