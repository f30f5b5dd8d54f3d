"""Repositories in a Hugging Face cache, laid out as the hub's client does: snapshots of links into blobs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def publish(cache: Path, name: str, files: Mapping[str, str | bytes], branch: str = "main") -> Path:
    """A commit of these files, that `branch` names; returns its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
    commit = hashlib.sha1(repr(sorted(contents.items())).encode(), usedforsecurity=False).hexdigest()
    for path, content in contents.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = repository / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return repository / "snapshots" / commit


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
