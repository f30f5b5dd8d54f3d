"""Plan a run of `sgld generate`, and check it as far as possible before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import attrs

from sgld import config
from sgld.cli.sources import Layer
from sgld.convert import Knob, knob_of, refuse_unbuilt, structure
from sgld.errors import BadRequest, NotBuilt
from sgld.params import IMAGE_FORMATS, VIDEO_FORMATS, SamplingParams, check_picture
from sgld.settings import RunOptions, Settings, settings_fields

DEFAULT_FORMATS = {"video": "mp4", "image": "png"}


@attrs.frozen
class Plan:
    """A run: one load, and the outputs of every prompt."""

    settings: Settings
    options: RunOptions
    prompts: list[str]
    sampling: list[dict[str, Any]]  # what was given for each prompt, the prompt included
    spelled: Layer

    @property
    def folder(self) -> Path:
        """Return the folder of the files."""
        if self.options.output_file_path is not None:
            return config.user_path(self.options.output_file_path, "output_file_path").parent
        return config.user_path(self.settings.storage.output_path, "output_path")

    @property
    def file_name(self) -> str | None:
        """Return the name that the user chose."""
        if self.options.output_file_path is not None:
            return self.options.output_file_path.rpartition("/")[2]
        return self.options.output_file_name

    @property
    def report(self) -> Path | None:
        """Return the path of the performance report."""
        path = self.options.perf_dump_path
        return None if path is None else config.user_path(path, "perf_dump_path")

    @property
    def format(self) -> str | None:
        """Return the format by extension, `return_frames` and `data_type`; None leaves it to the number of frames."""
        if self.options.return_frames:
            return "npy"
        return _extension(self.file_name) or DEFAULT_FORMATS.get(self.options.data_type or "")

    def format_for(self, num_frames: int) -> str:
        """Return the format of an output with that many frames."""
        return self.format or ("png" if num_frames == 1 else "mp4")


def _extension(name: str | None) -> str | None:
    suffix = PurePath(name or "").suffix[1:].lower()
    return suffix if suffix in (*VIDEO_FORMATS, *IMAGE_FORMATS, "npy") else None


def plan_of(layer: Layer) -> Plan:
    """Build the plan of a merged configuration.

    Raises:
        BadRequest: a wrong type or range, or options that contradict each other.
    """
    options = structure(config.section(layer.values, RunOptions), RunOptions)
    settings = config.settings_of(layer.values)
    given = _with_full_paths(config.section(layer.values, SamplingParams))
    prompts = _prompts(given.pop("prompt", []), options.prompt_path)
    structure(given, SamplingParams)
    plan = Plan(settings, options, prompts, _per_prompt(given, prompts), layer)
    _check_options(plan)
    return attrs.evolve(plan, sampling=[_with_one_frame(plan, values) for values in plan.sampling])


def refuse_early(plan: Plan) -> None:
    """Refuse a plan that no model can make. Raises NotBuilt, BadRequest."""
    own = {name: value for name, value in plan.spelled.values.items() if name not in serve_only()}
    sampling = [structure(values, SamplingParams) for values in plan.sampling]
    refuse_unbuilt(config.settings_of(own), *sampling[:1], spell=plan.spelled.spell)
    for values in plan.sampling:
        check_picture(values)
    if not plan.prompts:
        raise BadRequest("say what to show with --prompt or --prompt-path", field="prompt")


def serve_only() -> dict[str, Knob]:
    """Return the knobs that `generate` ignores."""
    return {name: meta for name, field in settings_fields().items() if (meta := knob_of(field)).serve_only}


def ignored(layer: Layer) -> list[str]:
    """Return the ignored knobs of the command line and the config file. The environment is shared with `serve`."""
    given = {name: spelled for name, spelled in layer.spelled.items() if name in serve_only()}
    return [spelled for name, spelled in given.items() if spelled != serve_only()[name].env]


def _prompts(prompt: Any, path: str | None) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(item, str) for item in prompts):
        raise BadRequest(f"{prompt!r} is not a valid text or list of text", field="prompt")
    if path is not None:
        if prompts:
            raise BadRequest("give --prompt or --prompt-path, not both", field="prompt_path")
        prompts = _lines(path)
    if not all(item.strip() for item in prompts):
        raise BadRequest("it is empty; say what to show", field="prompt")
    return prompts


def _lines(path: str) -> list[str]:
    file = config.user_path(path, "prompt_path")
    if file.suffix.lower() != ".txt":
        raise BadRequest(f"{path!r} must be a .txt file with one prompt a line", field="prompt_path")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise BadRequest(f"{path!r} cannot be read: {error.strerror}", field="prompt_path") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path!r} is not UTF-8 text: {error}", field="prompt_path") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadRequest(f"{path!r} holds no prompt", field="prompt_path")
    return prompts


def _with_full_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Make the paths of input files absolute, for other processes and for errors."""
    full = dict(given)
    if isinstance(paths := given.get("image_path"), list) and all(isinstance(path, str) for path in paths):
        full["image_path"] = [_full(path, "image_path") for path in paths]
    if isinstance(path := given.get("mask_path"), str):
        full["mask_path"] = _full(path, "mask_path")
    return full


