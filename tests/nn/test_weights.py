"""Strict loading: every bad file is named in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgld.errors import ModelError
from sgld.nn.weights import load_module, read_json

NAME = "diffusion_pytorch_model.safetensors"


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_module(build, folder, dtype, torch.device("cpu"), tied={"tied": "0.weight"}, unused=("extra.",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A component in bfloat16."""
    save_file({k: v.bfloat16() for k, v in build().state_dict().items()}, tmp_path / NAME)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / NAME).items()} | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_in_the_wanted_precision(folder: Path, dtype: torch.dtype) -> None:
    module = load(folder, dtype)
    stored = load_file(folder / NAME)
    assert all(torch.equal(value, stored[name].to(dtype)) for name, value in module.state_dict().items())
    assert not any(p.requires_grad for p in module.parameters())


def test_shards(folder: Path) -> None:
    tensors = load_file(folder / NAME)
    (folder / NAME).unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == part}, folder / part)
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": places}))
    assert load(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-1\.safetensors: no such file"):
        load(folder)


def test_tied_and_unused_names(folder: Path) -> None:
    weight = load_file(folder / NAME)["0.weight"]
    rewrite(folder, **{"0.weight": None, "tied": weight.clone(), "extra.1": torch.zeros(1)})
    assert load(folder)


def test_missing_tensors(folder: Path) -> None:
    rewrite(folder, **{"0.weight": None, "1.bias": None})
    with pytest.raises(ModelError, match=rf"{NAME}: 2 tensors missing: 0\.weight, 1\.bias"):
        load(folder)


def test_unexpected_tensors(folder: Path) -> None:
    rewrite(folder, **{f"more.{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(ModelError, match=r"5 tensors unexpected: more\.0, more\.1, more\.2, \.\.\."):
        load(folder)


def test_wrong_shapes(folder: Path) -> None:
    rewrite(folder, **{"0.bias": torch.zeros(9)})
    with pytest.raises(ModelError, match=r"1 tensor of the wrong shape: 0\.bias \[9\] instead of \[4\]"):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_corrupt_files(folder: Path, damage: str) -> None:
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes({"truncated": data[:-20], "empty": b"", "noise": b"\xff" * 400}[damage])
    with pytest.raises(ModelError, match=rf"{NAME}: corrupt or truncated") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights; expected"):
        load(tmp_path)


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be read as JSON"), ("[]", "holds no JSON object")])
def test_bad_json(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=says):
        read_json(tmp_path / "config.json")
    with pytest.raises(ModelError, match="no such file"):
        read_json(tmp_path / "other.json")
