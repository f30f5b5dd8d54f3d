"""JobRecord: the state of one job as a frozen value, and its JSON document."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import Any

import attrs
from cattrs import Converter
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from sgld.errors import SgldError, from_code
from sgld.messages import Progress
from sgld.params import OutputParams, OutputSpec
from sgld.resolve import outputs_from, values_of
from sgld.storage.local import indexed

ENDED = ("completed", "failed", "deleted")
PICTURES = ("thumbnail", "spritesheet")  # made from a video on demand


@attrs.frozen
class Artifact:
    """The file of one output in the result store."""

    name: str
    media_type: str
    bytes: int
    seed: int
    frames: int


@attrs.frozen
class JobProgress:
    """The position of a job in its stages."""

    percent: int = 0  # never falls; 100 only with the files
    stage: str = "queued"
    step: int = 0
    total: int = 0


@attrs.frozen
class Outcome:
    """The end of a job: completed with files, or failed or deleted before with an error, `Cancelled` included."""

    status: str
    error: SgldError | None = None
    artifacts: tuple[Artifact, ...] = ()


@attrs.frozen
class JobRecord:
    """One image or video request, from the queue to its files. Everything here outlives the process."""

    id: str
    kind: str  # image or video
    owner: str  # the name of the API key; "" without keys
    outputs: tuple[OutputParams, ...]
    output_format: str
    cost: float  # pixels x frames x steps x outputs: the unit of the queue and the estimates
    model: str = ""
    priority: str = "normal"
    previews: int = 0
    remixed_from: str | None = None
    inputs: tuple[str, ...] = ()  # names of uploaded files
    idempotency_key: str | None = None
    digest: str = ""  # of the request that came with the key
    created_at: float = attrs.field(factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    status: str = "queued"
    progress: JobProgress = JobProgress()
    error: SgldError | None = None
    artifacts: tuple[Artifact, ...] = ()
    notes: tuple[str, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def resumable(self) -> bool:
        """Return whether a restarted server makes the job again. Nobody waits for an image after a restart."""
        return self.kind == "video"

    @property
    def params(self) -> OutputParams:
        """Return the parameters of the first output. The others differ in the seed alone."""
        return self.outputs[0]

    @property
    def seeds(self) -> list[int]:
        return [output.seed for output in self.outputs]

    @property
    def spec(self) -> OutputSpec:
        """Return the shape of each output."""
        return OutputSpec.of(self.params)

    @property
    def file_names(self) -> list[str]:
        """Return the file name of each output. A single one carries no number."""
        return [indexed(f"{self.id}.{self.output_format}", i, len(self.outputs)) for i in range(len(self.outputs))]

    @property
    def all_file_names(self) -> list[str]:
        """Return the names of all files that the job may have, with the small pictures of a video."""
        pictures = [picture_name(self.file_names[0], each) for each in PICTURES] if self.kind == "video" else []
        return self.file_names + pictures

    def begin(self) -> JobRecord:
        """Return the job with one more attempt under way."""
        return attrs.evolve(
            self, status="in_progress", started_at=time.time(), attempts=self.attempts + 1, output_tokens=0
        )

    def advance(self, event: Progress) -> JobRecord:
        """Return the job after a step of one of its outputs."""
        percent = self.spec.percent(event.stage, event.step, event.total)
        percent = min(int((100 * event.item + percent) / len(self.outputs)), 99)
        progress = JobProgress(max(self.progress.percent, percent), event.stage, event.step, event.total)
        return attrs.evolve(self, progress=progress)

    def end(self, outcome: Outcome, ttl: int) -> JobRecord:
        """Return the job with its end. Results expire after `ttl` seconds, or never if it is 0."""
        now = time.time()
        percent, stage = (100, "completed") if outcome.error is None else (self.progress.percent, "failed")
        return attrs.evolve(
            self,
            status=outcome.status,
            progress=attrs.evolve(self.progress, percent=percent, stage=stage),
            error=outcome.error,
            artifacts=outcome.artifacts,
            completed_at=now,
            expires_at=now + ttl if ttl else None,
        )

    def requeue(self, attempts: int) -> JobRecord:
        """Return the job back in the queue."""
        return attrs.evolve(self, status="queued", progress=JobProgress(), attempts=attempts)


def picture_name(video: str, variant: str) -> str:
    """Return the name of a small picture beside its video."""
    return f"{PurePath(video).stem}.{variant}.webp"


def _make_converter() -> Converter:
    """Make the converter between records and documents; a document calls the outputs `params`."""
    converter = Converter(detailed_validation=False, unstruct_collection_overrides={tuple: list})
    converter.register_unstructure_hook(SgldError, lambda error: [error.code, error.message, error.param])
    converter.register_structure_hook(SgldError, lambda value, _: from_code(*value))
    outputs = override(
        rename="params", unstruct_hook=values_of, struct_hook=lambda value, _: outputs_from(value)
    )  # validated when they were written
    converter.register_unstructure_hook(JobRecord, make_dict_unstructure_fn(JobRecord, converter, outputs=outputs))
    converter.register_structure_hook(JobRecord, make_dict_structure_fn(JobRecord, converter, outputs=outputs))
    return converter


_CONVERTER = _make_converter()
_PROGRESS_KEYS = {"progress": "percent", "stage": "stage", "step": "step", "total": "total"}  # flat in the document
_KEYS = {field.name for field in attrs.fields(JobRecord)} - {"outputs"} | {"params", *_PROGRESS_KEYS}


def to_document(record: JobRecord) -> dict[str, Any]:
    """Convert a record to a flat JSON object."""
    document: dict[str, Any] = _CONVERTER.unstructure(record)
    return document | {key: getattr(record.progress, name) for key, name in _PROGRESS_KEYS.items()}


def from_document(document: dict[str, Any]) -> JobRecord:
    """Convert a JSON object back to its record.

    Raises:
        SgldError: a field of another version, or no seeds.
        KeyError, TypeError, ValueError: a field is missing or has another type.
    """
    if unknown := sorted(document.keys() - _KEYS):
        raise SgldError(f"it has {unknown[0]!r}, as another version of sgld writes it")
    progress = {name: document[key] for key, name in _PROGRESS_KEYS.items() if key in document}
    return _CONVERTER.structure(document | {"progress": progress}, JobRecord)
