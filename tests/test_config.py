"""Settings: rules across fields, words as values, and where knobs belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sgld import config
from sgld.config import SECTION_OF, SECTIONS, from_text, settings_of, user_path
from sgld.convert import fields_of, knob_of, unbuilt
from sgld.errors import BadRequest, SgldError
from sgld.params import SamplingParams
from sgld.settings import TITLES, ParallelSettings, RunOptions, Settings


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        ("3", float, 3.0),
        ("1e-2", float, 0.01),
        (".5", float, 0.5),
        ("true", bool, True),
        ("FALSE", bool, False),
        ("0", bool, False),
        ("3", str, "3"),
        ("true", str, "true"),
        ("3", int | list[int] | None, 3),
        ("12.7", int, "12.7"),
        ("1_000", int, "1_000"),
        ("٣", int, "٣"),
        (" 3", int, " 3"),
        ("0x10", int, "0x10"),
        ("9" * 5000, int, "9" * 5000),
        ("yes", bool, "yes"),
        ("", int, ""),
    ],
)
def test_words_become_values_of_their_type_or_stay_words(text: str, kind: Any, value: Any) -> None:
    made = from_text(text, kind)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"num_gpus": 4, "sp_degree": 2},
         "sp_degree: 2 workers are not the 4 that share a sequence (num_gpus 4); leave it out, or set enable_cfg_par"),
        ({"num_gpus": 2, "vae_sp": True, "vae_config": {"use_parallel_decode": False}},
         "vae_config.use_parallel_decode: false contradicts vae_sp true; leave one out"),
        ({"num_gpus": 4, "ring_degree": 4, "enable_cfg_parallel": True},
         "ring_degree: 4 workers do not divide the 2 that share a sequence (num_gpus 4, in 2 branches)"),
        ({"num_gpus": 4, "ulysses_degree": 3}, "ulysses_degree: 3 workers do not divide the 4 that share"),
        ({"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 1},
         "ulysses_degree: 2 x ring_degree 1 workers are not the 4 that share a sequence (num_gpus 4); leave one out"),
        ({"num_gpus": 3, "enable_cfg_parallel": True}, "enable_cfg_parallel: it needs an even number of workers"),
        ({"num_gpus": 4, "tp_size": 3}, "tp_size: 3 does not divide num_gpus (4)"),
        ({"vae_config": {"parallel_decode_mode": "auto"}}, "vae_config.parallel_decode_mode: it has no effect without"),
        ({"vae_tiling": True, "vae_config": {"use_tiling": False}},
         "vae_config.use_tiling: false contradicts vae_tiling true; leave one out"),
        ({"vae_tiling": False, "vae_config": {"use_tiling": True}},
         "vae_config.use_tiling: true contradicts vae_tiling false; leave one out"),
        ({"component_paths": {"vea": "x"}}, "component_paths: 'vea' is no component; did you mean vae?"),
        ({"component_paths": {"u_net": "x"}}, "component_paths: 'u_net' is no component; did you mean unet?"),
        ({"dit_precision": "fp8"}, "dit_precision: 'fp8' is not one of fp32, fp16, bf16"),
        ({"pin_cpu_memory": False}, "pin_cpu_memory: false has no effect without one of text_encoder_cpu_offload, "),
        ({"component_attention_backends": {"vae": "flash"}},
         "component_attention_backends.vae: 'flash' is not one of torch_sdpa, fa, "),
        ({"component_attention_backends": {"vae": "sla_attn"}},
         "component_attention_backends.vae: sla_attn is not built yet"),
        ({"dmd_denoising_steps": [757, 1000]}, "dmd_denoising_steps: 757,1000: give falling numbers, as in 1000,"),
        ({"dmd_denoising_steps": []}, "dmd_denoising_steps: none: give falling numbers"),
        ({"dmd_denoising_steps": [1001]}, "dmd_denoising_steps: 1001 is out of range; allowed is 1 to 1000"),
        ({"port": 70000}, "port: 70000 is out of range; allowed is 0 to 65535"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(values: dict[str, Any], line: str) -> None:
    with pytest.raises(SgldError) as caught:
        settings_of(values)
    assert caught.value.message.startswith(line)


@pytest.mark.parametrize("values", [
    {"num_gpus": 4}, {"num_gpus": 4, "sp_degree": 4}, {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2},
    {"num_gpus": 4, "ulysses_degree": 4}, {"num_gpus": 4, "ulysses_degree": 2}, {"num_gpus": 4, "tp_size": 2},
    {"num_gpus": 4, "enable_cfg_parallel": True, "sp_degree": 2},
    {"num_gpus": 4, "tp_size": 2, "text_encoder_cpu_offload": True, "pin_cpu_memory": False},
])  # fmt: skip
def test_settings_that_agree(values: dict[str, Any]) -> None:
    assert settings_of(values).parallel.num_gpus == 4


def test_every_knob_has_one_home_and_a_help() -> None:
    names = [name for cls in SECTIONS for name in fields_of(cls)]
    assert len(names) == len(set(names)) == len(SECTION_OF)
    aliases = [alias for cls in SECTIONS for field in fields_of(cls).values() for alias in knob_of(field).aliases]
    assert not set(aliases) & set(names)
    assert all(knob_of(field).help for cls in SECTIONS for field in fields_of(cls).values())
    assert all(knob_of(field).group or cls in TITLES for cls in SECTIONS for field in fields_of(cls).values())


def test_a_section_takes_its_own() -> None:
    values = {"height": 1, "num_gpus": 2, "json": True}
    assert [config.section(values, cls) for cls in (SamplingParams, ParallelSettings, RunOptions)] == [
        {"height": 1}, {"num_gpus": 2}, {"json": True}
    ]  # fmt: skip


def test_settings_have_flat_names() -> None:
    settings = Settings.of(num_gpus=2, port=1)
    assert (settings.parallel.num_gpus, settings.server.port, settings.get("port")) == (2, 1, 1)
    changed = settings.evolve(port=2, host="x")
    assert changed == Settings.of(num_gpus=2, port=2, host="x") != settings
    assert changed.flat() == {**Settings().flat(), "num_gpus": 2, "port": 2, "host": "x"}
    with pytest.raises(KeyError, match="prot"):
        settings.evolve(prot=1)
    with pytest.raises(BadRequest, match="^port: 65536 is out of range"):
        settings.evolve(port=65536)


@pytest.mark.parametrize("cls", SECTIONS)
def test_defaults_ask_for_nothing_that_is_not_built(cls: type) -> None:
    assert list(unbuilt(cls())) == []


def test_a_path_as_a_user_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [user_path(text, "x") for text in ("~/a", "b/~c", "")] == [Path("/home/me/a"), Path("b/~c"), Path()]


@pytest.mark.parametrize(
    ("text", "line"),
    [("~no-such-user/x", "'~no-such-user/x': there is no such user"), ("a\0", "'a\\x00' holds a NUL byte")],
)
def test_a_path_that_cannot_be_names_its_knob(text: str, line: str) -> None:
    with pytest.raises(BadRequest) as caught:
        user_path(text, "output_path")
    assert caught.value.message.startswith(f"output_path: {line}")
    assert caught.value.param == "output_path"