def _full(path: str, param: str) -> str:
    return str(config.user_path(path, param).absolute())


def _per_prompt(given: Mapping[str, Any], prompts: list[str]) -> list[dict[str, Any]]:
    """Return the values of each prompt. Lists of pictures or seeds for several prompts are distributed in order."""
    shared = [{**given, "prompt": prompt} for prompt in prompts]
    pictures = given.get("image_path") or []
    if len(pictures) > 1 and len(prompts) > 1:
        if len(pictures) != len(prompts):
            raise BadRequest(
                f"{len(pictures)} pictures for {len(prompts)} prompts; give one, or one for each prompt",
                field="image_path",
            )
        shared = [{**values, "image_path": [picture]} for values, picture in zip(shared, pictures, strict=True)]
    seeds, each = given.get("seed"), given.get("num_outputs_per_prompt", 1)
    if not isinstance(seeds, list):
        return shared
    if len(seeds) not in (each, each * max(1, len(prompts))):
        raise BadRequest(
            f"{len(seeds)} seeds for {len(prompts)} x {each} outputs; "
            "give one, one for each output of a prompt, or one for each output",
            field="seed",
        )
    if len(seeds) == each:
        return shared
    return [{**values, "seed": seeds[i * each : (i + 1) * each]} for i, values in enumerate(shared)]


def _check_options(plan: Plan) -> None:
    options, name = plan.options, plan.file_name
    for param in ("output_file_path", "perf_dump_path"):
        path: str | None = getattr(options, param)
        if path is not None and path.rpartition("/")[2] in ("", ".", ".."):
            raise BadRequest(f"{path!r} names no file; end it with a name", field=param)
    if not options.return_file_paths_only:
        raise NotBuilt(
            "false is not possible; paths are what is printed, and return_frames writes frames",
            field="return_file_paths_only",
        )
    if options.output_file_name is not None and options.output_file_path is not None:
        raise BadRequest("it names folder and file; leave output_file_name out", field="output_file_path")
    if options.return_frames and not options.save_output:
        raise BadRequest("it writes a file; save_output false forbids that", field="return_frames")
    others = {"video": IMAGE_FORMATS, "image": VIDEO_FORMATS}.get(options.data_type or "", ())
    if _extension(name) in others and not options.return_frames:
        raise BadRequest(f"{options.data_type!r} does not go with the name {name!r}", field="data_type")


def _with_one_frame(plan: Plan, values: dict[str, Any]) -> dict[str, Any]:
    """Set one frame if an image is asked for. The command line wins over a number of frames in the config file."""
    asks = "data_type" if plan.options.data_type == "image" else None
    if plan.format in IMAGE_FORMATS and asks is None:
        asks = "output_file_path" if plan.options.output_file_path is not None else "output_file_name"
    if asks is None:
        return values
    frames = values.get("num_frames", 1)
    if frames != 1 and plan.spelled.is_flag("num_frames") >= plan.spelled.is_flag(asks):
        raise BadRequest(
            f"{frames} frames do not fit in one image; give 1, or a name that ends in {', '.join(VIDEO_FORMATS)}",
            field="num_frames",
        )
    return {**values, "num_frames": 1}
