"""The embedded model obeys its prompts, measured from the files that `sgld generate` writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import media_files
from tests.processes import ranks_of
from tools.judge import Scene, draw_prompts, judge_file

DEMO = Path(__file__).parents[1] / "sgld" / "demo"
CLIPS, IMAGES, CONTROLS = 24, 12, 12
MAX_WEIGHTS_BYTES = 12_000_000


def made(folder: Path, prompts: list[tuple[str, Scene]], *flags: str) -> Iterator[tuple[Scene, Path]]:
    """One run of `sgld generate` for all prompts: each prompt's scene, and its file."""
    asked = folder / "prompts.txt"
    asked.write_text("\n".join(prompt for prompt, _ in prompts))
    command = [sys.executable, "-m", "sgld", "generate", "--prompt-path", str(asked), "--output-path", str(folder)]
    seed = () if "--seed" in flags else ("--seed", "0")
    run = subprocess.run([*command, "--json", *seed, *flags], capture_output=True, text=True, timeout=170)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt, _ in prompts]
    return iter([(scene, Path(line["path"])) for (_, scene), line in zip(prompts, lines, strict=True)])


def score(outputs: Iterator[tuple[Scene, Path]]) -> dict[str, float]:
    """The share of outputs in which each thing asked for is seen."""
    seen = [judge_file(path).agrees(scene) for scene, path in outputs]
    return {wish: sum(marks[wish] for marks in seen) / len(seen) for wish in seen[0]}


def test_clips_show_what_their_prompts_say(tmp_path: Path) -> None:
    scores = score(made(tmp_path, draw_prompts(CLIPS, held_out=True, images=False, seed=1)))
    assert scores["color"] >= 0.9 and scores["background"] >= 0.9, scores
    assert scores["shape"] >= 0.7 and scores["motion"] >= 0.85, scores


def test_images_show_what_their_prompts_say(tmp_path: Path) -> None:
    scores = score(made(tmp_path, draw_prompts(IMAGES, held_out=True, images=True, seed=1), "--num-frames", "1"))
    assert scores["color"] >= 0.8 and scores["background"] >= 0.8 and scores["shape"] >= 0.7, scores


def test_random_weights_are_told_apart(tmp_path: Path) -> None:
    """The control: the judge does not see obedience where there is none."""
    control = tmp_path / "control"
    shutil.copytree(DEMO, control, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    file = control / "transformer" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: (torch.randn(weight.shape, generator=generator) * weight.float().std(correction=0)).to(weight.dtype)
        for name, weight in load_file(file).items()
    }
    save_file(noise, file)
    prompts = draw_prompts(CONTROLS, held_out=True, images=False, seed=1)
    scores = score(made(tmp_path, prompts, "--model-path", str(control)))
    assert scores["color"] <= 0.5 and scores["shape"] <= 0.6, scores


def test_a_file_can_be_made_again_from_what_it_says(tmp_path: Path) -> None:
    prompts = draw_prompts(1, held_out=True, images=False, seed=2)
    (_, first), (_, second) = (next(made(tmp_path, prompts, "--num-inference-steps", "4")) for _ in range(2))
    assert first != second
    told = media_files.read_metadata(first)
    assert (told["prompt"], told["seed"], told["model"]) == (prompts[0][0], 0, "sgld/demo")
    assert (media_files.decode(first)[0] == media_files.decode(second)[0]).all()


def test_two_workers_make_the_same_clip_as_one(tmp_path: Path) -> None:
    prompts = draw_prompts(1, held_out=True, images=False, seed=2)
    flags = ("--num-inference-steps", "4", "--return-frames")
    ((_, one),) = made(tmp_path, prompts, *flags)
    ((_, two),) = made(tmp_path, prompts, *flags, "--num-gpus", "2")
    ((_, other),) = made(tmp_path, prompts, *flags, "--num-gpus", "2", "--seed", "1")
    frames = [media_files.decode(path)[0].astype(int) for path in (one, two, other)]
    assert abs(frames[0] - frames[1]).max() <= 1
    assert abs(frames[0] - frames[2]).max() > 20, "the control: another seed is another clip"


def test_a_worker_killed_under_generate_is_one_line_and_exit_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sgld", "generate", "--prompt", "a red circle", "--num-inference-steps", "1000"]
    with subprocess.Popen([*command, "--output-path", str(tmp_path)], stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        while not run.stderr.readline().startswith("encode"):
            pass
        (rank,) = ranks_of(run.pid)
        rank.kill()
        told = run.stderr.read().splitlines()
        assert run.wait(60) == 1
    assert [line for line in told if line.startswith("error:")] == ["error: worker 0 died (signal 9) during the job"]
    assert not any("Traceback" in line for line in told)
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_small() -> None:
    size = sum(file.stat().st_size for file in DEMO.rglob("*.safetensors"))
    assert 0 < size <= MAX_WEIGHTS_BYTES


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_every_length_the_readme_names(tmp_path: Path, frames: int) -> None:
    prompts = draw_prompts(1, held_out=True, images=frames == 1, seed=3)
    flags = ("--num-frames", str(frames), "--num-inference-steps", "1")
    ((_, path),) = made(tmp_path, prompts, *flags)
    assert len(media_files.decode(path)[0]) == frames
