"""Judges generated files: which shape, in which colour, on which background, moving where.

    python tools/judge.py --prompts 200 --held-out --out /tmp/judged
    python tools/judge.py --prompts 200 --held-out --images --out /tmp/judged
    python tools/judge.py --prompts 50 --random-weights --out /tmp/control
    python tools/judge.py --prompts 200 --round-trip --out /tmp/round-trip

Generates a file a prompt (mp4 for clips, png for images), decodes it from disk and measures it with numpy alone. The
measures: the background's colour is the palette colour nearest to the border's median; the shape is what differs from
the border; its colour is the palette colour nearest to its median; its kind is the one whose drawing, at the same place
and of the same area, overlaps it most; its motion comes from the path of its centre and the growth of its radius.
"""

import argparse
import functools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_model import scenes
from demo_model.scenes import FULL_LENGTH, PALETTE, SHAPES, Floats, Scene, caption, distance, parse_prompt, sample_scene

if TYPE_CHECKING:
    from diffusers import WanPipeline

__all__ = [
    *("Frames", "Judged", "Scene", "Verdict", "scenes"),
    *("caption", "judge_file", "judge_frames", "parse_prompt", "read_frames"),
]

Frames = npt.NDArray[np.uint8]

DEFAULT_MODEL: Final = Path(__file__).resolve().parents[1] / "sgld" / "demo"
MAX_COLOR_DISTANCE: Final = 75.0
"""RGB distance beyond which a colour is none of the palette's."""
MIN_AREA: Final = 0.006
"""The part of the picture below which there is no shape."""
MIN_OVERLAP: Final = 0.72
"""Intersection over union below which a blob is no known shape."""
MIN_TRAVEL: Final = 0.08
"""Travel over a whole clip, in picture widths, below which the shape stands still."""
MIN_GROWTH: Final = 0.2
"""Change of log radius over a whole clip below which the shape keeps its size."""


@dataclass(frozen=True)
class Verdict:
    """What a file shows; None where nothing known was recognised, and `motion` None for an image."""

    color: str | None
    background: str | None
    shape: str | None
    motion: str | None
    overlap: float
    """Mean intersection over union with the recognised shape's drawing: how sharp and true its outline is."""

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which of the prompt's wishes came true; an image has no motion to judge."""
        marks = {
            "color": self.color == scene.color,
            "background": self.background == scene.background,
            "shape": self.shape == scene.shape,
        }
        return marks if scene.image else marks | {"motion": self.motion == scene.motion}


# Measuring


