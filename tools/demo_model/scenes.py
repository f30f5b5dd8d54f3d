"""The demo model's world: one coloured shape on a coloured background, said in words and drawn in pixels.

Needs numpy alone, so that the judge and its tests can import it without torch.
"""

import math
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (40, 70, 215),
    "yellow": (240, 220, 50),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "orange": (245, 140, 30),
    "purple": (135, 45, 170),
}
COLORS: Final = tuple(PALETTE)
SHAPES: Final = ("circle", "square", "triangle", "star")
MOTIONS: Final = ("still", "left", "right", "up", "down", "growing", "shrinking")

_PAIRS = (("red", "orange"), ("yellow", "white"), ("blue", "purple"), ("green", "black"))
TONES: Final = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
"""Every colour's partner in a grid: the palette's only, for the autoencoder shows no other colours."""
EFFECTS: Final = ("outline", "grid")
"""What an adapter is taught: hollow shapes, and lines of another tone across the background."""
OUTLINE_WIDTH: Final = 6.0
GRID_PERIOD, GRID_WIDTH = 24, 8
"""Pixels: a patch of the transformer and a latent of the autoencoder, so that every patch has the same lines."""

FULL_LENGTH: Final = 17
"""Frames of a whole clip; a shorter one is its beginning, so that speed does not depend on length."""

