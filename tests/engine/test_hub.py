"""References to folders: local, embedded, cached; and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgld.config import Settings
from sgld.engine.hub import resolve, resolve_model
from sgld.errors import ModelError

NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one snapshot, and no network."""
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "vae" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_the_embedded_model() -> None:
    assert (resolve("sgld/demo", None, "model_path") / "model_index.json").is_file()


def test_a_cached_repository_and_a_folder_in_it(cache: Path) -> None:
    assert resolve(NAME, None, "model_path") == cache
    assert resolve(NAME, "main", "model_path") == cache
    assert resolve(f"{NAME}/vae", None, "vae_path") == cache / "vae"


def test_components_are_resolved_with_the_model(cache: Path) -> None:
    load = resolve_model(Settings(model_path=NAME, component_paths={"vae": f"{NAME}/vae"}))
    assert load.folder == cache
    assert load.component_folders == {"vae": cache / "vae"}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nobody/nothing", "not in the cache"),
        ("no such folder", "no folder"),
        ("../../nowhere", "no folder"),
        ("a/../../b", "no folder"),
        ("", "no folder"),
    ],
)
def test_a_reference_that_leads_nowhere(cache: Path, reference: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        resolve(reference, None, "model_path")
    assert caught.value.param == "model_path"


def test_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(file), None, "model_path")
    with pytest.raises(ModelError, match="no model_index.json"):
        resolve_model(Settings(model_path=str(tmp_path)))
