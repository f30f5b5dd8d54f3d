"""The documents' own commands, as they are written, by the models' real names: tiny twins stand for the hub.

Only `sglang` becomes `sgld`. Where a command leaves a size or a number of steps to the model, the twin's own
generation_config.json keeps it small; where it names a large one, flags behind it make it small.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hub.repositories import contents, publish
from tests.media_files import decode, decode_sound, read_metadata
from tools import tiny

SEEDS = Path(__file__).parent / "seeds"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
CLIP = SMALL | {"num_frames": 5, "fps": 8}
Run = Callable[..., "subprocess.Popen[str]"]


def block(document: str, start: str, end: str) -> str:
    """The lines of a document from the first that begins with `start` to the next that begins with `end`."""
    lines = (SEEDS / f"{document}.txt").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i, line in enumerate(lines) if i >= first and line.startswith(end))
    return "\n".join(lines[first : last + 1])


def after(document: str, line: str, start: str, end: str) -> str:
    """The same, searched behind a line that begins with `line`."""
    text = (SEEDS / f"{document}.txt").read_text()
    rest = text[text.index(line) :].splitlines()
    first = next(i for i, each in enumerate(rest) if each.startswith(start))
    last = next(i for i, each in enumerate(rest) if i >= first and each.startswith(end))
    return "\n".join(rest[first : last + 1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Iterator[Run]:
    """Start a script of the documents in an empty folder, with these models in the cache."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, more: str = "", **models: Mapping[str, Any] | None) -> subprocess.Popen[str]:
        for name, defaults in models.items():
            twin = name.replace("_", "-")
            if not (cache / f"models--{tiny.real_names()[twin].replace('/', '--')}").exists():
                snapshot = tiny.make_cache(twin, cache)
                if defaults is not None:
                    (snapshot / "generation_config.json").write_text(json.dumps(defaults))
        whole = f'sglang() {{ {sys.executable} -m sgld "$@" {more}; }}\n{script}'
        environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            ["bash", "-c", whole], cwd=tmp_path, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def made(process: subprocess.Popen[str], folder: Path) -> Path:
    """The file whose path is the last line."""
    out, told = process.communicate(timeout=150)
    assert process.returncode == 0, told
    return folder / out.splitlines()[-1]


def test_the_older_document_s_first_command(run: Run, tmp_path: Path) -> None:
    script = block("cli_older", "SERVER_ARGS=(", 'sglang generate "${SERVER_ARGS[@]}"')
    file = made(run(script, wan22_a14b=CLIP | {"guidance_scale": 4.0}), tmp_path)
    frames, _ = decode(file)
    assert (file.name, frames.shape) == ("A curious raccoon.mp4", (5, 32, 32, 3))


def test_the_newer_document_s_raccoon(run: Run, tmp_path: Path) -> None:
    script = after("cli_newer", "`sglang generate` runs a single", "sglang generate", '  --output-file-name "a-curious')
    file = made(run(script, wan22_a14b=CLIP | {"guidance_scale": 4.0}), tmp_path)
    assert decode(file)[0].shape == (5, 32, 32, 3)


def test_qwen_image(run: Run, tmp_path: Path) -> None:
    script = after("cli_newer", "### Generate", "sglang generate", "  --save-output")
    file = made(run(script, qwen_image=SMALL | {"guidance_scale": 4.0, "negative_prompt": " "}), tmp_path)
    assert (file.suffix, decode(file)[0].shape) == (".png", (1, 32, 32, 3))


def test_ltx_23_with_another_kernel_for_its_text(run: Run, tmp_path: Path) -> None:
    """The command says no prompt, and asks for flash attention, which a CPU cannot run."""
    script = after("cli_newer", "## Component Attention", "sglang generate", "  --component-attention-backends text")
    prompt, defaults = '--prompt "a red cat"', CLIP | {"num_frames": 9, "guidance_scale": 1.0}
    refused = run(script, prompt, ltx23=defaults)
    _, told = refused.communicate(timeout=150)
    assert refused.returncode == 2
    assert "attention-backend: fa cannot run here" in told and told.rstrip().endswith("these can: torch_sdpa")
    file = made(run(script.replace("backend fa", "backend torch_sdpa"), prompt, ltx23=defaults), tmp_path)
    assert decode(file)[0].shape == (9, 32, 32, 3)
    sound = decode_sound(file)
    assert sound is not None
    assert sound.samples.shape[1] / sound.rate > 0.9  # of 9 frames at 8 a second


