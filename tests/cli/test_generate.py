"""The real command, the real model: what a user of `sgld generate` sees. Each run costs seconds, so each tells much."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sgld import media
from tests import media_files
from tests.cli.command import QUICK, sgld, start

DEMO = Path(media.__file__).parent / "demo"


def generate(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return sgld("generate", *words, folder=folder, **environment)


def files(folder: Path) -> list[str]:
    """Everything below a folder, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error, after checking that no other line follows and that nothing looks like a traceback."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_a_video_can_be_made_again_from_its_own_metadata(tmp_path: Path) -> None:
    asked = ["--prompt", "Ein Waschbär 🦝", *QUICK]
    first = generate(tmp_path, *asked, "--save-output", "--output-path", "o", "--output-file-name", "A b.mp4")
    assert first.returncode == 0
    assert first.stdout == "o/A b.mp4\n"
    assert files(tmp_path) == ["o/A b.mp4"]
    told = media_files.read_metadata(tmp_path / "o/A b.mp4")
    assert f"seed {told['seed']}\n" in first.stderr
    assert (told["prompt"], told["model"]) == ("Ein Waschbär 🦝", "sgld/demo")
    assert [line.split(":")[0] for line in first.stderr.splitlines() if re.match("[a-z]+: ", line)] == [
        "load", "encode", "denoise", "decode"
    ]  # fmt: skip

    config = {name: value for name, value in told.items() if name not in ("sgld", "model")}
    (tmp_path / "again.json").write_text(json.dumps({"model_path": told["model"], **config}))
    again = generate(
        tmp_path, "--config", "again.json", "--output-file-path", "again.mp4", "--perf-dump-path", "p.json"
    )
    assert again.stdout == "again.mp4\n"
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "o/A b.mp4").read_bytes()
    (report,) = json.loads((tmp_path / "p.json").read_text())["outputs"]
    assert list(report["stages_ms"]) == ["encode", "denoise", "decode", "save"]
    assert len(report["steps_ms"]) == 2
    assert report["peak_memory_bytes"] > 2**26


def test_several_prompts_are_one_load_and_an_image_is_one_frame(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "one_1.png").touch()
    asked = ["--prompt-path", "prompts.txt", "--num-inference-steps", "1", "--seed", "5", "--output-path", "."]
    refused = generate(tmp_path, *asked, "--output-file-name", "one.png")
    assert refused.returncode == 1
    assert "one_1.png: the file exists; choose another name or give --overwrite" in one_error_line(refused)
    done = generate(tmp_path, *asked, "--output-file-name", "one.png", "--overwrite", "--json")
    assert done.returncode == 0
    assert done.stderr.count("load: ") == 1
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(t["path"], t["prompt"], t["seed"], t["num_frames"]) for t in told] == [
        ("one_0.png", "one", 5, 1), ("one_1.png", "two", 5, 1)
    ]  # fmt: skip
    assert files(tmp_path) == ["one_0.png", "one_1.png", "prompts.txt"]
    frames, _ = media_files.decode(tmp_path / "one_1.png")
    assert frames.shape == (1, 96, 96, 3)


