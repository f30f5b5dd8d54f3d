"""Outputs as they leave an engine, or a group of workers."""

from __future__ import annotations

from collections.abc import Callable

from sgld.engine.cancel import CancelToken
from sgld.engine.engine import Engine
from sgld.engine.group import WorkerGroup
from sgld.messages import Event, Generate, Media, OutputReady
from sgld.params import OutputParams

Emit = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Follow nothing."""


class Outputs:
    """An emit that collects outputs by item, and passes other events on."""

    def __init__(self, follow: Emit = ignore):
        self.by_item: dict[int, Media] = {}
        self._follow = follow

    def __call__(self, event: Event) -> None:
        if isinstance(event, OutputReady):
            assert event.item not in self.by_item
            self.by_item[event.item] = event.media
        else:
            self._follow(event)


async def generate_one(
    engine: Engine, job_id: str, params: OutputParams, follow: Emit = ignore, previews: int = 0
) -> Media:
    """Make one output through the engine."""
    outputs = Outputs(follow)
    await engine.generate(job_id, [params], outputs, previews)
    (media,) = outputs.by_item.values()
    return media


def run_one(group: WorkerGroup, command: Generate, follow: Emit = ignore, token: CancelToken | None = None) -> Media:
    """Make the one output of `command`."""
    outputs = Outputs(follow)
    group.run(command, outputs, token)
    (media,) = outputs.by_item.values()
    return media
