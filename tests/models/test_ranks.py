"""Several ranks make the picture that diffusers makes, however they share the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgld.errors import BadRequest
from sgld.nn.parallel import Mesh
from tests.models.conftest import REQUEST, levels_apart, load
from tests.models.parity import pictures_of_ranks

SIDES = {
    "tile_sample_min_height": 24, "tile_sample_min_width": 32, "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 16,
}  # fmt: skip
TILES = {"vae_tiling": True, "vae_config": SIDES}
REQUESTS: list[dict[str, Any]] = [
    {},
    {"height": 16, "width": 48, "num_frames": 5},  # 6 tokens and 2 latent rows do not divide over 3 or 4 ranks
    {"guidance_scale": 1.0},
]
DEFAULTS = {"guidance_scale_2": 3.0}  # of the model
SPLITS: list[tuple[int, dict[str, Any]]] = [
    (2, {"enable_cfg_parallel": True}),
    (2, {"ulysses_degree": 2}),
    (2, {"ring_degree": 2, "tp_size": 2, "vae_sp": True}),
    (3, {"ring_degree": 3, "vae_sp": True} | TILES),
    (4, {"ulysses_degree": 2, "ring_degree": 2, "tp_size": 2, "vae_sp": True}),
    (4, {"enable_cfg_parallel": True, "ulysses_degree": 2, "vae_sp": True}),
]


@pytest.fixture(scope="module")
def expected(twins: Path, reference: Callable[..., Tensor]) -> dict[bool, list[Tensor]]:
    """What diffusers makes of `REQUESTS`, without and with tiles."""
    ways, requests = ({}, {"tiles": SIDES}), [DEFAULTS | request for request in REQUESTS]
    return {bool(way): [reference(twins / "wan22-a14b", **way, **request) for request in requests] for way in ways}


@pytest.mark.proves("WanPipeline", "USP", "CFG parallel")
@pytest.mark.parametrize(("world", "settings"), SPLITS)
def test_ranks_make_the_picture_of_diffusers(
    world: int, settings: dict[str, Any], twins: Path, expected: dict[bool, list[Tensor]], tmp_path: Path
) -> None:
    cases = [(twins / "wan22-a14b", REQUEST | request, settings) for request in REQUESTS]
    first = pictures_of_ranks(world, tmp_path / "store", cases)
    for frames, theirs in zip(first, expected["vae_tiling" in settings], strict=True):
        assert levels_apart(frames, theirs) <= 1
    whole, tiled = (expected[tiles][0] for tiles in (False, True))
    assert levels_apart(whole, tiled) > 1, "tiles make no difference, so this proves nothing of them"


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_gpus": 3, "ulysses_degree": 3}, "ulysses_degree: 3 workers cannot share 4 attention heads evenly; "
     "allowed for 3 workers: 1"),
    ({"num_gpus": 3, "tp_size": 3}, "tp_size: 3 workers cannot share the 4 heads and 64 hidden channels"),
])  # fmt: skip
def test_what_does_not_divide_is_an_error(settings: dict[str, Any], message: str, twins: Path) -> None:
    mesh = Mesh(0, 3, torch.device("cpu"))
    with pytest.raises(BadRequest, match=message):
        load(twins / "wan21", mesh, **settings)
