"""Verify the pictures that clients send, and store them under names of our own."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import secrets
import shutil
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import anyio
import anyio.to_thread
import attrs
from PIL import ExifTags, Image, ImageOps

from sgld import inputs
from sgld.errors import BadRequest, MissingFile, NotFound, OutputError, SgldError
from sgld.inputs import opened
from sgld.params import SamplingParams
from sgld.storage.local import LocalStorage

log = logging.getLogger(__name__)
_UPRIGHT = 1
_NAME_CHARACTERS, _FOLDER_CHARACTERS = 40, 16
_UNSAFE = re.compile(r"[^A-Za-z0-9-]+")
MASK = "mask"  # the field of a mask
DECODERS = anyio.CapacityLimiter(2)  # each may hold 4 bytes for each of inputs.MAX_PIXELS
Arrival = tuple[str, str | None, bytes]  # field, the client's file name, and content of a picture


@attrs.frozen
class UploadedPicture:
    """A file that decodes to exactly one upright picture."""

    data: bytes = attrs.field(repr=False)
    format: str  # png, jpeg or webp; a gif becomes a png
    width: int  # pixels
    height: int
    name: str  # a harmless piece of what the client called it


async def read_picture(data: bytes, name: str | None, param: str) -> UploadedPicture:
    """Decode a png, jpeg, webp or gif completely, and turn it as its EXIF orientation says.

    The client's bytes stay as they are if they are one upright picture. An animation gives its first frame.

    Raises:
        BadRequest: another format, or truncated or damaged.
        TooLarge: more than `inputs.MAX_PIXELS` by the header, before anything is decoded.
    """
    return await anyio.to_thread.run_sync(_read, data, safe_name(name), param, limiter=DECODERS)


def safe_name(name: str | None) -> str:
    """Return the letters and digits of the stem of a client's file name; `picture` if none are left."""
    stem = PurePosixPath((name or "").replace("\\", "/")).stem
    return _UNSAFE.sub("-", stem)[:_NAME_CHARACTERS].strip("-") or "picture"


def _read(data: bytes, name: str, param: str) -> UploadedPicture:
    with opened(io.BytesIO(data), name, param) as image:
        image.load()
        return _upright(image, data, name)


def _upright(image: Image.Image, data: bytes, name: str) -> UploadedPicture:
    format = str(image.format).lower().replace("mpo", "jpeg")  # MPO: a JPEG with more behind it
    turned = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) != _UPRIGHT
    if not turned and not getattr(image, "is_animated", False) and format != "gif":
        return UploadedPicture(data, format, image.width, image.height, name)
    frame = ImageOps.exif_transpose(image)
    if frame.mode == "CMYK":  # which a png cannot hold
        frame = frame.convert("RGB")
    file = io.BytesIO()
    frame.save(file, "png", compress_level=1, icc_profile=None)
    return UploadedPicture(file.getvalue(), "png", frame.width, frame.height, name)


async def keep(picture: UploadedPicture, root: Path) -> str:
    """Store a picture under `root`, whole or not at all, and return its name: a random part, then the client's.

    Raises OutputError; the log has the reason.
    """
    name = f"{secrets.token_hex(16)}-{picture.name}.{picture.format}"
    await anyio.to_thread.run_sync(_write, picture.data, root, name)
    return name


def called(path: str) -> str:
    """Return the client's part of the name of a stored picture."""
    return Path(path).stem.partition("-")[2]


def _write(data: bytes, root: Path, name: str) -> None:
    try:
        with LocalStorage(root).create(name) as part:
            part.write_bytes(data)
    except OutputError as error:
        log.error("an upload is lost: %s", error)
        raise OutputError("the upload cannot be stored; the server's log has the reason") from None


