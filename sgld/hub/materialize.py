"""A model folder made of an overlay and its source: once, whole or not at all, and kept in `config.cache_root()`."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType

from filelock import FileLock, Timeout

from sgld.config import cache_root
from sgld.errors import BadRequest, ModelError
from sgld.hub.overlay import MANIFEST, FileMapping, Manifest, brought, files_of, inside, read_object

log = logging.getLogger(__name__)
MARKER = ".sglang_overlay_materialized.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
LINKED_BYTES = 64 * 2**20  # files of this size and above are hard linked where that is possible, and safe
_WEIGHTLESS = re.compile("(Tokenizer|Processor)(Fast)?$|Scheduler$|FeatureExtractor$")  # classes of components


def materialize(
    identity: Mapping[str, str], overlay: Path, manifest: Manifest, trusted: bool, fetch: Callable[[], Path]
) -> Path:
    """The folder of the overlay's files and the source's, made by one process at most and only where it is not whole.

    `fetch` gives the folder of the source. Code of the overlay runs only if `trusted`.

    Raises:
        BadRequest: there is such code, and it may not run.
        ModelError: a file is missing, leaves its folder, or cannot be written; what was made is removed.
    """
    source = identity["source_model_id"]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    final = cache_root() / "materialized_models" / f"{source.replace('/', '__')}-{key}"
    if _is_whole(final, identity):
        return final
    if manifest.custom_materializer and not trusted:
        told = f"the overlay {identity['overlay_repo_id']!r} runs code of its own ({manifest.custom_materializer})"
        raise BadRequest(f"{told}; it does so only with this flag", field="trust_remote_code")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final):
            if not _is_whole(final, identity):
                _make(final, identity, overlay, manifest, fetch())
    except OSError as error:
        raise ModelError(f"{source!r} cannot be put together in {final}: {error}", field="model_path") from None
    return final


def _is_whole(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether every file that was made is there, in its size."""
    try:
        record = json.loads((folder / MARKER).read_text())
        sizes = record.pop("files")
        return record == identity and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """One process at a time, on all machines that share the folder. The lock goes with its process."""
    lock = FileLock(final.with_name(f"{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process puts %s together; waiting for it", final)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(final: Path, identity: Mapping[str, str], overlay: Path, manifest: Manifest, source: Path) -> None:
    """Make the folder beside its place, then put it there, instead of one that is not whole."""
    missing = [name for name in manifest.required_source_files if not (source / name).is_file()]
    if missing:
        raise ModelError(f"{source}: lacks {', '.join(missing)}, which {overlay / MANIFEST} requires")
    log.info("putting %s together in %s, with the overlay %s", source, final, overlay)
    new = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    may_link = not manifest.custom_materializer  # which may write into what it finds
    try:
        for file in brought(overlay):
            if file.relative_to(overlay).parts[0] != "_overlay":
                _place(inside(overlay, file), new / file.relative_to(overlay), may_link)
        if left := [file.name for file in files_of(overlay) if file.suffix in WEIGHTS]:
            log.warning("%s: an overlay with a manifest brings no weights; not taken: %s", overlay, ", ".join(left))
        for mapping in manifest.file_mappings:
            for file, place in _mapped(mapping, source):
                _place(inside(source, file), new / place, may_link)
        if manifest.custom_materializer:
            _run(inside(overlay, overlay / manifest.custom_materializer), overlay, source, new)
        _check_components(new)
        (new / MARKER).unlink(missing_ok=True)  # of an overlay that was one's result
        sizes = {file.relative_to(new).as_posix(): file.stat().st_size for file in files_of(new)}
        (new / MARKER).write_text(json.dumps({**identity, "files": sizes}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _mapped(mapping: FileMapping, source: Path) -> list[tuple[Path, PurePosixPath]]:
    """Files of the source, and their places. Raises ModelError where there are none."""
    start = source / mapping.src
    if mapping.type == "glob":
        names = sorted(glob.glob(mapping.src, root_dir=source, recursive=True))  # noqa: PTH207 -- ** ends in files too
        found = [(source / name, PurePosixPath(name)) for name in names if (source / name).is_file()]
    elif mapping.type == "tree":
        place = PurePosixPath(mapping.dst_dir or mapping.src)
        found = [(file, place / file.relative_to(start)) for file in files_of(start)]
    else:
        found = [(start, PurePosixPath(mapping.dst or start.name))] if start.is_file() else []
    if not found:
        raise ModelError(f"{source}: has no {mapping.type} {mapping.src!r}, which the overlay maps")
    return found


def _place(file: Path, target: Path, may_link: bool) -> None:
    """Link a large file, hard, and copy any other: the hub's cache may be deleted."""
    if target.exists():
        raise ModelError(f"{target.name}: two files of the overlay and its source have this place: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if may_link and file.stat().st_size >= LINKED_BYTES:
        try:
            target.hardlink_to(file)
            return
        except OSError as error:
            log.debug("%s is copied, for it cannot be linked: %s", file, error.strerror)
    shutil.copyfile(file, target)


def _run(file: Path, overlay: Path, source: Path, output: Path) -> None:
    """Call the overlay's `materialize`. Raises ModelError, which names what it raised."""
    module = ModuleType("overlay_materializer")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    folders = {"overlay_dir": str(overlay), "source_dir": str(source), "output_dir": str(output)}
    try:
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
        module.materialize(**folders, manifest=read_object(overlay / MANIFEST))
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file}: materialize failed: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module.__name__]
    for made in files_of(output):
        if made.is_symlink():
            raise ModelError(
                f"{file}: materialize made a symbolic link, {made.relative_to(output)}; link hard, or copy"
            )


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
