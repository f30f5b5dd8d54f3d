"""An overlay, its source, and the load of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgld.config import cache_root
from sgld.hub import materialize
from sgld.hub.hub import resolve_model
from sgld.hub.overlay import MANIFEST
from sgld.settings import Settings

SOURCE, OVERLAY = "Wan-AI/Wan2.2-S2V-14B", "your-org/Wan2.2-S2V-14B-overlay"
RAW = {"weights.safetensors": "w" * 100, "text/spiece.json": "pieces", "text/more/vocab.txt": "words", "demo.mp4": "x"}
INDEX = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "tokenizer": ["transformers", "T5TokenizerFast"],
}
MAPPINGS: list[dict[str, Any]] = [
    {"src": "weights.safetensors", "dst": "transformer/model.safetensors"},
    {"type": "tree", "src": "text", "dst_dir": "tokenizer"},
]
Files = dict[str, str | bytes]
PLAIN: Files = {"model_index.json": json.dumps(INDEX), "transformer/config.json": "{}"}
MADE = {"model_index.json", "transformer/config.json", "transformer/model.safetensors", "tokenizer/spiece.json",
        "tokenizer/more/vocab.txt", materialize.MARKER}  # fmt: skip


def files(manifest: dict[str, Any] | None = None) -> Files:
    """An overlay of that manifest, with MAPPINGS unless it has its own."""
    return PLAIN | {MANIFEST: json.dumps({"file_mappings": MAPPINGS} | (manifest or {}))}


def write(folder: Path, files: Files) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def load(registry: Any, model_path: str = SOURCE, **settings: Any) -> Path:
    settings |= {"model_path": model_path, "model_overlay_registry": json.dumps(registry)}
    command = resolve_model(Settings.of(**settings))
    assert command.settings.model.model_path == model_path  # which is what everybody is told
    return command.folder


def results() -> list[str]:
    """What lies beside the locks."""
    return [path.name for path in (cache_root() / "materialized_models").glob("*") if path.suffix != ".lock"]
