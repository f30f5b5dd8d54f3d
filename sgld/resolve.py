"""Turn the values of a request into the parameters of its outputs, fitted to a model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import attrs

from sgld.convert import default_of, fields_of, refuse_unbuilt, structure
from sgld.errors import BadRequest, NotBuilt, SgldError, TooLarge
from sgld.params import (
    MAX_SIDE,
    STRENGTH,
    LoraUse,
    ModelInfo,
    OutputParams,
    OutputSpec,
    SamplingParams,
    check_loras,
    check_picture,
)


@attrs.frozen
class Resolved:
    """The outputs of a request: their parameters, their common shape, and warnings for the user."""

    outputs: tuple[OutputParams, ...]
    spec: OutputSpec
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> OutputParams:
        """Return the parameters of the first output. The others differ in the seed alone."""
        return self.outputs[0]

    @property
    def seeds(self) -> list[int]:
        """Return the seed of each output."""
        return [output.seed for output in self.outputs]

    def evolve(self, **changes: Any) -> Resolved:
        """Change fields that all outputs share."""
        return attrs.evolve(self, outputs=tuple(attrs.evolve(output, **changes) for output in self.outputs))

    @property
    def cost(self) -> float:
        """Return pixels x frames x steps x outputs, the unit of queue and estimates."""
        steps = self.params.num_inference_steps - self.params.first_step
        return float(self.spec.pixels * steps * len(self.outputs))


def values_of(outputs: tuple[OutputParams, ...]) -> dict[str, Any]:
    """Return the sampling fields of a request that asks for these outputs, as plain values."""
    seeds = [output.seed for output in outputs]
    return {**attrs.asdict(outputs[0]), "seed": seeds, "num_outputs_per_prompt": len(outputs)}


def outputs_from(values: Mapping[str, Any]) -> tuple[OutputParams, ...]:
    """Return the outputs that `values_of` described, without validating the values again.

    Raises:
        SgldError: a field of another version, or no seeds.
        KeyError, TypeError: a field is missing or has another type.
    """
    if unknown := sorted(values.keys() - fields_of(SamplingParams).keys()):
        raise SgldError(f"it has {unknown[0]!r}, as another version of sgld writes it")
    with attrs.validators.disabled():
        loras = [LoraUse(**lora) for lora in values.get("loras", [])]
        params = SamplingParams(**{**values, "loras": loras})
        if not isinstance(params.seed, list) or not params.seed:
            raise SgldError("it has no seeds")
        return tuple(OutputParams.of(params, seed) for seed in params.seed)


def resolve(
    given: Mapping[str, object],
    info: ModelInfo,
    *,
    base: Mapping[str, object] | None = None,
    picture: tuple[int, int] | None = None,
) -> Resolved:
    """Merge the request's values over the operator's (`base`) over the model's, and fit them to the model.

    `picture` is the width and height of the picture that gives its shape to a request without a size.

    Raises:
        BadRequest: a wrong type, range or size, or values that contradict each other.
        NotBuilt: a field that this model, or this version, cannot use.
        TooLarge: more memory than there is.
    """
    own = {name: value for name, value in given.items() if value is not None}
    asked = {**(base or {}), **own}
    for name, reason in info.unsupported.items():
        if name in asked and asked[name] != default_of(fields_of(SamplingParams)[name]):
            raise NotBuilt(f"this model cannot use it: {reason}", field=name)
    params = structure({**info.defaults, **asked}, SamplingParams)
    refuse_unbuilt(params)
    seeds = _seeds(params)
    check_loras(params.loras, info, "loras", "loras.target")
    _check_steps(params, info)
    if not info.pictures.starts_denoising and info.backend == "native":  # a pipeline's call tells which ones it lacks
        _refuse_start(asked)
    params = _with_picture(params, own, info)
    notes: list[str] = []
    if picture is not None and info.pictures.sets_size and not {"height", "width"} & own.keys():
        params, notes = _shaped(params, picture, info)
        asked |= {"height": params.height, "width": params.width}
    params = _left_open(params, asked, info)
    _check_size(params, info)
    _check_tokens(params, info)
    params, more = _fit_frames(params, info)
    _check_memory(params, info)
    outputs = tuple(OutputParams.of(params, seed) for seed in seeds)
    return Resolved(outputs, OutputSpec.of(params, audio=info.audio), (*notes, *more))


def _seeds(params: SamplingParams) -> list[int]:
    """Return one seed for each output: the given list, or numbers counted up from the given or a random one."""
    count = params.num_outputs_per_prompt
    if isinstance(params.seed, list):
        if len(params.seed) != count:
            raise BadRequest(
                f"{len(params.seed)} seeds for {count} outputs per prompt; give one, or one for each", field="seed"
            )
        return params.seed
    first = random.SystemRandom().randrange(2**32) if params.seed is None else params.seed
    return list(range(first, first + count))


def _left_open(params: SamplingParams, asked: Mapping[str, object], info: ModelInfo) -> SamplingParams:
    """Pass None to a pipeline's call for each field that nobody set, so that the pipeline decides."""
    if not (left := [name for name in info.left_open if name not in asked]):
        return params
    return attrs.evolve(params, diffusers_kwargs=dict.fromkeys(left) | (params.diffusers_kwargs or {}))


