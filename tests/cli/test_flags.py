"""From the words of a command line to plain values."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from sgld import config
from sgld.cli import flags
from sgld.cli.sources import gather
from sgld.convert import fields_of, knob_of, structure
from sgld.errors import BadRequest, UnknownField
from sgld.params import SamplingParams

SEEDS = Path(__file__).parent / "seeds"
CONTRACT = """
    data_type prompt negative_prompt num_outputs_per_prompt seed generator_device num_frames fps height width
    supported_resolutions num_inference_steps guidance_scale guidance_scale_2 true_cfg_scale guidance_rescale
    cfg_normalization boundary_ratio cfg_gate_step quality output_quality output_compression x264_preset
    enable_frame_interpolation frame_interpolation_exp frame_interpolation_scale enable_upscaling upscaling_scale
    enable_teacache enable_spectrum enable_cache_dit cache_dit_params progressive_mode progressive_levels
    progressive_delta attention_backend_override save_output return_frames return_file_paths_only adjust_frames
    num_frames_round_down enable_sequence_shard profile num_profiled_timesteps diffusers_kwargs
    max_sequence_length flow_shift condition_inputs
"""


def values(*words: str) -> dict[str, Any]:
    return flags.parse(flags.parser_for("generate", "", config.SECTIONS), words).layer.values


def known_flags() -> set[str]:
    parser = flags.parser_for("generate", "", config.SECTIONS)
    return {option for action in parser._actions for option in action.option_strings}


def flags_in(text: str) -> set[str]:
    """Every flag that a document names. Tables lost their borders: `--vae-tilingflagEnable ...` is --vae-tiling."""
    text = re.sub(r"(?<=[a-z])(flag|flash|fp16|auto)(?=[A-Z,]| \()", " ", text)
    found = re.findall(r"(?<![\w-])--[a-z0-9]+(?:[-_.][a-z0-9]+)*", text)
    return {flag.replace("_", "-") for flag in found}


@pytest.mark.parametrize("seed", sorted(SEEDS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_flag_of_the_seed_documents_is_known(seed: Path) -> None:
    named = flags_in(seed.read_text())
    assert len(named) > 35
    assert named - known_flags() == set()


def test_a_flag_that_no_document_names_is_unknown() -> None:
    named = flags_in("use `--height` and --made-up-flag=3, not a--dash or --component-<x>")
    assert named - known_flags() == {"--made-up-flag", "--component"}


def test_every_sampling_field_of_the_replaced_system_is_a_flag_and_a_key() -> None:
    assert set(CONTRACT.split()) <= set(config.SECTION_OF)
    assert {flags.flag_of(name) for name in CONTRACT.split()} <= known_flags()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-gpus", "4"], {"num_gpus": 4}),
        (["--num_gpus=4"], {"num_gpus": 4}),
        (["--ulysses-degree=2"], {"ulysses_degree": 2}),
        (["--sp-size", "2"], {"sp_degree": 2}),
        (["--save-output"], {"save_output": True}),
        (["--save-output", "false"], {"save_output": False}),
        (["--save_output=TRUE"], {"save_output": True}),
        (["--no-save-output"], {"save_output": False}),
        (["--no_save_output"], {"save_output": False}),
        (["--overwrite", "--height", "16"], {"overwrite": True, "height": 16}),
        (["--guidance-scale", "3"], {"guidance_scale": 3.0}),
        (["--guidance-scale", "1e1"], {"guidance_scale": 10.0}),
        (["--seed", "-1"], {"seed": -1}),
        (["--seed", "7"], {"seed": 7}),
        (["--seed", "7", "8"], {"seed": [7, 8]}),
        (["--prompt", "a", "b c"], {"prompt": ["a", "b c"]}),
        (["--prompt", "a", "--prompt", "b"], {"prompt": ["a", "b"]}),
        (["--prompt=-x"], {"prompt": "-x"}),
        (["--prompt", "--two_words are_kept"], {"prompt": "--two_words are_kept"}),
        (["--prompt=--a_b"], {"prompt": "--a_b"}),
        (["--prompt", "浣熊 🦝"], {"prompt": "浣熊 🦝"}),
        (["--text-encoder-precisions", "fp16", "fp16"], {"text_encoder_precisions": ["fp16", "fp16"]}),
        (["--vae-path=~/x"], {"component_paths": {"vae": "~/x"}}),
        (["--component-paths.vae", "x", "--transformer-2-path", "y"],
         {"component_paths": {"vae": "x", "transformer_2": "y"}}),
        (["--unet-path", "x", "--text-encoder-4-path", "y"], {"component_paths": {"unet": "x", "text_encoder_4": "y"}}),
        (["--component-paths", "vae=1"], {"component_paths": {"vae": "1"}}),
        (["--component-attention-backends", "text_encoder=torch_sdpa,transformer=fa"],
         {"component_attention_backends": {"text_encoder": "torch_sdpa", "transformer": "fa"}}),
        (["--component-attention-backends.text_encoder", "torch_sdpa", "--component-attention-backends.vae", "fa"],
         {"component_attention_backends": {"text_encoder": "torch_sdpa", "vae": "fa"}}),
        (["--component-attention-backends.transformer.self", "fa", "--component-attention-backends", "vae=torch_sdpa"],
         {"component_attention_backends": {"transformer.self": "fa", "vae": "torch_sdpa"}}),
        (["--attention-backend-config", "a=1,b=true,c=x"], {"attention_backend_config": {"a": 1, "b": True, "c": "x"}}),
        (["--attention-backend-config", '{"a": [1]}'], {"attention_backend_config": {"a": [1]}}),
        (["--vae-config.tile-sample-min-height", "64", "--vae_config.load_encoder=false"],
         {"vae_config": {"tile_sample_min_height": 64, "load_encoder": False}}),
        (["--vae-config", '{"use_tiling": true}'], {"vae_config": {"use_tiling": True}}),
        (["--dmd-denoising-steps", "1000,757,522"], {"dmd_denoising_steps": [1000, 757, 522]}),
        (["--dmd-denoising-steps", "1000", "757"], {"dmd_denoising_steps": [1000, 757]}),
        (["--720p"], {"width": 1280, "height": 720}),
    ],
)  # fmt: skip
def test_words_become_values(words: list[str], expected: dict[str, Any]) -> None:
    assert values(*words) == expected


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--num-gpu", "2"], UnknownField, "unknown flag --num-gpu; did you mean --num-gpus?"),
        (["--promt", "x"], UnknownField, "unknown flag --promt; did you mean --prompt?"),
        (["--vea-path=x"], UnknownField, "unknown flag --vea-path; did you mean --vae-path?"),
        (["--zzz"], UnknownField, "unknown flag --zzz"),
        (["--no-height"], UnknownField, "unknown flag --no-height; did you mean --height?"),
        (["--height"], BadRequest, "--height: expected one argument"),
        (["--vae-path"], BadRequest, "--vae-path: expected one argument"),
        (["a raccoon"], BadRequest, "unexpected argument 'a raccoon'; values belong to a flag, such as --prompt"),
        (["--4k", "--720p"], BadRequest, "--4k and --720p both set the size; give one of them"),
        (["--width", "8", "--4k"], BadRequest, "--4k and --width both set the size; give one of them"),
        (["--cache-dit-params", "{a"], BadRequest, "--cache-dit-params: '{a' is not valid JSON: .*"),
        (["--cache-dit-params", '{"a": 1, "a": 2}'], BadRequest,
         "--cache-dit-params: '{\"a\": 1, \"a\": 2}' is not valid JSON: 'a' stands twice"),
        (["--cache-dit-params", '{"a":' * 20000], BadRequest,
         "--cache-dit-params: .{120} is not valid JSON: maximum .*"),
        (["--attention-backend-config", "a=" + "[" * 20000], BadRequest, "--attention-backend-config: .*: maximum .*"),
        (["--attention-backend-config", "a=1,a=2"], BadRequest,
         "--attention-backend-config: 'a=1,a=2': 'a' stands twice"),
        (["--attention-backend-config", "~no-such-user/x.yaml"], BadRequest,
         "--attention-backend-config: '~no-such-user/x.yaml': there is no such user.*"),
        (["--height", "8", "--height=8"], BadRequest, "--height: given twice"),
        (["--config", "a.yaml", "--config", "b.yaml"], BadRequest, "--config: given twice"),
        (["--overwrite", "--no-overwrite"], BadRequest, "--no-overwrite: given twice, as --overwrite too"),
        (["--n=1", "--num-outputs", "2"], BadRequest, "--num-outputs: given twice, as --n too"),
        (["--vae-path=a", "--component-paths.vae=b"], BadRequest,
         "--component-paths.vae: given twice, as --vae-path too"),
        (["--component-paths", "vae=a", "--vae-path=b"], BadRequest,
         "--component-paths and --vae-path both set vae; give one of them"),
        (["--no-vae-tiling=true"], BadRequest, "--no-vae-tiling: it takes no value, not even 'true'"),
        (["--prompt", "-a&b"], BadRequest,
         "--prompt: expected at least one argument; did you mean --prompt='-a&b'?"),
        (["--negative_prompt", "-hands"], BadRequest,
         "--negative-prompt: expected one argument; did you mean --negative-prompt=-hands?"),
        (["--prompt", "--height", "3"], BadRequest, "--prompt: expected at least one argument"),
        (["--component-paths", "vae"], BadRequest, "--component-paths: 'vae' is neither JSON, nor a file, nor .*"),
        (["--attention-backend-config", "no.yaml"], BadRequest,
         "--attention-backend-config: 'no.yaml' cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense(words: list[str], error: type[BadRequest], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        values(*words)
    assert type(caught.value) is error
    assert re.fullmatch(message.replace("?", r"\?") if "*" not in message else message, caught.value.message)


def test_a_map_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kernel.yaml"
    file.write_text("a: 1\nb: [x]\n")
    assert values("--attention-backend-config", str(file)) == {"attention_backend_config": {"a": 1, "b": ["x"]}}


@pytest.mark.parametrize(
    ("words", "spelled"),
    [
        (["--num_inference_steps", "0"], "--num-inference-steps: 0 is out of range; allowed is 1 to 1000"),
        (["--num-inference-steps", "12.5"], "--num-inference-steps: '12.5' is not a valid int"),
        (["--fps", "1_0"], "--fps: '1_0' is not a valid int"),
        (["--guidance-scale", "nan"], "--guidance-scale: nan is not a finite number"),
        (["--n", "0"], "--n: 0 is out of range; allowed is 1 to 10"),
        (["--adjust-frames=perhaps"], "--adjust-frames: 'perhaps' is not true or false"),
        (["--output-quality", "hihg"], "--output-quality: 'hihg' is not one of maximum, high, medium, low, default; "
                                       "did you mean high?"),
        (["--height", "9" * 5000], f"--height: '{'9' * 116}... is not a valid int"),
    ],
)  # fmt: skip
def test_an_error_about_a_value_names_the_flag(words: list[str], spelled: str) -> None:
    layer = flags.parse(flags.parser_for("generate", "", config.SECTIONS), words).layer
    with pytest.raises(BadRequest) as caught, layer.spelling():
        structure(layer.values, SamplingParams)
    assert caught.value.message == spelled


@pytest.mark.parametrize("sections", [config.SECTIONS, config.SETTINGS], ids=["generate", "serve"])
def test_help_tells_the_default_and_the_allowed_values_of_every_flag(sections: tuple[type, ...]) -> None:
    parser = flags.parser_for("x", "", sections)
    told = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(told) > 80
    assert all(re.search(r"\(.+; default: .+\)$", action.help or "") for action in told)
    text = " ".join(parser.format_help().split())
    for cls in sections:
        for name, field in fields_of(cls).items():
            assert flags.flag_of(name) in text
            assert not knob_of(field).choices or ", ".join(knob_of(field).choices) in text


def test_help_is_grouped() -> None:
    text = flags.parser_for("generate", "", config.SECTIONS).format_help()
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    for title in ("general", "model", "parallelism", "memory", "prompt", "size", "sampling", "output", "files"):
        assert titles.count(title) == 1


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("height: 16\nwidth: 16\nvae_config: {use_tiling: true, load_encoder: true}\n")
    parsed = flags.parse(
        flags.parser_for("generate", "", config.SECTIONS),
        ["--config", str(file), "--width=32", "--vae-config.load-encoder=false"],
    )
    layer = gather(parsed.config, parsed.layer)
    assert layer.values == {
        "height": 16, "width": 32, "vae_config": {"use_tiling": True, "load_encoder": False}
    }  # fmt: skip
    assert layer.spelled["height"] == f"{file}: height"
    assert layer.spelled["width"] == "--width"


def test_help_names_numbers_as_such() -> None:
    text = " ".join(flags.parser_for("generate", "", config.SECTIONS).format_help().split())
    assert "--lora-scale X [X ...]" in text and "--seed N [N ...]" in text and "--lora-path TEXT [TEXT ...]" in text
    assert "default: by extension, then by the number of frames" in text
