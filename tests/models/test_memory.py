"""What a request takes, estimated before it runs: against the measured peak of a fresh process."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sgld
from sgld.errors import TooLarge
from sgld.nn.parallel import Axis, Mesh
from sgld.platform import Cpu, available_memory, room_in_groups
from sgld.resolve import resolve
from tests.models.conftest import REQUEST, load
from tests.models.parity import estimate_is_near_the_peak

DEMO = Path(sgld.__file__).parent / "demo"
SIZES = ({"height": 96, "width": 96, "num_frames": 17}, {"height": 192, "width": 192, "num_frames": 17})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("model", ["demo", "wan21"])
def test_the_estimate_is_near_the_measured_peak(twins: Path, tmp_path: Path, model: str, size: dict[str, Any]) -> None:
    folder = DEMO if model == "demo" else twins / model
    once = REQUEST | {"num_inference_steps": 1}
    warm = once | {"height": 48, "width": 48, "num_frames": 1}
    estimate_is_near_the_peak(tmp_path / "store", folder, warm, once | size)


def test_what_cannot_fit_is_refused_before_it_runs() -> None:
    info = load(DEMO).info
    assert info.memory is not None
    resolve({"height": 480, "width": 480}, info)
    with pytest.raises(
        TooLarge, match=r"^num_frames: 9601: .* need about \d{3,}\.\d GiB of memory; there are"
    ) as caught:
        resolve({"height": 9600, "width": 9600, "num_frames": 9601}, info)
    assert caught.value.param == "num_frames"


def test_capabilities(twins: Path) -> None:
    info = load(twins / "wan21").info
    assert info.tasks == ("text-to-video", "text-to-image", "image-to-video", "image-to-image")
    assert info.max_tokens == 512


def test_free_memory_is_bounded_by_control_groups(tmp_path: Path) -> None:
    assert 0 < Cpu().free_memory() <= available_memory()
    outer, inner, old = tmp_path / "a", tmp_path / "a/b", tmp_path / "memory/c"
    for folder in (inner, old):
        folder.mkdir(parents=True)
    groups = tmp_path / "cgroup"
    groups.write_text("9:cpu:/elsewhere\n4:memory:/c\n0::/a/b\n")
    for folder, limit, used in ((outer, "5000", "3000"), (inner, "max", "1000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        (folder / "memory.stat").write_text("anon 10\ninactive_file 500\n")
    (old / "memory.limit_in_bytes").write_text("900")
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("total_inactive_file 7\n")
    assert list(room_in_groups(groups, tmp_path)) == [807, 2500]


def test_a_cuda_rank_counts_its_own_share(twins: Path) -> None:
    """Its memory is its own, so more ranks hold fewer tokens each; frames are decoded by one rank alone."""

    class Apart(Cpu):
        ranks_share_memory = False

    from sgld.models.wan import Wan

    family = load(twins / "wan21")
    assert isinstance(family, Wan)
    parallel_decode = family.memory()
    family.parts.platform, family.parts.mesh = Apart(), Mesh(0, 2, torch.device("cpu"), tokens=Axis((0, 1)))
    apart = family.memory()
    assert apart.token < parallel_decode.token < 2 * apart.token
    assert apart.pixel == parallel_decode.pixel
