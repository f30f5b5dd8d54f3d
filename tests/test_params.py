"""What a request becomes for a given model."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from sgld.errors import BadRequest, NotBuilt, TooLarge
from sgld.params import MAX_PROMPT_CHARACTERS, MAX_SEED, Memory, ModelInfo, PictureRule
from sgld.resolve import outputs_from, resolve, values_of

DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "guidance_scale": 3.0}
INFO = ModelInfo("WanPipeline", "video", DEFAULTS, 16, 4, ("vae",), {"guidance_scale_2": "it has one expert"})
LORA = attrs.evolve(INFO, lora_targets=("transformer",), unsupported={})


def test_the_request_beats_the_model_and_null_is_the_models_own() -> None:
    resolved = resolve({"prompt": "a", "height": 16, "width": None}, INFO)
    params, notes = resolved.params, list(resolved.notes)
    assert (params.height, params.width, params.fps, params.guidance_scale) == (16, 832, 16, 3.0)
    assert notes == []


@pytest.mark.parametrize(
    ("asked", "down", "made"),
    [(80, False, 81), (82, False, 81), (83, False, 85), (46, False, 45), (96, False, 97), (1, False, 1), (2, False, 1),
     (80, True, 77), (84, True, 81), (81, True, 81)],
)  # fmt: skip
def test_frames_are_fitted_with_a_warning(asked: int, down: bool, made: int) -> None:
    resolved = resolve({"num_frames": asked, "num_frames_round_down": down}, INFO)
    params, notes = resolved.params, list(resolved.notes)
    assert params.num_frames == made
    expected = [f"num_frames: {asked} becomes {made}: this model makes 4k+1 frames"]
    assert notes == ([] if asked == made else expected)


def test_frames_that_may_not_be_fitted_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"^num_frames: 80 cannot be made: .* 4k\+1 frames; the nearest is 81$"):
        resolve({"num_frames": 80, "adjust_frames": False}, INFO)


def test_the_nearest_size_is_one_that_is_allowed() -> None:
    """16392, the nearest multiple of 24, is above the limit."""
    with pytest.raises(BadRequest, match="the nearest valid size is 16368x16368 "):
        resolve({"height": 16384, "width": 16384}, attrs.evolve(INFO, size_multiple=24))


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


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_has_a_longest(name: str) -> None:
    resolve({name: "é" * MAX_PROMPT_CHARACTERS}, INFO)
    with pytest.raises(
        BadRequest, match=f"^{name}: 32769 characters are too many; at most 32768 are allowed"
    ) as caught:
        resolve({name: "a" * (MAX_PROMPT_CHARACTERS + 1)}, INFO)
    assert caught.value.param == name


MEMORY = Memory(free=2**30, base=1000, text_pair=1000, token=100, paired_tokens=8192, pixel=27, chunk_pixel=200)
SMALL = attrs.evolve(INFO, memory=MEMORY, max_tokens=4096)


def test_memory_is_estimated_and_what_cannot_fit_is_refused() -> None:
    params = resolve({"num_frames": 5, "height": 160, "width": 160}, SMALL).params
    needs = SMALL.memory_needs(params)
    assert needs["num_frames"] == 1000 + 5 * 160 * 160 * 27 + 4 * 160 * 160 * 200
    with pytest.raises(TooLarge) as caught:
        resolve({}, SMALL)
    assert caught.value.message == (
        "num_frames: 81: 81 frames of 832x480 with max_sequence_length 512 need about 1.1 GiB of memory; "
        "there are 1.0 GiB; ask for less"
    )
    with pytest.raises(TooLarge, match="^height: 8192: 1 frames of 8192x8192"):
        resolve({"num_frames": 1, "height": 8192, "width": 8192}, SMALL)
    with pytest.raises(TooLarge, match="^max_sequence_length: 4096: "):
        resolve({"num_frames": 1, "prompt": "a " * 4096, "max_sequence_length": 4096}, SMALL)
    resolve({"num_frames": 1, "prompt": "a", "max_sequence_length": 4096}, SMALL)


def test_small_outputs_pay_for_guidance_and_tiles_bound_the_decoder() -> None:
    params = resolve({"num_frames": 1, "height": 160, "width": 160}, INFO).params
    only_tokens = Memory(free=0, token=100, paired_tokens=8192)
    assert attrs.evolve(INFO, memory=only_tokens).memory_needs(params)["height"] == 2 * 100 * 100
    tiles = Memory(free=0, chunk_pixel=10, tile_pixels=1024)
    assert attrs.evolve(INFO, memory=tiles).memory_needs(params)["height"] == 10 * 1024


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    with pytest.raises(
        BadRequest, match="^max_sequence_length: 513 is more than this model takes; allowed is 1 to 512"
    ):
        resolve({"max_sequence_length": 513}, attrs.evolve(INFO, max_tokens=512))


def test_outputs_have_one_seed_each() -> None:
    resolved = resolve({"seed": 7, "num_outputs_per_prompt": 3}, INFO)
    assert resolved.seeds == [7, 8, 9]
    assert {output.num_outputs_per_prompt for output in resolved.outputs} == {1}
    assert resolve({"seed": [3, 1], "num_outputs_per_prompt": 2}, INFO).seeds == [3, 1]
    with pytest.raises(BadRequest, match="^seed: 2 seeds for 1 outputs per prompt"):
        resolve({"seed": [3, 1]}, INFO)
    with pytest.raises(BadRequest, match=f"^seed: {MAX_SEED + 1} is out of range"):
        resolve({"seed": MAX_SEED, "num_outputs_per_prompt": 2}, INFO)


def test_an_absent_seed_is_drawn_anew() -> None:
    drawn = {resolve({}, INFO).params.seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_outputs_can_be_asked_for_again() -> None:
    """As a remix does, and the journal: the same outputs, with seeds that nobody chose."""
    asked = {"prompt": "a", "num_outputs_per_prompt": 2, "loras": [{"path": "a.safetensors"}]}
    outputs = resolve(asked, LORA).outputs
    assert resolve(values_of(outputs), LORA).outputs == outputs_from(values_of(outputs)) == outputs


def test_the_shape_of_the_outputs() -> None:
    silent, loud = (resolve({"num_frames": 33}, attrs.evolve(INFO, audio=audio)).spec for audio in (False, True))
    assert (silent.size, silent.frames, silent.fps, silent.seconds) == ("832x480", 33, 16, 33 / 16)
    assert (silent.audio, loud.audio) == (False, True)
    assert not resolve({"num_frames": 1}, attrs.evolve(INFO, audio=True)).spec.audio, "a picture has no sound"


def test_progress_follows_the_stages() -> None:
    spec = resolve({}, INFO).spec
    at = [("encode", 0, 1), ("encode", 1, 1), ("denoise", 5, 10), ("denoise", 10, 10), ("decode", 1, 1)]
    assert [spec.percent(*step) for step in at] == [0, 5, 47.5, 90, 99]
    assert attrs.evolve(spec, stages=("denoise", "decode")).percent("denoise", 1, 1) == pytest.approx(99 * 85 / 94)


TAKES = attrs.evolve(INFO, pictures=PictureRule(max=1))


def test_pictures_bring_their_strength() -> None:
    params = resolve({"image_path": ["a.png"]}, TAKES).params
    assert (params.strength, params.first_step) == (0.8, 10)
    params = resolve({"image_path": ["a.png"], "strength": 1, "num_inference_steps": 7}, TAKES).params
    assert (params.strength, params.first_step) == (1.0, 0)
    assert resolve({}, TAKES).params.strength is None
    assert resolve({}, TAKES, base={"strength": 0.5}).params.first_step == 0, (
        "the operator's own holds for pictures only"
    )
    assert resolve({"image_path": ["a.png"]}, TAKES, base={"strength": 0.5}).params.strength == 0.5


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"image_path": ["a.png", "b.png"]}, "^image_path: 2 given; this model takes 1$"),
        ({"strength": 0.5}, "^strength: it needs a picture to start from$"),
        ({"mask_path": "m.png"}, "^mask_path: it needs a picture"),
        ({"image_path": ["a.png"], "strength": 0}, "^strength: 0.* is out of range; allowed is 0.001 to 1$"),
        ({"image_path": ["a.png"], "strength": 1.1}, "^strength: 1.1 is out of range"),
        ({"image_path": ["a.png"], "strength": 0.04, "num_inference_steps": 20},
         "^strength: 0.04 of 20 steps is less than one step; give 0.05 or more$"),
        ({"image_path": "a.png"}, "^image_path: 'a.png' is not a valid list of text"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRequest, match=line):
        resolve(given, TAKES)


def test_a_model_of_text_alone_takes_no_picture() -> None:
    with pytest.raises(BadRequest, match="^image_path: 1 given; this model makes pictures from text alone"):
        resolve({"image_path": ["a.png"]}, INFO)


LOOKS = attrs.evolve(INFO, pictures=PictureRule(min=1, max=3, starts_denoising=False))


@pytest.mark.parametrize(
    ("count", "least", "most", "line"),
    [(0, 1, 1, "none given; this model takes 1"), (0, 1, 3, "none given; this model takes 1 to 3"),
     (4, 1, 3, "4 given; this model takes 1 to 3"), (3, 0, 2, "3 given; this model takes 2")],
)  # fmt: skip
def test_how_many_pictures_a_model_takes(count: int, least: int, most: int, line: str) -> None:
    info = attrs.evolve(LOOKS, pictures=PictureRule(min=least, max=most))
    with pytest.raises(BadRequest, match=f"^image_path: {line}$"):
        resolve({"image_path": ["a.png"] * count} if count else {}, info)
    for right in {least or 1, most}:
        assert resolve({"image_path": ["a.png"] * right}, info).params.image_path == ["a.png"] * right


def test_a_model_that_looks_at_pictures_begins_with_noise() -> None:
    params = resolve({"image_path": ["a.png"]}, LOOKS).params
    assert (params.strength, params.first_step) == (None, 0)
    asked: dict[str, Any]
    for name, asked in (("strength", {"strength": 0.5}), ("mask_path", {"mask_path": "m.png"})):
        with pytest.raises(NotBuilt, match=f"^{name}: this model cannot use it: it looks at pictures") as caught:
            resolve({"image_path": ["a.png"]} | asked, LOOKS)
        assert caught.value.param == name
        with pytest.raises(NotBuilt, match=f"^{name}: "):
            resolve({"image_path": ["a.png"]}, LOOKS, base=asked)


@pytest.mark.parametrize("steps", [*range(1, 120), 333, 999, 1000])
def test_the_strength_that_is_advised_runs_a_step(steps: int) -> None:
    with pytest.raises(BadRequest, match="strength") as caught:
        resolve({"image_path": ["a"], "strength": 0.001, "num_inference_steps": steps}, TAKES)
        raise BadRequest("strength: give 0.001 or more")
    least = float(str(caught.value).rpartition("give ")[2].split()[0])
    assert (
        resolve({"image_path": ["a"], "strength": least, "num_inference_steps": steps}, TAKES).params.first_step < steps
    )


@pytest.mark.parametrize(
    ("picture", "size"),
    [((1664, 960), (832, 480)), ((100, 100), (624, 624)), ((3000, 4000), (544, 720)), ((10, 4000), (16, 12624)),
     ((4000, 10), (12624, 16)), ((1, 60000), (16, 16384)), ((832, 480), (832, 480))],
)  # fmt: skip
def test_the_size_follows_the_picture(picture: tuple[int, int], size: tuple[int, int]) -> None:
    resolved = resolve({"image_path": ["a.png"]}, TAKES, picture=picture)
    params, notes = resolved.params, list(resolved.notes)
    assert (params.width, params.height) == size
    assert params.width * params.height <= 832 * 480
    told = "x".join(map(str, picture))
    changed = [f"size: 832x480 becomes {size[0]}x{size[1]}, after the picture's {told} pixels"]
    assert notes == ([] if size == (832, 480) else changed)


@pytest.mark.parametrize(
    ("picture", "size"),
    [((100, 100), (1024, 1024)), ((1600, 900), (1376, 768)), ((900, 1600), (768, 1376)), ((1, 60000), (32, 16384))],
)
def test_a_size_near_the_picture(picture: tuple[int, int], size: tuple[int, int]) -> None:
    """The nearest multiples of 32 in about a megapixel; explicit sizes may still be multiples of 16."""
    info = attrs.evolve(TAKES, pictures=PictureRule(max=1, multiple=32), defaults={"width": 1024, "height": 1024})
    params = resolve({"image_path": ["a.png"]}, info, picture=picture).params
    assert (params.width, params.height) == size
    assert resolve({"image_path": ["a.png"], "width": 48}, info, picture=picture).params.width == 48


@pytest.mark.parametrize("picture", [(1, 1), (20, 12), (64, 2)])
def test_a_picture_smaller_than_a_multiple_is_the_model_s_to_refuse(picture: tuple[int, int]) -> None:
    info = attrs.evolve(TAKES, pictures=PictureRule(max=1, may_enlarge=False))
    params = resolve({"image_path": ["a.png"]}, info, picture=picture).params
    assert (params.width, params.height) == (16, 16)


def test_a_size_that_is_given_stands() -> None:
    resolved = resolve({"image_path": ["a.png"], "height": 64}, TAKES, picture=(100, 100))
    params, notes = resolved.params, list(resolved.notes)
    assert (params.width, params.height, notes) == (832, 64, [])
    base = {"width": 320, "height": 160}
    params = resolve({"image_path": ["a.png"]}, TAKES, base=base, picture=(100, 100)).params
    assert (params.width, params.height) == (224, 224), "the operator's size is the area"
    own_size = attrs.evolve(TAKES, pictures=PictureRule(max=1, sets_size=False))
    resolved = resolve({"image_path": ["a.png"]}, own_size, picture=(100, 100))
    params, notes = resolved.params, list(resolved.notes)
    assert (params.width, params.height, notes) == (832, 480, []), "a model for which a picture's shape means nothing"


def test_a_field_without_a_use_may_have_its_default() -> None:
    """As in a file's metadata, from which the file can be made again."""
    info = attrs.evolve(INFO, unsupported={"cfg_normalization": "it has none"})
    assert resolve({"cfg_normalization": 0.0}, info).params.cfg_normalization == 0.0
    with pytest.raises(NotBuilt, match="cfg_normalization: this model cannot use it: it has none"):
        resolve({"cfg_normalization": 0.5}, info)
