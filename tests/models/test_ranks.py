"""Sequence parallelism: two ranks make the picture that one makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sgld.errors import BadRequest
from sgld.nn.parallel import Mesh
from tests.models.conftest import generate, levels_apart, load
from tests.nn.ranks import on_ranks


def _pictures(mesh: Mesh, folder: Path) -> tuple[Any, str]:
    family = load(folder, mesh)
    with pytest.raises(BadRequest) as caught:
        generate(family, mesh, height=16, width=48, num_frames=1)
    return generate(family, mesh).numpy(), str(caught.value)


def test_two_ranks_make_the_picture_of_one(twins: Path, tmp_path: Path) -> None:
    (frames, refusal), (nothing, _) = on_ranks(2, tmp_path / "store", _pictures, twins / "wan22-a14b")
    alone = generate(load(twins / "wan22-a14b"))
    assert levels_apart(torch.from_numpy(frames), alone) <= 1
    assert nothing.size == 0
    assert "3 tokens of this size and length do not split over 2 workers; allowed for it: 1" in refusal
