"""Find the files of a LoRA adapter: its weights, and PEFT's adapter_config.json beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sgld.errors import BadRequest, MissingFile

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_file(path: Path) -> Path:
    """Find the safetensors file that `read_adapter` reads."""
    if path.is_dir():
        return _only_file(path)
    if not path.is_file():
        raise MissingFile(": no such file or folder", field="lora_path", file=str(path))
    return _safetensors(path)


def config_file(path: Path, file: Path) -> Path | None:
    """Find the adapter_config.json that goes with `file`: a folder's, or the one beside PEFT's own file name."""
    config = file.parent / "adapter_config.json"
    return config if config.is_file() and (path != file or file.name == "adapter_model.safetensors") else None


def _only_file(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise bad_file(folder, f"holds {listed_names(found)}; name one of these files")
    for name in names:
        if name.endswith(_PICKLES):
            _safetensors(folder / name)
    raise bad_file(folder, "holds no .safetensors file")


def _safetensors(file: Path) -> Path:
    if file.suffix in _PICKLES:
        raise bad_file(file, "is a pickle, which may run code when it is read; convert it to .safetensors")
    if file.suffix != ".safetensors":
        raise bad_file(file, "is no .safetensors file")
    return file


def bad_file(file: Path, reason: str) -> BadRequest:
    return BadRequest(f"{file.name!r} {reason}", field="lora_path")


def listed_names(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# -------------------------------------------------------------------------------------------------- alpha, config
