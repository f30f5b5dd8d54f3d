"""The contract of every family: diffusers' picture, whatever ranks, weights and adapters take part."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from sgld.messages import Cancel
from sgld.nn.parallel import Mesh
from sgld.resolve import resolve
from sgld.worker.run_context import RunContext, Stopped
from sgld.worker.sampler import sample
from tests.models.contract import CASES, Case
from tests.models.parity import (
    activate,
    apart,
    estimate_is_near_the_peak,
    load,
    photo,
    picture,
    pictures_of_ranks,
    shown,
    write_lora,
)
from tools import tiny

Reference = Callable[..., Tensor]


def every(*features: str, of: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    """Parametrize over cases, each of which proves these features, or its task where none is named."""
    return pytest.mark.parametrize(
        "case",
        [pytest.param(c, id=c.twin, marks=pytest.mark.proves(c.pipeline, *features or (c.task,))) for c in of],
        indirect=True,
    )


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Case]:
    """A case whose request names the files of its pictures."""
    folder = tmp_path_factory.mktemp("pictures")

    def written(case: Case) -> Case:
        files = [str(photo(folder / f"{w}x{h}.png", w, h)) for w, h in case.pictures]
        return attrs.evolve(case, request={**case.request, "image_path": files}) if files else case

    return cache(written)


@pytest.fixture
def case(
    request: pytest.FixtureRequest, with_pictures: Callable[[Case], Case], monkeypatch: pytest.MonkeyPatch
) -> Case:
    """The case of a test, with its pictures and patches."""
    request.param.patch(monkeypatch)
    return with_pictures(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder of a case's twin, made once."""
    root, makers = tmp_path_factory.mktemp("contract"), tiny.makers()
    return cache(lambda case: makers[case.twin](root / case.twin))


@pytest.fixture(scope="module")
def pipelines(folders: Callable[[Case], Path]) -> Callable[[Case], Any]:
    """diffusers' own pipeline of a case."""
    return cache(lambda case: case.pipeline_of(folders(case)))


@pytest.fixture(scope="module")
def reference(pipelines: Callable[[Case], Any]) -> Reference:
    """Frames u8 [N, H, W, 3] of a case's request with changes, as diffusers makes them in float32."""
    return lambda case, **changes: case.reference(pipelines(case), {**case.request, **changes})


@every()
def test_same_seed_same_picture_as_diffusers(case: Case, folders: Callable[[Case], Path], reference: Reference) -> None:
    family = load(folders(case))
    ours = picture(family, case.request)
    assert ours.float().std() > 10  # not a blank picture, on which everything agrees
    assert apart(ours, reference(case)) <= 1
    assert apart(ours, reference(case, seed=8)) > 20
    assert apart(ours, picture(family, {**case.request, **case.unguided})) > 20, "guidance takes no part"
    for changes in case.also:
        assert apart(picture(family, {**case.request, **changes}), reference(case, **changes)) <= 1, changes


@every("USP", "CFG parallel", of=[case for case in CASES if case.splits])
def test_ranks_make_the_picture_of_diffusers(
    case: Case, folders: Callable[[Case], Path], reference: Reference, tmp_path: Path
) -> None:
    expected = reference(case)
    prepare = partial(case.patch, pytest.MonkeyPatch())  # in the processes of the ranks
    for world, splits in case.splits.items():
        cases = [(folders(case), case.request, split) for split in splits]
        for made, split in zip(pictures_of_ranks(world, tmp_path / f"{world}", cases, prepare), splits, strict=True):
            assert apart(made, expected) <= 1, split


@every("LoRA")
def test_an_adapter_as_with_diffusers(
    case: Case, folders: Callable[[Case], Path], pipelines: Callable[[Case], Any], reference: Reference, tmp_path: Path
) -> None:
    family, pipeline = load(folders(case)), pipelines(case)
    before = picture(family, case.request)
    file = write_lora(tmp_path / "lora.safetensors", family.transformer)
    for component in family.lora:
        activate(family, file, component)
    adapted = picture(family, case.request)
    pipeline.load_lora_weights(file)
    if "transformer_2" in family.lora:
        pipeline.load_lora_weights(file, adapter_name="second", load_into_transformer_2=True)
    expected = reference(case)
    pipeline.unload_lora_weights()
    assert apart(adapted, expected) <= 1
    assert apart(adapted, before) > 20
    for layers in family.lora.values():
        layers.clear()
    assert torch.equal(picture(family, case.request), before)
    offloaded = load(folders(case), **case.offloads[-1])
    for component in offloaded.lora:
        activate(offloaded, file, component)
    assert torch.equal(picture(offloaded, case.request), adapted), case.offloads[-1]


@every("offload")
def test_offloaded_weights_make_the_same_picture(case: Case, folders: Callable[[Case], Path]) -> None:
    expected = cache(lambda **dtypes: picture(load(folders(case), **dtypes), case.request))
    for settings in case.offloads:
        family = load(folders(case), **settings)
        dtypes = {name: value for name, value in settings.items() if name == "precision"}
        for _ in range(2):
            assert torch.equal(picture(family, case.request), expected(**dtypes)), settings


@every("previews")
def test_previews_come_and_change_nothing(case: Case, folders: Callable[[Case], Path]) -> None:
    """The first, from pure noise, is what a single step without guidance makes."""
    family, request = load(folders(case)), {**case.request, "num_inference_steps": 4}
    made, previews = shown(family, request, 2)
    assert [tuple(frames.shape) for frames in previews] == [(1, *made.shape[1:])] * 2
    assert apart(previews[0], previews[1]) > 5
    if case.one_step is not None:
        assert apart(previews[0], picture(family, {**request, "num_inference_steps": 1, **case.one_step})[:1]) <= 1
    distances = [(frames.float() - made[:1].float()).abs().mean() for frames in previews]
    assert distances[1] < distances[0] or not case.approaches, "the later, the nearer"
    assert torch.equal(made, picture(family, request))


@every("previews")
def test_a_cancel_ends_the_request(case: Case, folders: Callable[[Case], Path]) -> None:
    family = load(folders(case))
    params = resolve(case.request, family.info).params
    ours, theirs = Pipe()
    with ours, theirs:
        ours.send(Cancel("job"))
        with pytest.raises(Stopped):
            sample(family, params, RunContext("job", Mesh.solo(), theirs))
    assert picture(family, case.request).numel(), "the model still works"


@every(of=[case for case in CASES if case.large])
def test_the_memory_estimate_is_near_the_peak(case: Case, folders: Callable[[Case], Path], tmp_path: Path) -> None:
    once = {**case.request, "num_inference_steps": 1}
    large = once | dict(case.large or {})
    estimate_is_near_the_peak(tmp_path / "store", folders(case), once, large, below=case.estimate_below)