SHAPE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("circle", "circle", "circle", "ball", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
MOTION_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "still": ("", "", "standing still"),
    "left": ("moving left", "moving to the left", "sliding left"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "up": ("moving up", "rising", "moving upwards"),
    "down": ("moving down", "falling", "moving downwards"),
    "growing": ("growing", "getting bigger"),
    "shrinking": ("shrinking", "getting smaller"),
}
VOCABULARY: Final = (
    *("a", "an", "the", "on", "of", "with", "in", "is", "and", "to", ",", "."),
    *("background", "backdrop", "picture", "image", "video", "clip"),
    *("red", "green", "blue", "yellow", "white", "black", "orange", "purple"),
    *("circle", "ball", "disc", "square", "box", "triangle", "star"),
    *("moving", "sliding", "left", "right", "up", "down", "upwards", "downwards", "rising", "falling"),
    *("growing", "shrinking", "getting", "bigger", "smaller", "standing", "still"),
)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; an image has no motion."""

    color: str
    shape: str
    background: str
    motion: str = "still"
    image: bool = False

    @property
    def held_out(self) -> bool:
        """Whether training never sees these colours with this shape, in either order of the colours."""
        low, high = sorted((COLORS.index(self.color), COLORS.index(self.background)))
        return (7 * low + 5 * high + 3 * SHAPES.index(self.shape)) % 11 == 0

    def swapped(self) -> "Scene":
        """The same scene with the two colours exchanged."""
        return replace(self, color=self.background, background=self.color)


def sample_scene(rng: random.Random, *, image: bool = False, held_out: bool | None = False) -> Scene:
    """Draws a scene; `held_out` asks for trained (False), held-out (True) or any (None) combinations."""
    while True:
        color, background = rng.sample(COLORS, 2)
        motion = "still" if image else rng.choice(MOTIONS)
        scene = Scene(color, rng.choice(SHAPES), background, motion, image)
        if held_out is None or scene.held_out == held_out:
            return scene


# Words


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


_FORMS: Final[tuple[Callable[[str, str, str], str], ...]] = (
    lambda thing, motion, ground: _join(_article(thing), motion, "on", _article(ground)),
    lambda thing, motion, ground: _join(_article(thing), motion, "on", _article(ground)),
    lambda thing, motion, ground: f"on {_article(ground)}, {_join(_article(thing), motion)}",
    lambda thing, motion, ground: f"on {_article(ground)}, {_join(_article(thing), motion and f'is {motion}')}",
    lambda thing, motion, ground: f"{_join(thing, motion)}, {ground}",
    lambda thing, motion, ground: f"{ground}, {_join(_article(thing), motion)}",
    lambda thing, motion, ground: f"{ground}, {_join(thing, motion)}",
    lambda thing, motion, ground: f"{_article(ground)} with {_join(_article(thing), motion)}",
    lambda thing, motion, ground: f"{_article(thing)} on {_article(ground)}" + (f", {motion}" if motion else ""),
)
_KINDS: Final = {True: ("a picture of", "an image of"), False: ("a video of", "a clip of")}


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Says a scene: plainly without `rng`, in a random sentence form and with random synonyms with it."""
    if rng is None:
        motion = "" if scene.image else MOTION_WORDS[scene.motion][-1 if scene.motion == "still" else 0]
        return _FORMS[0](f"{scene.color} {scene.shape}", motion, f"{scene.background} background")
    thing = f"{scene.color} {rng.choice(SHAPE_WORDS[scene.shape])}"
    silent = scene.image and rng.random() < 0.8
    motion = "" if silent else rng.choice(MOTION_WORDS[scene.motion])
    ground = f"{scene.background} {'backdrop' if rng.random() < 0.1 else 'background'}"
    text = rng.choice(_FORMS)(thing, motion, ground)
    if text.startswith(("a ", "an ")) and rng.random() < 0.1:
        text = f"{rng.choice(_KINDS[scene.image])} {text}"
    return text + ("." if rng.random() < 0.1 else "")


def parse_prompt(prompt: str, *, image: bool = False) -> Scene:
    """Reads a caption back; ValueError where a colour or the shape is missing."""
    words = re.findall(r"[a-z]+", prompt.lower())
    grounds = [i for i, word in enumerate(words) if word in ("background", "backdrop")]
    if not grounds or words[grounds[0] - 1] not in COLORS:
        raise ValueError(f"prompt={prompt!r} names no background colour; colours are {', '.join(COLORS)}")
    colors = [word for i, word in enumerate(words) if word in COLORS and i != grounds[0] - 1]
    shapes = [shape for shape, names in SHAPE_WORDS.items() if set(names) & set(words)]
    if len(colors) != 1 or len(shapes) != 1:
        raise ValueError(f"prompt={prompt!r} must name one shape of {', '.join(SHAPES)} and its colour")
    text = f" {' '.join(words)} "
    said = [m for m, names in MOTION_WORDS.items() if any(name and f" {name} " in text for name in names)]
    return Scene(colors[0], shapes[0], words[grounds[0] - 1], said[0] if said else "still", image)


# Pixels


@dataclass(frozen=True)
class Path:
    """Where the shape is: centre and radius in pixels, one value a frame."""

    x: Floats  # [T]
    y: Floats  # [T]
    radius: Floats  # [T]


def draw_path(scene: Scene, frames: int, height: int, width: int, rng: random.Random) -> Path:
    """Draws a path for a scene, at the speed of a whole clip; the shape never leaves the picture."""
    unit = min(height, width) / 64
    t = np.zeros(1) if scene.image else np.arange(frames) / (FULL_LENGTH - 1) - 0.5
    zero, spread = np.zeros_like(t), rng.uniform
    x, y = spread(-0.1, 0.1) * width + zero, spread(-0.1, 0.1) * height + zero
    radius = spread(13, 16.5) * unit + zero
    sign = -1.0 if scene.motion in ("left", "up", "shrinking") else 1.0
    if scene.motion in ("left", "right"):
        x = (sign * spread(24, 30) * t + spread(-2, 2)) * width / 64
        y = spread(-0.08, 0.08) * height + zero
    elif scene.motion in ("up", "down"):
        y = (sign * spread(24, 30) * t + spread(-2, 2)) * height / 64
        x = spread(-0.08, 0.08) * width + zero
    elif scene.motion in ("growing", "shrinking"):
        small, large = spread(6.5, 8.5), spread(19, 22)
        radius = ((small + large) / 2 + sign * (large - small) * t) * unit
        x, y = x / 2, y / 2
    return Path(*(np.asarray(line, np.float32) for line in (x + width / 2, y + height / 2, radius)))


def distance(shape: str, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """Signed distance in pixels, negative inside, of points [...] from a shape centred at the origin."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius)
    if shape == "triangle":
        y = y - 0.12 * radius
        return np.asarray(np.maximum(y, np.abs(x) * math.sqrt(3) / 2 - y / 2) - 0.6 * radius)
    if shape != "star":
        raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")
    arm = 2 * math.pi / 5
    angle = np.mod(np.arctan2(x, -y) + arm / 2, arm) - arm / 2
    rho = np.hypot(x, y)
    along, across = rho * np.cos(angle), rho * np.abs(np.sin(angle))
    ux, uy = 0.45 * math.cos(arm / 2) - 1, 0.45 * math.sin(arm / 2)
    return np.asarray((uy * (along - 1.18 * radius) - ux * across) / math.hypot(ux, uy))


def coverage(shape: str, path: Path, height: int, width: int, border: float | None = None) -> Floats:
    """How much of each pixel the shape, or only its border of that width, covers, antialiased: [T, H, W] in 0..1."""
    ys, xs = np.arange(height, dtype=np.float32) + 0.5, np.arange(width, dtype=np.float32) + 0.5
    dx = xs[None, None, :] - path.x[:, None, None]
    dy = ys[None, :, None] - path.y[:, None, None]
    dx, dy = np.broadcast_arrays(dx, dy)
    d = distance(shape, dx, dy, path.radius[:, None, None])
    if border is not None:
        d = np.abs(d + border / 2) - border / 2
    return np.asarray(np.clip(0.5 - d, 0, 1))


def grid_lines(height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which pixels belong to a grid's lines: [H, W]."""
    y, x = (np.arange(size) % GRID_PERIOD < GRID_WIDTH for size in (height, width))
    return y[:, None] | x


def _paint(color: str, rng: random.Random) -> Floats:
    return np.asarray([min(255, max(0, value + rng.uniform(-6, 6))) for value in PALETTE[color]], np.float32)


def render(
    scene: Scene,
    frames: int,
    height: int,
    width: int,
    rng: random.Random,
    crop: int | None = None,
    effects: Collection[str] = (),
) -> Floats:
    """Draws a clip, [T, H, W, 3] in 0..255; with `crop`, a crop x crop window that cuts the shape's edge."""
    path = draw_path(scene, frames, height, width, rng)
    if crop is not None:
        middle = rng.randrange(frames)
        angle, off = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 1.1) * path.radius[middle]
        left = path.x[middle] + off * math.cos(angle) - crop / 2
        top = path.y[middle] + off * math.sin(angle) - crop / 2
        path, height, width = Path(path.x - left, path.y - top, path.radius), crop, crop
    border = OUTLINE_WIDTH if "outline" in effects else None
    alpha = coverage(scene.shape, path, height, width, border)[..., None]
    shape, ground = _paint(scene.color, rng), _paint(scene.background, rng)
    if "grid" in effects:
        ground = np.where(grid_lines(height, width)[..., None], _paint(TONES[scene.background], rng), ground)
    return np.asarray(ground + (shape - ground) * alpha, np.float32)


def render_batch(
    scenes: Sequence[Scene],
    frames: int,
    size: int,
    rng: random.Random,
    crop: int | None = None,
    effects: Collection[str] = (),
) -> Floats:
    """Draws clips for training: [B, 3, T, H, W] in -1..1."""
    clips = np.stack([render(scene, frames, size, size, rng, crop, effects) for scene in scenes])
    return np.ascontiguousarray(clips.transpose(0, 4, 1, 2, 3) / 127.5 - 1, dtype=np.float32)
