"""What every family is held to: diffusers' picture from the same seed, on any number of ranks, with any weights."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sgld.config import settings_of
from sgld.messages import Load, Preview
from sgld.models import load_family
from sgld.models.base import DiffusionModel, OpaquePipeline, Sound
from sgld.nn.lora import WeightedAdapter
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.nn.weights import read_json
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.worker.run_context import RunContext
from sgld.worker.sampler import sample
from tests.nn.ranks import in_fresh_process, on_ranks

Request = Mapping[str, Any]


def load(folder: Path, mesh: Mesh | None = None, **settings: Any) -> DiffusionModel:
    """That model on the CPU; as many workers as the mesh has ranks."""
    mesh = mesh or Mesh.solo()
    command = Load(settings_of({"model_path": str(folder), "num_gpus": mesh.world} | settings), folder)
    family = load_family(command, mesh, Cpu(), lambda step, total: None)
    assert isinstance(family, DiffusionModel)
    return family


def make(
    family: DiffusionModel | OpaquePipeline, request: Request, mesh: Mesh | None = None, previews: int = 0
) -> tuple[Tensor, Sound | None]:
    """Frames u8 [N, H, W, 3], and what is heard."""
    params = resolve(request, family.info).params
    ours, theirs = Pipe()
    try:
        return sample(family, params, RunContext("job", mesh or Mesh.solo(), theirs), previews)
    finally:
        ours.close()
        theirs.close()


def picture(family: DiffusionModel | OpaquePipeline, request: Request, mesh: Mesh | None = None) -> Tensor:
    """Frames u8 [N, H, W, 3]."""
    return make(family, request, mesh)[0]


def shown(family: DiffusionModel, request: Request, previews: int) -> tuple[Tensor, list[Tensor]]:
    """Frames u8 [N, H, W, 3], and the previews [1, H, W, 3] that came before them."""
    params = resolve(request, family.info).params
    found: list[Tensor] = []
    ours, theirs = Pipe()
    with ours, theirs:
        frames, _ = sample(family, params, RunContext("job", Mesh.solo(), theirs), previews)
        while ours.poll():
            if isinstance(message := ours.recv(), Preview):
                message.frames.receive(ours)
                found.append(torch.from_numpy(message.frames.array.copy()))
    return frames, found


Case = tuple[Path, Request, Mapping[str, Any]]  # a model's folder, what is asked of it, and with which settings
Made = tuple[Tensor, Tensor | None]  # frames u8 [N, H, W, 3], samples [C, N]
SPLITS = ("num_gpus", "sp_degree", "ulysses_degree", "ring_degree", "enable_cfg_parallel", "tp_size")


@contextmanager
def _counted(family: DiffusionModel) -> Iterator[Counter[str]]:
    """Fills with the multiplications of layers in the stages that ranks may share, and the steps under guidance."""
    found: Counter[str] = Counter()
    stages = ["other"]

    def count(module: nn.Module, args: object, y: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and not isinstance(module, nn.Embedding):
            found[stages[-1]] += y.numel() * weight[0].numel()

    def within(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            stages.append(stage)
            answer = method(*args)
            stages.pop()
            found["guided"] += stage == "velocities" and answer[1] is not None
            return answer

        return run

    for stage in ("encode", "velocities", "decode"):
        setattr(family, stage, within(stage, getattr(family, stage)))
    context = register_module_forward_hook(count)
    yield found
    context.remove()


def _on_rank(mesh: Mesh, cases: Iterable[Case], prepare: Callable[[], object]) -> list[tuple[Any, Any, Counter[str]]]:
    prepare()
    answers = []
    for folder, request, settings in cases:
        family = load(folder, mesh, **settings)
        with _counted(family) as work:
            frames, sound = make(family, request, mesh)
        answers.append((frames.numpy(), None if sound is None else sound.samples.numpy(), work))
    return answers


def made_by_ranks(world: int, store: Path, cases: Iterable[Case], prepare: Callable[[], object] = dict) -> list[Made]:
    """Each case, made by that many processes, which meet in the file `store` and call `prepare` first.

    One process alone makes the same, within a level; what is shared takes each of many less than that one; and all but
    the first of them have no frames and no sound.
    """
    cases = list(cases)
    alone = [(folder, request, {k: v for k, v in given.items() if k not in SPLITS}) for folder, request, given in cases]
    different = {str(case): case for case in alone}
    (answers,) = on_ranks(1, store.with_name("alone"), _on_rank, list(different.values()), prepare)
    singles = dict(zip(different, answers, strict=True))
    ranks = on_ranks(world, store, _on_rank, cases, prepare)
    found: list[Made] = []
    work: dict[str, list[Counter[str]]] = {}  # by model and settings: of the one, and of each of many
    for (folder, _, settings), same, parts in zip(cases, alone, zip(*ranks, strict=True), strict=True):
        (whole, heard, all_of_it), ((frames, samples, _), *others) = singles[str(same)], parts
        assert apart(torch.from_numpy(frames), torch.from_numpy(whole)) <= 1, settings
        assert (samples is None) == (heard is None)
        assert samples is None or float(abs(samples - heard).max()) < 1e-3
        assert all(frames.size == 0 and samples is None for frames, samples, _ in others)
        found.append((torch.from_numpy(frames), None if samples is None else torch.from_numpy(samples)))
        sums = work.setdefault(str((folder, settings)), [Counter() for _ in range(world + 1)])
        for total, more in zip(sums, (all_of_it, *(done for _, _, done in parts)), strict=True):
            total.update(more)
    for folder, _, settings in cases:
        one, *many = work[str((folder, settings))]
        halved = one["guided"] or world > 2 or not settings.get("enable_cfg_parallel")
        shared = {"velocities": halved, "encode": settings.get("tp_size"), "decode": settings.get("vae_sp")}
        for stage in (stage for stage, split in shared.items() if split):
            assert max(rank[stage] for rank in many) < one[stage], f"{settings}: a rank of {world} does all of {stage}"
    return found


def pictures_of_ranks(
    world: int, store: Path, cases: Iterable[Case], prepare: Callable[[], object] = dict
) -> list[Tensor]:
    """The frames of `made_by_ranks`."""
    return [frames for frames, _ in made_by_ranks(world, store, cases, prepare)]


def picture_of_ranks(world: int, store: Path, folder: Path, request: Request, **settings: Any) -> Tensor:
    """The same of one."""
    return pictures_of_ranks(world, store, [(folder, request, settings)])[0]


def tiles(size: int, stride: int) -> dict[str, int]:
    """Square tiles, as `vae_config` has them."""
    sides = "height", "width"
    return {f"tile_sample_{name}_{side}": n for name, n in (("min", size), ("stride", stride)) for side in sides}


def ranks_decode_tiles(store: Path, folder: Path, request: Request, size: int, stride: int) -> None:
    """Two share the tiles of one picture, which is not that of one tile."""
    ours = picture_of_ranks(2, store, folder, request, vae_sp=True, vae_config=tiles(size, stride))
    assert apart(ours, picture(load(folder), request)) > 1, "there was one tile"


def _memory(mesh: Mesh, folder: Path, warm: Request, request: Request) -> tuple[int, int]:
    family = load(folder, mesh)
    picture(family, warm, mesh)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = Cpu().peak_memory()
    picture(family, request, mesh)
    params = resolve(request, family.info).params
    return max(family.info.memory_needs(params).values()), Cpu().peak_memory() - before


def estimate_is_near_the_peak(
    store: Path, folder: Path, warm: Request, request: Request, below: float = 1.3, slack: int = 2**26
) -> None:
    """Bytes that a request takes above the loaded and warm model: as estimated, and as a fresh process takes them."""
    estimate, peak = in_fresh_process(store, _memory, folder, warm, request)
    assert peak / below < estimate < 3 * peak + slack, f"estimated {estimate >> 20} MiB, measured {peak >> 20} MiB"


def levels(picture: npt.NDArray[Any]) -> Tensor:
    """A picture or clip of diffusers, floats in [0, 1] [..., H, W, 3], as frames u8 [N, H, W, 3]."""
    frames = (np.asarray(picture) * 255).round().astype(np.uint8)
    return torch.from_numpy(frames.reshape(-1, *frames.shape[-3:]))


def quiet(pipeline: Any) -> Any:
    """A pipeline of diffusers that shows no bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, request: Request) -> Tensor:
    """What a pipeline of diffusers makes of that call and `seed`: a picture u8 [1, H, W, 3]."""
    given = dict(request)
    generator = torch.Generator().manual_seed(given.pop("seed"))
    return levels(pipeline(**given, generator=generator, output_type="np").images)


