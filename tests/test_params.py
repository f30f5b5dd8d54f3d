"""What a request becomes for a given model."""

from __future__ import annotations

from typing import Any

import pytest

from sgld.errors import BadRequest, NotBuilt
from sgld.params import MAX_SEED, ModelInfo, SamplingParams, resolve

DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "guidance_scale": 3.0}
INFO = ModelInfo("WanPipeline", "video", DEFAULTS, 16, 4, ("vae",), {"guidance_scale_2": "it has one expert"})


def test_the_request_beats_the_model_and_null_is_the_models_own() -> None:
    params, notes = resolve({"prompt": "a", "height": 16, "width": None}, INFO)
    assert (params.height, params.width, params.fps, params.guidance_scale) == (16, 832, 16, 3.0)
    assert notes == []


@pytest.mark.parametrize(
    ("asked", "down", "made"),
    [(80, False, 81), (82, False, 81), (83, False, 85), (46, False, 45), (96, False, 97), (1, False, 1), (2, False, 1),
     (80, True, 77), (84, True, 81), (81, True, 81)],
)  # fmt: skip
def test_frames_are_fitted_with_a_warning(asked: int, down: bool, made: int) -> None:
    params, notes = resolve({"num_frames": asked, "num_frames_round_down": down}, INFO)
    assert params.num_frames == made
    expected = [f"num_frames: {asked} becomes {made}: this model makes 4k+1 frames"]
    assert notes == ([] if asked == made else expected)


def test_frames_that_may_not_be_fitted_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"^num_frames: 80 cannot be made: .* 4k\+1 frames; the nearest is 81$"):
        resolve({"num_frames": 80, "adjust_frames": False}, INFO)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ({"height": 481}, "height: 481 is not a multiple of 16; the nearest valid size is 832x480 (width x height)"),
        ({"width": 840}, "width: 840 is not a multiple of 16; the nearest valid size is 848x480 (width x height)"),
        ({"height": 3}, "height: 3 is not a multiple of 16; the nearest valid size is 832x16 (width x height)"),
    ],
)
def test_sizes_are_refused_with_the_nearest(size: dict[str, int], line: str) -> None:
    with pytest.raises(BadRequest) as caught:
        resolve(size, INFO)
    assert (caught.value.message, caught.value.param) == (line, next(iter(size)))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"guidance_scale_2": 3.0}, "guidance_scale_2: this model cannot use it: it has one expert"),
        ({"enable_teacache": True}, "enable_teacache: not built yet in this version of sgld (step caching)"),
        ({"generator_device": "cuda"}, "generator_device: 'cuda' is not built yet in this version of sgld"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_never_ignored(given: dict[str, Any], line: str) -> None:
    with pytest.raises(NotBuilt) as caught:
        resolve(given, INFO)
    assert caught.value.message.startswith(line)


@pytest.mark.parametrize(
    "given",
    [
        {"num_inference_steps": 0}, {"num_outputs_per_prompt": 0}, {"num_frames": 0}, {"fps": 16.0}, {"seed": -1},
        {"seed": MAX_SEED + 1}, {"guidance_scale": -1.0}, {"boundary_ratio": 1.5}, {"flow_shift": 0},
        {"output_compression": 101}, {"output_quality": "best"}, {"frame_interpolation_exp": 5},
        {"upscaling_scale": 9}, {"x264_preset": "warp"}, {"prompt": 3}, {"prompt": "\ud800"},
    ],
    ids=str,
)  # fmt: skip
def test_ranges_and_types(given: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        resolve(given, INFO)
    assert caught.value.param == next(iter(given))


def test_outputs_have_one_seed_each() -> None:
    params = SamplingParams(seed=7, num_outputs_per_prompt=3)
    assert [(one.seed, one.num_outputs_per_prompt) for one in params.outputs()] == [(7, 1), (8, 1), (9, 1)]
    assert SamplingParams(seed=[3, 1], num_outputs_per_prompt=2).seeds() == [3, 1]
    with pytest.raises(BadRequest, match="^seed: 2 seeds for 1 outputs per prompt"):
        SamplingParams(seed=[3, 1]).seeds()


def test_an_absent_seed_is_drawn_anew() -> None:
    drawn = {SamplingParams().seeds()[0] for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**32 for seed in drawn)
