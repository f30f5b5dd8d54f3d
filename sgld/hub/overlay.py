"""Overlay repositories: configurations, and a manifest that says where the files of a source repository go.

This module reads and checks them. `materialize` applies them, and `hub` finds and downloads overlay and source.
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
from sgld.hub.reference import Reference

REGISTRY = "model_overlay_registry"
MANIFEST = "_overlay/overlay_manifest.json"
SUFFIXES = (".json", ".md", ".py", ".txt", ".model", ".jinja")  # of files that an overlay with a manifest contributes
_SOURCE_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@attrs.frozen
class Overlay:
    """A registry entry: the overlay of one source repository."""

    overlay_repo_id: str = knob("", "Hugging Face id or folder of the overlay")
    overlay_revision: str | None = knob(None, "commit, tag or branch of the overlay")
    source_revision: str | None = knob(None, "the same of the source; wins over the manifest's")


BUILT_IN = {"Lightricks/LTX-2.3": Overlay("MickJ/LTX-2.3-overlay")}  # for as long as the sources are raw files


@attrs.frozen
class FileMapping:
    """Files of the source, and their place in the model."""

    src: str = knob("", "path in the source; of a glob, a pattern in which ** takes slashes too")
    type: str = knob("file", "one file, a folder, or all files that match", choices=("file", "tree", "glob"))
    dst: str | None = knob(None, "of a file: where it goes", shown_default="its name")
    dst_dir: str | None = knob(None, "of a tree: where it goes", shown_default="src")


@attrs.frozen
class Manifest:
    """The manifest of an overlay."""

    source_model_id: str | None = knob(None, "Hugging Face id of the source; needed when the overlay is --model-path")
    source_revision: str | None = knob(None, "commit, tag or branch of the source")
    source_allow_patterns: list[str] | None = knob(None, "files to download of the source", shown_default="all")
    required_source_files: list[str] = knob([], "files that must be there")
    materializer_version: str = knob("v1", "another one makes the result anew")
    file_mappings: list[FileMapping] = knob([], "where files go")
    custom_materializer: str | None = knob(None, "Python file in the overlay that exposes `materialize`")


def registry(given: str | None) -> dict[str, Overlay]:
    """Read overlays by the id of their source, from a JSON object or a file that holds one.

    Raises:
        BadRequest: the message names the entry and the allowed values.
    """
    if given is None:
        return {}
    try:
        text = given if given.lstrip().startswith("{") else user_path(given, REGISTRY).read_text(encoding="utf-8-sig")
        entries = parse_object(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        wrong = f"{shorten(given)} is neither a JSON object nor a file that holds one: {reason}"
        raise BadRequest(wrong, field=REGISTRY) from None
    return {name: _entry(name, value) for name, value in entries.items()}


def _entry(name: str, value: Any) -> Overlay:
    keys = fields_of(Overlay)
    try:
        if not _SOURCE_ID.fullmatch(name):
            raise BadRequest("its name must be the Hugging Face id (owner/name) of the source")
        entry = structure(value if isinstance(value, dict) else {"overlay_repo_id": value}, Overlay)
        for key in keys:
            if getattr(entry, key) == "":
                raise BadRequest("it is empty; overlay_repo_id is needed, the others may be left out", field=key)
    except SgldError as error:
        allowed = f"; allowed: {', '.join(keys)}" if isinstance(error, UnknownField) else ""
        raise error.renamed(REGISTRY, f"entry {shorten(name)}: {error.message}{allowed}") from None
    return entry


def match(model_path: str, overlays: Mapping[str, Overlay]) -> str | None:
    """Find the source of a model path: an id, a folder of its short name, or a folder in a cache of the hub.

    Return None for a folder that is an overlay. Raise BadRequest for a folder that fits several sources.
    """
    if model_path in overlays:
        return model_path
    path = user_path(model_path, "model_path").absolute()
    if not path.is_dir() or (path / MANIFEST).is_file():
        return None
    cached = [name for name in overlays if f"models--{name.replace('/', '--')}" in path.parts]
    named = cached or [name for name in overlays if name.split("/")[1] == path.name]
    if len(named) > 1:
        reason = f"{shorten(model_path)} may be any of {', '.join(named)}; rename the folder, or leave the others out"
        raise BadRequest(reason, field=REGISTRY)
    return named[0] if named else None


def read_manifest(overlay: Path) -> Manifest:
    """Read the overlay's manifest. Raise ModelError, which names file, field and value."""
    file = overlay / MANIFEST
    try:
        values = read_object(file)
        given = values.get("file_mappings")
        if isinstance(given, list):
            values["file_mappings"] = [_mapping(i, each) for i, each in enumerate(given)]
        manifest = structure(values, Manifest)
        name = manifest.source_model_id
        if name is not None and not _SOURCE_ID.fullmatch(name):
            raise BadRequest(f"{shorten(name)} is no Hugging Face id (owner/name)", field="source_model_id")
        if manifest.source_revision == "":
            raise BadRequest("it is empty; leave it out", field="source_revision")
        for path in manifest.required_source_files:
            _check_path("required_source_files", path)
        _check_path("custom_materializer", manifest.custom_materializer)
    except BadRequest as error:
        raise ModelError(f"{file}: {error.message}") from None
    return manifest


