"""LoRA adapters in sgld against diffusers, on a Wan of 300 M random weights, in one run and in turns. Prints Markdown.

cold      a file that was not read before: read and merged, in place of another
cached    from one adapter to another, both in memory; for sgld also with no merged weights kept (`merged anew`)
generate  a short clip with an adapter merged
drift     how far the weights are from the original after many swaps and taking the last adapter away

Both sides live in one process, with the same precisions, files and threads. The adapters, in PEFT's format, have rank
32 in all attention and feed-forward layers. A ratio is the median over the rounds; above 1, sgld is faster. The files
are in the page cache. `memory` is what adapters cost beside the weights, their own tensors included.
"""

# ruff: noqa: E402 - how threads wait is read when torch is imported
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgld.config import set_default_environment
from sgld.log import QUIET
from sgld.settings import Settings

set_default_environment(**QUIET, OMP_WAIT_POLICY="passive")  # as the ranks do

import torch
from bench import Silence
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import make_wan21
from torch import nn

from sgld import __version__
from sgld.engine.lora import resolve_adapter
from sgld.hub.hub import resolve_model
from sgld.messages import SetLora, UnmergeLora
from sgld.models import load_family
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.params import LoraUse
from sgld.platform import choose_platform
from sgld.resolve import resolve
from sgld.worker.adapters import Adapters
from sgld.worker.run_context import RunContext
from sgld.worker.sampler import sample