def nearest_color(rgb: Floats) -> str | None:
    """The palette colour nearest to rgb [3], None where all are far."""
    distances = {name: float(np.linalg.norm(rgb - np.asarray(value))) for name, value in PALETTE.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


def border_color(frames: Floats) -> Floats:
    """The median colour [3] of the outer twentieth of the frames [T, H, W, 3]."""
    edge = max(1, frames.shape[1] // 20)
    sides = (frames[:, :edge], frames[:, -edge:], frames[:, :, :edge], frames[:, :, -edge:])
    return np.asarray(np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0), np.float32)


def shape_color(frames: Floats, ground: Floats) -> Floats | None:
    """The median colour [3] of what clearly differs from the background, None where too little does."""
    far = np.linalg.norm(frames - ground, axis=-1)
    inside = far > max(40.0, 0.6 * float(np.percentile(far, 98)))
    if inside.mean() < MIN_AREA:
        return None
    return np.asarray(np.median(frames[inside], axis=0), np.float32)


def shape_mask(frames: Floats, ground: Floats, shape: Floats) -> Floats:
    """How far each pixel lies on the way from the background's colour to the shape's: [T, H, W] in 0..1."""
    way = shape - ground
    return np.asarray(np.clip((frames - ground) @ way / float(way @ way), 0, 1), np.float32)


@dataclass(frozen=True)
class Blob:
    """A frame's shape: its centre and the square root of its area, in pixels, and its mask [H, W]."""

    x: float
    y: float
    extent: float
    mask: npt.NDArray[np.bool_]


def find_blob(soft: Floats) -> Blob | None:
    """The shape in a soft mask [H, W], None where it is too small."""
    mask = soft > 0.5
    area = float(mask.sum())
    if area < MIN_AREA * mask.size:
        return None
    ys, xs = np.nonzero(mask)
    return Blob(float(xs.mean()) + 0.5, float(ys.mean()) + 0.5, area**0.5, mask)


@functools.cache
def template_moments(shape: str) -> tuple[float, float]:
    """Of a shape with radius 1 drawn about the origin: the height of its centroid, and the root of its area."""
    ticks = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    x, y = np.meshgrid(ticks, ticks)
    inside = distance(shape, x, y, 1.0) < 0
    return float(y[inside].mean()), float(inside.sum() ** 0.5 * (ticks[1] - ticks[0]))


def overlap(blob: Blob, shape: str) -> float:
    """Intersection over union of a blob and a shape drawn with the same centroid and area."""
    height, extent = template_moments(shape)
    radius = blob.extent / extent
    ys, xs = np.indices(blob.mask.shape, dtype=np.float32) + 0.5
    drawn = distance(shape, xs - blob.x, ys - (blob.y - height * radius), radius) < 0
    return float((drawn & blob.mask).sum() / max(1, (drawn | blob.mask).sum()))


def recognise(blobs: Sequence[Blob]) -> tuple[str | None, float]:
    """The shape that overlaps the blobs most on average, and that average; None where it is low."""
    scores = {shape: statistics.fmean(overlap(blob, shape) for blob in blobs) for shape in SHAPES}
    best = max(scores, key=scores.__getitem__)
    return (best if scores[best] >= MIN_OVERLAP else None), scores[best]


def measure_motion(blobs: Sequence[Blob | None], height: int, width: int) -> str | None:
    """The motion along a clip's blobs, from least-squares slopes; None where the shape is often missing."""
    seen = [(i, blob) for i, blob in enumerate(blobs) if blob is not None]
    if len(seen) < max(2, 0.75 * len(blobs)):
        return None
    times = np.array([i for i, _ in seen]) / (FULL_LENGTH - 1)

    def slope(values: list[float]) -> float:
        return float(np.polyfit(times, values, 1)[0])

    dx, dy = slope([blob.x / width for _, blob in seen]), slope([blob.y / height for _, blob in seen])
    growth = slope([float(np.log(blob.extent)) for _, blob in seen])
    travel = max(abs(dx), abs(dy))
    if travel / MIN_TRAVEL < 1 and abs(growth) / MIN_GROWTH < 1:
        return "still"
    if abs(growth) / MIN_GROWTH > travel / MIN_TRAVEL:
        return "growing" if growth > 0 else "shrinking"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def judge_frames(frames: Frames) -> Verdict:
    """Judges a clip or a single image: frames [N, H, W, 3] uint8."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames have shape {frames.shape}; [N, H, W, 3] is needed")
    pixels = frames.astype(np.float32)
    ground = border_color(pixels)
    background, shape = nearest_color(ground), shape_color(pixels, ground)
    if shape is None:
        return Verdict(None, background, None, None, 0.0)
    color = nearest_color(shape)
    blobs = [find_blob(soft) for soft in shape_mask(pixels, ground, shape)]
    seen = [blob for blob in blobs if blob is not None]
    kind, fit = recognise(seen) if seen else (None, 0.0)
    motion = measure_motion(blobs, *frames.shape[1:3]) if len(frames) > 1 else None
    return Verdict(color, background, kind, motion, fit)


# Files


def read_frames(path: Path | str) -> Frames:
    """Decodes an mp4, webm, gif, webp or png from disk: [N, H, W, 3] uint8."""
    path = Path(path)
    if path.suffix.lower() in (".png", ".webp", ".gif", ".jpg", ".jpeg"):
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def judge_file(path: Path | str) -> Verdict:
    """Judges a file on disk."""
    return judge_frames(read_frames(path))


def write_clip(path: Path, frames: Frames, fps: int = 8) -> None:
    """Writes frames [N, H, W, 3] as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_frames(path: Path, frames: Frames) -> None:
    """Writes frames [N, H, W, 3] as the file's suffix says: one as an image, several as a clip."""
    if path.suffix == ".mp4":
        write_clip(path, frames)
        return
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    if rest:
        first.save(path, save_all=True, append_images=rest, duration=125, loop=0, lossless=True)
    else:
        first.save(path)


# Generating

Generator = Callable[[str, int, int], Frames]
"""Makes a clip from a prompt, a number of frames and a seed: [N, H, W, 3] uint8."""


def load_pipeline(model: Path) -> "WanPipeline":
    """The model folder as a diffusers pipeline in float32."""
    import torch
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def forget(pipeline: "WanPipeline") -> None:
    """Replaces the transformer's weights by random ones of the same spread: the control."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            weight.copy_(torch.randn_like(weight) * weight.std(correction=0) + weight.mean())


def pipeline_generator(pipeline: "WanPipeline", size: int, steps: int, guidance: float) -> Generator:
    """A generator on diffusers' own pipeline; the only place that knows how clips are made."""
    import torch

    def generate(prompt: str, frames: int, seed: int) -> Frames:
        made = pipeline(
            prompt,
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        return np.asarray(np.round(np.clip(made.frames[0], 0, 1) * 255), np.uint8)

    return generate


def round_trip_generator(pipeline: "WanPipeline", size: int) -> Generator:
    """Draws what the prompt asks for and sends it through the autoencoder: how well a perfect transformer could do."""
    import torch

    def generate(prompt: str, frames: int, seed: int) -> Frames:
        rng = random.Random(seed)
        pixels = scenes.render_batch([parse_prompt(prompt, image=frames == 1)], frames, size, rng)
        with torch.no_grad():
            latents = pipeline.vae.encode(torch.from_numpy(pixels)).latent_dist.mode()
            decoded = pipeline.vae.decode(latents).sample[0]  # [3, T, H, W] in -1..1
        return np.asarray(np.round((decoded.permute(1, 2, 3, 0).numpy() + 1) * 127.5), np.uint8)

    return generate


def draw_prompts(count: int, *, held_out: bool, images: bool, seed: int) -> list[tuple[str, Scene]]:
    """Prompts in random sentence forms, with the scenes they ask for."""
    rng = random.Random(f"judge/{seed}/{held_out}/{images}")
    asked = [sample_scene(rng, image=images, held_out=held_out) for _ in range(count)]
    return [(caption(scene, rng), scene) for scene in asked]


@dataclass(frozen=True)
class Judged:
    """One prompt's file and what it shows."""

    prompt: str
    file: str
    seconds: float
    scene: Scene
    verdict: Verdict


def judge_prompts(prompts: Sequence[tuple[str, Scene]], generate: Generator, frames: int, out: Path) -> list[Judged]:
    """Generates, writes, decodes and judges a file for every prompt."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for i, (prompt, scene) in enumerate(prompts):
        path = out / f"{i:04d}.{'png' if scene.image else 'mp4'}"
        began = time.perf_counter()
        made = generate(prompt, 1 if scene.image else frames, i)
        seconds = time.perf_counter() - began
        write_frames(path, made)
        results.append(Judged(prompt, path.name, seconds, scene, judge_file(path)))
    return results


def summarise(results: Sequence[Judged]) -> dict[str, float]:
    """The part of the prompts that came true, by wish and in all, the part with swapped colours, and the timing."""
    marks = [judged.verdict.agrees(judged.scene) for judged in results]
    summary = {name: statistics.fmean(mark[name] for mark in marks) for name in marks[0]}
    summary["all"] = statistics.fmean(all(mark.values()) for mark in marks)
    swapped = [(j.verdict.color, j.verdict.background) == (j.scene.background, j.scene.color) for j in results]
    summary["swapped"] = statistics.fmean(swapped)
    summary["overlap"] = statistics.fmean(judged.verdict.overlap for judged in results)
    summary["seconds"] = statistics.median(judged.seconds for judged in results)
    return {name: round(value, 4) for name, value in summary.items()}


def confusions(results: Sequence[Judged], wish: str) -> dict[str, int]:
    """How often one thing was seen where another was asked for."""
    pairs = [(getattr(judged.scene, wish), getattr(judged.verdict, wish)) for judged in results]
    return {f"{asked} -> {seen}": n for (asked, seen), n in Counter(pairs).most_common() if asked != seen}


def report(results: Sequence[Judged]) -> dict[str, Any]:
    """The summary, the confusions and every verdict, ready for JSON."""
    wishes = [wish for wish in ("color", "background", "shape", "motion") if wish in summarise(results)]
    return {
        "prompts": len(results),
        "summary": summarise(results),
        "confusions": {wish: confusions(results, wish) for wish in wishes},
        "verdicts": [asdict(judged) for judged in results],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="how many prompts")
    parser.add_argument("--held-out", action="store_true", help="combinations that training never saw")
    parser.add_argument("--images", action="store_true", help="single images instead of clips")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="a WanPipeline folder")
    parser.add_argument("--random-weights", action="store_true", help="control: a transformer that knows nothing")
    parser.add_argument("--round-trip", action="store_true", help="no transformer: drawn clips through the autoencoder")
    parser.add_argument("--frames", type=int, default=FULL_LENGTH)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files and report.json")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Generates and judges, and prints the summary."""
    args = build_parser().parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    pipeline = load_pipeline(args.model)
    if args.random_weights:
        forget(pipeline)
    prompts = draw_prompts(args.prompts, held_out=args.held_out, images=args.images, seed=args.seed)
    if args.round_trip:
        generate = round_trip_generator(pipeline, args.size)
    else:
        generate = pipeline_generator(pipeline, args.size, args.steps, args.guidance)
    result = report(judge_prompts(prompts, generate, args.frames, args.out))
    (args.out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("prompts", "summary", "confusions")}, indent=1))


if __name__ == "__main__":
    main()
