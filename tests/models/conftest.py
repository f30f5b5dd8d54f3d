"""Random tiny twins, our pictures of them, and diffusers' pictures of them."""

import os
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgld.messages import Load
from sgld.models import load_family
from sgld.models.base import DiffusionModel
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings
from sgld.worker.run_context import RunContext
from sgld.worker.sampler import sample
from tools import tiny

REQUEST = {
    "prompt": "a red cat &amp; the green   ball", "negative_prompt": "blurred", "height": 32, "width": 48,
    "num_frames": 9, "num_inference_steps": 5, "guidance_scale": 5.0, "seed": 7,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are faster without threads, the more so beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins `wan21`, `wan21-euler` and `wan22-a14b`."""
    folder = tmp_path_factory.mktemp("twins")
    tiny.make_wan21(folder / "wan21")
    tiny.set_scheduler(tiny.make_wan21(folder / "wan21-euler"), "FlowMatchEulerDiscreteScheduler", shift=3.0)
    tiny.make_wan22_a14b(folder / "wan22-a14b")
    return folder


def load(folder: Path, mesh: Mesh | None = None, **settings: Any) -> DiffusionModel:
    """That model on the CPU."""
    command = Load(Settings.of(model_path=str(folder), **settings), folder)
    family = load_family(command, mesh or Mesh.solo(), Cpu(), lambda step, total: None)
    assert isinstance(family, DiffusionModel)
    return family


def generate(family: DiffusionModel, mesh: Mesh | None = None, **changes: Any) -> Tensor:
    """Frames u8 [N, H, W, 3] of `REQUEST` with changes."""
    params = resolve(REQUEST | changes, family.info).params
    ours, theirs = Pipe()
    try:
        return sample(family, params, RunContext("job", mesh or Mesh.solo(), theirs))[0]
    finally:
        ours.close()
        theirs.close()


@pytest.fixture(scope="session")
def reference() -> Callable[..., Tensor]:
    """Frames u8 [N, H, W, 3] of `REQUEST` with changes, as `diffusers.WanPipeline` makes them in float32.

    With `tiles` its autoencoder decodes in such tiles.
    """
    from diffusers import WanPipeline

    pipelines: dict[Path, Any] = {}

    def make(folder: Path, tiles: Mapping[str, int] | None = None, **changes: Any) -> Tensor:
        if folder not in pipelines:
            pipelines[folder] = WanPipeline.from_pretrained(folder)
            pipelines[folder].set_progress_bar_config(disable=True)
        request = REQUEST | changes
        generator = torch.Generator("cpu").manual_seed(request.pop("seed"))
        if tiles is not None:
            pipelines[folder].vae.enable_tiling(**tiles)
        frames = pipelines[folder](**request, generator=generator, output_type="np").frames[0]
        pipelines[folder].vae.use_tiling = False
        return torch.from_numpy((frames * 255).round().astype("uint8"))

    return make


def levels_apart(a: Tensor, b: Tensor) -> int:
    """The largest difference of two pictures, in levels of 255."""
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))
