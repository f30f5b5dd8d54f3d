"""`sgld generate`: load once, make every prompt's outputs, write them, exit.

A single-request run of the engine that `sgld serve` runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from sgld import config, log, params
from sgld.cli import flags
from sgld.cli.progress import ProgressPrinter, warn
from sgld.config import RunOptions, Settings
from sgld.convert import fields_of, knob_of, plain, refuse_unbuilt, structure
from sgld.errors import BadRequest
from sgld.params import SamplingParams

DESCRIPTION = "Make images or videos from prompts. The last line of standard output is the path of the file."


@attrs.frozen
class Plan:
    """What one command line asks for, checked as far as it can be before the model is loaded."""

    settings: Settings
    options: RunOptions
    given: dict[str, Any]  # sampling values, the prompt aside
    prompts: list[str]

    @property
    def folder(self) -> Path:
        if self.options.output_file_path is not None:
            return Path(self.options.output_file_path).expanduser().parent
        return Path(self.settings.output_path).expanduser()

    @property
    def file_name(self) -> str | None:
        if self.options.output_file_path is not None:
            return Path(self.options.output_file_path).name
        return self.options.output_file_name


@attrs.frozen
class Output:
    """One file to make."""

    params: SamplingParams
    name: str
    format: str


def run(words: list[str]) -> int:
    """Parse, check, and make the outputs; or print help or the merged configuration."""
    parser = flags.parser_for("generate", DESCRIPTION, config.SECTIONS)
    typed, namespace = flags.parse(parser, words)
    from_file = config.read_file(namespace.config) if hasattr(namespace, "config") else {}
    merged = config.merge(from_file, config.read_environment(), typed)
    if hasattr(namespace, "print_config"):
        plan_of(merged, needs_prompt=False)
        print(flags.show(merged, config.SECTIONS), end="")
        return 0
    plan = plan_of(merged)
    log.set_up(plan.settings.log_level)
    for name in typed:
        field = fields_of(config.SECTION_OF[name])[name]
        if knob_of(field).serve_only:
            warn(f"{flags.flag_of(name)} only matters to `sgld serve`")
    refuse_unbuilt(plan.settings)
    return asyncio.run(_main(plan))


def plan_of(merged: Mapping[str, Any], *, needs_prompt: bool = True) -> Plan:
    """The typed parts of a merged configuration.

    Raises:
        BadRequest: a wrong type or range, no prompt, or options that contradict each other.
    """
    given = config.section(merged, SamplingParams)
    prompts = given.pop("prompt", [])
    options = structure(config.section(merged, RunOptions), RunOptions)
    settings = config.settings_of(merged)
    prompts = _prompts(prompts, options.prompt_path)
    for prompt in prompts or [""]:
        checked = structure({**given, "prompt": prompt}, SamplingParams)
        if needs_prompt:
            refuse_unbuilt(checked)
    if needs_prompt and not prompts:
        raise BadRequest("prompt: say what to show with --prompt or --prompt-path", "prompt")
    if options.output_file_name is not None and options.output_file_path is not None:
        raise BadRequest("output_file_path: it names folder and file; leave output_file_name out", "output_file_path")
    return Plan(settings, options, given, prompts)


def _prompts(prompt: Any, path: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list) else None
    if prompts is None or not all(isinstance(item, str) for item in prompts):
        raise BadRequest(f"prompt: {prompt!r} is not a valid text or list of text", "prompt")
    if path is not None:
        if prompts:
            raise BadRequest("prompt_path: give --prompt or --prompt-path, not both", "prompt_path")
        prompts = _lines(path)
    if any(not item.strip() for item in prompts):
        raise BadRequest("prompt: it is empty; say what to show", "prompt")
    return prompts


def _lines(path: str) -> list[str]:
    file = Path(path).expanduser()
    if file.suffix != ".txt":
        raise BadRequest(f"prompt_path: {path!r} must be a .txt file with one prompt a line", "prompt_path")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"prompt_path: {path!r} cannot be read: {error}", "prompt_path") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadRequest(f"prompt_path: {path!r} holds no prompt", "prompt_path")
    return prompts


async def _main(plan: Plan) -> int:
    from sgld.engine.engine import Engine

    async with Engine(plan.settings) as engine:
        making = asyncio.create_task(_make(plan, engine))
        _handle_interrupts(making, engine)
        try:
            return await making
        except asyncio.CancelledError:
            print("error: interrupted", file=sys.stderr)
            return 130


def _handle_interrupts(making: asyncio.Task[int], engine: Any) -> None:
    """^C cancels the job at its next step; a second one kills the workers."""

    def interrupted() -> None:
        if making.cancelling() or engine.state == "loading":
            engine.kill()
        else:
            print("\ncancelling; ^C again kills", file=sys.stderr)
        making.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted)


async def _make(plan: Plan, engine: Any) -> int:
    from sgld.storage.local import LocalStorage

    storage = LocalStorage(plan.folder)
    if plan.options.save_output:
        await asyncio.to_thread(storage.check, [])
    progress = ProgressPrinter()
    info = await engine.load(progress)
    progress.close()
    outputs, notes = _outputs(plan, info)
    for note in notes:
        warn(note)
    if plan.options.save_output:
        await asyncio.to_thread(storage.check, [output.name for output in outputs], plan.options.overwrite)
    performance = []
    for index, output in enumerate(outputs):
        title = f"[{index + 1}/{len(outputs)}]" if len(outputs) > 1 else ""
        progress = ProgressPrinter(title)
        print(f"{title or 'output'} seed {output.params.seed}", file=sys.stderr)
        media = await engine.generate(f"generate-{index}", output.params, progress)
        progress.close()
        path = await asyncio.to_thread(_write, plan, storage, output, media)
        performance.append(_performance(output, media))
        print(_result(plan, output, media, path), flush=True)
    if plan.options.perf_dump_path is not None:
        await asyncio.to_thread(_dump, plan.options.perf_dump_path, performance)
    return 0


def _outputs(plan: Plan, info: params.ModelInfo) -> tuple[list[Output], list[str]]:
    """Every output of every prompt, with the name and format of its file."""
    from sgld import media
    from sgld.storage import local

    asked = _asked_format(plan)
    one_frame = {"num_frames": 1} if asked in params.IMAGE_FORMATS or plan.options.data_type == "image" else {}
    resolved, notes = [], []
    for prompt in plan.prompts:
        sampling, notes = params.resolve({**one_frame, **plan.given, "prompt": prompt}, info)
        resolved += sampling.outputs()
    format = asked or ("png" if resolved[0].num_frames == 1 else "mp4")
    now, outputs = datetime.now(), []
    for index, sampling in enumerate(resolved):
        if plan.file_name is not None:
            name = local.indexed(local.complete_name(plan.file_name, format), index, len(resolved))
        else:
            assert isinstance(sampling.seed, int)
            name = local.default_name(sampling.prompt, now, sampling.seed, format)
            name = local.indexed(name, index, len(resolved)) if name in {output.name for output in outputs} else name
        media.check_encodable(
            format,
            num_frames=sampling.num_frames,
            height=sampling.height,
            width=sampling.width,
            fps=sampling.fps,
            metadata=media.describe(sampling, plan.settings.model_path),
        )
        outputs.append(Output(sampling, name, format))
    return outputs, notes


def _asked_format(plan: Plan) -> str | None:
    """The format that name, `return_frames` and `data_type` ask for; None leaves it to the number of frames."""
    from sgld import media
    from sgld.storage import local

    if plan.options.return_frames:
        return "npy"
    default = {"video": "mp4", "image": "png", None: None}[plan.options.data_type]
    if plan.file_name is None:
        return default
    named = media.format_of(local.complete_name(plan.file_name, default or "mp4"))
    return named if media.format_of(plan.file_name) else default


def _write(plan: Plan, storage: Any, output: Output, made: Any) -> Path | None:
    from sgld import media

    if not plan.options.save_output:
        return None
    sampling = output.params
    with storage.create(output.name, plan.options.overwrite) as part:
        media.encode(
            part,
            output.format,
            made.frames.array,
            fps=made.fps,
            quality=media.file_quality(output.format, sampling.output_quality, sampling.output_compression),
            metadata=media.describe(sampling, plan.settings.model_path),
            x264_preset=sampling.x264_preset,
        )
    path: Path = storage.path(output.name)
    return path


def _result(plan: Plan, output: Output, made: Any, path: Path | None) -> str:
    if not plan.options.json:
        return str(path) if path is not None else "not saved (save_output is false)"
    return json.dumps(
        {
            "path": str(path) if path is not None else None,
            "prompt": output.params.prompt,
            "seed": made.seed,
            "model": plan.settings.model_path,
            "num_frames": int(made.frames.shape[0]),
            "height": int(made.frames.shape[1]),
            "width": int(made.frames.shape[2]),
            "fps": made.fps,
            "seconds": round(sum(made.timings.stages_ms.values()) / 1e3, 3),
        },
        ensure_ascii=False,
    )


def _performance(output: Output, made: Any) -> dict[str, Any]:
    timings = made.timings
    return {
        "prompt": output.params.prompt,
        "seed": made.seed,
        "total_ms": sum(timings.stages_ms.values()),
        "stages_ms": timings.stages_ms,
        "steps_ms": timings.steps_ms,
        "peak_memory_bytes": timings.peak_memory_bytes,
        "params": plain(output.params),
    }


def _dump(path: str, performance: list[dict[str, Any]]) -> None:
    from sgld.storage.local import LocalStorage

    file = Path(path).expanduser()
    with LocalStorage(file.parent).create(file.name, overwrite=True) as part:
        part.write_text(json.dumps({"outputs": performance}, indent=2) + os.linesep)
