"""The judge on clips that are right, wrong, blank or noise, and through files."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tools.judge import (
    Frames,
    Judged,
    Scene,
    Verdict,
    caption,
    draw_prompts,
    judge_file,
    judge_frames,
    judge_prompts,
    parse_prompt,
    read_frames,
    summarise,
    write_frames,
)
from tools.judge import scenes as world

SIZE = 96


def drawn(scene: Scene, frames: int = 17, seed: int = 0) -> Frames:
    pixels = world.render(scene, frames, SIZE, SIZE, random.Random(seed))
    return np.uint8(np.round(pixels))


def some_scenes(count: int, *, image: bool = False) -> list[Scene]:
    rng = random.Random(1)
    return [world.sample_scene(rng, image=image, held_out=None) for _ in range(count)]


@pytest.mark.parametrize(("frames", "count"), [(17, 20), (9, 20), (5, 30), (1, 100)])
def test_clean_clips_are_judged_right(frames: int, count: int) -> None:
    for i, scene in enumerate(some_scenes(count, image=frames == 1)):
        verdict = judge_frames(drawn(scene, frames, seed=i))
        assert all(verdict.agrees(scene).values()), (scene, verdict)
        assert verdict.overlap > 0.97


@pytest.mark.parametrize("motion", world.MOTIONS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_and_motion_is_told_apart(shape: str, motion: str) -> None:
    verdict = judge_frames(drawn(Scene("orange", shape, "purple", motion)))
    assert (verdict.color, verdict.background) == ("orange", "purple")
    assert (verdict.shape, verdict.motion) == (shape, motion)


@pytest.mark.parametrize("wish", ["color", "background", "shape", "motion"])
def test_a_wrong_prompt_is_not_obeyed(wish: str) -> None:
    asked = Scene("red", "circle", "blue", "left")
    wrong = {"color": "green", "background": "black", "shape": "star", "motion": "up"}[wish]
    marks = judge_frames(drawn(replace(asked, **{wish: wrong}))).agrees(asked)
    assert [name for name, right in marks.items() if not right] == [wish]


def test_swapped_colours_are_seen() -> None:
    asked = Scene("yellow", "square", "green", "growing")
    verdict = judge_frames(drawn(asked.swapped()))
    result = Judged("", "", 0.0, asked, verdict)
    assert summarise([result]) | {"overlap": 0} == {
        "color": 0, "background": 0, "shape": 1, "motion": 1, "all": 0, "swapped": 1, "overlap": 0, "seconds": 0,
    }  # fmt: skip


def test_a_reversed_clip_moves_the_other_way() -> None:
    right = drawn(Scene("white", "star", "black", "right"))
    assert (judge_frames(right).motion, judge_frames(right[::-1]).motion) == ("right", "left")


def test_nothing_is_seen_on_an_empty_background() -> None:
    empty = np.full((17, SIZE, SIZE, 3), world.PALETTE["blue"], np.uint8)
    assert judge_frames(empty) == Verdict(None, "blue", None, None, 0.0)


@pytest.mark.parametrize("grain", [1, 16])
def test_noise_shows_no_shape(grain: int) -> None:
    rng, shapes = np.random.default_rng(0), 0
    for _ in range(10):
        coarse = rng.integers(0, 256, (5, SIZE // grain, SIZE // grain, 3), np.uint8)
        shapes += judge_frames(coarse.repeat(grain, 1).repeat(grain, 2)).shape is not None
    assert shapes <= 1


def test_a_smear_is_no_shape() -> None:
    smear = np.full((5, SIZE, SIZE, 3), world.PALETTE["white"], np.uint8)
    smear[:, 40:52, 10:86] = world.PALETTE["red"]
    verdict = judge_frames(smear)
    assert (verdict.color, verdict.background, verdict.shape) == ("red", "white", None)


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_verdicts_survive_a_file(suffix: str, tmp_path: Path) -> None:
    moving = [scene for scene in some_scenes(8) if scene.motion != "still"]  # equal frames would be stored as one
    for i, scene in enumerate(moving):
        path = tmp_path / f"{i}{suffix}"
        write_frames(path, drawn(scene, seed=i))
        assert read_frames(path).shape == (17, SIZE, SIZE, 3)
        assert all(judge_file(path).agrees(scene).values()), scene


def test_an_image_survives_a_png(tmp_path: Path) -> None:
    scene = Scene("black", "triangle", "yellow", image=True)
    frames = drawn(scene, 1)
    write_frames(tmp_path / "one.png", frames)
    assert np.array_equal(read_frames(tmp_path / "one.png"), frames)
    assert judge_file(tmp_path / "one.png").agrees(scene) == {"color": True, "background": True, "shape": True}


def test_captions_are_parsed_back() -> None:
    rng = random.Random(2)
    for scene in some_scenes(500):
        assert parse_prompt(caption(scene, rng)) == scene
        assert parse_prompt(caption(scene)) == scene


def test_captions_use_known_words_alone() -> None:
    rng = random.Random(3)
    texts = [caption(scene, rng) for scene in some_scenes(500) + some_scenes(200, image=True)]
    words = {word for text in texts for word in text.replace(",", " , ").replace(".", " . ").split()}
    assert words <= set(world.VOCABULARY)


@pytest.mark.parametrize("prompt", ["a red circle", "a circle on a blue background", "a red cat on a blue background"])
def test_foreign_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt="):
        parse_prompt(prompt)


def test_held_out_means_both_orders_of_the_colours() -> None:
    for scene in some_scenes(500):
        assert scene.held_out == scene.swapped().held_out
    prompts = draw_prompts(50, held_out=True, images=False, seed=0)
    assert all(scene.held_out for _, scene in prompts)


def test_a_truthful_generator_scores_one_and_a_deaf_one_near_chance(tmp_path: Path) -> None:
    prompts = draw_prompts(20, held_out=False, images=False, seed=0)
    truth = judge_prompts(prompts, lambda prompt, frames, seed: drawn(parse_prompt(prompt), frames, seed), 9, tmp_path)
    assert summarise(truth)["all"] == 1
    others = some_scenes(20)
    deaf = judge_prompts(prompts, lambda prompt, frames, seed: drawn(others[seed], frames, seed), 9, tmp_path)
    assert summarise(deaf)["all"] < 0.1
    assert summarise(deaf)["color"] < 0.4


def test_frames_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="N, H, W, 3"):
        judge_frames(np.zeros((SIZE, SIZE, 3), np.uint8))
