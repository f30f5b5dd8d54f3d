"""Strict loading: every bad file is named in one line."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgld.errors import ModelError
from sgld.nn.weights import load_module, pick, read_json

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


def test_what_is_precise_stays_in_float32(folder: Path) -> None:
    """By a part of a name between dots; `0` is no part of `10.weight`."""
    module = load_module(build, folder, torch.float16, torch.device("cpu"), precise=("0", "eigh"))
    assert {name: x.dtype for name, x in module.state_dict().items()} == {
        "0.weight": torch.float32, "0.bias": torch.float32, "1.weight": torch.float16, "1.bias": torch.float16,
    }  # fmt: skip


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


@attrs.frozen
class Config:
    layers: int
    eps: float = 1e-6
    patch: tuple[int, int] = attrs.field(default=(1, 2), converter=tuple)
    scales: list[float] = attrs.field(factory=list)
    gated: bool = False
    name: str | None = None


@pytest.mark.parametrize(
    ("values", "picked"),
    [
        ({"layers": 2, "eps": 1, "patch": [1, 3], "scales": [1, 0.5]}, Config(2, 1, (1, 3), [1, 0.5])),
        ({"layers": 2, "gated": True, "name": "x", "eps": None}, Config(2, gated=True, name="x")),
        ({"layers": 2, "_class_name": "X", "dropout": 0.0, "later": None}, Config(2)),
        ({"layers": 2, "model_type": "umt5", "use_cache": True}, Config(2)),
    ],
)
def test_a_configuration_is_picked(values: dict[str, Any], picked: Config) -> None:
    assert pick(values, Config, Path("config.json")) == picked


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layers": None}, "has no layers"),
        ({"layers": "2"}, "layers: '2' is not a valid int"),
        ({"layers": True}, "layers: True is not a valid int"),
        ({"eps": "small"}, "eps: 'small' is not a valid number"),
        ({"patch": [1, 2, 3]}, r"patch: \[1, 2, 3\] is not a valid list of int"),
        ({"patch": 2}, "patch: 2 is not a valid list of int"),
        ({"scales": [None]}, r"scales: \[None\] is not a valid list of number"),
        ({"gated": 1}, "gated: 1 is not true or false"),
        ({"name": 3}, "name: 3 is not a valid text"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: \{'bits': 4\} is not supported"),
        ({"layer": 3}, r"layer: 3 is not supported; did you mean layers\?"),
    ],
)
def test_a_bad_configuration_names_file_and_key(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelError, match=f"^m/config.json: {line}$"):
        pick({"layers": 2} | changes, Config, Path("m/config.json"))


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_whatever_diffusers_and_transformers_write_is_taken(name: str) -> None:
    """Configurations made by the libraries' own classes, every key at its default."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config as Theirs

    from sgld.models.text import UMT5Config
    from sgld.models.vae import WanVaeConfig
    from sgld.models.wan_transformer import WanConfig

    made = {
        "transformer": lambda: dict(WanTransformer3DModel(num_attention_heads=2, ffn_dim=8, num_layers=1).config),
        "vae": lambda: dict(AutoencoderKLWan(base_dim=8, z_dim=16).config),
        "text_encoder": lambda: Theirs().to_dict(),
    }
    cls = {"transformer": WanConfig, "vae": WanVaeConfig, "text_encoder": UMT5Config}[name]
    stored = json.loads(json.dumps(made[name](), default=list))
    assert pick(stored, cls, Path("config.json"))


def test_an_index_that_names_no_file(folder: Path) -> None:
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(ModelError, match=r"index\.json: weight_map: a: 1 is not a valid text$"):
        load(folder)
