"""Draws a contact sheet of clips that the model makes, a row a prompt with its caption beneath.

python tools/contact_sheet.py --prompts 16 --out docs/demo.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from judge import DEFAULT_MODEL, Frames, draw_prompts, judge_frames, load_pipeline, pipeline_generator
from PIL import Image, ImageDraw, ImageFont

GAP, LINE = 4, 16


def draw_row(frames: Frames, text: str, shown: int, height: int) -> Image.Image:
    """A row of `shown` frames, evenly chosen from [N, H, W, 3], with a caption line beneath."""
    chosen = frames[np.linspace(0, len(frames) - 1, shown).round().astype(int)]
    width = round(height * frames.shape[2] / frames.shape[1])
    row = Image.new("RGB", (shown * (width + GAP) - GAP, height + LINE), "white")
    for i, frame in enumerate(chosen):
        row.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS), (i * (width + GAP), 0))
    ImageDraw.Draw(row).text((1, height + 2), text, fill="black", font=ImageFont.load_default(10))
    return row


def lay_out(rows: Sequence[Image.Image], columns: int) -> Image.Image:
    """Rows one below the other, in columns."""
    width, height = rows[0].size
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (width + 3 * GAP) - 3 * GAP, lines * (height + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (i // lines * (width + 3 * GAP), i % lines * (height + GAP)))
    return sheet


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--trained", action="store_true", help="trained combinations instead of held-out ones")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shown", type=int, default=5, help="frames a row")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Generates the clips, draws the sheet and says how many prompts the judge finds obeyed."""
    args = build_parser().parse_args(argv)
    generate = pipeline_generator(load_pipeline(args.model), args.size, args.steps, args.guidance)
    rows, obeyed = [], 0
    prompts = draw_prompts(args.prompts, held_out=not args.trained, images=False, seed=args.seed)
    for i, (prompt, scene) in enumerate(prompts):
        frames = generate(prompt, args.frames, 1000 * args.seed + i)
        obeyed += all(judge_frames(frames).agrees(scene).values())
        rows.append(draw_row(frames, prompt, args.shown, args.size))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lay_out(rows, columns=2).save(args.out, optimize=True)
    print(f"{args.out}: {obeyed} of {len(rows)} prompts obeyed")


if __name__ == "__main__":
    main()
