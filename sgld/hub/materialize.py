"""Build a model folder of an overlay and its source: once, completely or not at all, in `config.cache_root()`."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import runpy
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import AcquireReturnProxy, FileLock, Timeout

from sgld.config import cache_root
from sgld.errors import BadRequest, ModelError
from sgld.hub.overlay import MANIFEST, FileMapping, Manifest, files_of, inside, overlay_files, read_object

log = logging.getLogger(__name__)
MARKER = ".sglang_overlay_materialized.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
LINKED_BYTES = 64 * 2**20  # files of this size and above are hard linked where that is possible, and safe
_WEIGHTLESS = re.compile("(Tokenizer|Processor)(Fast)?$|Scheduler$|FeatureExtractor$")  # classes of components


def materialize(
    identity: Mapping[str, str], overlay: Path, manifest: Manifest, trusted: bool, fetch: Callable[[], Path]
) -> Path:
    """Return the folder of the overlay's and the source's files. Build it in one process where it is not complete.

    `fetch` returns the folder of the source. Code of the overlay runs only if `trusted`.

    Raises:
        BadRequest: the overlay has code, and it is not trusted.
        ModelError: a file is missing, leads out of its folder, or cannot be written. Nothing stays behind then.
    """
    source = identity["source_model_id"]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    final = cache_root() / "materialized_models" / f"{source.replace('/', '__')}-{key}"
    if _is_complete(final, identity):
        return final
    if manifest.custom_materializer and not trusted:
        reason = f"the overlay {identity['overlay_repo_id']!r} runs code of its own ({manifest.custom_materializer})"
        raise BadRequest(f"{reason}; it does so only with this flag", field="trust_remote_code")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final):
            if not _is_complete(final, identity):
                _build(final, identity, overlay, manifest, fetch())
    except OSError as error:
        raise ModelError(f"{source!r} cannot be put together in {final}: {error}", field="model_path") from None
    return final


def _is_complete(folder: Path, identity: Mapping[str, str]) -> bool:
    """Return true where every file that was built is there, in its size."""
    try:
        record = json.loads((folder / MARKER).read_text())
        sizes = record.pop("files")
        return record == identity and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _lock(final: Path) -> AcquireReturnProxy[FileLock]:
    """Lock the folder for one process, on all machines that share it. The lock ends with its process."""
    lock = FileLock(final.with_name(f"{final.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("another process puts %s together; waiting for it", final)
        return lock.acquire()


def _build(final: Path, identity: Mapping[str, str], overlay: Path, manifest: Manifest, source: Path) -> None:
    """Build the folder beside its place, then move it there. It replaces one that is not complete."""
    if missing := [name for name in manifest.required_source_files if not (source / name).is_file()]:
        raise ModelError(f"{source}: lacks {', '.join(missing)}, which {overlay / MANIFEST} requires")
    log.info("putting %s together in %s, with the overlay %s", source, final, overlay)
    new = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    may_link = not manifest.custom_materializer  # which may write into what it finds
    try:
        for file in overlay_files(overlay):
            if file.relative_to(overlay).parts[0] != "_overlay":
                _place(inside(overlay, file), new / file.relative_to(overlay), may_link)
        if left := [file.name for file in files_of(overlay) if file.suffix in WEIGHTS]:
            log.warning("%s: an overlay with a manifest brings no weights; not taken: %s", overlay, ", ".join(left))
        for mapping in manifest.file_mappings:
            for file, target in _map_files(mapping, source).items():
                _place(inside(source, file), new / target, may_link)
        if manifest.custom_materializer:
            _run(inside(overlay, overlay / manifest.custom_materializer), overlay, source, new)
        _check_components(new)
        (new / MARKER).unlink(missing_ok=True)  # of an overlay that was itself built so
        sizes = {file.relative_to(new).as_posix(): file.stat().st_size for file in files_of(new)}
        (new / MARKER).write_text(json.dumps({**identity, "files": sizes}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _map_files(mapping: FileMapping, source: Path) -> dict[Path, PurePosixPath]:
    """Return the targets of the source's files. Raise ModelError where no file matches."""
    start = source / mapping.src
    if mapping.type == "glob":
        names = sorted(glob.glob(mapping.src, root_dir=source, recursive=True))  # noqa: PTH207 -- ** ends in files too
        found = {source / name: PurePosixPath(name) for name in names if (source / name).is_file()}
    elif mapping.type == "tree":
        target = PurePosixPath(mapping.dst_dir or mapping.src)
        found = {file: target / file.relative_to(start) for file in files_of(start)}
    else:
        found = {start: PurePosixPath(mapping.dst or start.name)} if start.is_file() else {}
    if not found:
        raise ModelError(f"{source}: has no {mapping.type} {mapping.src!r}, which the overlay maps")
    return found


def _place(file: Path, target: Path, may_link: bool) -> None:
    """Link a large file hard, and copy any other. The hub's cache may be deleted afterwards."""
    if target.exists():
        raise ModelError(f"{target.name}: two files of the overlay and its source have this place: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if may_link and file.stat().st_size >= LINKED_BYTES:
        with suppress(OSError):  # such as another file system
            target.hardlink_to(file)
            return
    shutil.copyfile(file, target)


def _run(file: Path, overlay: Path, source: Path, output: Path) -> None:
    """Call the overlay's `materialize`. Raise ModelError for any error of its code, and for symbolic links."""
    folders = {"overlay_dir": str(overlay), "source_dir": str(source), "output_dir": str(output)}
    try:
        module = runpy.run_path(str(file), run_name="overlay_materializer")
        module["materialize"](**folders, manifest=read_object(overlay / MANIFEST))
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file}: materialize failed: {type(error).__name__}: {error}") from error
    if links := [made.relative_to(output) for made in files_of(output) if made.is_symlink()]:
        raise ModelError(f"{file}: materialize made a symbolic link, {links[0]}; link hard, or copy")


def _check_components(folder: Path) -> None:
    """Raise ModelError unless every component of model_index.json has its folder, and a model its weights."""
    for name, value in read_object(folder / "model_index.json").items():
        if name.startswith("_") or not isinstance(value, list) or value[-1:] in ([], [None]):
            continue
        if not (folder / name).is_dir():
            raise ModelError(f"{folder / name}: neither the overlay nor its source has this component")
        weightless = _WEIGHTLESS.search(str(value[-1])) or not (folder / name / "config.json").is_file()
        if not weightless and not any((folder / name).glob("*.safetensors")):
            raise ModelError(f"{folder / name}: has no .safetensors; the source's weights are not mapped there")
