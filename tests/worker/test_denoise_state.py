"""Denoising that goes on in another process: the same picture, bit for bit, with every solver."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sgld
from sgld.messages import Frames
from sgld.models.base import DiffusionModel
from sgld.nn.parallel import Mesh
from sgld.resolve import resolve
from sgld.worker.denoise_state import DenoiseState
from sgld.worker.run_context import RunContext
from sgld.worker.sampler import Trajectory, decode, denoise, prepare, sample
from sgld.worker.solvers import make_solver
from tests.models.conftest import load
from tests.nn.ranks import in_fresh_process

STEPS, SAVED_AT = 6, 3
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
STOCHASTIC = EULER | {"stochastic_sampling": True}
UNIPC: dict[str, Any] = {}  # the embedded model's own scheduler
CASES: dict[str, tuple[dict[str, Any], bool]] = {  # changes of scheduler_config.json, and a picture to start from
    "unipc": (UNIPC, False),
    "unipc of order 3 with bh1": (UNIPC | {"solver_order": 3, "solver_type": "bh1"}, False),
    "euler": (EULER, False),
    "stochastic": (STOCHASTIC, False),
    "unipc from a picture": (UNIPC, True),
    "stochastic from a picture": (STOCHASTIC, True),
}
Resumed = dict[str, list[Frames]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a mask that keeps its left half, and states that were saved."""
    folder = tmp_path_factory.mktemp("states")
    x = np.linspace(0, 255, 96).astype(np.uint8)
    Image.fromarray(np.broadcast_to(x[:, None, None], (96, 96, 3))).save(folder / "picture.png")
    Image.fromarray(np.where(np.arange(96) < 48, 0, 255).astype(np.uint8)[None].repeat(96, 0)).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Resumed:
    """Pictures made in one go; their states after some steps are in the folder."""
    made: Resumed = in_fresh_process(folder / "store 1", _make, folder)
    return made


@pytest.fixture(scope="module")
def resumed(folder: Path, whole: Resumed) -> Resumed:
    """Pictures from the saved states: as they are, without history, and with another generator."""
    made: Resumed = in_fresh_process(folder / "store 2", _resume, folder)
    return made


def _make(mesh: Mesh, folder: Path) -> Resumed:
    def one(model: DiffusionModel, params: Any, context: RunContext, file: Path) -> list[Tensor]:
        path, state = prepare(model, params, context)
        denoise(path, state, context, until=SAVED_AT).save(file)
        return [sample(model, params, context)[0]]

    return _each(mesh, folder, one)


def _resume(mesh: Mesh, folder: Path) -> Resumed:
    def one(model: DiffusionModel, params: Any, context: RunContext, file: Path) -> list[Tensor]:
        path, _ = prepare(model, params, context)
        state = DenoiseState.load(file)
        other = torch.Generator().manual_seed(99).get_state()
        states = state, attrs.evolve(state, history=()), attrs.evolve(state, generator=other)
        return [_finish(path, each, context) for each in states]

    return _each(mesh, folder, one)


def _finish(path: Trajectory, state: DenoiseState, context: RunContext) -> Tensor:
    assert state.step == SAVED_AT
    return decode(path, denoise(path, state, context), context)[0]


def _each(mesh: Mesh, folder: Path, one: Callable[..., list[Tensor]]) -> Resumed:
    model, made = load(Path(sgld.__file__).parent / "demo"), {}
    scheduler = model.scheduler
    for name, (changes, from_picture) in CASES.items():
        model.scheduler = changes if "_class_name" in changes else scheduler | changes
        request = {"prompt": "a red circle on a blue background", "seed": 5, "num_frames": 1}
        if from_picture:
            start = {"image_path": [str(folder / "picture.png")], "mask_path": str(folder / "mask.png")}
            request |= start | {"strength": 0.8, "num_inference_steps": STEPS + 2}
        else:
            request["num_inference_steps"] = STEPS
        params = resolve(request, model.info).params
        ours, theirs = Pipe()
        with ours, theirs:
            frames = one(model, params, RunContext("job", mesh, theirs), folder / f"{name}.safetensors")
        made[name] = [each.numpy() for each in frames]
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_goes_on_to_the_same_picture(name: str, whole: Resumed, resumed: Resumed) -> None:
    expected, (same, _, _) = whole[name][0], resumed[name]
    assert expected.std() > 10
    assert np.array_equal(same, expected)


@pytest.mark.parametrize("name", CASES)
def test_without_its_history_or_generator_the_picture_is_another(name: str, whole: Resumed, resumed: Resumed) -> None:
    """The control: what a solver remembers is needed, and nothing else is."""
    expected, (_, forgetful, other_noise) = whole[name][0], resumed[name]
    assert np.array_equal(forgetful, expected) == (not name.startswith("unipc"))
    assert np.array_equal(other_noise, expected) == (not name.startswith("stochastic"))


def test_a_file_holds_the_whole_state(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3).get_state()
    state = DenoiseState(
        2, torch.randn(1, 4, 2), (torch.randn(1, 4, 2), torch.randn(4, 1, 2).transpose(0, 1)), generator
    )
    state.save(tmp_path / "state")
    again = DenoiseState.load(tmp_path / "state")
    assert again.step == 2 and again.generator is not None
    assert torch.equal(again.latents, state.latents) and torch.equal(again.generator, generator)
    assert all(torch.equal(a, b) for a, b in zip(again.history, state.history, strict=True))
    DenoiseState(1, state.latents).save(tmp_path / "state")
    bare = DenoiseState.load(tmp_path / "state")
    assert (bare.step, bare.history, bare.generator) == (1, (), None)


def test_a_step_leaves_its_state_alone() -> None:
    solver = make_solver({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, 3)
    state = DenoiseState(0, torch.ones(1, 2), generator=torch.Generator().manual_seed(1).get_state())
    once, twice = (solver.step(state, torch.ones(1, 2)) for _ in range(2))
    assert torch.equal(once.latents, twice.latents)
    assert (state.step, once.step) == (0, 1)


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, tmp_path / "state", {"version": "0", "step": "1"})
    with pytest.raises(ValueError, match="version '0' cannot be resumed; only '1'"):
        DenoiseState.load(tmp_path / "state")
