"""Offloaded weights: there when they are needed, gone when they are not, and always the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError
from sgld.nn.offload import Offloader
from sgld.nn.weights import load_module
from sgld.platform import Cpu
from sgld.settings import Settings

FILE = "model.safetensors"


class Tower(nn.Module):
    """A layer, then blocks of which each does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tower in float32."""
    torch.manual_seed(0)
    save_file(Tower().state_dict(), tmp_path / FILE)
    return tmp_path


def load(folder: Path, offloader: Offloader, name: str = "tower", dtype: torch.dtype = torch.float32) -> Tower:
    keeper = offloader.keeper(name, layers=("blocks",))
    return load_module(Tower, folder, dtype, torch.device("cpu"), offload=keeper)


def held(module: nn.Module) -> list[str]:
    """Names of the weights that are there."""
    return [n for n, p in module.named_parameters() if p.untyped_storage().nbytes() >= p.numel() * p.element_size()]


def run(tower: Tower, offloader: Offloader, x: Tensor, seen: list[list[str]] | None = None) -> Tensor:
    x = tower.first(x)
    for block in offloader.runner("tower").visit(tower.blocks):
        if seen is not None:
            seen.append(held(tower))
        x = block(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_component_at_a_time_and_none_at_rest(folder: Path, dtype: torch.dtype) -> None:
    offloader, plain = Offloader(Cpu(), True, whole=("a", "b")), load(folder, Offloader(Cpu(), True), dtype=dtype)
    a, b = (load(folder, offloader, name, dtype) for name in "ab")
    everything = list(plain.state_dict())
    assert held(plain) == everything
    assert (held(a), held(b)) == ([], [])
    assert {n: (p.shape, p.dtype) for n, p in a.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    for name, here, away in (("a", a, b), ("b", b, a), ("a", a, b)):
        with torch.inference_mode():
            offloader.need(name)
        assert (held(here), held(away)) == (everything, [])
        assert all(torch.equal(p, q) for p, q in zip(here.parameters(), plain.parameters(), strict=True))
        assert not any(p.requires_grad or p.is_inference() for p in here.parameters())
    offloader.need("one that stays")
    assert held(a) == []
    offloader.need("b")
    offloader.release_all()
    assert held(b) == []


def test_block_by_block(folder: Path) -> None:
    """Without the drop after each block, or with all read ahead, more would be held than one."""
    offloader, plain = Offloader(Cpu(), True, layerwise=("tower",)), load(folder, Offloader(Cpu(), True))
    tower, x, seen = load(folder, offloader), torch.randn(2, 4), list[list[str]]()
    offloader.need("tower")
    assert held(tower) == ["first.weight", "first.bias"]
    for _ in range(2):  # the second run begins with a block that was read at the end of the first
        assert torch.equal(run(tower, offloader, x, seen), run(plain, Offloader(Cpu(), True), x))
    assert seen == 2 * [["first.weight", "first.bias", f"blocks.{i}.weight", f"blocks.{i}.bias"] for i in range(5)]
    block = 4 * (4 * 4 + 4)
    assert offloader.held_bytes("tower") == 3 * block
    assert offloader.held_bytes("another") == 0
    offloader.release_all()
    assert held(tower) == []


def test_a_visit_that_is_given_up_leaves_no_trace(folder: Path) -> None:
    offloader, plain = Offloader(Cpu(), True, layerwise=("tower",)), load(folder, Offloader(Cpu(), True))
    tower, x = load(folder, offloader), torch.randn(2, 4)
    offloader.need("tower")
    visit = offloader.runner("tower").visit(tower.blocks)
    next(visit), next(visit)
    offloader.release_all()
    assert held(tower) == []
    offloader.need("tower")
    assert torch.equal(run(tower, offloader, x), run(plain, Offloader(Cpu(), True), x))


@pytest.mark.parametrize("layerwise", [False, True])
def test_changed_weights_come_changed_until_the_change_is_taken_back(folder: Path, layerwise: bool) -> None:
    names = ("tower",)
    offloader = Offloader(Cpu(), True, *((), names) if layerwise else (names, ()))
    tower, plain, x = load(folder, offloader), load(folder, Offloader(Cpu(), True)), torch.randn(2, 4)
    change = offloader.changer("tower")
    assert change is not None
    assert offloader.changer("another") is None
    offloader.need("tower")
    before = run(tower, offloader, x)
    change({"blocks.3.weight": lambda base: base * 2, "first.bias": lambda base: base + 1})
    offloader.need("tower")
    changed = run(tower, offloader, x)
    with torch.no_grad():
        plain.get_parameter("blocks.3.weight").mul_(2)
        plain.get_parameter("first.bias").add_(1)
    assert torch.equal(changed, run(plain, Offloader(Cpu(), True), x))
    change({})
    offloader.need("tower")
    assert torch.equal(run(tower, offloader, x), before)


def test_files_that_went_away_are_named(folder: Path) -> None:
    offloader = Offloader(Cpu(), True, layerwise=("tower",))
    tower = load(folder, offloader)
    offloader.need("tower")
    (folder / FILE).rename(folder / "moved")
    with pytest.raises(ModelError, match=r"model\.safetensors: no such file"):
        run(tower, offloader, torch.randn(2, 4))
    save_file({"first.weight": torch.zeros(4, 4)}, folder / FILE)
    offloader.release_all()
    with pytest.raises(ModelError, match=r"model\.safetensors: it has changed since it was checked"):
        offloader.need("tower")


@pytest.mark.parametrize("pin", [True, False])
def test_host_memory_is_the_other_place_to_wait(folder: Path, pin: bool) -> None:
    """As on a GPU: the files are read once, into pinned memory if asked."""
    pinned: list[Tensor] = []

    class Gpu(Cpu):
        offloads_to_files = False

        def pin(self, x: Tensor) -> Tensor:
            pinned.append(x)
            return x

    offloader, plain = Offloader(Gpu(), pin, layerwise=("tower",)), load(folder, Offloader(Cpu(), True))
    tower, x = load(folder, offloader), torch.randn(2, 4)
    (folder / FILE).unlink()
    assert len(pinned) == (12 if pin else 0)
    for _ in range(2):
        assert held(tower) == []
        offloader.need("tower")
        assert torch.equal(run(tower, offloader, x), run(plain, Offloader(Cpu(), True), x))
        offloader.release_all()


def test_bad_files_are_refused_before_they_are_needed(folder: Path) -> None:
    save_file({"first.weight": torch.zeros(4, 4)}, folder / FILE)
    with pytest.raises(ModelError, match="11 tensors missing"):
        load(folder, Offloader(Cpu(), True, whole=("tower",)))


def test_flags() -> None:
    settings = Settings.of(image_encoder_cpu_offload=True)
    with pytest.raises(BadRequest, match="^image_encoder_cpu_offload: this model has no image_encoder; leave it out"):
        Offloader.of(settings, Cpu(), ("transformer", "vae"))
    both = Offloader.of(Settings.of(dit_cpu_offload=True, dit_layerwise_offload=True), Cpu(), ("transformer",))
    assert [both.keeper(name) is None for name in ("transformer", "transformer_2", "vae")] == [False, False, True]