def photo(file: Path, width: int, height: int) -> Path:
    """A picture of slopes and noise, written to that file."""
    slopes = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    noise = np.random.default_rng(width).integers(0, 55, slopes.shape)
    Image.fromarray((slopes + noise).astype(np.uint8)).save(file)
    return file


def apart(a: Tensor, b: Tensor) -> int:
    """The largest difference of two pictures, in levels of 255."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return int((a.int() - b.int()).abs().max())


def clipped_alike(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """What a block makes in half precision is the same, where it stays finite only because it is clipped."""
    pairs = list(zip(ours, theirs, strict=True))
    for a, b in pairs:
        assert a.dtype == torch.float16
        torch.testing.assert_close(a, b, rtol=0.02, atol=2.0)
    assert any(bool((a.abs() == torch.finfo(a.dtype).max).any()) for a, _ in pairs)


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


SPELLINGS = {  # of a layer's name, and of its down and up
    "authors": ("{}", "lora_A", "lora_B"),
    "comfy": ("diffusion_model.{}", "lora_down", "lora_up"),
    "dotted": ("transformer.{}", "lora.down", "lora.up"),
    "kohya": ("lora_unet_{}", "lora_down", "lora_up"),
}


def spelled(tensors: Mapping[str, Tensor], spelling: str, file: Path) -> Path:
    """An adapter in diffusers' spelling, written to that file in another; kohya's has underscores for dots."""
    name, down, up = SPELLINGS[spelling]
    made = {}
    for key, x in tensors.items():
        layer, _, part = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        layer = layer.replace(".", "_") if spelling == "kohya" else layer
        made[f"{name.format(layer)}.{down if part == 'lora_A' else up}.weight"] = x.contiguous()
    save_file(made, file)
    return file


def fused(tensors: Mapping[str, Tensor], layers: Sequence[str], name: str) -> dict[str, Tensor]:
    """An adapter of one layer in place of several, whose outputs it has one after the other."""
    downs, ups = ([tensors[f"{layer}.lora_{part}.weight"] for layer in layers] for part in "AB")
    return {f"{name}.lora_A.weight": torch.cat(downs), f"{name}.lora_B.weight": torch.block_diag(*ups)}


def write_both(
    folder: Path,
    module: nn.Module,
    authors: Mapping[str, Sequence[str]],
    spell: Callable[[str], str],
    swapped: Sequence[str] = (),
) -> tuple[Path, Path]:
    """One random adapter in diffusers' names, and in the authors', of whose layers each has the rows of several.

    Of those that are `swapped` the two halves of the rows change places.
    """
    generator = torch.Generator().manual_seed(1)
    ours, theirs = {}, {}
    for name, layers in authors.items():
        modules = [module.get_submodule(layer) for layer in layers]
        sizes = [m.out_features for m in modules if isinstance(m, nn.Linear)]
        down = 0.2 * torch.randn(2, modules[0].in_features, generator=generator)
        up = 0.2 * torch.randn(sum(sizes), 2, generator=generator)
        theirs |= {f"{spell(name)}.lora_down.weight": down, f"{spell(name)}.lora_up.weight": up}
        up = up.roll(sizes[0] // 2, 0) if name in swapped else up
        for layer, rows in zip(layers, up.split(sizes), strict=True):
            ours[f"transformer.{layer}.lora_A.weight"] = down.clone()
            ours[f"transformer.{layer}.lora_B.weight"] = rows.clone()
    files = folder / "diffusers.safetensors", folder / "authors.safetensors"
    for file, tensors in zip(files, (ours, theirs), strict=True):
        save_file(tensors, file)
    return files


def activate(family: DiffusionModel, file: Path, component: str = "transformer") -> None:
    """Let an adapter hold on that component; all of its keys must fit."""
    layers = family.lora[component]
    layers.apply([WeightedAdapter(layers.fit(read_adapter(file)))], "merge")


def edit(file: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps(read_json(file) | changes))
