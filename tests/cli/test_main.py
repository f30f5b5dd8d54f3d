"""The commands themselves: help, version, the merged configuration, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sgld
from sgld import cli, config
from sgld.cli.generate import run as generate
from sgld.cli.serve import run as serve
from sgld.convert import fields_of, knob_of
from sgld.settings import Settings
from tests.cli.command import sgld as command

SEEDS = Path(__file__).parent / "seeds"
PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
HEAVY = ("torch", "aiohttp", "numpy", "asyncio", "av", "PIL", "transformers", "diffusers", "huggingface_hub", "anyio")


def example_of(seed: str) -> tuple[str, str]:
    """The first configuration file that a document shows, and its ending."""
    text = (SEEDS / seed).read_text()
    if fenced := re.search(r"```yaml Config[^\n]*\n(.+?)```", text, re.DOTALL):
        return fenced[1], "yaml"
    found = re.search(r"^config.json\n(\{.+?^\})", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1], "json"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert cli.dispatch(list(words)) == 0
    values: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return values


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["serve", "-h"], ["version"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sgld", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 1
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "sgld" in imported
    assert imported & set(HEAVY) - ({"asyncio"} if "serve" in words else set()) == set()


def test_a_run_does_import_something_heavy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sgld", "generate", "--prompt", "x", "--model-path", "no-such"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert "torch" not in imported


def test_exit_codes_and_streams(tmp_path: Path) -> None:
    done = command("version", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sgld {sgld.__version__}\n", "")
    done = command("genrate", folder=tmp_path)
    told = "error: unknown command 'genrate', not one of generate, serve, version; did you mean generate?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    done = command("generate", "--promt", "x", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --promt; did you mean --prompt?\n")
    assert command(folder=tmp_path).returncode == 2


def test_help_into_a_pipe_that_closes_is_silent(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m sgld generate --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("usage: sgld generate [flags]\n0\n", "")


@pytest.mark.parametrize("seed", ["cli_older.txt", "cli_newer.txt"])
@pytest.mark.parametrize("name", ["generate", "serve"])
def test_the_examples_of_the_seed_documents_load(
    seed: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, ending = example_of(seed)
    file = tmp_path / f"config.{ending}"
    file.write_text(text)
    shown = printed(capsys, name, "--config", str(file), "--print-config", "--num-gpus", "1", "--sp-size=1")
    given = yaml.safe_load(text)
    assert (shown["num_gpus"], shown["sp_degree"]) == (1, 1)
    kept = ("model_path", "prompt", "output_path", "num_frames", "height", "width", "num_inference_steps", "seed",
            "fps", "precision", "vae_precision", "vae_tiling", "vae_sp", "enable_torch_compile")  # fmt: skip
    assert {key: shown[key] for key in kept} == {key: given[key] for key in kept}
    if ending == "json":
        nested = shown["vae_config"]
        assert isinstance(nested, dict)
        assert nested["load_encoder"] is False and nested["tile_sample_min_width"] == 256
        assert shown["mask_strategy_file_path"] is None
        assert shown["text_encoder_precisions"] == ["fp16", "fp16"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_are_short(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = preset.read_text()
    assert len(text.splitlines()) < 30
    for name in ("generate", "serve"):
        shown = printed(capsys, name, "--config", str(preset), "--print-config")
        assert {key: shown[key] for key in yaml.safe_load(text)} == yaml.safe_load(text)


def test_there_is_a_preset_for_every_model_that_the_documents_name() -> None:
    docs = PRESETS[0].parents[1] / "docs"
    text = "".join((docs / name).read_text() for name in ("models.md", "overlays.md"))
    rows = dict(re.findall(r"^\| `([\w./-]+)` \| `configs/([\w.-]+)\.yaml` \|$", text, re.MULTILINE))
    assert {
        yaml.safe_load(path.read_text())["model_path"]: path.stem for path in PRESETS if path.stem != "demo"
    } == rows


def test_the_printed_configuration_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--prompt", "a", "b", "--seed", "3", "--vae-config.use-tiling", "--print-config"]
    first = printed(capsys, *asked)
    assert set(first) == {name for name, cls in config.SECTION_OF.items() if not knob_of(fields_of(cls)[name]).secret}
    assert (first["prompt"], first["seed"], first["num_inference_steps"], first["overwrite"]) == (
        ["a", "b"],
        3,
        None,
        False,
    )
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(first))
    assert printed(capsys, "generate", "--config", str(file), "--print-config") == first


def test_secrets_are_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_S3_SECRET_ACCESS_KEY", "hunter2")
    (tmp_path / "c.json").write_text(json.dumps({"s3_access_key_id": 31337}))
    for name in ("generate", "serve"):
        assert cli.dispatch([name, "--print-config", "--s3-access-key-id=AKIA"]) == 0
    assert cli.dispatch(["serve", "--config", str(tmp_path / "c.json")]) == 2
    assert cli.dispatch(["serve", "--s3-access-key-id=AKIA"]) == 2
    told = capsys.readouterr()
    assert "# s3_secret_access_key is set, and not shown\n" in told.out
    assert "s3_access_key_id: its value is not a valid text\n" in told.err
    assert not re.search("hunter2|31337|AKIA", told.out + told.err)
    assert not re.search("hunter2", repr(Settings.of(s3_secret_access_key="hunter2")))


def test_flags_of_the_other_command_are_named_as_such(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.dispatch(["serve", "--prompt", "x"]) == 2
    file = tmp_path / "c.yaml"
    file.write_text("output_file_name: x.mp4")
    assert cli.dispatch(["serve", "--config", str(file)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --prompt is a flag of `sgld generate` only",
        f"error: {file}: output_file_name: only `sgld generate` has this; each request asks for its own",
    ]


@pytest.mark.parametrize("run", [generate, serve])
def test_serving_flags_exist_on_both_commands(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = "generate" if run is generate else "serve"
    assert printed(capsys, name, "--port", "1", "--host=::1", "--print-config")["port"] == 1


@pytest.mark.parametrize("words", [["version", "--foo"], ["--help", "generate"]], ids=" ".join)
def test_a_word_too_many_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(words) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"error: unexpected argument {words[1]!r}; `sgld {words[0]}` takes none\n")


def python(code: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A program that changes something and then is `sgld`."""
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom sgld import cli\nsys.exit(cli.main())", *words],
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_an_interrupt_during_the_imports_is_one_line(number: str, tmp_path: Path) -> None:
    done = python(AT_IMPORT.format(act=f"signal.raise_signal(signal.{number})"), tmp_path, "generate", "--prompt", "x")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_what_nobody_thought_of_is_one_line(tmp_path: Path) -> None:
    code = AT_IMPORT.format(act="raise LookupError('a\\nb')")
    done = python(code, tmp_path, "generate", "--prompt", "x")
    line = "error: internal error: LookupError: a b; --log-level debug shows the traceback\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    done = python(code, tmp_path, "generate", "--prompt", "x", "--log-level=debug")
    assert "Traceback" in done.stderr and done.stderr.endswith(line)


AT_IMPORT = """
import signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "sgld.cli.generate":
            {act}

sys.meta_path.insert(0, Finder())
"""


def test_the_log_may_be_json(tmp_path: Path) -> None:
    code = """
import logging, sys
from sgld import inputs

def size_of(path):
    logging.getLogger("sgld").warning("seen")
    raise MemoryError

inputs.size_of = size_of
"""
    done = python(code, tmp_path, "generate", "--prompt", "x", "--image-path", "y", "--log-format", "json")
    first, last = done.stderr.splitlines()
    assert json.loads(first)["message"] == "seen"
    assert last.startswith("error: internal error: MemoryError")


@pytest.mark.parametrize("words", ["version", "generate --help", "generate --print-config"])
def test_a_full_standard_output_is_named(words: str, tmp_path: Path) -> None:
    shell = f"exec {sys.executable} -m sgld {words} >/dev/full"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    told = "error: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)
