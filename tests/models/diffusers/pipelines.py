"""Loads twins as pipelines of diffusers, and makes outputs as a worker does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import attrs
import pytest
from torch import Tensor

from sgld.errors import BadRequest
from sgld.messages import Cancel, Load, Note, Progress
from sgld.models import load_family
from sgld.models.base import DiffusionModel, OpaquePipeline
from sgld.models.diffusers.running import DiffusersPipeline
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings
from sgld.worker.run_context import RunContext, Stopped
from sgld.worker.sampler import sample
from tests.models.parity import Request, picture

REQUEST = {
    "prompt": "a red cat", "negative_prompt": "blurred", "height": 32, "width": 48, "num_inference_steps": 3,
    "guidance_scale": 3.0, "seed": 7,
}  # fmt: skip

CLIP = REQUEST | {"num_frames": 5}


def load(folder: Path, components: dict[str, Path] | None = None, **settings: Any) -> DiffusionModel | OpaquePipeline:
    command = Load(Settings.of(model_path=str(folder), **settings), folder, components or {})
    return load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


def pipeline(folder: Path, components: dict[str, Path] | None = None, **settings: Any) -> DiffusersPipeline:
    made = load(folder, components, **{"backend": "diffusers"} | settings)
    assert isinstance(made, DiffusersPipeline)
    return made


@attrs.frozen
class Run:
    """The output of one request, and the events on the way."""

    frames: Tensor | None
    stages: list[tuple[str, int, int]]
    notes: list[str]
    context: RunContext


def run(model: DiffusersPipeline, request: Request, cancel_in: str | None = None) -> Run:
    """Make one output as a worker does. A cancel arrives once the stage `cancel_in` is reported."""
    params = resolve(request, model.info).params
    ours, theirs = Pipe()

    class Context(RunContext):
        @contextmanager
        def stage(self, name: str, total: int = 1, done: int = 0) -> Iterator[None]:
            with super().stage(name, total, done):
                if name == cancel_in:
                    ours.send(Cancel("job"))
                yield

    with ours, theirs:
        context = Context("job", Mesh.solo(), theirs)
        frames = None
        try:
            frames, _ = sample(model, params, context)
        except Stopped:
            assert cancel_in is not None
        events = []
        while ours.poll():
            events.append(ours.recv())
    stages = [(e.stage, e.step, e.total) for e in events if isinstance(e, Progress)]
    return Run(frames, stages, [e.text for e in events if isinstance(e, Note)], context)


def refusal(model: DiffusersPipeline, kind: type[BadRequest] = BadRequest, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        picture(model, REQUEST | changes)
    return caught.value.message


def set_class(folder: Path, name: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))
