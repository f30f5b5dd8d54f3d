"""What the handlers share, under a typed application key."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import anyio.to_thread
import attrs
from aiohttp import web

from sgld.config import Settings
from sgld.convert import default_of, fields_of, shorten
from sgld.engine.engine import Engine
from sgld.errors import BadRequest, Forbidden, NotReady, UnknownModel
from sgld.params import ModelInfo, SamplingParams
from sgld.resolve import Resolved, resolve, values_of
from sgld.server.http.auth import IDENTITY, OWNER
from sgld.server.http.body import Body
from sgld.server.http.fetch import Fetcher
from sgld.server.http.schema import CommonFields
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.job import Job
from sgld.server.jobs.store import JobStore

MAX_KEY_CHARACTERS = 255


@attrs.define
class Service:
    """The engine, its jobs, and the model's description once it is loaded."""

    settings: Settings
    sampling: dict[str, Any]  # the operator's defaults, over the model's and under a request's
    engine: Engine
    jobs: JobStore
    fetcher: Fetcher
    started_at: int
    info: ModelInfo | None = None
    warm: bool = False

    @property
    def model_id(self) -> str:
        return self.settings.served_model_name or self.settings.model_path

    @property
    def ready(self) -> bool:
        return self.warm and self.engine.state == "ready"

    @property
    def uploads(self) -> Path:
        """The folder of pictures that requests brought."""
        return self.jobs.uploads

    def params(self, given: dict[str, Any], picture: tuple[int, int] | None = None) -> Resolved:
        """A request's values, fitted to the model, with a seed for each output. Raises NotReady while it loads.

        `picture` is the width and height of its first picture.
        """
        return resolve(given, self.loaded(), base=self.sampling, picture=picture)

    def again(self, before: Job, prompt: str) -> Resolved:
        """A job's values, seeds included, with another prompt, fitted to the model as it stands now.

        Raises BadRequest for a job of another model, and what `resolve` raises.
        """
        info = self.loaded()
        if before.model != self.model_id:
            raise BadRequest(
                f"id: {before.id!r} was made by {before.model!r}, and this server runs {self.model_id!r}", "id"
            )
        kept = {name: value for name, value in values_of(before.outputs).items() if name not in info.unsupported}
        return resolve({**kept, "prompt": prompt}, info)

    def loaded(self) -> ModelInfo:
        """The model's description. Raises NotReady while it loads."""
        if self.info is None or not self.warm:
            raise NotReady(f"the model is {self.engine.state}; try again soon")
        return self.info

    def default(self, name: str) -> Any:
        """What a request that does not name this sampling field gets."""
        own = self.info.defaults if self.info is not None else {}
        return {**own, **self.sampling}.get(name, default_of(fields_of(SamplingParams)[name]))

    async def adapted(self, resolved: Resolved) -> Resolved:
        """With the files of its adapters: named ones, or downloaded now. Raises BadRequest; local paths are none."""
        if not resolved.params.loras:
            return resolved
        found = await self.engine.adapters.resolve(resolved.params.loras, "loras", local=False)
        return resolved.evolve(loras=found)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that this server does not run."""
        if name not in (None, self.model_id, self.settings.model_path):
            raise UnknownModel(f"model: {shorten(name)} is not served here; {self.model_id!r} is", "model")

    async def submit(self, job: Job) -> Job:
        """Queue it; where its Idempotency-Key brought another one before, that one, and its own pictures go."""
        queued = await self.jobs.submit(job)
        if queued is not job:
            await uploads.remove(job.inputs, self.uploads)
        return queued

    async def new_job(
        self,
        request: web.Request,
        kind: str,
        fields: CommonFields,
        resolved: Resolved,
        body: Body,
        **own: Any,
    ) -> Job:
        """A job for this caller. Raises Forbidden for a priority that its key may not have."""
        if fields.priority == "high" and not request[IDENTITY].admin:
            raise Forbidden("priority: high needs an admin key; low and normal are allowed", "priority")
        key = request.headers.get("Idempotency-Key")
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
            raise BadRequest(f"Idempotency-Key: 1 to {MAX_KEY_CHARACTERS} characters are allowed", "Idempotency-Key")
        digest = "" if key is None else f"{request.method} {request.path} {await anyio.to_thread.run_sync(body.digest)}"
        return Job(
            f"{kind}_{uuid.uuid4().hex}",
            kind,
            request[OWNER],
            resolved.outputs,
            cost=resolved.cost,
            model=self.model_id,
            priority=fields.priority,
            idempotency_key=key,
            digest=digest,
            **own,
        )


SERVICE = web.AppKey("service", Service)