def folder(parent: Path, results: Path | None) -> Path:
    """Return the absolute path of a server's own folder of pictures, which it may sweep.

    A server with the same folder of results gets the same one. Without results the folder is random.
    """
    parent = parent.absolute()
    if results is None:
        return parent / secrets.token_hex(_FOLDER_CHARACTERS // 2)
    return parent / hashlib.sha256(str(results.absolute()).encode()).hexdigest()[:_FOLDER_CHARACTERS]


async def sweep(named: Collection[str], root: Path) -> None:
    """Delete all files but the named ones, and the folder if it is empty then."""
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
    """Delete stored pictures. A missing file is no error."""
    await anyio.to_thread.run_sync(_unlink, list(names), LocalStorage(root))


def _unlink(names: list[str], storage: LocalStorage) -> None:
    for name in names:
        storage.path(name).unlink(missing_ok=True)


@attrs.frozen
class StoredPictures:
    """The pictures of one request in the folder of uploads."""

    names: list[str]
    sampling: dict[str, Any]  # the sampling fields that name them
    size: tuple[int, int] | None = None  # width and height of the picture that gives the shape


@asynccontextmanager
async def stored(arrivals: AsyncIterable[Arrival], root: Path, shape_from: int) -> AsyncIterator[StoredPictures]:
    """Store pictures and mask one by one, and remove them again if the body raises.

    Raises:
        BadRequest, TooLarge: a picture cannot be read, or a mask does not fit.
        OutputError: a picture cannot be stored.
    """
    names: list[str] = []
    pictures: list[str] = []
    masks: list[str] = []
    try:
        async for field, client_name, data in arrivals:
            names.append(await keep(await read_picture(data, client_name, field), root))
            (masks if field == MASK else pictures).append(str(root / names[-1]))
        mask = masks[0] if masks else None
        size = await measure(pictures[shape_from], mask) if pictures else None
        yield StoredPictures(names, _sampling(pictures, mask), size)
    except BaseException:
        await remove(names, root)
        raise


@asynccontextmanager
async def copied(params: SamplingParams, root: Path) -> AsyncIterator[StoredPictures]:
    """Copy the pictures of another request, and remove the copies again if the body raises.

    Raises:
        NotFound: one of them is gone.
        OutputError: a copy cannot be stored.
    """
    old = [Path(path).name for path in [*(params.image_path or []), params.mask_path] if path is not None]
    new = await anyio.to_thread.run_sync(_copy, old, root)
    count = len(params.image_path or [])
    paths = [str(root / name) for name in new]
    try:
        yield StoredPictures(new, _sampling(paths[:count], paths[count] if paths[count:] else None))
    except BaseException:
        await remove(new, root)
        raise


def _sampling(pictures: list[str], mask: str | None) -> dict[str, Any]:
    fields = {inputs.PICTURE: pictures or None, inputs.MASK: mask}
    return {name: value for name, value in fields.items() if value is not None}


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
        _unlink(copies, storage)
        raise
    return copies


async def measure(picture: str, mask: str | None) -> tuple[int, int]:
    """Return a picture's width and height. Raises BadRequest for a mask that does not fit it."""
    return await anyio.to_thread.run_sync(_measure, picture, mask, limiter=DECODERS)


def _measure(picture: str, mask: str | None) -> tuple[int, int]:
    try:
        size = inputs.size_of(picture)
        if mask is not None:
            inputs.read_mask(mask, size)
    except BadRequest as error:
        raise without_paths(error, SamplingParams(image_path=[picture], mask_path=mask)) from None
    return size


def without_paths(error: SgldError, params: SamplingParams) -> SgldError:
    """Return the error of a request's file without its path on this server, and other errors as they are."""
    labels: dict[str | None, tuple[str | None, str]] = {params.mask_path: (MASK, "it")}
    labels |= {path: (None, f"the picture {called(path)!r}") for path in params.image_path or []}
    labels |= {lora.path: ("loras", repr(lora.nickname)) for lora in params.loras}
    if error.file is None or error.file not in labels:
        return error
    field, label = labels[error.file]
    if isinstance(error, MissingFile):
        log.error("%s", error)
        return NotFound(f"{label} is gone from the server; send the request again", field=field)
    return error.renamed(field, label + error.reason)