def _mapping(index: int, value: Any) -> FileMapping:
    """Read and check one of `file_mappings`. Raise BadRequest."""
    try:
        if not isinstance(value, dict):
            raise BadRequest(f"{shorten(value)} is no map of {', '.join(fields_of(FileMapping))}")
        mapping = structure(value, FileMapping)
        for name, kind in (("dst", "file"), ("dst_dir", "tree")):
            path = getattr(mapping, name)
            if path is not None and mapping.type != kind:
                raise BadRequest(f"{shorten(path)}: a {mapping.type} has none; it is of a {kind}", field=name)
            _check_path(name, path)
        _check_path("src", mapping.src)
    except BadRequest as error:
        raise error.renamed(f"file_mappings[{index}]", error.message) from None
    return mapping


def _check_path(name: str, text: str | None) -> None:
    """Raise BadRequest for a path that may lead out of its folder."""
    path = PurePosixPath(text or "")
    if text is not None and (not text or "\0" in text or path.is_absolute() or ".." in path.parts):
        raise BadRequest(f"{shorten(text)} is not allowed; give a path inside the folder, without ..", field=name)


def snapshot(folder: Path) -> Path:
    """Return the main snapshot of a repository's folder in the hub's cache, and any other folder unchanged."""
    main = folder / "refs" / "main"
    if folder.name.startswith("models--") and main.is_file():
        return folder / "snapshots" / main.read_text().strip()
    return folder


def identity(source: Reference, by: Reference, overlay: Path, manifest: Manifest, local: Path | None) -> dict[str, str]:
    """Identify one result: by ids, revisions, the overlay's files, and the folder of a local source."""
    is_local = by.local() is not None
    found = {
        "source_model_id": source.name,
        "overlay_repo_id": str(overlay) if is_local else by.name,
        "overlay_revision": "local" if is_local else by.revision or "main",
        "materializer_version": manifest.materializer_version,
        "overlay_fingerprint": _fingerprint(overlay),
        "source_revision": source.revision,
        "source_folder": None if local is None else str(local),
    }
    return {name: value for name, value in found.items() if value is not None}


def _fingerprint(overlay: Path) -> str:
    """Hash names and contents of the overlay's files by SHA-256. Weights of the overlay do not count."""
    digest = hashlib.sha256()
    for file in overlay_files(overlay):
        try:
            content = hashlib.sha256(inside(overlay, file).read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
        digest.update(json.dumps([file.relative_to(overlay).as_posix(), content]).encode())
    return digest.hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raise ModelError."""
    try:
        return parse_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None


def parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object without repeated keys. Raise ValueError."""
    value = json.loads(text, object_pairs_hook=once)
    if not isinstance(value, dict):
        raise ValueError(f"{shorten(value)} is no JSON object")
    return value


def files_of(folder: Path) -> list[Path]:
    """List every file below. Raise ModelError for a link to a folder: it is not followed."""
    found = sorted(folder.rglob("*"))
    if links := [path for path in found if path.is_symlink() and path.is_dir()]:
        raise ModelError(f"{links[0]}: links to folders are not followed; put the folder itself there")
    return [path for path in found if not path.is_dir()]


def overlay_files(overlay: Path) -> list[Path]:
    """List the files that an overlay contributes."""
    return [file for file in files_of(overlay) if file.suffix in SUFFIXES]


def inside(root: Path, path: Path) -> Path:
    """Follow the links of a path. They must end in `root`, or in the blobs of the hub's snapshot.

    Raises:
        ModelError: a link that leads elsewhere.
    """
    real = Path(os.path.realpath(path, strict=True))  # a loop of links is an OSError here
    snapshots = [each for each in root.parents if each.name == "snapshots" and each.parent.name.startswith("models--")]
    if any(real.is_relative_to(each.resolve()) for each in (root, *(each.parent / "blobs" for each in snapshots))):
        return real
    raise ModelError(f"{path}: leads out of {root}, to {real}")
