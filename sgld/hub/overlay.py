"""Overlay repositories: configurations, and a manifest that says where the files of a source repository go.

What they say is read and checked here; `materialize` does it, and `hub` finds and downloads both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import attrs

from sgld.config import user_path
from sgld.convert import fields_of, knob, once, shorten, structure
from sgld.errors import BadRequest, ModelError, SgldError, UnknownField

REGISTRY = "model_overlay_registry"
MANIFEST = "_overlay/overlay_manifest.json"
SUFFIXES = (".json", ".md", ".py", ".txt", ".model", ".jinja")  # what is taken of an overlay that has a manifest
_SOURCE_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@attrs.frozen
class Overlay:
    """What the registry says of one source repository."""

    overlay_repo_id: str = knob("", "Hugging Face id or folder of the overlay")
    overlay_revision: str | None = knob(None, "commit, tag or branch of the overlay")
    source_revision: str | None = knob(None, "the same of the source; wins over the manifest's")


BUILT_IN = {"Lightricks/LTX-2.3": Overlay("MickJ/LTX-2.3-overlay")}  # for as long as the sources are raw files


@attrs.frozen
class FileMapping:
    """Files of the source, and where they go."""

    src: str = knob("", "path in the source; of a glob, a pattern in which ** takes slashes too")
    type: str = knob("file", "one file, a folder, or all files that match", choices=("file", "tree", "glob"))
    dst: str | None = knob(None, "of a file: where it goes", shown_default="its name")
    dst_dir: str | None = knob(None, "of a tree: where it goes", shown_default="src")


@attrs.frozen
class Manifest:
    """What an overlay does with its source."""

    source_model_id: str | None = knob(None, "Hugging Face id of the source; needed when the overlay is --model-path")
    source_revision: str | None = knob(None, "commit, tag or branch of the source")
    source_allow_patterns: list[str] | None = knob(None, "files to download of the source", shown_default="all")
    required_source_files: list[str] = knob([], "files that must be there")
    materializer_version: str = knob("v1", "another one makes the result anew")
    file_mappings: list[FileMapping] = knob([], "where files go")
    custom_materializer: str | None = knob(None, "Python file in the overlay that exposes `materialize`")


def registry(given: str | None) -> dict[str, Overlay]:
    """Overlays by the id of their source, from a JSON object or a file of one.

    Raises BadRequest, which names the entry and what is allowed.
    """
    if given is None:
        return {}
    try:
        text = given if given.lstrip().startswith("{") else user_path(given, REGISTRY).read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=once)
    except OSError as error:
        told = f"{shorten(given)} is neither a JSON object nor a file that can be read: {error.strerror}"
        raise BadRequest(f"{told}", field=REGISTRY) from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{shorten(given)}: it is not valid JSON: {error}", field=REGISTRY) from None
    if not isinstance(entries, dict):
        raise BadRequest(f"{shorten(given)} holds no JSON object", field=REGISTRY)
    return {name: _entry(name, value) for name, value in entries.items()}


def _entry(name: str, value: Any) -> Overlay:
    keys = fields_of(Overlay)
    try:
        if not _SOURCE_ID.fullmatch(name):
            raise BadRequest("its name must be the Hugging Face id (owner/name) of the source")
        if not isinstance(value, str | dict):
            raise BadRequest(f"{shorten(value)} is neither text nor a map of {', '.join(keys)}")
        entry = structure({"overlay_repo_id": value} if isinstance(value, str) else value, Overlay)
        for key in keys:
            if getattr(entry, key) == "":
                raise BadRequest(f"{key}: it is empty; overlay_repo_id is needed, the others may be left out")
    except SgldError as error:
        allowed = f"; allowed: {', '.join(keys)}" if isinstance(error, UnknownField) else ""
        raise error.renamed(REGISTRY, f"entry {shorten(name)}: {error.message}{allowed}") from None
    return entry


def match(model_path: str, overlays: Mapping[str, Overlay]) -> str | None:
    """The source that `model_path` means: by its id, or as a folder of its short name, or in a cache of the hub.

    A folder that is an overlay itself is none. Raises BadRequest for a folder that several sources may mean.
    """
    if model_path in overlays:
        return model_path
    path = user_path(model_path, "model_path").absolute()
    if not path.is_dir() or (path / MANIFEST).is_file():
        return None
    cached = [name for name in overlays if f"models--{name.replace('/', '--')}" in path.parts]
    named = cached or [name for name in overlays if name.split("/")[1] == path.name]
    if len(named) > 1:
        told = f"{shorten(model_path)} may be any of {', '.join(named)}; rename the folder, or leave the others out"
        raise BadRequest(f"{told}", field=REGISTRY)
    return named[0] if named else None


def read_manifest(overlay: Path) -> Manifest:
    """The overlay's manifest. Raises ModelError, which names file, field and value."""
    file = overlay / MANIFEST
    try:
        values = read_object(file)
        given = values.get("file_mappings")
        if isinstance(given, list):
            values["file_mappings"] = [_mapping(f"file_mappings[{i}]", each) for i, each in enumerate(given)]
        manifest = structure(values, Manifest)
        name = manifest.source_model_id
        if name is not None and not _SOURCE_ID.fullmatch(name):
            raise BadRequest(f"source_model_id: {shorten(name)} is no Hugging Face id (owner/name)")
        if manifest.source_revision == "":
            raise BadRequest("source_revision: it is empty; leave it out")
        for path in manifest.required_source_files:
            _check_path("required_source_files", path)
        _check_path("custom_materializer", manifest.custom_materializer)
    except BadRequest as error:
        raise ModelError(f"{file}: {error.message}") from None
    return manifest


