"""Results in a local folder: names as the user wrote them, whole files or none, nothing overwritten unasked."""

from __future__ import annotations

import errno
import os
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePath

import attrs

from sgld.errors import BadRequest, OutputError
from sgld.params import IMAGE_FORMATS, VIDEO_FORMATS

RAW_FORMAT = "npy"
PARTS = ".sgld-*.part"  # files that are being written
EXTENSIONS = (*VIDEO_FORMATS, *IMAGE_FORMATS, RAW_FORMAT)
_OTHER_MEDIA = frozenset(
    {
        "3gp",
        "apng",
        "avi",
        "avif",
        "bmp",
        "flv",
        "glb",
        "heic",
        "heif",
        "jp2",
        "jxl",
        "m4v",
        "mkv",
        "mov",
        "mp3",
        "mpeg",
    }
    | {"mpg", "npz", "obj", "ogg", "ogv", "pdf", "psd", "svg", "tga", "tif", "tiff", "ts", "wav", "wmv"}
)
_NAME_BYTES = 255  # what ext4, xfs, btrfs and tmpfs allow
_SLUG_CHARACTERS, _SLUG_BYTES = 80, 180
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def check_name(name: str) -> None:
    """Refuse (BadRequest) what is no plain file name; everything else stays as the user wrote it."""
    fault = _fault(name)
    if fault:
        raise BadRequest(
            f"output_file_name: {name!r} {fault}; give a plain file name of up to {_NAME_BYTES} bytes"
            " (the folder goes into output_path)",
            "output_file_name",
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
    """The name with a known extension: its own if it has one, else `extension` added ("clip.v2" -> "clip.v2.mp4").

    `extension` "npy" (raw frames) is added to every other one. BadRequest for media that sgld does not write.
    """
    check_name(name)
    suffix = PurePath(name).suffix[1:].lower()
    if suffix == extension or (suffix in EXTENSIONS and extension != RAW_FORMAT):
        return name
    if suffix in _OTHER_MEDIA and extension != RAW_FORMAT:
        raise BadRequest(
            f"output_file_name: {name!r}: .{suffix} is not one of {', '.join(EXTENSIONS)}", "output_file_name"
        )
    completed = f"{name}.{extension}"
    check_name(completed)
    return completed


def default_name(prompt: str, when: datetime, seed: int, extension: str) -> str:
    """A readable name from the prompt, the local time and the seed."""
    return f"{_slug(prompt) or 'output'}_{when:%Y%m%d-%H%M%S}_{seed}.{extension}"


def _slug(prompt: str) -> str:
    """Letters, marks and digits of any script, everything else as single underscores."""
    text = unicodedata.normalize("NFC", prompt)
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "-" else " " for c in text)
    slug = "_".join(kept.split())[:_SLUG_CHARACTERS]
    return slug.encode()[:_SLUG_BYTES].decode(errors="ignore").strip("_-")


def indexed(name: str, i: int, n: int) -> str:
    """The name of output `i` of `n`: "clip_0.mp4" where there are several."""
    if n == 1:
        return name
    path = PurePath(name)
    numbered = f"{path.stem}_{i}{path.suffix}"
    check_name(numbered)
    return numbered


@attrs.frozen
class LocalStorage:
    """One folder of results. Errors: OutputError, one line with the path and the reason."""

    root: Path = attrs.field(converter=Path)

    def path(self, name: str) -> Path:
        """Where `name` goes."""
        check_name(name)
        return self.root / name

    def check(self, names: Iterable[str], overwrite: bool = False) -> None:
        """Make the folder, prove that it can be written, and refuse names that are taken.

        Ask before denoising; `create` refuses again, for another program may take the name in between.
        """
        with self._part():
            pass
        for name in names:
            path = self.path(name)
            if _exists(path) and (not overwrite or path.is_dir()):
                raise _taken(path)

    def free_name(self, name: str) -> str:
        """`name`, or the first of "clip_2.mp4", "clip_3.mp4" ... that is free; for names the user did not choose."""
        candidate, i = name, 1
        while _exists(self.path(candidate)):
            i += 1
            candidate = f"{PurePath(name).stem}_{i}{PurePath(name).suffix}"
        return candidate

    @contextmanager
    def create(self, name: str, overwrite: bool = False) -> Iterator[Path]:
        """A hidden file to write in the body; afterwards it becomes `name` at once, or vanishes if the body failed."""
        path = self.path(name)
        with _map_os_errors(path), self._part() as part:
            yield part
            _publish(part, path, overwrite)

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """An empty hidden file in the folder, gone at the end in any case."""
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
    """Whether the name is taken, be it by a broken link."""
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
    """Give the finished file its name in one step; of two writers of a free name exactly one wins."""
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
    """For file systems without hard links: claim the name with an empty file, then put the real one in its place."""
    path.touch(exist_ok=False)
    try:
        part.replace(path)
    except BaseException:
        path.unlink()
        raise
