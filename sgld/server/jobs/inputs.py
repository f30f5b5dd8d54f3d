"""Pictures that clients send: verified before anything else reads them, kept under names of our own."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import anyio
import anyio.to_thread
import attrs
from PIL import ExifTags, Image, ImageOps

from sgld import inputs
from sgld.errors import NotFound, OutputError, SgldError
from sgld.inputs import opened
from sgld.params import SamplingParams
from sgld.storage.local import LocalStorage

log = logging.getLogger(__name__)
_UPRIGHT = 1
_NAME_CHARACTERS, _FOLDER_CHARACTERS = 40, 16
_UNSAFE = re.compile(r"[^A-Za-z0-9-]+")
MASK = "mask"  # the field of a mask
DECODERS = anyio.CapacityLimiter(2)  # each may hold 4 bytes for each of inputs.MAX_PIXELS


@attrs.frozen
class Picture:
    """A file that decodes to exactly one upright picture."""

    data: bytes = attrs.field(repr=False)
    format: str  # png, jpeg or webp; a gif becomes a png
    width: int  # pixels
    height: int
    name: str  # a harmless piece of what the client called it


async def read_picture(data: bytes, name: str | None, param: str) -> Picture:
    """Decode a png, jpeg, webp or gif completely, and turn it as its EXIF orientation says.

    The client's own bytes are kept where they are one upright picture already; an animation gives its first frame.

    Raises:
        BadRequest: another format, or truncated or damaged.
        TooLarge: more than `inputs.MAX_PIXELS`; told from the header, before anything is decoded.
    """
    return await anyio.to_thread.run_sync(_read, data, safe_name(name), param, limiter=DECODERS)


def safe_name(name: str | None) -> str:
    """The letters and digits of a client's file name, without its folders and extension; `picture` if none are left."""
    stem = PurePosixPath((name or "").replace("\\", "/")).stem
    return _UNSAFE.sub("-", stem)[:_NAME_CHARACTERS].strip("-") or "picture"


def _read(data: bytes, name: str, param: str) -> Picture:
    with opened(io.BytesIO(data), name, param) as image:
        image.load()
        return _upright(image, data, name)


def _upright(image: Image.Image, data: bytes, name: str) -> Picture:
    format = str(image.format).lower().replace("mpo", "jpeg")  # MPO: a JPEG with more behind it
    turned = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) != _UPRIGHT
    if not turned and not getattr(image, "is_animated", False) and format != "gif":
        return Picture(data, format, image.width, image.height, name)
    frame = ImageOps.exif_transpose(image)
    if frame.mode == "CMYK":  # which a png cannot hold
        frame = frame.convert("RGB")
    file = io.BytesIO()
    frame.save(file, "png", compress_level=1, icc_profile=None)
    return Picture(file.getvalue(), "png", frame.width, frame.height, name)


async def keep(picture: Picture, root: Path) -> str:
    """Store a picture under `root`, whole or not at all, and return the name it got.

    The name is random; what the client called it only follows. Raises OutputError, whose reason is in the log.
    """
    name = f"{secrets.token_hex(16)}-{picture.name}.{picture.format}"
    await anyio.to_thread.run_sync(_write, picture.data, root, name)
    return name


def called(path: str) -> str:
    """What the client called a picture that `keep` stored, as far as its name tells."""
    return Path(path).stem.partition("-")[2]


def _write(data: bytes, root: Path, name: str) -> None:
    try:
        with LocalStorage(root).create(name) as part:
            part.write_bytes(data)
    except OutputError as error:
        log.error("an upload is lost: %s", error)
        raise OutputError("the upload cannot be stored; the server's log has the reason") from None


def folder(parent: Path, results: Path | None) -> Path:
    """Where the pictures of one server lie: apart from those of other servers, so that it may sweep them.

    The next server with the same folder of results finds the same one; None: there will be no next one. The path is
    absolute, for jobs that outlive the server name it.
    """
    parent = parent.absolute()
    if results is None:
        return parent / secrets.token_hex(_FOLDER_CHARACTERS // 2)
    return parent / hashlib.sha256(str(results.absolute()).encode()).hexdigest()[:_FOLDER_CHARACTERS]


async def sweep(named: Collection[str], root: Path) -> None:
    """Delete all but the named files: what a server that was killed has left. An empty folder goes too."""
    await anyio.to_thread.run_sync(_sweep, named, root)


def _sweep(named: Collection[str], root: Path) -> None:
    left = [path for path in root.iterdir() if path.name not in named] if root.is_dir() else []
    for path in left:
        try:
            path.unlink()
        except OSError as error:
            log.error("cannot remove %s: %s", path, error.strerror)
    with suppress(OSError):  # it is not there, or holds something
        root.rmdir()


async def remove(names: Iterable[str], root: Path) -> None:
    """Delete what `keep` stored; a name that is gone already is no error."""
    await anyio.to_thread.run_sync(_unlink, list(names), LocalStorage(root))


def _unlink(names: list[str], storage: LocalStorage) -> None:
    for name in names:
        storage.path(name).unlink(missing_ok=True)


def without_paths(error: SgldError, params: SamplingParams) -> SgldError:
    """What is wrong with a file of a request, without saying where this server has it; other errors as they are."""
    files: dict[str, tuple[str, str | None]] = {}  # how its message begins -> how it is told instead, and the field
    for path in params.image_path or []:
        files[f"{inputs.PICTURE}: {path!r}"] = f"the picture {called(path)!r}", None
    files |= {f"{inputs.MASK}: {params.mask_path!r}": (f"{MASK}: it", MASK)}
    files |= {f"loras: {lora.path!r}": (f"loras: {lora.nickname!r}", "loras") for lora in params.loras}
    for begin, (instead, param) in files.items():
        if error.message.startswith(begin):
            rest = error.message.removeprefix(begin)
            if rest.startswith(": no such file"):
                log.error("%s", error)
                return NotFound(f"{instead} is gone from the server; send the request again", param)
            return type(error)(instead + rest, param)
    return error


async def copy(params: SamplingParams, root: Path) -> tuple[dict[str, Any], list[str]]:
    """Copy the pictures of a request: the sampling fields that name the copies, and their names. Raises NotFound."""
    old = [*(params.image_path or []), *([params.mask_path] if params.mask_path is not None else [])]
    new = await anyio.to_thread.run_sync(_copy, [Path(path).name for path in old], root)
    paths = [str(root / name) for name in new]
    count = len(params.image_path or [])
    mask = paths[count] if paths[count:] else None
    return {"image_path": paths[:count] or None, "mask_path": mask}, new


def _copy(names: list[str], root: Path) -> list[str]:
    storage = LocalStorage(root)
    copies = [secrets.token_hex(16) + name[32:] for name in names]  # another random part before the client's
    try:
        for name, made in zip(names, copies, strict=True):
            if not storage.path(name).is_file():
                raise NotFound("the picture that the video was made from is gone", "id")
            with storage.create(made) as part:
                shutil.copyfile(storage.path(name), part)
    except BaseException:
        for made in copies:
            storage.path(made).unlink(missing_ok=True)
        raise
    return copies
