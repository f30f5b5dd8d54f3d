"""What rank 0 makes for all: shared when it succeeds, and nobody left waiting when it does not."""

from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import torch

from sgld.inputs import Input
from sgld.nn.parallel import Mesh
from sgld.worker.run_context import RunContext, Stopped
from sgld.worker.sdedit import SDEditStart, still_clip
from tests.nn.ranks import on_ranks


def _shared(mesh: Mesh) -> tuple[list[float], list[str]]:
    ours, theirs = Pipe()
    context = RunContext("job", mesh, theirs)
    like = torch.empty(2, 3)
    made = context.from_rank0(like, lambda: torch.arange(6.0).view(2, 3))
    ends = []
    for error in (ValueError("torn"), Stopped("encode")):

        def fail(error: Exception = error) -> torch.Tensor:
            raise error

        try:
            context.from_rank0(like, fail)
        except Exception as caught:
            ends.append(type(caught).__name__)
    made = context.from_rank0(made, lambda: made + 1)  # and the ranks still agree
    ours.close()
    return made.flatten().tolist(), ends


def test_from_rank0(tmp_path: Path) -> None:
    (one, first), (two, second) = on_ranks(2, tmp_path / "store", _shared)
    assert one == two == [1, 2, 3, 4, 5, 6]
    assert (first, second) == (["ValueError", "Stopped"], ["Stopped", "Stopped"])


def test_a_grey_mask_fades() -> None:
    picture = np.full((4, 4, 3), 100, np.uint8)
    mask = np.array([[0, 1, 128, 255]] * 4, np.uint8)
    sdedit = SDEditStart(torch.zeros(1), torch.zeros(1), Input(picture, mask), None)
    made = sdedit.composite(torch.full((2, 4, 4, 3), 200, dtype=torch.uint8))
    assert made[1, 0, :, 0].tolist() == [100, 100, 150, 200]
    plain = SDEditStart(torch.zeros(1), torch.zeros(1), Input(picture, None), None)
    assert plain.composite(torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)).min() == 200


def test_a_still_clip() -> None:
    clip = still_clip(Input(np.array([[[0, 51, 255]]], np.uint8), None), 5)
    assert clip.shape == (5, 3, 1, 1)
    assert clip[4].flatten().tolist() == [-1, torch.tensor(51 / 255).mul(2).sub(1).item(), 1]