def test_the_config_of_fast_hunyuan(run: Run, tmp_path: Path) -> None:
    """bf16 and an fp16 decoder that two workers share, as the file says; only the size and the length are smaller."""
    config = block("cli_older", "{", "}")
    (tmp_path / "config.json").write_text(config)
    script = block("cli_older", "sglang generate --config config.json", "sglang generate --config config.json")
    file = made(run(script, "--height 48 --width 64 --num-frames 9", fasthunyuan=None), tmp_path)
    assert file.parent == tmp_path / "outputs"
    assert decode(file)[0].shape == (9, 48, 64, 3)


RAW = {  # file of the source, and of the model that the overlay makes
    "diffusion_pytorch_model.safetensors": "transformer/diffusion_pytorch_model.safetensors",
    "Wan2.1_VAE.safetensors": "vae/diffusion_pytorch_model.safetensors",
    "models_t5_umt5-xxl-enc-bf16.safetensors": "text_encoder/model.safetensors",
    "google/umt5-xxl/tokenizer.json": "tokenizer/tokenizer.json",
    "google/umt5-xxl/tokenizer_config.json": "tokenizer/tokenizer_config.json",
}


def test_a_source_of_raw_files_through_its_overlay(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source and the overlay by their names in the document; the result is the model that both were made of."""
    twin = contents(tiny.makers()["wan21"](tmp_path / "twin"))
    mappings = [{"src": raw, "dst": place} for raw, place in RAW.items() if not raw.startswith("google")]
    mappings.append({"type": "tree", "src": "google/umt5-xxl", "dst_dir": "tokenizer"})
    manifest = {"source_model_id": "Wan-AI/Wan2.2-S2V-14B", "file_mappings": mappings}
    brought = {name: text for name, text in twin.items() if name not in RAW.values()}
    publish(
        cache, "your-org/Wan2.2-S2V-14B-overlay", brought | {"_overlay/overlay_manifest.json": json.dumps(manifest)}
    )
    source = publish(cache, "Wan-AI/Wan2.2-S2V-14B", {raw: twin[place] for raw, place in RAW.items()} | {"a.bin": "a"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    script = block("cli_newer", "export SGLANG_DIFFUSION_MODEL_OVERLAY", "  --config configs/wan_s2v")
    more = "--height 32 --width 32 --num-frames 5 --num-inference-steps 2 --seed 7 --output-file-name"
    first = run(script, f"{more} first.mp4")
    out, told = first.communicate(timeout=150)
    assert first.returncode == 0, told
    [folder] = (tmp_path / "cache/sgl_diffusion/materialized_models").glob("Wan-AI__Wan2.2-S2V-14B-*[0-9a-f]")
    assert f"in {folder}, with the overlay" in told
    assert b"Wan-AI/Wan2.2-S2V-14B" in (tmp_path / out.splitlines()[-1]).read_bytes()
    shutil.rmtree(source.parents[1])  # a later load needs it no more
    files = [out.splitlines()[-1], made(run(script, f"{more} again.mp4"), tmp_path)]
    whole = script.replace("--model-path Wan-AI/Wan2.2-S2V-14B", "--model-path twin")
    files.append(made(run(whole, f"{more} twin.mp4"), tmp_path))
    frames = [decode(tmp_path / file)[0] for file in files]
    assert frames[0].shape == (5, 32, 32, 3)
    assert (frames[0] == frames[1]).all() and (frames[0] == frames[2]).all()


def test_ovis_image_as_a_diffusers_pipeline(run: Run, tmp_path: Path) -> None:
    """Both documents have the same command. It asks for flash attention, which a CPU cannot run."""
    script = after("cli_older", "Example: running Ovis-Image-7B", "sglang generate", "  --output-file-name")
    assert script == after("cli_newer", "## Diffusers Backend", "sglang generate", "  --output-file-name")
    small = script.replace("1024", "32").replace("steps 30", "steps 2")
    refused = run(small, ovis_image=None)
    _, told = refused.communicate(timeout=150)
    assert refused.returncode == 2
    assert "diffusers-attention-backend: flash cannot run here: it needs an NVIDIA GPU" in told
    assert told.rstrip().endswith("these can: native")
    file = made(run(small.replace("backend flash", "backend native"), ovis_image=None), tmp_path)
    assert file == tmp_path / "outputs" / "ovis_garden.png"
    assert decode(file)[0].shape == (1, 32, 32, 3)


def test_the_config_with_arguments_of_the_pipeline_s_own(run: Run, tmp_path: Path) -> None:
    """The file's `cross_attention_kwargs` are `joint_attention_kwargs` there, and a warning says so."""
    (tmp_path / "config.json").write_text(after("cli_older", "For pipeline-specific parameters", "{", "}"))
    script = after("cli_older", "For pipeline-specific parameters", "sglang generate --config", "sglang generate")
    process = run(script, "--height 32 --width 48 --num-inference-steps 2", ovis_image=None)
    out, told = process.communicate(timeout=150)
    assert process.returncode == 0, told
    assert decode(tmp_path / out.splitlines()[-1])[0].shape == (1, 32, 48, 3)
    assert "cross_attention_kwargs: OvisImagePipeline names it joint_attention_kwargs" in told


def test_auto_says_that_diffusers_runs_it(run: Run, tmp_path: Path) -> None:
    command = "sglang generate --model-path AIDC-AI/Ovis-Image-7B --prompt 'a red cat'"
    small = "--height 32 --width 48 --num-inference-steps 2"
    process = run(command, small, ovis_image=None)
    _, told = process.communicate(timeout=150)
    assert process.returncode == 0, told
    assert "OvisImagePipeline: sgld has no native code for it; diffusers runs it" in told
    refused = run(f"{command} --backend sglang", small, ovis_image=None)
    _, told = refused.communicate(timeout=150)
    assert (refused.returncode, "pipeline 'OvisImagePipeline' is not supported" in told) == (1, True)


def test_the_same_config_in_yaml(run: Run, tmp_path: Path) -> None:
    config = after("cli_newer", "```yaml Config", "model_path", "enable_torch_compile")
    (tmp_path / "config.yaml").write_text(config)
    script = block("cli_newer", "sglang generate --config config.yaml", "sglang generate --config config.yaml")
    file = made(run(script, "--height 48 --width 64 --num-frames 9", fasthunyuan=None), tmp_path)
    told = read_metadata(file)
    assert (file.parent, decode(file)[0].shape) == (tmp_path / "outputs", (9, 48, 64, 3))
    assert (told["seed"], told["fps"], told["num_inference_steps"]) == (1024, 24, 6)
    assert told["prompt"] == "A beautiful woman in a red dress walking down a street"


def test_dotted_attention_and_an_autoencoder_from_a_local_folder(run: Run, tmp_path: Path) -> None:
    """The shell leaves the ~ behind a = alone; a CPU has no flash attention."""
    flag = block("cli_older", "  --vae-path=~", "  --vae-path=~").strip()
    home, folder = tmp_path / "home", flag.removeprefix("--vae-path=~/")
    tiny.makers()["flux2-tiny-autoencoder"](home / folder)
    dotted = after("cli_newer", "You can also pass dotted", "sglang generate", "  --component-attention-backends.tr")
    script = f"export HOME={home}\n{dotted.replace('<MODEL_PATH_OR_ID>', 'black-forest-labs/FLUX.2-dev')}"
    asked, models = '--prompt "a red cat" --seed 1', {"flux2_dev": SMALL | {"guidance_scale": 4.0}}
    refused = run(script, asked, **models)
    _, told = refused.communicate(timeout=150)
    assert refused.returncode == 2
    assert "component-attention-backends.transformer: fa cannot run here" in told
    script = script.replace("transformer fa", "transformer torch_sdpa")
    own, other = (decode(made(run(script, f"{asked} {more}", **models), tmp_path))[0] for more in ("", flag))
    assert own.shape == other.shape == (1, 32, 32, 3)
    assert (own != other).any()


@pytest.mark.parametrize(
    ("script", "models"),
    [
        (block("cli_older", "  --model-path Wan-AI/Wan2.1", "sglang serve"), {"wan21": CLIP}),
        (after("cli_newer", "### Serve", "sglang serve", "  --port"), {"wan21": CLIP}),
        (after("cli_older", "Replace the default VAE", "sglang serve", "  --vae-path"),
         {"flux2_dev": SMALL | {"guidance_scale": 4.0}, "flux2_tiny_autoencoder": None}),
    ],
    ids=["older", "newer", "tiny autoencoder"],
)  # fmt: skip
def test_servers(run: Run, script: str, models: dict[str, Any]) -> None:
    if script.startswith("  --model-path"):
        script = f"SERVER_ARGS=(\n{script}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    port = 30010 if "--port 30010" in script else free
    process = run(script, "" if port == 30010 else f"--port {port}", **models)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        json.dumps({"prompt": "a red cat", "size": "32x32", "num_inference_steps": 2}).encode(),
        {"Content-Type": "application/json"},
    )
    answer = json.loads(_ask(process, request))
    assert len(answer["data"][0]["b64_json"]) > 100
    [server] = psutil.Process(process.pid).children()
    server.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0  # bash's own status is that of its last command


def _ask(process: subprocess.Popen[str], request: urllib.request.Request) -> bytes:
    """The answer of a server, once it is ready."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise AssertionError(error.read()) from None
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the server ended with {process.poll()}")
