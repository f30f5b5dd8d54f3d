"""What a Wan checkpoint takes for what a request leaves open: by its name, else by what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

TEXT_TOKENS = 512  # the pipeline pads text to max_sequence_length with zeros, and nothing masks them
SHIFT = 8.0  # of the schedule that few-step models were trained on
FAST = (1000, 757, 522)
TURBO, TURBO_PICTURE = (988, 932, 852, 608), (996, 932, 852, 608)
FEW_STEPS = {"turbowan2.2-i2v": TURBO_PICTURE, "turbowan": TURBO}  # by a part of the name; the others are FAST

NEGATIVE = (  # gaudy, overexposed, still, blurred, subtitled, grey, low quality, deformed, crowded, walking backwards
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)

Values = dict[str, Any]
BASE: Values = {"negative_prompt": "", "max_sequence_length": TEXT_TOKENS, "num_frames": 81, "fps": 16}
SMALL = BASE | {"width": 832, "height": 480, "num_inference_steps": 50}
LARGE = BASE | {"width": 1280, "height": 720, "num_inference_steps": 50}

WAN21_SMALL = SMALL | {"guidance_scale": 3.0}
WAN21_LARGE = LARGE | {"guidance_scale": 5.0}
WAN21_PICTURE = SMALL | {"guidance_scale": 5.0}
WAN22_A14B = LARGE | {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
WAN22_PICTURE = LARGE | {"num_inference_steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5}
WAN22_5B = LARGE | {"height": 704, "num_frames": 121, "fps": 24, "guidance_scale": 5.0}

NAMED: dict[str, Values] = {  # by a part of the name, in lower case; the first that fits
    "fastwan2.1": WAN21_SMALL | {"num_frames": 61},
    "turbowan2.1": WAN21_SMALL,
    "turbowan2.2-i2v": WAN22_PICTURE,
    "wan2.1-t2v-1.3b": WAN21_SMALL | {"flow_shift": 3.0},
    "wan2.1-t2v-14b": WAN21_LARGE | {"flow_shift": 5.0},
    "wan2.1-i2v-14b-480p": WAN21_PICTURE | {"flow_shift": 3.0},
    "wan2.1-i2v-14b-720p": WAN21_LARGE | {"flow_shift": 5.0},
    "wan2.1-fun-1.3b-inp": SMALL | {"guidance_scale": 6.0},
    "wan2.2-t2v-a14b": WAN22_A14B | {"flow_shift": 12.0},
    "wan2.2-i2v-a14b": WAN22_PICTURE | {"flow_shift": 5.0},
    "wan2.2-ti2v-5b": WAN22_5B | {"flow_shift": 5.0},
}


@attrs.frozen
class Form:
    """What a checkpoint is made of, as far as its defaults depend on it."""

    layers: int
    experts: int
    shown_pictures: bool  # as channels beside the latents
    expands_times: bool  # one for each token
    few_steps: Sequence[int] | None  # their times


def few_steps(name: str, pipeline: str, given: Sequence[int] | None) -> Sequence[int] | None:
    """Return the times of a few-step model's steps: the setting, or else the model's. None for many steps."""
    if given or "dmd" not in pipeline.lower():
        return given or None
    return next((times for part, times in FEW_STEPS.items() if part in name.lower()), FAST)


def levels_of(times: Sequence[int], train: int, shift: float) -> list[float]:
    """Find the noise level of each time: the nearest of the `train` shifted levels of the training."""
    levels = [shift * i / (train + (shift - 1) * i) for i in range(1, train + 1)]
    return [min(levels, key=lambda sigma: abs(train * sigma - t)) for t in times]


def defaults(name: str, form: Form) -> Values:
    """Values of SamplingParams; the negative prompt that the authors advise only with a checkpoint that they named.

    Few-step models were distilled from a guided one, and are not guided themselves.
    """
    named = next((known for part, known in NAMED.items() if part in name.lower()), None)
    values = named or _by_form(form)
    if form.few_steps is None:
        return values | {"negative_prompt": NEGATIVE} if named else values
    few = {"num_inference_steps": len(form.few_steps), "guidance_scale": 1.0, "flow_shift": SHIFT}
    return {key: value for key, value in values.items() if key != "guidance_scale_2"} | few


def _by_form(form: Form) -> Values:
    if form.expands_times:
        return WAN22_5B
    if form.experts == 2:
        return WAN22_PICTURE if form.shown_pictures else WAN22_A14B
    if form.shown_pictures:
        return WAN21_PICTURE
    return WAN21_SMALL if form.layers <= 30 else WAN21_LARGE