WAN_300M = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256, "num_layers": 6}
LAYERS = (
    *(f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)
RANK = 32
CLIP = {
    "prompt": "a red ball moving", "negative_prompt": "blurred", "seed": 1, "num_inference_steps": 4,
    "guidance_scale": 5.0, "width": 128, "height": 128, "num_frames": 9, "max_sequence_length": 32,
}  # fmt: skip
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
AIMS = {"cold": "2", "cached": "5", "generate": "1"}


def write_adapter(folder: Path, seed: int) -> Path:
    """A PEFT folder of random values that change the weights by about a tenth of what they are."""
    generator = torch.Generator().manual_seed(seed)
    dim, ffn = WAN_300M["num_attention_heads"] * WAN_300M["attention_head_dim"], WAN_300M["ffn_dim"]
    tensors = {}
    for block in range(WAN_300M["num_layers"]):
        for layer in LAYERS:
            inner, outer = ffn if layer == "ffn.net.2" else dim, ffn if layer == "ffn.net.0.proj" else dim
            name = f"transformer.blocks.{block}.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) / 10
            tensors[f"{name}.lora_B.weight"] = torch.randn(outer, RANK, generator=generator) / 100
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Ours:
    """What a rank does."""

    def __init__(self, model: Path, precision: str):
        settings = Settings.of(
            model_path=str(model), dit_precision=precision, text_encoder_precisions=[precision], vae_precision="fp32"
        )
        machine = choose_platform()
        self._mesh = Mesh.solo(machine.device(0))
        self._family = load_family(resolve_model(settings), self._mesh, machine, lambda done, total: None)
        self.layers = self._family.lora["transformer"]
        self.module: nn.Module = self.layers.module
        self.adapters = Adapters(self._family.lora, self._mesh)

    def cold(self, folder: Path) -> None:
        self.adapters = Adapters(self._family.lora, self._mesh)
        self.cached(folder)

    def cached(self, folder: Path) -> None:
        self.adapters.set(SetLora((LoraUse(path=str(resolve_adapter(str(folder)))),)))

    def anew(self, folder: Path) -> None:
        self.layers.release()
        self.cached(folder)

    def unmerge(self) -> None:
        self.adapters.unmerge(UnmergeLora())

    def memory(self, adapters: list[Path]) -> int:
        """Bytes, beside the weights that were loaded."""
        return self.layers.kept_bytes + sum(read_adapter(folder).nbytes for folder in adapters)

    def generate(self) -> None:
        params = resolve(CLIP, self._family.info).params
        sample(self._family, params, RunContext("bench", self._mesh, Silence()))  # type: ignore[arg-type]


class Theirs:
    """What the documentation of diffusers says to do."""

    def __init__(self, model: Path, precision: str):
        from diffusers import AutoencoderKLWan, WanPipeline

        pipeline: Any = WanPipeline
        vae: Any = AutoencoderKLWan
        vae = vae.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
        self._pipe = pipeline.from_pretrained(model, vae=vae, torch_dtype=PRECISIONS[precision])
        self._pipe.set_progress_bar_config(disable=True)
        self.module: nn.Module = self._pipe.transformer
        self._loaded: set[str] = set()

    def cold(self, folder: Path) -> None:
        if self._loaded:
            self._pipe.unfuse_lora()
            self._pipe.unload_lora_weights()
        self._pipe.load_lora_weights(folder, adapter_name=folder.name)
        self._pipe.fuse_lora()
        self._loaded = {folder.name}

    def know(self, folder: Path) -> None:
        """Load it beside the others, and let it be merged."""
        self._pipe.unfuse_lora()
        self._pipe.load_lora_weights(folder, adapter_name=folder.name)
        self._loaded.add(folder.name)
        self._fuse(folder.name)

    def cached(self, folder: Path) -> None:
        self._pipe.unfuse_lora()
        self._fuse(folder.name)

    def _fuse(self, name: str) -> None:
        self._pipe.set_adapters(name)
        self._pipe.fuse_lora(adapter_names=[name])

    def unmerge(self) -> None:
        self._pipe.unfuse_lora()
        self._pipe.unload_lora_weights()

    def memory(self) -> int:
        return sum(p.nbytes for name, p in self.module.named_parameters() if "lora_" in name)

    def generate(self) -> None:
        given = {name: value for name, value in CLIP.items() if name != "seed"}
        self._pipe(**given, generator=torch.Generator().manual_seed(1), output_type="np")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Rows:
    """Pairs of timings, by what was timed."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        self._pairs.setdefault(name, []).append((seconds(ours), seconds(theirs)))

    def medians(self) -> dict[str, tuple[float, float, float]]:
        """sgld's and diffusers' seconds, and the ratio; the first round warms up."""
        found = {}
        for name, (_, *pairs) in self._pairs.items():
            ours, theirs = map(statistics.median, zip(*pairs, strict=True))
            found[name] = ours, theirs, statistics.median(b / a for a, b in pairs)
        return found


def furthest(module: nn.Module, model: Path, dtype: torch.dtype) -> float:
    """The largest difference of a weight from the file's; NaN counts as infinitely far."""
    weights = module.state_dict()
    (file,) = (model / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as original:
        differences = [
            float((weights[name].float() - original.get_tensor(name).to(dtype).float()).abs().max())
            for name in original.keys()  # noqa: SIM118 - not a dict
        ]
    return max(math.inf if math.isnan(d) else d for d in differences)


def measure(model: Path, adapters: list[Path], precision: str, repeat: int, swaps: int) -> dict[str, Any]:
    ours, theirs, rows = Ours(model, precision), Theirs(model, precision), Rows()
    for i in range(repeat + 1):
        folder = adapters[i % 2]
        rows.time("cold", lambda f=folder: ours.cold(f), lambda f=folder: theirs.cold(f))  # type: ignore[misc]
    ours.layers.release()  # merged weights of adapters as they were read before
    theirs.know(adapters[repeat % 2 - 1])
    for folder in adapters:
        ours.cached(folder)
    for i in range(repeat + 1):
        folder = adapters[i % 2]
        rows.time("cached", lambda f=folder: ours.cached(f), lambda f=folder: theirs.cached(f))  # type: ignore[misc]
    memory = {"ours": ours.memory(adapters), "theirs": theirs.memory()}
    for i in range(repeat + 1):
        folder = adapters[i % 2]
        rows.time("merged anew", lambda f=folder: ours.anew(f), lambda f=folder: theirs.cached(f))  # type: ignore[misc]
    for _ in range(repeat + 1):
        rows.time("generate", ours.generate, theirs.generate)
    for i in range(swaps):
        ours.cached(adapters[i % 2])
        theirs.cached(adapters[i % 2])
    ours.unmerge()
    theirs.unmerge()
    dtype, sides = PRECISIONS[precision], {"ours": ours.module, "theirs": theirs.module}
    return {
        "parameters": sum(p.numel() for p in ours.module.parameters()),
        "seconds": rows.medians(),
        "memory, MiB": {name: nbytes / 2**20 for name, nbytes in memory.items()},
        "drift": {name: furthest(module, model, dtype) for name, module in sides.items()},
    }


def table(found: dict[str, dict[str, Any]], swaps: int) -> str:
    """Markdown: one row for each figure."""
    lines = ["| precision | what | sgld | diffusers | ratio | aim |", "|---|---|---:|---:|---:|---:|"]
    for precision, figures in found.items():
        for name, (a, b, ratio) in figures["seconds"].items():
            lines.append(f"| {precision} | {name}, s | {a:.4f} | {b:.4f} | {ratio:.2f} | {AIMS.get(name, '')} |")
        for name, what, aim in (("memory, MiB", "memory, MiB", ""), ("drift", f"drift after {swaps} swaps", "0")):
            a, b = figures[name].values()
            lines.append(f"| {precision} | {what} | {a:.4g} | {b:.4g} | | {aim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", choices=[*PRECISIONS, []], help="which to run (default: both)")
    parser.add_argument("--repeat", type=int, default=7, help="counted rounds of each (default: 7)")
    parser.add_argument("--swaps", type=int, default=100, help="before drift is measured (default: 100)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_wan21(Path(folder) / "model", **WAN_300M)
        adapters = [write_adapter(Path(folder) / name, seed) for seed, name in enumerate(("first", "second"))]
        found = {
            precision: measure(model, adapters, precision, options.repeat, options.swaps)
            for precision in options.precisions or PRECISIONS
        }
    print(table(found, options.swaps))
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "load": os.getloadavg()[0]}
    count = next(iter(found.values()))["parameters"] / 1e6
    print(f"\nsgld {__version__}, {count:.0f} M parameters, medians of {options.repeat}, {machine['cores']} cores")
    if options.json is not None:
        report = {"sgld": __version__, "machine": machine, "repeat": options.repeat, "figures": found}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
