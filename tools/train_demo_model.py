"""Trains the embedded demo model from clips that it renders itself.

    python tools/train_demo_model.py all --seed 0 --workdir /tmp/train --threads 2

Stages, each reading what the ones before it wrote to the work folder; `vae` and `transformer` resume from checkpoints:

    text         the tokenizer and the text encoder, alone, on labels
    vae          the autoencoder, mostly on crops around edges
    bank         latents of rendered clips, and the latents' mean and standard deviation
    transformer  the flow transformer, jointly with the text encoder
    assemble     the WanPipeline folder in bf16, `<workdir>/final`

Budgets are in steps, and every batch is drawn from (seed, stage, step, worker), so that a seed and a number of threads
reproduce a run.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_model.assemble import assemble
from demo_model.autoencoder import train_autoencoder
from demo_model.bank import join_bank, make_bank
from demo_model.runs import Run, run_workers
from demo_model.text import train_text_encoder
from demo_model.transformer import train_transformer

STAGES = ("text", "vae", "bank", "transformer", "assemble")


@dataclass(frozen=True)
class Budget:
    """Steps of each training stage, and scenes in the bank."""

    text: int = 1500
    vae: int = 2800
    clips: int = 3840
    images: int = 5120
    transformer: int = 4200
    polish: int = 2600


def run_stage(stage: str, budget: Budget, workdir: Path, seed: int, threads: int) -> None:
    """Runs one stage on `threads` single-threaded workers; text and assemble need only one."""
    spread = functools.partial(run_workers, workdir=workdir, seed=seed, workers=threads)
    if stage == "text":
        run_workers(functools.partial(train_text_encoder, steps=budget.text), workdir, seed, workers=1)
    elif stage == "vae":
        spread(functools.partial(train_autoencoder, steps=budget.vae))
    elif stage == "bank":
        spread(functools.partial(make_bank, clips=budget.clips, images=budget.images))
        join_bank(workdir, threads)
    elif stage == "transformer":
        spread(functools.partial(train_transformer, steps=budget.transformer, polish=budget.polish))
    else:
        assemble(Run(workdir, seed))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--threads", type=int, default=2, help="workers of one thread each")
    for name, value in vars(Budget()).items():
        kind = "scenes in the bank" if name in ("clips", "images") else "steps"
        parser.add_argument(f"--{name}-budget", type=int, default=value, metavar="N", help=f"{kind} ({value})")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen stages in order."""
    args = build_parser().parse_args(argv)
    budget = Budget(**{name: getattr(args, f"{name}_budget") for name in vars(Budget())})
    args.workdir.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, budget, args.workdir, args.seed, args.threads)


if __name__ == "__main__":
    main()
