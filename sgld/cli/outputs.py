"""Name, check and write the files of a run, and report on them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from sgld import __version__, inputs, media
from sgld.cli.plan import Plan
from sgld.convert import structure, unstructure
from sgld.errors import BadRequest, OutputError
from sgld.messages import Media
from sgld.params import ModelInfo, OutputParams, OutputSpec, SamplingParams
from sgld.resolve import resolve
from sgld.storage.local import LocalStorage, complete_name, default_name, indexed


@attrs.frozen
class Output:
    """A file to make."""

    params: OutputParams
    name: str
    format: str
    chosen: bool  # the user chose the name

    @property
    def seed(self) -> int:
        """Return the seed of the noise."""
        return self.params.seed


@attrs.frozen
class Saved:
    """An output that was made, with its file if one was written."""

    output: Output
    path: Path | None
    media: Media
    stages_ms: dict[str, float]


def check_early(plan: Plan, storage: LocalStorage) -> None:
    """Refuse files that cannot be read or written, before the model is loaded."""
    for values in plan.sampling:
        sizes = [inputs.size_of(path) for path in values.get("image_path") or ()]
        if sizes and (mask := values.get("mask_path")) is not None:
            inputs.read_mask(mask, sizes[0])
    guess = structure(plan.sampling[0], SamplingParams)
    frames = plan.sampling[0].get("num_frames")
    format = plan.format or (plan.format_for(frames) if frames is not None else None)
    if format is not None:
        check_format(plan, guess, OutputSpec.of(guess), format)
    if plan.report is not None:
        _check_report(plan.report, plan.options.overwrite)
    name = plan.file_name
    if name is not None:
        name = complete_name(name, format or "mp4")
    if plan.options.save_output:
        total = len(plan.prompts) * guess.num_outputs_per_prompt
        names = [indexed(name, i, total) for i in range(total)] if name and format else []
        storage.check(names, plan.options.overwrite)


def _check_report(file: Path, overwrite: bool) -> None:
    try:
        LocalStorage(file.parent).check([file.name], overwrite)
    except BadRequest as error:
        raise error.renamed("perf_dump_path") from None


def absent_folders(plan: Plan) -> list[Path]:
    """Return the folders that the run will have to make, innermost first."""
    folders = [plan.folder, *([plan.report.parent] if plan.report else [])]
    return [one for folder in folders for one in (folder, *folder.parents) if not os.access(one, os.F_OK)]


def remove_empty(folders: list[Path]) -> None:
    """Remove the empty ones of these folders, in this order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_format(plan: Plan, sampling: SamplingParams, spec: OutputSpec, format: str) -> None:
    """Refuse an output that the format cannot hold."""
    media.check_encodable(format, spec, media.describe(sampling, plan.settings.model.model_path, plan.settings))


def outputs_of(plan: Plan, info: ModelInfo) -> tuple[list[Output], list[str]]:
    """Return every output of every prompt, and warnings for the user. Blocks."""
    found: list[tuple[OutputParams, OutputSpec]] = []
    notes: dict[str, None] = {}
    for given in plan.sampling:
        pictures = given.get("image_path")
        picture = inputs.size_of(pictures[info.pictures.shape_from]) if pictures else None
        resolved = resolve(given, info, picture=picture)
        found += [(output, resolved.spec) for output in resolved.outputs]
        format = plan.format_for(resolved.spec.frames)
        notes |= dict.fromkeys([*resolved.notes, *_idle(plan, given, format), *_silent(format, resolved.spec)])
    now = datetime.now()
    return [_output(plan, *one, i, len(found), now) for i, one in enumerate(found)], [*notes]


def _idle(plan: Plan, given: Mapping[str, object], format: str) -> list[str]:
    """Return warnings for options without effect."""
    reasons = {}
    if format != "mp4" and given.get("x264_preset"):
        reasons["x264_preset"] = f"a {format} is no mp4"
    for name in ("output_quality", "output_compression"):
        if format in media.LOSSLESS and given.get(name) not in (None, "default"):
            reasons[name] = f"a {format} has no quality to choose"
    return [f"{plan.spelled.spell(name)}: ignored; {reason}" for name, reason in reasons.items()]


def _silent(format: str, spec: OutputSpec) -> list[str]:
    """Return a warning for sound that the file cannot hold."""
    if not spec.audio or media.FORMATS[format].sound:
        return []
    return [f"the sound is left out: a {format} holds none; choose mp4 or webm"]


def _output(plan: Plan, sampling: OutputParams, spec: OutputSpec, i: int, n: int, now: datetime) -> Output:
    format = plan.format_for(spec.frames)
    check_format(plan, sampling, spec, format)
    if plan.file_name is not None:
        name = complete_name(plan.file_name, format)
    else:
        name = default_name(sampling.prompt, now, sampling.seed, format)
    return Output(sampling, indexed(name, i, n), format, plan.file_name is not None)


def save(plan: Plan, storage: LocalStorage, output: Output, made: Media, parts: list[Path]) -> Saved:
    """Encode and write one output. The unfinished file is added to `parts`. Blocks."""
    started = time.perf_counter()
    path = _write(plan, storage, output, made, parts) if plan.options.save_output else None
    stages = {**made.timings.stages_ms, "save": 1e3 * (time.perf_counter() - started)}
    return Saved(output, path, made, stages)


def _write(plan: Plan, storage: LocalStorage, output: Output, made: Media, parts: list[Path]) -> Path:
    """Write the file. If a default name is taken, use the next free one."""
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
        metadata=media.describe(sampling, plan.settings.model.model_path, plan.settings),
        x264_preset=sampling.x264_preset,
        audio=made.audio,
    )


def line_of(plan: Plan, saved: Saved) -> str:
    """Return the line for standard output: the path, or one JSON object."""
    if not plan.options.json:
        return str(saved.path)
    frames, height, width = saved.media.frames.shape[:3]
    answer = {
        "path": None if saved.path is None else str(saved.path),
        "prompt": saved.output.params.prompt,
        "seed": saved.output.seed,
        "model": plan.settings.model.model_path,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": saved.media.fps,
        "seconds": round(sum(saved.stages_ms.values()) / 1e3, 3),
    }
    return json.dumps(answer, ensure_ascii=False)


def dump_performance(plan: Plan, load_ms: float, made: list[Saved]) -> None:
    """Write `perf_dump_path`: milliseconds by stage and step, and peak memory. Blocks."""
    assert plan.report is not None
    report = {
        "sgld": __version__,
        "model": plan.settings.model.model_path,
        "num_gpus": plan.settings.parallel.num_gpus,
        "load_ms": load_ms,
        "outputs": [_performance(saved) for saved in made],
    }
    with LocalStorage(plan.report.parent).create(plan.report.name, overwrite=True) as part:
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
        "params": unstructure(saved.output.params),
    }
