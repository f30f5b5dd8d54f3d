"""What is refused before a model is loaded, and what a run will make."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from PIL import Image

from sgld import config, media
from sgld.cli import flags
from sgld.cli.outputs import Output, absent_folders, check_early, outputs_of, remove_empty, save
from sgld.cli.plan import Plan, ignored, plan_of, refuse_early
from sgld.cli.sources import Layer, gather
from sgld.errors import BadRequest, NotBuilt, OutputError
from sgld.messages import Audio, Media, SharedFrames, Timings
from sgld.params import ModelInfo, PictureRule
from sgld.storage.local import LocalStorage
from tests import media_files

INFO = ModelInfo("Wan", "video", {"height": 64, "width": 64, "num_frames": 9, "fps": 8}, 8, 4, ())


def layer_of(*words: str) -> Layer:
    parsed = flags.parse(flags.parser_for("generate", "", config.SECTIONS), words)
    return gather(parsed.config, parsed.layer)


def plan(*words: str) -> Plan:
    return plan_of(layer_of(*words))


def refusal(*words: str) -> str:
    """The error line of a command, as far as it comes without a model."""
    layer = layer_of(*words)
    with pytest.raises((BadRequest, OutputError)) as caught, layer.spelling():
        made = plan_of(layer)
        refuse_early(made)
        check_early(made, LocalStorage(made.folder))
    return caught.value.message


def names(made: Plan) -> list[str]:
    return [output.name for output in outputs_of(made, INFO)[0]]


SEED = ["--prompt", "A curious raccoon", "--output-file-name", "A curious raccoon.mp4"]
NOT_BUILT = "not built yet in this version of sgld"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--enable-torch-compile", "--cache-dit-config", "x.yaml"],
         f"--cache-dit-config: {NOT_BUILT} (step caching); leave it out; nor are --enable-torch-compile"),
        (["--attention-backend", "vmoba_attn"],
         f"--attention-backend: 'vmoba_attn' is {NOT_BUILT} (sparse attention); use torch_sdpa or fa or fa2 or fa3 or "
         "fa4 or torch_cudnn_sdpa or sage_attn or sage_attn_3 or aiter or flash or _flash_3_hub or sage or xformers or "
         "native"),
        (["--cache-dit-config", "x.yaml"], f"--cache-dit-config: {NOT_BUILT}"),
        (["--component-attention-backends.transformer.self", "vmoba_attn"],
         f"--component-attention-backends.transformer.self: vmoba_attn is {NOT_BUILT} (sparse attention)"),
        (["--vae-config", '{"use_temporal_tiling": true}'], f"--vae-config.use_temporal_tiling: {NOT_BUILT}"),
        (["--video-path", "a.mp4", "b.mp4"], f"--video-path: {NOT_BUILT} (video input); leave it out"),
        (["--generator-device", "cuda"], f"--generator-device: 'cuda' is {NOT_BUILT}"),
        (["--enable-frame-interpolation", "--frame-interpolation-exp", "1"],
         f"--enable-frame-interpolation: {NOT_BUILT}"),
        (["--transformer-weights-path", "x"], f"--transformer-weights-path: {NOT_BUILT}"),
    ],
)  # fmt: skip
def test_what_is_not_built_says_so(words: list[str], line: str) -> None:
    assert refusal(*SEED, *words).startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        ["--backend", "sglang"],
        ["--backend", "diffusers", "--trust-remote-code", "--diffusers-attention-backend", "flash"],
        ["--diffusers-kwargs", '{"clip_skip": 1}'],
        ["--backend", "auto", "--attention-backend", "torch_sdpa"],
        ["--attention-backend", "fa", "--component-attention-backends", "text_encoder=torch_sdpa"],
        ["--text-encoder-cpu-offload", "--dit-layerwise-offload", "--pin-cpu-memory"],
        ["--pin-cpu-memory", "--tp-size", "1", "--ring-degree", "1", "--sp-degree", "1"],
        ["--text-encoder-cpu-offload", "false", "--no-vae-sp", "--save-output"],
        ["--vae-tiling", "--vae-slicing", "--vae-config.load-encoder", "false"],
        ["--cloud-storage-type", "s3", "--port", "1"],
    ],
)
def test_what_is_built_or_left_at_its_default_passes(words: list[str], tmp_path: Path) -> None:
    made = plan(*SEED, *words, "--output-path", str(tmp_path))
    refuse_early(made)
    check_early(made, LocalStorage(made.folder))


def test_a_documented_environment_variable_is_not_ignored_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    assert refusal(*SEED) == f"SGLANG_CACHE_DIT_ENABLED: {NOT_BUILT} (step caching); leave it out"


def test_flags_of_the_server_are_ignored_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_S3_BUCKET_NAME", "b")
    layer = layer_of(*SEED, "--host", "0.0.0.0", "--s3-endpoint-url", "https://x", "--served-model-name", "x")
    assert ignored(layer) == ["--host", "--s3-endpoint-url", "--served-model-name"]
    refuse_early(plan_of(layer))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "prompt: say what to show with --prompt or --prompt-path"),
        (["--prompt", " "], "--prompt: it is empty; say what to show"),
        (["--prompt", "a", "--prompt-path", "x.txt"], "--prompt-path: give --prompt or --prompt-path, not both"),
        (["--prompt-path", "x.md"], "--prompt-path: 'x.md' must be a .txt file with one prompt a line"),
        (["--prompt-path", "x.txt"], "--prompt-path: 'x.txt' cannot be read: No such file or directory"),
        (["--prompt", "a\udcff"], "--prompt: 'a\\udcff' is not valid Unicode"),
        (["--prompt", "a", "--output-file-name", "../x.mp4"], "--output-file-name: '../x.mp4' has a path separator"),
        (["--prompt", "a", "--output-file-name", ".."], "--output-file-name: '..' is a folder"),
        (["--prompt", "a", "--output-file-name", "x.mov"], "--output-file-name: 'x.mov': .mov is not one of mp4"),
        (["--prompt", "a", "--output-file-name", "x", "--output-file-path", "y/z"],
         "--output-file-path: it names folder and file"),
        (["--prompt", "a", "--output-file-path", "y/"], "--output-file-path: 'y/' names no file"),
        (["--prompt", "a", "--output-file-path", "y/."], "--output-file-path: 'y/.' names no file"),
        (["--prompt", "a", "--output-file-path", ""], "--output-file-path: '' names no file"),
        (["--prompt", "a", "--output-file-path", "y/x.mov"], "--output-file-path: 'x.mov': .mov is not one of mp4"),
        (["--prompt", "a", "--output-file-path", "y/a\nb"], "--output-file-path: 'a\\nb' has a control character"),
        (["--prompt", "a", "--output-file-path", "y\0/x"], "--output-file-path: 'y\\x00/x' holds a NUL byte"),
        (["--prompt", "a", "--output-file-path", "~no-such-user/x"], "--output-file-path: '~no-such-user/x': there is"),
        (["--prompt", "a", "--output-path", "~no-such-user"], "--output-path: '~no-such-user': there is no such user"),
        (["--prompt", "a", "--perf-dump-path", "p\0"], "--perf-dump-path: 'p\\x00' holds a NUL byte"),
        (["--prompt", "a", "--perf-dump-path", "p\n"], "--perf-dump-path: 'p\\n' has a control character"),
        (["--prompt", "a", "--perf-dump-path", "p/"], "--perf-dump-path: 'p/' names no file"),
        (["--prompt-path", "~no-such-user/x.txt"], "--prompt-path: '~no-such-user/x.txt': there is no such user"),
        (["--prompt", "a", "--image-path", "~no-such-user/x"], "--image-path: '~no-such-user/x': there is no such"),
        (["--prompt", "a", "--mask-path", "m\0"], "--mask-path: 'm\\x00' holds a NUL byte"),
        (["--prompt", "a", "--image-path", "no.png"], "--image-path: "),
        (["--prompt", "a", "--return-file-paths-only", "false"], "--return-file-paths-only: false is not possible"),
        (["--prompt", "a", "--vae-config", "nope=3"], "--vae-config.nope: unknown key"),
        (["--prompt", "a", "--output-file-name", "x.png", "--num-frames", "9"],
         "--num-frames: 9 frames do not fit in one image; give 1, or a name that ends in mp4, webm, gif"),
        (["--prompt", "a", "--data-type", "image", "--num-frames", "9"], "--num-frames: 9 frames do not fit"),
        (["--prompt", "a", "--data-type", "image", "--output-file-name", "x.mp4"],
         "--data-type: 'image' does not go with the name 'x.mp4'"),
        (["--prompt", "a", "--return-frames", "--no-save-output"], "--return-frames: it writes a file"),
        (["--prompt", "a", "--fps", "60", "--output-file-name", "x.gif"], "--fps: 60: a gif shows at most 50"),
        (["--prompt", "a", "--seed", "1", "2"], "--seed: 2 seeds for 1 x 1 outputs"),
        (["--prompt", "a", "--output-path", "/proc/no/such"], "cannot write /proc/no/such: "),
        (["--prompt", "a", "--perf-dump-path", "/proc/no/such.json"], "cannot write /proc/no: "),
        (["--prompt", "a", "--vae-config.tile-sample-min-width=3"], "--vae-config.tile-sample-min-width: 3 is out of"),
        (["--prompt", "a", "--component-paths", "vea=x"], "--component-paths: 'vea' is no component; did"),
        (["--prompt", "a", "--num-gpus", "2", "--sp-size", "3"], "--sp-size: 3 workers are not the 2 that share"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_model_is_loaded(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refusal(*words)
    assert told.startswith(line)
    assert "\n" not in told


@pytest.mark.parametrize("words", [[], ["--num-outputs", "2"]], ids=["one", "several"])
def test_a_taken_name_is_refused_before_the_model_is_loaded(words: list[str], tmp_path: Path) -> None:
    (tmp_path / ("x_1.mp4" if words else "x.mp4")).touch()
    asked = ["--prompt", "a", "--output-path", str(tmp_path), "--output-file-name", "x.mp4", *words]
    assert "the file exists; choose another name or give --overwrite" in refusal(*asked)
    made = plan(*asked, "--overwrite")
    check_early(made, LocalStorage(made.folder))


def test_a_taken_performance_report_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "perf.json"
    file.touch()
    asked = ["--prompt", "a", "--output-path", str(tmp_path), "--perf-dump-path", str(file)]
    assert "the file exists" in refusal(*asked)


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["--output-file-name", "A curious raccoon.mp4"], [("A curious raccoon.mp4", "mp4", 9)]),
        (["--output-file-name", "x"], [("x.mp4", "mp4", 9)]),
        (["--output-file-name", "x.WebM"], [("x.WebM", "webm", 9)]),
        (["--output-file-name", "x", "--num-frames", "1"], [("x.png", "png", 1)]),
        (["--output-file-name", "x.jpeg"], [("x.jpeg", "jpeg", 1)]),
        (["--output-file-name", "x.mp4", "--num-frames", "1"], [("x.mp4", "mp4", 1)]),
        (["--output-file-name", "x", "--data-type", "image"], [("x.png", "png", 1)]),
        (["--output-file-name", "x", "--data-type", "video", "--num-frames=1"], [("x.mp4", "mp4", 1)]),
        (["--output-file-name", "x.mp4", "--return-frames"], [("x.mp4.npy", "npy", 9)]),
        (["--output-file-name", "x.npy", "--return-frames"], [("x.npy", "npy", 9)]),
        (["--output-file-path", "some/where/x.gif"], [("x.gif", "gif", 9)]),
        (["--output-file-name", "x.mp4", "--n", "2"], [("x_0.mp4", "mp4", 9), ("x_1.mp4", "mp4", 9)]),
        (["--prompt", "b", "--output-file-name", "x.mp4"], [("x_0.mp4", "mp4", 9), ("x_1.mp4", "mp4", 9)]),
    ],
)
def test_names_and_formats(words: list[str], made: list[tuple[str, str, int]]) -> None:
    outputs, _ = outputs_of(plan("--prompt", "a", *words), INFO)
    assert [(output.name, output.format, output.params.num_frames) for output in outputs] == made


def test_a_name_on_the_command_line_beats_the_number_of_frames_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("num_frames: 81\nprompt: a\n")
    outputs, _ = outputs_of(plan("--config", str(file), "--output-file-name", "x.png"), INFO)
    assert [output.params.num_frames for output in outputs] == [1]


def test_default_names_tell_prompt_and_seed() -> None:
    made = names(plan("--prompt", "Ein Waschbär", "b", "--seed", "5", "--n", "2"))
    assert [name.split("_")[0] for name in made] == ["Ein", "Ein", "b", "b"]
    assert [name.split("_", 1)[1].rsplit("_", 2)[1:] for name in made] == [
        ["5", "0.mp4"], ["6", "1.mp4"], ["5", "2.mp4"], ["6", "3.mp4"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "dealt"),
    [
        (["7"], [7, 8, 7, 8]),
        (["7", "3"], [7, 3, 7, 3]),
        (["1", "2", "3", "4"], [1, 2, 3, 4]),
    ],
)
def test_seeds_are_counted_up_or_dealt_out(seeds: list[str], dealt: list[int]) -> None:
    outputs, _ = outputs_of(plan("--prompt", "a", "b", "--n", "2", "--seed", *seeds), INFO)
    assert [output.seed for output in outputs] == dealt


def test_without_a_seed_every_output_draws_its_own() -> None:
    outputs, _ = outputs_of(plan("--prompt", "a", "b"), INFO)
    assert outputs[0].seed != outputs[1].seed


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\r\n  zwei 🦝 \n".encode())
    assert plan("--prompt-path", str(file)).prompts == ["one", "zwei 🦝"]
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in refusal("--prompt-path", str(file))
    file.write_bytes(b"\n")
    assert "holds no prompt" in refusal("--prompt-path", str(file))


def test_a_size_no_model_can_make_is_named_by_its_flag() -> None:
    layer = layer_of("--prompt", "a", "--height", "63")
    with (
        pytest.raises(BadRequest, match=r"^--height: 63 is not a multiple of 8; the nearest valid size is 64x64"),
        layer.spelling(),
    ):
        outputs_of(plan_of(layer), INFO)


def test_a_knob_the_model_has_no_use_for_is_refused() -> None:
    info = ModelInfo("Wan", "video", INFO.defaults, 8, 4, (), {"guidance_scale_2": "it has no second expert"})
    layer = layer_of("--prompt", "a", "--guidance-scale-2", "3")
    with (
        pytest.raises(NotBuilt, match=r"^--guidance-scale-2: this model cannot use it: it has no second expert"),
        layer.spelling(),
    ):
        outputs_of(plan_of(layer), info)


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        (["--x264-preset", "slow", "--output-file-name", "x.png"], ["--x264-preset: ignored; a png is no mp4"]),
        (["--x264-preset", "slow", "--output-file-name", "x.mp4"], []),
        (["--output-compression", "3", "--output-file-name", "x.gif"],
         ["--output-compression: ignored; a gif has no quality to choose"]),
        (["--output-quality", "low", "--output-file-name", "x.webp"], []),
        (["--output-quality", "default", "--output-file-name", "x.png"], []),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_told(words: list[str], notes: list[str]) -> None:
    assert outputs_of(plan("--prompt", "a", *words), INFO)[1] == notes


@pytest.mark.parametrize(
    ("name", "frames", "notes"),
    [
        ("x.gif", 9, ["the sound is left out: a gif holds none; choose mp4 or webm"]),
        ("x.webm", 9, []),
        ("x.png", 1, []),
    ],
)
def test_sound_that_a_file_cannot_hold_is_told(name: str, frames: int, notes: list[str]) -> None:
    made = plan("--prompt", "a", "--num-frames", str(frames), "--output-file-name", name)
    assert outputs_of(made, attrs.evolve(INFO, audio=True))[1] == notes
    assert outputs_of(made, INFO)[1] == []


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif"])
def test_sound_reaches_the_file(tmp_path: Path, name: str) -> None:
    made = plan("--prompt", "a", "--num-frames", "9", "--output-path", str(tmp_path), "--output-file-name", name)
    output, tone = outputs_of(made, INFO)[0][0], np.sin(np.arange(27000) / 10, dtype=np.float32)
    result = attrs.evolve(made_of(output), audio=Audio(np.stack([tone, tone]), 24000))
    path = save(made, LocalStorage(tmp_path), output, result, []).path
    assert path is not None
    heard = None if name == "x.gif" else media_files.decode_sound(path)
    assert (heard is not None) == (name != "x.gif")
    assert heard is None or np.abs(heard.samples).max() > 0.5


def test_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    made = plan("--prompt", "a", "--output-path", str(tmp_path / "o/p"), "--perf-dump-path", str(tmp_path / "r/x.json"))
    absent = absent_folders(made)
    assert absent == [tmp_path / "o/p", tmp_path / "o", tmp_path / "r"]
    check_early(made, LocalStorage(made.folder))
    (tmp_path / "r/kept").touch()
    remove_empty(absent)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def made_of(output: Output) -> Media:
    frames = np.zeros((output.params.num_frames, 64, 64, 3), np.uint8)
    return Media(SharedFrames.of(frames), 8, output.seed, Timings({"denoise": 1.0}, [1.0], 1))


def test_a_default_name_that_is_taken_gives_way(tmp_path: Path) -> None:
    made = plan("--prompt", "a", "--output-path", str(tmp_path))
    output, storage = outputs_of(made, INFO)[0][0], LocalStorage(tmp_path)
    paths = [save(made, storage, output, made_of(output), []).path for _ in range(2)]
    first = tmp_path / output.name
    assert paths == [first, first.with_stem(f"{first.stem}_2")]


def test_a_default_name_that_is_taken_during_the_encoding_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("--prompt", "a", "--output-path", str(tmp_path))
    output, storage = outputs_of(made, INFO)[0][0], LocalStorage(tmp_path)
    encode = media.encode

    def slowly(*args: Any, **options: Any) -> None:
        (tmp_path / output.name).touch()
        encode(*args, **options)

    monkeypatch.setattr(media, "encode", slowly)
    saved = save(made, storage, output, made_of(output), [])
    assert saved.path is not None and saved.path.stem.endswith("_2")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("--prompt", "a", "--output-path", str(tmp_path), "--output-file-name", "x.mp4")
    output, parts = outputs_of(made, INFO)[0][0], list[Path]()

    def fill(part: Path, *_: Any, **__: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(media, "encode", fill)
    with pytest.raises(OutputError, match=r"x.mp4: No space left on device$"):
        save(made, LocalStorage(tmp_path), output, made_of(output), parts)
    assert list(tmp_path.iterdir()) == []
    assert [part.parent for part in parts] == [tmp_path]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora-scale", "1"], "--lora-scale: it has no effect without lora_path"),
        (["--lora-path", "x", "y", "--lora-nickname", "one"], "--lora-nickname: 1 given for 2 in lora_path"),
        (["--lora-path", "x", "y", "z", "--lora-scale", "1", "2"],
         "--lora-scale: 2 given for 3 in lora_path; allowed: 1 or 3"),
        (["--lora-path", "x", "y", "--lora-nickname", "a", "a"], "--lora-nickname: ['a', 'a']: each adapter needs"),
        (["--lora-path", "x", "--lora-target", "vae"], "--lora-target: 'vae' is not one of all, transformer,"),
        (["--lora-path", ""], "--lora-path: it is empty"),
        (["--loras", "nickname=a,strenght=1"], "--loras.strenght: unknown key"),
        (["--loras", "strength=1"], "--loras.nickname: it names no adapter"),
    ],
)  # fmt: skip
def test_adapters_that_contradict(words: list[str], line: str) -> None:
    assert refusal(*SEED, *words).startswith(line)


def test_the_shape_comes_from_the_picture_that_the_model_says(tmp_path: Path) -> None:
    for name, size in (("wide.png", (64, 32)), ("tall.png", (32, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    words = ["--prompt", "a", "--image-path", str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    rules = (PictureRule(max=2, starts_denoising=False, shape_from=i) for i in (0, -1))
    first, last = (outputs_of(plan(*words), attrs.evolve(INFO, pictures=rule))[0][0].params for rule in rules)
    assert first.width > first.height
    assert last.width < last.height
