"""Trains the embedded model's LoRA adapters from clips that it renders itself.

    python tools/train_demo_lora.py outline grid --seed 0 --workdir /tmp/train-lora

For each effect: a bank of clips and images that show it, encoded with the model's autoencoder, then a pair of small
matrices for every linear layer of the transformer's blocks, trained on that bank with everything else frozen. `outline`
makes shapes hollow; `grid` lays lines of another tone across the background. Every batch is drawn from (seed, stage,
step, worker), so that a seed and a number of threads reproduce a run.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from demo_model.lora import make_effect_bank, train_adapter
from demo_model.runs import run_workers
from demo_model.scenes import EFFECTS

DEMO = Path(__file__).resolve().parents[1] / "sgld" / "demo"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("effects", nargs="+", choices=EFFECTS)
    parser.add_argument("--model", type=Path, default=DEMO, help="a WanPipeline folder")
    parser.add_argument("--out", type=Path, default=DEMO / "loras", help="folder for the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("/tmp/train-lora"))
    parser.add_argument("--threads", type=int, default=1, help="workers of one thread each")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=512, help="clips in the bank")
    parser.add_argument("--images", type=int, default=640, help="images in the bank")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the chosen adapters, one after the other."""
    args = build_parser().parse_args(argv)
    for folder in (args.workdir, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    spread = functools.partial(run_workers, workdir=args.workdir, seed=args.seed, workers=args.threads)
    for effect in args.effects:
        about = {"model": args.model, "effect": effect}
        spread(functools.partial(make_effect_bank, **about, clips=args.clips, images=args.images))
        spread(functools.partial(train_adapter, **about, steps=args.steps, out=args.out))


if __name__ == "__main__":
    main()