def test_adapters_of_one_output(tmp_path: Path) -> None:
    """By a name that --lora-path gave, and by a path below the home folder; one that is not there is one line."""
    shutil.copyfile(DEMO / "loras" / "outline.safetensors", tmp_path / "o.safetensors")
    image = ("--prompt", "a red circle", "--num-frames", "1", "--num-inference-steps", "4", "--seed", "1")
    loras = {
        "plain": [],
        "set": ["--lora-path", "o.safetensors", "--lora-nickname", "mine"],
        "off": ["--lora-path", "o.safetensors", "--lora-nickname", "mine", "--loras", "nickname=mine,strength=0"],
        "own": ["--loras", "path=~/o.safetensors"],
    }
    for name, words in loras.items():
        done = generate(tmp_path, *image, *words, "--output-file-path", f"{name}.png", HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    plain, worn, off, own = (media_files.decode(tmp_path / f"{name}.png")[0].astype(int) for name in loras)
    assert (off == plain).all() and (own == worn).all() and abs(worn - plain).mean() > 0.5
    missing = generate(tmp_path, *image, "--loras", "path=no/thing", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert missing.returncode == 2 and "--loras: 'no/thing' is no local folder" in one_error_line(missing)


def test_raw_frames_and_a_reader_that_has_gone(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "sgld", "generate", "--prompt", "x", *QUICK, "--output-path=."]
    command = [*asked, "--return-frames", "--output-file-name", "x.mp4", "--n", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(100) == 0
    assert "Traceback" not in told and "BrokenPipe" not in told
    assert files(tmp_path) == ["x.mp4_0.npy", "x.mp4_1.npy"]
    for name in files(tmp_path):
        frames = np.load(tmp_path / name)
        assert (frames.shape, frames.dtype) == ((5, 96, 96, 3), np.uint8)


def test_closed_standard_streams_do_no_harm(tmp_path: Path) -> None:
    asked = "generate --prompt x --num-inference-steps 1 --num-frames 1 --output-path . --output-file-name x.webp"
    done = subprocess.run(
        f"exec {sys.executable} -m sgld {asked} <&- >&- 2>&-", shell=True, cwd=tmp_path, timeout=100, check=False
    )
    assert done.returncode == 0
    assert files(tmp_path) == ["x.webp"]


@pytest.mark.parametrize(
    ("number", "wait_for"),
    [(signal.SIGINT, "seed "), (signal.SIGTERM, "encode: "), (signal.SIGINT, None)],
    ids=["SIGINT denoise", "SIGTERM denoise", "SIGINT load"],
)
def test_an_interrupt_leaves_no_file_and_no_process(
    number: signal.Signals, wait_for: str | None, tmp_path: Path
) -> None:
    process = start(
        "generate", "--prompt", "x", "--num-inference-steps", "1000", "--output-file-name", "x.mp4", folder=tmp_path
    )
    assert process.stdout is not None and process.stderr is not None
    family = psutil.Process(process.pid)
    if wait_for is None:  # until the first worker is there
        while not family.children():
            assert process.poll() is None
    else:
        for line in process.stderr:
            if line.startswith(wait_for):
                break
    workers = family.children(recursive=True)
    assert workers
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in told
    assert files(tmp_path) == []
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def test_a_hang_up_that_nohup_ignores_stays_ignored_and_a_second_interrupt_kills(tmp_path: Path) -> None:
    asked = ["generate", "--prompt", "x", "--num-inference-steps", "1000", "--output-path", "o"]
    told = []
    with subprocess.Popen(
        ["nohup", sys.executable, "-m", "sgld", *asked],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            told.append(line.partition(":")[0].split(";")[0].strip())
            if told[-1] == "encode":
                process.send_signal(signal.SIGHUP)
            elif told[-1] in ("denoise", "stopping after this step"):  # "denoise" comes seconds later
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert told[-5:] == ["encode", "denoise", "", "stopping after this step", "error"]
    assert not (tmp_path / "o").exists()


def test_a_failure_keeps_what_was_made_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND_FAILS, "generate", "--prompt", "a", "b", *QUICK, "--output-file-path=x.mp4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "x_0.mp4\n"
    assert done.stderr.splitlines()[-1] == "error: no luck"
    assert files(tmp_path) == ["x_0.mp4"]


def test_a_file_that_cannot_be_written_stops_the_outputs_after_it(tmp_path: Path) -> None:
    words = ["--prompt", "a", "--seed", "5", "--num-outputs-per-prompt", "4", "--num-inference-steps", "40"]
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IS_LOST, "generate", *words, "--num-frames", "1", "--output-file-path=x.png"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, lines[-1]) == (1, "", "error: no room")
    assert "[2/4] seed 6" in lines, "the next one is begun while the first is written"
    assert not [line for line in lines if "[4/4]" in line]
    assert files(tmp_path) == []


FIRST_IS_LOST = """
import sys
from sgld import cli
from sgld.cli import make
from sgld.errors import OutputError

def lost(*args):
    raise OutputError("no room")

if __name__ == "__main__":
    make.save = lost
    sys.exit(cli.main())
"""


SECOND_FAILS = """
import sys
from sgld import cli
from sgld.engine.engine import Engine
from sgld.errors import OutOfMemory

if __name__ == "__main__":
    generate = Engine.generate

    async def second_fails(self, job_id, items, emit):
        if items[0].prompt == "b":
            raise OutOfMemory("no luck")
        return await generate(self, job_id, items, emit)

    Engine.generate = second_fails
    sys.exit(cli.main())
"""


def broken(folder: Path, kind: str) -> None:
    """A copy of the embedded model with one fault."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    if kind == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    else:
        (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("kind", "words", "code", "line"),
    [
        ("truncated", [], 1, r"transformer/diffusion_pytorch_model\.safetensors: corrupt or truncated"),
        ("no model", [], 1, r"--model-path: 'm' .*model_index\.json"),
        (None, ["--model-path", "no/such/folder/.."], 1, r"^error: --model-path: "),
        (
            None,
            ["--height", "60"],
            2,
            r"^error: --height: 60 is not a multiple of \d+; the nearest valid size is 96x72",
        ),
    ],
    ids=["truncated", "no-model", "no-folder", "size"],
)
def test_bad_input_is_one_line(kind: str | None, words: list[str], code: int, line: str, tmp_path: Path) -> None:
    if kind is not None:
        broken(tmp_path / "m", kind)
        words = ["--model-path", "m"]
    before = files(tmp_path)
    done = generate(tmp_path, "--prompt", "x", *QUICK, *words)
    assert done.returncode == code
    assert re.search(line, one_error_line(done))
    assert files(tmp_path) == before
    assert not (tmp_path / "outputs").exists()


def test_debug_shows_where(tmp_path: Path) -> None:
    asked: list[Any] = ["--prompt", "x", "--height", "0"]
    quiet = generate(tmp_path, *asked)
    loud = generate(tmp_path, "--prompt", "x", "--model-path", "/no/such", "--log-level", "debug")
    assert quiet.stderr == "error: --height: 0 is out of range; allowed is 1 to 16384\n"
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1].startswith("error: --model-path: no folder '/no/such'")
