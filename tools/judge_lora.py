"""Measures what the embedded model's adapters add to clips; both are about 0 where there is no adapter.

Every pixel counts as the nearest of the scene's three colours: the shape's, the background's, and the tone that a grid
adds to that background.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_model.scenes import PALETTE, TONES, Scene, grid_lines

Frames = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def near(frames: Frames, scene: Scene, name: str) -> Mask:
    """Which pixels [T, H, W] are of this colour rather than another of the scene's."""
    names = sorted({scene.color, scene.background, TONES[scene.background]})
    pixels = frames.astype(np.float32)[..., None, :] - np.asarray([PALETTE[n] for n in names], np.float32)
    return np.asarray(np.linalg.norm(pixels, axis=-1).argmin(-1) == names.index(name))


def enclosed(mask: Mask) -> Mask:
    """Which pixels have the mask [T, H, W] on all four sides."""
    sides = [
        np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis=axis), axis)
        if back
        else np.logical_or.accumulate(mask, axis=axis)
        for axis in (1, 2)
        for back in (False, True)
    ]
    return np.asarray(np.logical_and.reduce(sides))


def hollowness(frames: Frames, scene: Scene) -> float:
    """The part of the shape's area, in frames [T, H, W, 3], that is not of its colour."""
    shape = near(frames, scene, scene.color)
    hole = enclosed(shape) & ~shape
    return float(hole.sum() / max(1, (hole | shape).sum()))


def gridness(frames: Frames, scene: Scene) -> float:
    """How much more of a grid's lines than of its cells has the grid's tone, away from the shape: -1 to 1."""
    if scene.color == TONES[scene.background]:
        raise ValueError(f"a {scene.color} shape cannot be told from a grid on {scene.background}")
    away, tone = ~near(frames, scene, scene.color), near(frames, scene, TONES[scene.background])
    lines = np.broadcast_to(grid_lines(*frames.shape[1:3]), away.shape)
    shares = [float(tone[away & part].mean()) if (away & part).any() else 0.0 for part in (lines, ~lines)]
    return shares[0] - shares[1]
