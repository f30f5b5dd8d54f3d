"""Previews of the embedded model: on the way to the final picture, and without a trace in it."""

from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

import sgld
from sgld.messages import Frames, Preview
from sgld.models.base import DiffusionModel
from sgld.nn.parallel import Mesh
from sgld.nn.runner import H, PlainRunner, StepContext
from sgld.resolve import resolve
from sgld.worker.run_context import RunContext
from sgld.worker.sampler import preview_steps, sample
from tests.models.conftest import load

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def demo() -> DiffusionModel:
    return load(Path(sgld.__file__).parent / "demo")


def made(family: DiffusionModel, seed: int, previews: int = 0, **changes: object) -> tuple[Tensor, list[Preview]]:
    """An image of `PROMPT`, or what the changes ask for, and what was sent on the way."""
    params = resolve({"prompt": PROMPT, "seed": seed, "num_frames": 1} | changes, family.info).params
    ours, theirs = Pipe()
    with ours, theirs:
        frames, _ = sample(family, params, RunContext("job", Mesh.solo(), theirs), previews)
        sent = []
        while ours.poll():
            if isinstance(message := ours.recv(), Preview):
                message.frames.receive(ours)
                sent.append(message)
    return frames, sent


def psnr(a: Frames, b: Frames) -> float:
    """Decibels."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.proves("WanPipeline", "previews")
def test_each_later_preview_is_closer_to_the_final_picture(demo: DiffusionModel) -> None:
    rows, others = [], []
    other, _ = made(demo, 0, prompt="a green star on a white background")
    for seed in range(4):
        frames, previews = made(demo, seed, previews=3)
        rows.append([psnr(preview.frames.array[0], frames[0].numpy()) for preview in previews])
        others.append(psnr(previews[-1].frames.array[0], other[0].numpy()))
    first, second, third = np.mean(rows, 0)
    assert first + 1 < second and second + 1 < third
    assert np.mean(others) + 5 < first, "a preview shows its own picture, not another"


@pytest.mark.parametrize("num_frames", [1, 9])
def test_previews_change_nothing(demo: DiffusionModel, num_frames: int) -> None:
    changes = {"num_frames": num_frames, "num_inference_steps": 4}
    alone, none = made(demo, 1, **changes)
    frames, previews = made(demo, 1, previews=10, **changes)
    assert (frames == alone).all()
    assert none == []
    assert [(p.job_id, p.index, p.step, p.total) for p in previews] == [("job", i, i + 1, 4) for i in range(3)]
    assert {p.frames.array.shape for p in previews} == {(1, 96, 96, 3)}
    assert made(demo, 1, previews=3, num_inference_steps=1)[1] == []


def test_block_runners_know_the_step_and_have_one_store_for_each_output(
    demo: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[StepContext] = []

    class Recorder(PlainRunner):
        def run(
            self, blocks: Iterable[nn.Module], hidden: H, call: Callable[[nn.Module, H], H], step: StepContext
        ) -> H:
            steps.append(step)
            return super().run(blocks, hidden, call, step)

    expected, _ = made(demo, 1, num_inference_steps=3)
    monkeypatch.setattr(demo.transformer, "runner", Recorder())
    for _ in range(2):
        assert (made(demo, 1, num_inference_steps=3)[0] == expected).all()
    first, second = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    for run in (first, second):
        assert [step.index for step in run] == [0, 1, 2]
        assert {step.total for step in run} == {3}
        assert [step.sigma for step in run] == sorted((step.sigma for step in run), reverse=True)
        assert run[0].sigma > run[-1].sigma > 0
        assert all(step.store is run[0].store for step in run)
        assert [run[0].agree(flag) for flag in (False, True)] == [False, True]
    assert first[0].store is not second[0].store


@pytest.mark.parametrize(
    ("total", "previews", "steps"),
    [(20, 0, []), (20, 1, [10]), (20, 3, [5, 10, 15]), (4, 3, [1, 2, 3]), (2, 3, [1]), (1, 3, []), (9, 2, [3, 6])],
)
def test_previews_are_spread_over_the_steps_before_the_last(total: int, previews: int, steps: list[int]) -> None:
    assert preview_steps(total, previews) == steps