def _mapping(where: str, value: Any) -> FileMapping:
    """One of `file_mappings`. Raises BadRequest."""
    if not isinstance(value, dict):
        raise BadRequest(f"{where}: {shorten(value)} is no map of {', '.join(fields_of(FileMapping))}")
    try:
        mapping = structure(value, FileMapping)
    except SgldError as error:
        raise BadRequest(f"{where}: {error.message}") from None
    taken = {"file": "dst", "tree": "dst_dir"}.get(mapping.type)
    for name, path in (("dst", mapping.dst), ("dst_dir", mapping.dst_dir)):
        if path is not None and name != taken:
            instead = f"it has {taken}" if taken else "its files keep their paths"
            raise BadRequest(f"{where}: {name}: {shorten(path)}: a {mapping.type} has none; {instead}")
        _check_path(f"{where}: {name}", path)
    _check_path(f"{where}: src", mapping.src)
    return mapping


def _check_path(where: str, text: str | None) -> None:
    """Raise BadRequest for a path that may lead out of its folder."""
    if text is None:
        return
    path = PurePosixPath(text)
    if not text or "\0" in text or path.is_absolute() or ".." in path.parts:
        raise BadRequest(f"{where}: {shorten(text)} is not allowed; give a path inside the folder, without ..")


def snapshot(folder: Path) -> Path:
    """The folder itself; of a repository's folder in the hub's cache, its main snapshot."""
    main = folder / "refs" / "main"
    if folder.name.startswith("models--") and main.is_file():
        return folder / "snapshots" / main.read_text().strip()
    return folder


def identity(source: str, entry: Overlay, overlay: Path, manifest: Manifest, local: Path | None) -> dict[str, str]:
    """What makes one result another: ids, revisions, and the overlay's files; of a local source, its folder."""
    is_local = user_path(entry.overlay_repo_id, REGISTRY).is_dir()
    known = {
        "source_model_id": source,
        "overlay_repo_id": str(overlay) if is_local else entry.overlay_repo_id,
        "overlay_revision": "local" if is_local else entry.overlay_revision or "main",
        "materializer_version": manifest.materializer_version,
        "overlay_fingerprint": _fingerprint(overlay),
        "source_revision": entry.source_revision,
        "source_folder": None if local is None else str(local),
    }
    return {name: value for name, value in known.items() if value is not None}


def _fingerprint(overlay: Path) -> str:
    """SHA-256 over names and contents of the overlay's files; of its weights, which are not taken, nothing."""
    digest = hashlib.sha256()
    for file in brought(overlay):
        try:
            content = hashlib.sha256(inside(overlay, file).read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
        digest.update(json.dumps([file.relative_to(overlay).as_posix(), content]).encode())
    return digest.hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object in which no key stands twice. Raises ModelError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return value


def files_of(folder: Path) -> list[Path]:
    """Every file below. Raises ModelError for a link to a folder, which is not followed."""
    found = sorted(folder.rglob("*"))
    for path in found:
        if path.is_symlink() and path.is_dir():
            raise ModelError(f"{path}: links to folders are not followed; put the folder itself there")
    return [path for path in found if not path.is_dir()]


def brought(overlay: Path) -> list[Path]:
    """The files that are taken of an overlay."""
    return [file for file in files_of(overlay) if file.suffix in SUFFIXES]


def inside(root: Path, path: Path) -> Path:
    """The file itself, its links followed, which must end in `root` or, of a snapshot of the hub, in its blobs.

    Raises ModelError where they lead elsewhere.
    """
    real = Path(os.path.realpath(path, strict=True))  # a loop of links is an OSError here
    snapshots = [each for each in root.parents if each.name == "snapshots" and each.parent.name.startswith("models--")]
    if any(real.is_relative_to(each.resolve()) for each in (root, *(each.parent / "blobs" for each in snapshots))):
        return real
    raise ModelError(f"{path}: leads out of {root}, to {real}")
