"""docs/adding-a-model.md: the family on the page keeps the contract of every family."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sgld.models import REGISTRY
from tests.models import contract
from tests.models import test_contract as held_to
from tests.models.contract import Case
from tests.models.parity import apart, load, pictures_of_ranks, quiet
from tools import tiny

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
MODULE = "sgld.models.ovis_image"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def install() -> None:
    """Put the page's file and its registry line into this process."""
    *file, line, _ = blocks()
    module = sys.modules[MODULE] = ModuleType(MODULE)
    exec(compile("\n\n".join(file), PAGE, "exec"), vars(module))
    REGISTRY.update(eval(f"{{{line}}}"))


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    """The page's case, with the page's family in the registry."""
    before = dict(REGISTRY)
    install()
    yield eval(blocks()[-1], vars(contract))
    REGISTRY.clear()
    REGISTRY.update(before)
    del sys.modules[MODULE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder of a case's twin."""
    return cache(lambda case: tiny.makers()[case.twin](tmp_path_factory.mktemp("page") / case.twin))


@pytest.fixture(scope="module")
def reference(folders: Callable[[Case], Path]) -> Callable[..., Any]:
    """Frames u8 [N, H, W, 3] of a case's request with changes, as diffusers makes them."""
    from diffusers import OvisImagePipeline

    pipeline = cache(lambda case: quiet(OvisImagePipeline.from_pretrained(folders(case))))
    return lambda case, **changes: case.reference(pipeline(case), {**case.request, **changes})


def test_the_page_s_family_makes_the_picture_of_diffusers(
    case: Case, folders: Callable[[Case], Path], reference: Callable[..., Any]
) -> None:
    assert load(folders(case)).info.backend == "native"
    held_to.test_same_seed_same_picture_as_diffusers(case, folders, reference)


def test_its_ranks_do_too(
    case: Case, folders: Callable[[Case], Path], reference: Callable[..., Any], tmp_path: Path
) -> None:
    for world, splits in case.splits.items():
        asked = [(folders(case), case.request, split) for split in splits]
        for made, split in zip(pictures_of_ranks(world, tmp_path / f"{world}", asked, install), splits, strict=True):
            assert apart(made, reference(case)) <= 1, split


def test_it_offloads_previews_and_hears_of_a_cancel(case: Case, folders: Callable[[Case], Path]) -> None:
    held_to.test_offloaded_weights_make_the_same_picture(case, folders)
    held_to.test_previews_come_and_change_nothing(case, folders)
    held_to.test_a_cancel_ends_the_request(case, folders)
