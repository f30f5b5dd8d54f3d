"""What every family is held to: diffusers' picture from the same seed, on any number of ranks, with any weights."""

from collections.abc import Iterable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgld.config import Settings
from sgld.messages import Load
from sgld.models import load_family
from sgld.models.family import Family, Sound
from sgld.nn.lora import Use
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.params import resolve
from sgld.platform import Cpu
from sgld.worker.hook import Hook
from sgld.worker.sampler import sample
from tests.nn.ranks import in_fresh_process, on_ranks

Request = Mapping[str, Any]


def load(folder: Path, mesh: Mesh | None = None, **settings: Any) -> Family:
    """That model on the CPU; as many workers as the mesh has ranks."""
    mesh = mesh or Mesh.solo()
    command = Load(Settings(model_path=str(folder), num_gpus=mesh.world, **settings), folder)
    return load_family(command, mesh, Cpu(), lambda step, total: None)


def make(family: Family, request: Request, mesh: Mesh | None = None, previews: int = 0) -> tuple[Tensor, Sound | None]:
    """Frames u8 [N, H, W, 3], and what is heard."""
    params, _ = resolve(request, family.info)
    ours, theirs = Pipe()
    try:
        return sample(family, params, Hook("job", mesh or Mesh.solo(), theirs), previews)
    finally:
        ours.close()
        theirs.close()


def picture(family: Family, request: Request, mesh: Mesh | None = None) -> Tensor:
    """Frames u8 [N, H, W, 3]."""
    return make(family, request, mesh)[0]


def _on_rank(mesh: Mesh, folder: Path, request: Request, settings: Mapping[str, Any]) -> Any:
    frames, sound = make(load(folder, mesh, **settings), request, mesh)
    return frames.numpy(), None if sound is None else sound.samples.numpy()


def picture_of_ranks(world: int, store: Path, folder: Path, request: Request, **settings: Any) -> Tensor:
    """The same, made by that many processes, which meet in the file `store`; all but the first have no frames."""
    (frames, _), *others = on_ranks(world, store, _on_rank, folder, request, settings)
    assert all(part.size == 0 for part, _ in others)
    return torch.from_numpy(frames)


def _memory(mesh: Mesh, folder: Path, warm: Request, request: Request) -> tuple[int, int]:
    family = load(folder, mesh)
    picture(family, warm, mesh)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = Cpu().peak_memory()
    picture(family, request, mesh)
    params, _ = resolve(request, family.info)
    return max(family.info.memory_needs(params).values()), Cpu().peak_memory() - before


def estimate_is_near_the_peak(
    store: Path, folder: Path, warm: Request, request: Request, below: float = 1.3, slack: int = 2**25
) -> None:
    """Bytes that a request takes above the loaded and warm model: as estimated, and as a fresh process takes them."""
    estimate, peak = in_fresh_process(store, _memory, folder, warm, request)
    assert peak / below < estimate < 3 * peak + slack, f"estimated {estimate >> 20} MiB, measured {peak >> 20} MiB"


def levels(picture: npt.NDArray[Any]) -> Tensor:
    """A picture or clip of diffusers, floats in [0, 1] [..., H, W, 3], as frames u8 [N, H, W, 3]."""
    frames = (np.asarray(picture) * 255).round().astype(np.uint8)
    return torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]))


def apart(a: Tensor, b: Tensor) -> int:
    """The largest difference of two pictures, in levels of 255."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int((a.int() - b.int()).abs().max())


def same_state(ours: nn.Module, theirs: nn.Module, unused: Iterable[str] = ()) -> None:
    """Both modules, on the meta device, have the same tensors of the same shapes; `unused` are prefixes of theirs."""
    skip = tuple(unused)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if not (skip and name.startswith(skip))}
    assert {name: tuple(x.shape) for name, x in ours.state_dict().items()} == expected


def write_lora(
    file: Path, module: nn.Module, *, prefix: str = "transformer.", rank: int = 2, scale: float = 0.2
) -> Path:
    """A random adapter for every linear layer of a module, in diffusers' names."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                tensors[f"{prefix}{name}.lora_{part}.weight"] = scale * torch.randn(shape, generator=generator)
    save_file(tensors, file)
    return file


def wear(family: Family, file: Path, component: str = "transformer") -> None:
    """Let an adapter hold on that component; all of its keys must fit."""
    layers = family.lora[component]
    layers.apply([Use(layers.fit(read_adapter(file)))], "merge")
