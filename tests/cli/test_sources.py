"""Config files, the environment, and which of them wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgld import config
from sgld.cli.sources import Layer, gather, read_environment, read_file, stack
from sgld.convert import structure
from sgld.errors import BadRequest, UnknownField
from sgld.params import SamplingParams
from sgld.settings import MemorySettings

EMPTY = Layer({}, {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(file: Path, text: str) -> Layer:
    file.write_text(text, encoding="utf-8")
    return read_file(str(file))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("num_gpus: 2", {"num_gpus": 2}),
        ("num-gpus: 2", {"num_gpus": 2}),
        ("sp_size: 2", {"sp_degree": 2}),
        ("vae_path: x", {"component_paths": {"vae": "x"}}),
        ("component_paths: {text-encoder: x}", {"component_paths": {"text_encoder": "x"}}),
        ("vae_config: {load_encoder: false}", {"vae_config": {"load_encoder": False}}),
        ("vae_config.load_encoder: false", {"vae_config": {"load_encoder": False}}),
        ("vae_config: {use_tiling: true}\nvae_config.load-encoder: false",
         {"vae_config": {"use_tiling": True, "load_encoder": False}}),
        ("pipeline_config: {vae_config: {load_encoder: false}}", {"vae_config": {"load_encoder": False}}),
        ("pipeline_config.vae_config.load_encoder: false", {"vae_config": {"load_encoder": False}}),
        ("prompt: [a, b]", {"prompt": ["a", "b"]}),
        ("mask_strategy_file_path: null\nseed: null\nvae_path: null", {}),
        ("component_paths: {vae: null}", {"component_paths": {}}),
        ("\ufeffheight: 16", {"height": 16}),
    ],
)  # fmt: skip
def test_keys_find_their_knobs(text: str, values: dict[str, object], file: Path) -> None:
    assert read(file, text).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heigth: 3", "unknown key 'heigth'; did you mean height?"),
        ("vae_pth: 3", "unknown key 'vae_pth'; did you mean vae_path?"),
        ("zzz: null", "unknown key 'zzz'"),
        ("sp_size: 2\nsp_degree: 3", "'sp_degree' and 'sp_size' both set sp_degree; give one of them"),
    ],
)
def test_keys_that_make_no_sense_are_named_with_their_file(text: str, message: str, file: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        read(file, text)
    assert caught.value.message == f"{file}: {message}"


def test_an_unknown_nested_key_is_named_with_the_nearest(file: Path) -> None:
    layer = read(file, "vae_config: {tile_sample_min_heigt: 3}")
    with pytest.raises(UnknownField, match=r"'vae_config.tile_sample_min_heigt'; did you mean tile_sample_min_height"):
        config.settings_of(layer.values)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "", "must end in .json or .yaml or .yml"),
        ("c.json", "{", "is not valid json: Expecting property name"),
        ("c.yaml", "a: [", "is not valid yaml: while parsing"),
        ("c.yaml", "- a", "must hold a map of names to values"),
        ("c.yaml", "", "must hold a map of names to values"),
        ("c.yaml", "1: 2", "must hold a map of names to values"),
        ("c.yaml", "height: 1\nwidth: 2\nheight: 3", "is not valid yaml: 'height' stands twice in .* line 3"),
        ("c.yaml", "vae_config: {use_tiling: true, use_tiling: false}", "is not valid yaml: 'use_tiling' stands twice"),
        ("c.json", '{"height": 1, "height": 3}', "is not valid json: 'height' stands twice"),
        ("c.json", '{"a":' * 20000, "is not valid json: maximum recursion"),
    ],
)
def test_files_that_hold_no_map(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"^--config: .*{message}") as caught:
        read(tmp_path / name, text)
    assert "\n" not in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"^--config: 'no.yaml' cannot be read: No such file or directory$"):
        read_file("no.yaml")


def test_file_below_environment_below_command_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", "from-environment")
    monkeypatch.setenv("SGLANG_S3_ENDPOINT_URL", "https://from.environment")
    file.write_text("s3_bucket_name: from-file\nheight: 16\nwidth: 16\n")
    layer = gather(str(file), Layer({"s3_endpoint_url": "https://typed", "width": 32}, {"width": "--width"}))
    assert layer.values == {
        "height": 16, "width": 32, "s3_bucket_name": "from-environment", "s3_endpoint_url": "https://typed",
    }  # fmt: skip
    assert layer.spelled["s3_bucket_name"] == "SGLANG_S3_BUCKET_NAME"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False)])
def test_the_environment_is_read_as_the_type_of_its_knob(
    text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", text)
    assert read_environment().values["enable_cache_dit"] is value
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "")
    assert "enable_cache_dit" not in read_environment().values


def test_an_error_names_the_place_of_the_value(file: Path) -> None:
    layer = read(file, "num_inference_steps: many\nsp-size: 3\nvae_config: {tile_sample_min_width: 1}")
    told = []
    for cls in (SamplingParams, MemorySettings):
        with pytest.raises(BadRequest) as caught, layer.spelling():
            structure(config.section(layer.values, cls), cls)
        told.append(caught.value.message)
    with pytest.raises(BadRequest) as caught, layer.spelling():
        config.settings_of({"sp_degree": 3})
    assert [*told, caught.value.message] == [
        f"{file}: num_inference_steps: 'many' is not a valid int",
        f"{file}: vae_config.tile_sample_min_width: 1 is out of range; allowed is at least 16",
        f"{file}: sp-size: 3 workers are not the 1 that share a sequence (num_gpus 1); leave it out",
    ]


def test_an_unknown_key_of_a_map_is_named_with_its_place(file: Path) -> None:
    layer = read(file, "vae_config: {nope: 3}")
    typed = Layer({"vae_config": {"nope": 3}}, {"vae_config": "--vae-config"})
    told = []
    for one in (layer, typed):
        with pytest.raises(UnknownField) as caught, one.spelling():
            config.settings_of(one.values)
        told.append(caught.value.message)
    assert told == [f"{file}: vae_config.nope: unknown key", "--vae-config.nope: unknown key"]


def test_yaml_may_still_merge(file: Path) -> None:
    text = "vae_config: &a {use_tiling: true}\npipeline_config: {vae_config: {<<: *a, load_encoder: false}}"
    assert read(file, text).values == {"vae_config": {"use_tiling": True, "load_encoder": False}}


def test_null_in_a_later_layer_leaves_the_earlier_value() -> None:
    assert stack(Layer({"height": 1}, {}), Layer({"height": None}, {})).values == {"height": 1}
