"""Store files in a local folder: whole files or none, under names as the user wrote them."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePath
from stat import S_ISREG

import anyio.to_thread
import attrs

from sgld.errors import BadRequest, NotFound, OutputError
from sgld.params import IMAGE_FORMATS, VIDEO_FORMATS

log = logging.getLogger(__name__)
RAW_FORMAT = "npy"
PARTS = ".sgld-*.part"  # unfinished files
ABANDONED_S = 3600.0  # age of an unfinished file that nobody will finish
EXTENSIONS = (*VIDEO_FORMATS, *IMAGE_FORMATS, RAW_FORMAT)
_OTHER_MEDIA = (
    "3gp", "apng", "avi", "avif", "bmp", "flv", "glb", "heic", "heif", "jp2", "jxl", "m4v", "mkv", "mov", "mp3", "mpeg",
    "mpg", "npz", "obj", "ogg", "ogv", "pdf", "psd", "svg", "tga", "tif", "tiff", "ts", "wav", "wmv",
)  # fmt: skip
_NAME_BYTES = 255  # what ext4, xfs, btrfs and tmpfs allow
_SLUG_CHARACTERS, _SLUG_BYTES = 80, 180
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def check_name(name: str) -> None:
    """Refuse a name that is not a plain file name. Raises BadRequest."""
    fault = _fault(name)
    if fault:
        raise BadRequest(
            f"{name!r} {fault}; give a plain file name of up to {_NAME_BYTES} bytes (the folder goes into output_path)",
            field="output_file_name",
        )


def _fault(name: str) -> str | None:
    if not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "is a folder"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if any(unicodedata.category(c) == "Cc" for c in name):
        return "has a control character"
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"has {size} bytes" if size > _NAME_BYTES else None


def complete_name(name: str, extension: str) -> str:
    """Return the name with a known extension: its own, or else with `extension` added ("clip.v2" -> "clip.v2.mp4").

    The extension "npy" of raw frames is added to every other one. Raises BadRequest for media that sgld cannot write.
    """
    check_name(name)
    suffix = PurePath(name).suffix[1:].lower()
    if suffix == extension or (suffix in EXTENSIONS and extension != RAW_FORMAT):
        return name
    if suffix in _OTHER_MEDIA and extension != RAW_FORMAT:
        raise BadRequest(f"{name!r}: .{suffix} is not one of {', '.join(EXTENSIONS)}", field="output_file_name")
    completed = f"{name}.{extension}"
    check_name(completed)
    return completed


def default_name(prompt: str, when: datetime, seed: int, extension: str) -> str:
    """Return a readable name from the prompt, the local time and the seed."""
    return f"{_slug(prompt) or 'output'}_{when:%Y%m%d-%H%M%S}_{seed}.{extension}"


def _slug(prompt: str) -> str:
    """Replace everything but letters, marks and digits of any script with single underscores."""
    text = unicodedata.normalize("NFC", prompt)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "-" else " " for c in text)
    slug = "_".join(words.split())[:_SLUG_CHARACTERS]
    return slug.encode()[:_SLUG_BYTES].decode(errors="ignore").strip("_-")


def indexed(name: str, i: int, n: int) -> str:
    """Return the name of output `i` of `n`: "clip_0.mp4" if there are several."""
    if n == 1:
        return name
    path = PurePath(name)
    numbered = f"{path.stem}_{i}{path.suffix}"
    check_name(numbered)
    return numbered


@attrs.frozen
class LocalStorage:
    """A folder of files. Its methods block, and raise OutputError with the path and the reason."""

    root: Path = attrs.field(converter=Path)

    def path(self, name: str) -> Path:
        """Return the path of `name`."""
        check_name(name)
        return self.root / name

    def check(self, names: Iterable[str], overwrite: bool = False) -> None:
        """Make the folder, test that it can be written, and refuse names that exist.

        Call it before denoising. `create` refuses again, because another program may take the name in between.
        """
        with self._part():
            pass
        for name in names:
            path = self.path(name)
            if _exists(path) and (not overwrite or path.is_dir()):
                raise _taken(path)

    def free_name(self, name: str) -> str:
        """Return `name`, or the first of "clip_2.mp4", "clip_3.mp4" ... that does not exist."""
        candidate, i = name, 1
        while _exists(self.path(candidate)):
            i += 1
            candidate = f"{PurePath(name).stem}_{i}{PurePath(name).suffix}"
        return candidate

    @contextmanager
    def create(self, name: str, overwrite: bool = False) -> Iterator[Path]:
        """Provide a hidden file to write. It becomes `name` in one step at the end, or is removed if the body fails."""
        path = self.path(name)
        with _map_os_errors(path), self._part() as part:
            yield part
            _publish(part, path, overwrite)

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """Provide an empty hidden file in the folder, and remove it at the end in any case."""
        part = self.root / PARTS.replace("*", secrets.token_hex(8))
        try:
            with _map_os_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                part.touch(exist_ok=False)
            yield part
        finally:
            with suppress(OSError):
                part.unlink()


@contextmanager
def _map_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}", "output_path") from error


def _exists(path: Path) -> bool:
    """Return whether the name is taken, even by a broken link."""
    with _map_os_errors(path):
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        return True


def _taken(path: Path) -> OutputError:
    if path.is_dir():
        return OutputError(f"cannot write {path}: it is a folder", "output_file_name")
    return OutputError(
        f"cannot write {path}: the file exists; choose another name or give --overwrite", "output_file_name"
    )


def _publish(part: Path, path: Path, overwrite: bool) -> None:
    """Rename the finished file in one step. Of two writers of a free name exactly one wins."""
    if overwrite:
        part.replace(path)
        return
    try:
        _link(part, path)
    except FileExistsError:
        raise _taken(path) from None


def _link(part: Path, path: Path) -> None:
    try:
        path.hardlink_to(part)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _claim_and_replace(part, path)


def _claim_and_replace(part: Path, path: Path) -> None:
    """Claim the name with an empty file and replace it, on file systems without hard links."""
    path.touch(exist_ok=False)
    try:
        part.replace(path)
    except BaseException:
        path.unlink()
        raise


@attrs.frozen
class LocalResultStore:
    """A `ResultStore` in a folder. Its methods run in threads."""

    root: Path

    async def create_folder(self) -> None:
        """Create the folder, readable by this user alone."""
        await anyio.to_thread.run_sync(lambda: self.root.mkdir(mode=0o700))

    async def delete_folder(self) -> None:
        """Delete the folder with all files; log what cannot be deleted."""
        await anyio.to_thread.run_sync(self._delete_folder)

    async def put(self, name: str, write: Callable[[Path], object]) -> int:
        """Store what `write` puts at a path, in place of an older file, and return its bytes."""
        return await anyio.to_thread.run_sync(self._put, name, write)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Path]:
        """Provide the file to read. Raises NotFound if the body finds none."""
        try:
            yield self.root / name
        except FileNotFoundError:
            raise NotFound(f"{name}: the file has been removed", "id") from None

    async def serve(self, name: str) -> Path:
        """Return the file."""
        return self.root / name

    async def delete(self, names: Iterable[str]) -> None:
        """Delete files. A missing file is no error; a file that cannot be deleted is logged."""
        await anyio.to_thread.run_sync(self._delete, list(names))

    async def exists(self, names: Iterable[str], newer_than: str | None = None) -> bool:
        """Return whether all these files exist and, where it is given, none is older than another file."""
        return await anyio.to_thread.run_sync(self._exist, list(names), newer_than)

    async def sweep(self) -> None:
        """Delete unfinished files that nobody has written to for an hour."""
        await anyio.to_thread.run_sync(self._sweep)

    def _put(self, name: str, write: Callable[[Path], object]) -> int:
        with LocalStorage(self.root).create(name, overwrite=True) as part:
            write(part)
            return part.stat().st_size

    def _delete(self, names: list[str]) -> None:
        for name in names:
            try:
                (self.root / name).unlink(missing_ok=True)
            except OSError as error:
                log.error("cannot remove %s: %s", self.root / name, error.strerror)

    def _exist(self, names: list[str], newer_than: str | None) -> bool:
        try:
            oldest = (self.root / newer_than).stat().st_mtime_ns if newer_than is not None else 0
            found = [(self.root / name).stat() for name in names]
        except OSError:
            return False
        return all(S_ISREG(each.st_mode) and each.st_mtime_ns >= oldest for each in found)

    def _sweep(self) -> None:
        for part in self.root.glob(PARTS):
            with suppress(FileNotFoundError):  # another program has finished it
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink()

    def _delete_folder(self) -> None:
        try:
            shutil.rmtree(self.root)
        except OSError as error:
            log.error("cannot remove %s: %s", self.root, error.strerror)