def _refuse_start(asked: Mapping[str, object]) -> None:
    """Refuse fields that only a model that starts from its picture can use. Raises NotBuilt."""
    for name in ("strength", "mask_path"):
        if name in asked:
            reason = "it looks at pictures and begins with noise, not with one of them"
            raise NotBuilt(f"this model cannot use it: {reason}", field=name)


def _with_picture(params: SamplingParams, own: Mapping[str, object], info: ModelInfo) -> SamplingParams:
    """Set the strength where denoising starts from a picture, and clear it elsewhere. Raises BadRequest."""
    count, least, most = len(params.image_path or ()), info.pictures.min, info.pictures.max
    if not least <= count <= most:
        takes = f"takes {least} to {most}" if 0 < least < most else f"takes {most}"
        takes = takes if most else "makes pictures from text alone and takes none"
        raise BadRequest(f"{count or 'none'} given; this model {takes}", field="image_path")
    check_picture(own)
    if not count or not info.pictures.starts_denoising:
        return attrs.evolve(params, strength=None, mask_path=params.mask_path if count else None)
    params = attrs.evolve(params, strength=STRENGTH if params.strength is None else params.strength)
    steps = params.num_inference_steps
    if params.first_step == steps:
        raise BadRequest(
            f"{params.strength} of {steps} steps is less than one step; give {_least(steps)} or more",
            field="strength",
        )
    return params


def _least(steps: int) -> float:
    """Return the lowest strength, to three places, that runs a step."""
    return -(-1000 // steps) / 1000


def _shaped(params: SamplingParams, picture: tuple[int, int], info: ModelInfo) -> tuple[SamplingParams, list[str]]:
    """Give the output the shape of the picture."""
    width, height = info.pictures.size(picture, params.width * params.height, info.size_multiple)
    if (width, height) == (params.width, params.height):
        return params, []
    shown = "x".join(map(str, picture))
    note = f"size: {params.width}x{params.height} becomes {width}x{height}, after the picture's {shown} pixels"
    return attrs.evolve(params, width=width, height=height), [note]


def _check_steps(params: SamplingParams, info: ModelInfo) -> None:
    if info.fixed_steps not in (None, params.num_inference_steps):
        raise BadRequest(
            f"{params.num_inference_steps}: this model takes {info.fixed_steps} steps and no other number",
            field="num_inference_steps",
        )


def _check_tokens(params: SamplingParams, info: ModelInfo) -> None:
    if info.max_tokens is not None and params.max_sequence_length > info.max_tokens:
        raise BadRequest(
            f"{params.max_sequence_length} is more than this model takes; allowed is 1 to {info.max_tokens}",
            field="max_sequence_length",
        )


def _check_memory(params: SamplingParams, info: ModelInfo) -> None:
    for name, needed in info.memory_needs(params).items():
        if info.memory is not None and needed > info.memory.free:
            raise TooLarge(
                f"{getattr(params, name)}: {params.num_frames} frames of {params.width}x{params.height} with "
                f"max_sequence_length {params.max_sequence_length} need about {needed / 2**30:.1f} GiB of memory; "
                f"there are {info.memory.free / 2**30:.1f} GiB; ask for less",
                field=name,
            )


def _check_size(params: SamplingParams, info: ModelInfo) -> None:
    multiple = info.size_multiple
    if params.height % multiple or params.width % multiple:
        name = "height" if params.height % multiple else "width"
        longest = MAX_SIDE // multiple * multiple
        width, height = (
            min(longest, max(multiple, _nearest(side, multiple))) for side in (params.width, params.height)
        )
        raise BadRequest(
            f"{getattr(params, name)} is not a multiple of {multiple}; the nearest valid size is "
            f"{width}x{height} (width x height)",
            field=name,
        )


def _nearest(value: int, multiple: int) -> int:
    """Return the nearest multiple, rounding up from the middle."""
    return (value + multiple // 2) // multiple * multiple


def _fit_frames(params: SamplingParams, info: ModelInfo) -> tuple[SamplingParams, list[str]]:
    multiple, asked = info.frame_multiple, params.num_frames
    if info.kind == "image" and asked != 1:
        raise BadRequest(f"{asked}: this model makes single pictures; allowed is 1", field="num_frames")
    fitted = 1 + ((asked - 1) // multiple * multiple if params.num_frames_round_down else _nearest(asked - 1, multiple))
    if fitted == asked:
        return params, []
    rule = f"this model makes {multiple}k+1 frames"
    if not params.adjust_frames:
        raise BadRequest(f"{asked} cannot be made: {rule}; the nearest is {fitted}", field="num_frames")
    return attrs.evolve(params, num_frames=fitted), [f"num_frames: {asked} becomes {fitted}: {rule}"]
