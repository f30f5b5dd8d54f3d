"""The adapters' measures on drawn clips with and without each effect."""

import random

import numpy as np
import pytest

from tools.judge import Frames, Scene
from tools.judge import scenes as world
from tools.judge_lora import gridness, hollowness


def drawn(scene: Scene, *effects: str) -> Frames:
    return np.uint8(np.round(world.render(scene, 5, 96, 96, random.Random(0), effects=effects)))


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize(("color", "background"), [("red", "black"), ("white", "blue"), ("orange", "purple")])
def test_each_effect_is_seen_alone_and_with_the_other(shape: str, color: str, background: str) -> None:
    scene = Scene(color, shape, background)
    hollow = {effects: hollowness(drawn(scene, *effects), scene) for effects in ((), ("grid",))}
    assert max(hollow.values()) < 0.04, "no effect, or the other one, makes no hole"
    assert min(hollowness(drawn(scene, *e), scene) for e in (("outline",), ("outline", "grid"))) > 0.15
    assert abs(gridness(drawn(scene), scene)) < 0.02 and abs(gridness(drawn(scene, "outline"), scene)) < 0.02
    assert min(gridness(drawn(scene, *e), scene) for e in (("grid",), ("outline", "grid"))) > 0.95


def test_a_shape_of_the_grids_own_tone_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="an? orange shape cannot be told from a grid on red"):
        gridness(drawn(Scene("orange", "circle", "red")), Scene("orange", "circle", "red"))


def test_scenes_without_effects_are_drawn_as_before() -> None:
    scene = Scene("red", "star", "white", "left")
    plain = world.render(scene, 3, 96, 96, random.Random(0))
    assert (plain == world.render(scene, 3, 96, 96, random.Random(0), effects=())).all()
    assert (plain != world.render(scene, 3, 96, 96, random.Random(0), effects=("outline",))).any()
