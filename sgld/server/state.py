"""What the handlers share, under typed application keys."""

from __future__ import annotations

from typing import Any

import attrs
from aiohttp import web

from sgld.config import Settings
from sgld.convert import default_of, fields_of
from sgld.engine.engine import Engine
from sgld.errors import NotFound, NotReady
from sgld.params import ModelInfo, SamplingParams, resolve
from sgld.server.jobs import JobStore


@attrs.define
class Service:
    """The engine, its jobs, and the model's description once it is loaded."""

    settings: Settings
    sampling: dict[str, Any]  # the operator's defaults, over the model's and under a request's
    engine: Engine
    jobs: JobStore
    started_at: int
    info: ModelInfo | None = None
    warm: bool = False

    @property
    def model_id(self) -> str:
        return self.settings.served_model_name or self.settings.model_path

    @property
    def ready(self) -> bool:
        return self.warm and self.engine.state == "ready"

    def params(self, given: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """A request's values, fitted to the model. Raises `NotReady` while it loads."""
        if self.info is None or not self.warm:
            raise NotReady(f"the model is {self.engine.state}; try again soon")
        own = {name: value for name, value in given.items() if value is not None}
        return resolve({**self.sampling, **own}, self.info)

    def default(self, name: str) -> Any:
        """What a request that does not name this sampling field gets."""
        own = self.info.defaults if self.info is not None else {}
        return {**own, **self.sampling}.get(name, default_of(fields_of(SamplingParams)[name]))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that this server does not run."""
        if name not in (None, self.model_id, self.settings.model_path):
            raise NotFound(f"model: {name!r} is not served here; {self.model_id!r} is", "model")


SERVICE = web.AppKey("service", Service)
