"""A job: one image or video request, from the queue to its files, and the events that tell of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from functools import cached_property
from pathlib import PurePath
from typing import Any, ClassVar

import attrs

from sgld.errors import SgldError, from_code
from sgld.messages import Progress
from sgld.params import OutputParams, OutputSpec
from sgld.resolve import outputs_from, values_of
from sgld.storage.local import indexed

ENDED = ("completed", "failed", "deleted")
PICTURES = ("thumbnail", "spritesheet")  # that are made from a video when they are asked for
_LOG_EVENTS = 1000


@attrs.frozen
class Artifact:
    """A result's file in the output folder."""

    name: str
    media_type: str
    bytes: int
    seed: int
    frames: int


@attrs.frozen
class JobEvent:
    """One line of a job's log; numbers rise by one."""

    number: int
    name: str  # queued, progress, preview, completed, failed or deleted
    data: dict[str, Any]

    @cached_property
    def text(self) -> str:
        """The event of a video as JSON, made once for all who follow it."""
        return event_text(self.name, self.data)


def event_text(name: str, data: dict[str, Any]) -> str:
    """What a video's followers are sent, as JSON."""
    return json.dumps({"type": f"video.{name}", **data})


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.define(eq=False)
class Job:
    """Mutable, and touched by the loop alone. Plain data, so that the journal can hold it, but for the log."""

    id: str
    kind: str  # image or video
    owner: str  # the name of the key that asked; "" where there are no keys
    outputs: tuple[OutputParams, ...]
    output_format: str
    cost: float  # pixels x frames x steps x outputs: what queue and estimates reckon with
    model: str = ""
    priority: str = "normal"
    previews: int = 0
    remixed_from: str | None = None
    inputs: tuple[str, ...] = attrs.field(default=(), converter=_texts)  # names of uploads
    idempotency_key: str | None = None
    digest: str = ""  # of the request that has the key
    created_at: float = attrs.field(factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    status: str = "queued"
    progress: int = 0  # percent; never falls, and is 100 only with the files
    stage: str = "queued"
    step: int = 0
    total: int = 0
    error: SgldError | None = None
    artifacts: tuple[Artifact, ...] = attrs.field(default=(), converter=tuple)
    notes: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    prompt_tokens: int = 0
    output_tokens: int = 0
    # of this process only
    settled: bool = False  # its end is decided: by the first of completion, failure and cancel
    parked: bool = False  # it goes on in the next process, and tells nothing more in this one
    task: asyncio.Task[None] | None = None  # makes its outputs
    waiters: int = 0
    arrival: int = 0  # its number in the catalog
    _log: tuple[JobEvent, ...] = ()
    _number: int = 0
    _changed: asyncio.Event | None = None  # where somebody waits for the next event
    _followers: int = 0

    VOLATILE: ClassVar = (
        "settled", "parked", "task", "waiters", "arrival", "_log", "_number", "_changed", "_followers",
    )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def number(self) -> int:
        """Of its last event."""
        return self._number

    @property
    def followed(self) -> bool:
        """Whether somebody reads its events."""
        return self._followers > 0

    @property
    def seeds(self) -> list[int]:
        return [output.seed for output in self.outputs]

    @property
    def params(self) -> OutputParams:
        """Return the parameters of the first output. The others differ in the seed alone."""
        return self.outputs[0]

    @property
    def spec(self) -> OutputSpec:
        """Return the shape of each output."""
        return OutputSpec.of(self.params)

    def settle(self) -> bool:
        """Decide its end: true for the first who asks, who then must end it."""
        first, self.settled = not self.settled, True
        return first

    def park(self) -> None:
        """Leave it to the next process; who follows it here hears no more."""
        self.settled = self.parked = True
        self._wake()

    def ending(self, error: SgldError | None, ttl: int) -> dict[str, Any]:
        """What changes when it has completed, or failed with `error`; the journal hears of it first."""
        now, status = time.time(), "failed" if error is not None else "completed"
        changes = {"status": status, "stage": status, "error": error, "completed_at": now}
        changes["expires_at"] = now + ttl if ttl else None
        return changes if error is not None else changes | {"progress": 100}

    def change(self, **changes: Any) -> None:
        """Set several fields at once."""
        for name, value in changes.items():
            setattr(self, name, value)

    def state(self, position: int | None = None, eta_s: float | None = None) -> dict[str, Any]:
        """Where it stands: what every event and every answer tells."""
        return {
            "id": self.id,
            "status": self.status,
            "progress": self.progress,
            "stage": self.stage,
            "step": self.step,
            "total": self.total,
            "queue_position": position,
            "eta_seconds": None if eta_s is None else round(eta_s, 1),
        }

    # Events

    def publish(self, name: str, data: dict[str, Any]) -> None:
        """Add a line to the log and wake who follows it; of a job that has ended its fields tell as much."""
        self._number += 1
        if self.ended and not self._followers:
            self._log = ()
        else:  # who reads slowly still gets what came before the end
            self._log = (*self._log[1 - _LOG_EVENTS :], JobEvent(self._number, name, data))
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        """Until the next event."""
        self._changed = self._changed or asyncio.Event()
        await self._changed.wait()

    async def follow(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events with higher numbers than `after`, until and with the one of its end, or until it is parked."""
        self._followers += 1
        try:
            if self.ended and not self._log and self._number > after:
                yield JobEvent(self._number, self.status, self.state())
                return
            while True:
                while unseen := [event for event in self._log if event.number > after]:
                    for event in unseen:
                        after = event.number
                        yield event
                if self.ended or self.parked:
                    return
                await self._change()
        finally:
            self._followers -= 1
            if self.ended and not self._followers:
                self._log = ()

    async def wait(self) -> None:
        """Until its end, or until it is parked."""
        while not (self.ended or self.parked):
            await self._change()

    # The journal

    def record(self, **changes: Any) -> dict[str, Any]:
        """Everything that outlives the process, as JSON; with these changes."""
        names = [field.name for field in attrs.fields(Job) if field.name not in self.VOLATILE]
        record = {name: getattr(self, name) for name in names} | changes
        error = record["error"]
        return record | {
            "params": values_of(record.pop("outputs")),
            "artifacts": [attrs.asdict(artifact) for artifact in record["artifacts"]],
            "error": [error.code, error.message, error.param] if error is not None else None,
        }

    @classmethod
    def restore(cls, record: dict[str, Any]) -> Job:
        """A job as the journal holds it.

        Raises:
            SgldError: it has fields of another version, or no seeds.
            KeyError, TypeError: it lacks a field, or one has another type.
        """
        known = attrs.fields_dict(cls).keys() - {"outputs"} | {"params"}
        if unknown := sorted(record.keys() - known):
            raise SgldError(f"it has {unknown[0]!r}, as another version of sgld writes it")
        own = {
            "outputs": outputs_from(record["params"]),
            "artifacts": [Artifact(**artifact) for artifact in record["artifacts"]],
            "error": from_code(*record["error"]) if record["error"] else None,
        }
        # its events' numbers are higher than any that a process before this one gave out
        values = {name: value for name, value in record.items() if name != "params"} | own
        return cls(**values, settled=record["status"] in ENDED, number=int(1000 * time.time()))

    # What a rank says

    def advance(self, event: Progress) -> None:
        """Take the step of an output's stage."""
        percent = self.spec.percent(event.stage, event.step, event.total)
        self.progress = max(self.progress, min(int((100 * event.item + percent) / len(self.seeds)), 99))
        self.stage, self.step, self.total = event.stage, event.step, event.total

    def file_names(self) -> list[str]:
        """The file of each output; a single one carries no number."""
        return [indexed(f"{self.id}.{self.output_format}", i, len(self.seeds)) for i in range(len(self.seeds))]

    def picture_names(self) -> list[str]:
        """The files of a video's small pictures, made or not."""
        return [picture_name(self.file_names()[0], each) for each in PICTURES] if self.kind == "video" else []


def picture_name(video: str, variant: str) -> str:
    """The file of a small picture, beside its video."""
    return f"{PurePath(video).stem}.{variant}.webp"
