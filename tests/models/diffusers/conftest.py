"""Twins by name, and the pipeline that most tests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from sgld.models.diffusers.running import DiffusersPipeline
from tests.models.diffusers.pipelines import REQUEST, pipeline
from tests.models.parity import picture
from tools import tiny


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a twin by name."""

    @cache
    def make(name: str) -> Path:
        return tiny.makers()[name](tmp_path_factory.mktemp("twin") / name)

    return make


@pytest.fixture(scope="session")
def ovis(twin: Callable[[str], Path]) -> DiffusersPipeline:
    return pipeline(twin("ovis-image"))


@pytest.fixture(scope="session")
def ovis_picture(ovis: DiffusersPipeline) -> Tensor:
    return picture(ovis, REQUEST)
