"""A cache of the hub without network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.overlays import OVERLAY, RAW, SOURCE, Files, load
from tests.hub.repositories import publish


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds the source, and no network; results go to `results`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "results"))
    publish(tmp_path / "hub", SOURCE, RAW)
    return tmp_path / "hub"


@pytest.fixture
def made(hub: Path) -> Callable[..., Path]:
    """Put an overlay of these files in the cache, and load its source by name."""

    def make(files: Files, *, trust: bool = False, **entry: str) -> Path:
        publish(hub, OVERLAY, files)
        return load({SOURCE: {"overlay_repo_id": OVERLAY, **entry}}, trust_remote_code=trust)

    return make
