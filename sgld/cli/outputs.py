"""Outputs: the files of a run, from their names to what is said of them."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from sgld import __version__, inputs, media, params
from sgld.cli.plan import Plan
from sgld.convert import plain, structure
from sgld.errors import OutputError
from sgld.messages import Media
from sgld.params import ModelInfo, SamplingParams
from sgld.storage.local import LocalStorage, complete_name, default_name, indexed


@attrs.frozen
class Output:
    """One file to make."""

    params: SamplingParams
    name: str
    format: str
    chosen: bool  # the user chose the name

    @property
    def seed(self) -> int:
        """The noise's seed."""
        assert isinstance(self.params.seed, int)
        return self.params.seed


@attrs.frozen
class Saved:
    """One file that was made, or only measured."""

    output: Output
    path: Path | None
    media: Media
    stages_ms: dict[str, float]


def check_early(plan: Plan, storage: LocalStorage) -> None:
    """Refuse files that cannot be read, and names, folders and formats that cannot be written: before the load."""
    for values in plan.sampling:
        sizes = [inputs.size_of(path) for path in values.get("image_path") or ()]
        if sizes and (mask := values.get("mask_path")) is not None:
            inputs.read_mask(mask, sizes[0])
    guess = structure(plan.sampling[0], SamplingParams)
    frames = plan.sampling[0].get("num_frames")
    format = plan.format or (plan.format_for(frames) if frames is not None else None)
    if format is not None:
        check_format(plan, guess, format)
    if plan.options.perf_dump_path is not None:
        file = Path(plan.options.perf_dump_path).expanduser()
        LocalStorage(file.parent).check([file.name], plan.options.overwrite)
    name = plan.file_name
    if name is not None:
        name = complete_name(name, format or "mp4")
    if plan.options.save_output:
        total = len(plan.prompts) * guess.num_outputs_per_prompt
        names = [indexed(name, i, total) for i in range(total)] if name and format else []
        storage.check(names, plan.options.overwrite)


def check_format(plan: Plan, sampling: SamplingParams, format: str) -> None:
    """Refuse what the format cannot hold."""
    media.check_encodable(
        format,
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        fps=sampling.fps,
        metadata=media.describe(sampling, plan.settings.model_path),
    )


def outputs_of(plan: Plan, info: ModelInfo) -> tuple[list[Output], list[str]]:
    """Every output of every prompt, with the name and format of its file; and warnings for the user. Blocks."""
    sampling: list[SamplingParams] = []
    notes: list[str] = []
    for given in plan.sampling:
        pictures = given.get("image_path")
        resolved, more = params.resolve(given, info, picture=inputs.size_of(pictures[0]) if pictures else None)
        sampling += resolved.outputs()
        notes += [note for note in more if note not in notes]
    now = datetime.now()
    return [_output(plan, one, i, len(sampling), now) for i, one in enumerate(sampling)], notes


def _output(plan: Plan, sampling: SamplingParams, i: int, n: int, now: datetime) -> Output:
    assert isinstance(sampling.seed, int)
    format = plan.format_for(sampling.num_frames)
    check_format(plan, sampling, format)
    if plan.file_name is not None:
        name = complete_name(plan.file_name, format)
    else:
        name = default_name(sampling.prompt, now, sampling.seed, format)
    return Output(sampling, indexed(name, i, n), format, plan.file_name is not None)


def save(plan: Plan, storage: LocalStorage, output: Output, made: Media, parts: list[Path]) -> Saved:
    """Encode and write one output; `parts` takes note of the unfinished file. Blocks."""
    started = time.perf_counter()
    path = _write(plan, storage, output, made, parts) if plan.options.save_output else None
    stages = {**made.timings.stages_ms, "save": 1e3 * (time.perf_counter() - started)}
    return Saved(output, path, made, stages)


def _write(plan: Plan, storage: LocalStorage, output: Output, made: Media, parts: list[Path]) -> Path:
    """The file; a default name that is taken, or becomes so meanwhile, gives way to the next free one."""
    while True:
        name = output.name if output.chosen else storage.free_name(output.name)
        try:
            with storage.create(name, plan.options.overwrite) as part:
                parts.append(part)
                _encode(part, plan, output, made)
            return storage.path(name)
        except OutputError:
            if output.chosen or storage.free_name(name) == name:
                raise


def _encode(part: Path, plan: Plan, output: Output, made: Media) -> None:
    sampling = output.params
    media.encode(
        part,
        output.format,
        made.frames.array,
        fps=made.fps,
        quality=media.file_quality(output.format, sampling.output_quality, sampling.output_compression),
        metadata=media.describe(sampling, plan.settings.model_path),
        x264_preset=sampling.x264_preset,
    )


def line_of(plan: Plan, saved: Saved) -> str:
    """What standard output says of it: the path, or one JSON object."""
    if not plan.options.json:
        return str(saved.path)
    frames, height, width = saved.media.frames.shape[:3]
    answer = {
        "path": None if saved.path is None else str(saved.path),
        "prompt": saved.output.params.prompt,
        "seed": saved.output.seed,
        "model": plan.settings.model_path,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": saved.media.fps,
        "seconds": round(sum(saved.stages_ms.values()) / 1e3, 3),
    }
    return json.dumps(answer, ensure_ascii=False)


def dump_performance(plan: Plan, load_ms: float, made: list[Saved]) -> None:
    """Write `perf_dump_path`: milliseconds by stage and step, and peak memory. Blocks."""
    assert plan.options.perf_dump_path is not None
    file = Path(plan.options.perf_dump_path).expanduser()
    report = {
        "sgld": __version__,
        "model": plan.settings.model_path,
        "num_gpus": plan.settings.num_gpus,
        "load_ms": load_ms,
        "outputs": [_performance(saved) for saved in made],
    }
    with LocalStorage(file.parent).create(file.name, overwrite=True) as part:
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + os.linesep, encoding="utf-8")


def _performance(saved: Saved) -> dict[str, Any]:
    timings = saved.media.timings
    return {
        "path": None if saved.path is None else str(saved.path),
        "prompt": saved.output.params.prompt,
        "seed": saved.output.seed,
        "total_ms": sum(saved.stages_ms.values()),
        "stages_ms": saved.stages_ms,
        "steps_ms": timings.steps_ms,
        "peak_memory_bytes": timings.peak_memory_bytes,
        "params": plain(saved.output.params),
    }
