"""The embedded model edits pictures: what it makes of a drawing, as the judge sees it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from tests.models.conftest import generate, load
from tools.judge import judge_frames

Frames = npt.NDArray[np.uint8]
DEMO = Path(__file__).parents[2] / "sgld" / "demo"
OWN, OTHER = "a red circle on a blue background", "a green square on a blue background"
SIZE, CIRCLE, PAINTED = (96, 96), (12, 18, 48, 54), (4, 10, 56, 62)
SEEDS = (0,)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red circle, left of the middle, and beside it a mask about the circle."""
    folder = tmp_path_factory.mktemp("drawing")
    picture, mask = Image.new("RGB", SIZE, (40, 70, 215)), Image.new("L", SIZE)
    ImageDraw.Draw(picture).ellipse(CIRCLE, fill=(215, 35, 40))
    ImageDraw.Draw(mask).rectangle(PAINTED, fill=255)
    picture.save(folder / "picture.png")
    mask.save(folder / "mask.png")
    return folder / "picture.png"


@pytest.fixture(scope="module")
def make(drawing: Path) -> Callable[..., Frames]:
    """Frames u8 [N, H, W, 3] of the embedded model, from the drawing."""
    family = load(DEMO)

    def frames(prompt: str, seed: int, **changes: object) -> Frames:
        request = {
            "prompt": prompt, "seed": seed, "width": 96, "height": 96, "num_frames": 1, "num_inference_steps": 20,
            "guidance_scale": 4.0, "negative_prompt": "", "image_path": [str(drawing)],
        }  # fmt: skip
        made: Frames = generate(family, **request | changes).numpy()
        return made

    return frames


def psnr(a: Frames, b: Frames) -> float:
    """Of two pictures, in decibels."""
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean()))


@pytest.mark.parametrize("seed", SEEDS)
def test_high_strength_shows_the_prompt_and_low_strength_the_picture(
    make: Callable[..., Frames], drawing: Path, seed: int
) -> None:
    picture = np.asarray(Image.open(drawing))
    seen = judge_frames(make(OTHER, seed, strength=0.8))
    assert (seen.color, seen.shape, seen.background) == ("green", "square", "blue")
    low = make(OTHER, seed, strength=0.05)
    assert judge_frames(low).shape == "circle"
    near = make(OWN, seed, strength=0.1)
    seen = judge_frames(near)
    assert (seen.color, seen.shape, seen.background) == ("red", "circle", "blue")
    alone = make(OWN, seed, image_path=None)
    assert psnr(near[0], picture) > psnr(alone[0], picture) + 5, "the control: the same prompt without the picture"
    assert psnr(near[0], picture) > 17
    assert psnr(low[0], picture) > psnr(make(OTHER, seed, strength=0.8)[0], picture) + 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mask_confines_the_change(make: Callable[..., Frames], drawing: Path, seed: int) -> None:
    picture = np.asarray(Image.open(drawing))
    inside = np.asarray(Image.open(drawing.with_name("mask.png"))) > 0
    (frame,) = made = make(OTHER, seed, strength=0.9, mask_path=str(drawing.with_name("mask.png")))
    assert (frame[~inside] == picture[~inside]).all()
    assert psnr(frame[inside], picture[inside]) < 12
    seen = judge_frames(made)
    assert (seen.color, seen.background) == ("green", "blue")
    whole = make(OTHER, seed, strength=0.9)[0]
    assert (whole[~inside] != picture[~inside]).any(-1).mean() > 0.9, "the control: without a mask"


def test_a_picture_begins_a_clip(make: Callable[..., Frames]) -> None:
    clip = make("a yellow star on a blue background moving right", 0, num_frames=17, strength=0.9)
    seen = judge_frames(clip)
    assert (len(clip), seen.color, seen.background, seen.motion) == (17, "yellow", "blue", "right")
