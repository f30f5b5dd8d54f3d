"""Pictures that a request brings: uploads, data: URLs and addresses to fetch, kept for the workers to read."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import attrs

from sgld import inputs
from sgld.convert import shorten
from sgld.errors import BadRequest, NotBuilt
from sgld.params import SamplingParams
from sgld.server.http.body import Body
from sgld.server.http.fetch import Fetcher
from sgld.server.jobs import inputs as uploads
from sgld.server.jobs.inputs import MASK

log = logging.getLogger(__name__)
MAX_PICTURES = 16


@attrs.frozen
class Source:
    """Where a picture comes from: a file of the form, or an address."""

    field: str
    name: str | None
    data: bytes | None
    url: str | None


def find_sources(body: Body, fields: tuple[str, ...]) -> list[Source]:
    """The pictures that these fields name, removed from the body's values. Raises BadRequest for a file elsewhere."""
    sources = [Source(file.field, file.name, file.data, None) for file in body.files if file.field in fields]
    for file in body.files:
        if file.field not in fields:
            raise BadRequest(f"{file.field}: no file is taken here; pictures go into {', '.join(fields)}", file.field)
    for field in fields:
        value = body.values.pop(field, None)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            sources.append(Source(field, None, None, _url(field, item)))
            body.addresses.append(f"{field} {sources[-1].url}")
    if len(sources) > MAX_PICTURES:
        raise BadRequest(f"{sources[0].field}: {len(sources)} pictures; at most {MAX_PICTURES} are taken")
    return sources


def _url(field: str, value: object) -> str:
    if isinstance(value, dict) and set(value) == {"image_url"}:  # as OpenAI's JSON nests it
        value = value["image_url"]
    if not isinstance(value, str):
        raise BadRequest(
            f"{field}: {shorten(value)} is no address; give an http(s) or data: URL, or upload a file", field
        )
    return value


async def keep(sources: list[Source], root: Path, fetcher: Fetcher) -> list[str]:
    """Read, check and store every picture under `root`; their names. None stays when one is refused."""
    names: list[str] = []
    try:
        for source in sources:
            data = source.data
            if data is None:
                assert source.url is not None
                data = await fetcher.read(source.url, param=source.field)
            picture = await uploads.read_picture(data, source.name, source.field)
            names.append(await uploads.keep(picture, root))
    except BaseException:
        await uploads.remove(names, root)
        raise
    return names


@attrs.frozen
class RetainedPictures:
    """The pictures of a request in the folder of uploads."""

    names: list[str] = attrs.field(factory=list)
    sampling: dict[str, Any] = attrs.field(factory=dict)  # the sampling fields that name them
    size: tuple[int, int] | None = None  # width and height of the one that gives the shape


@asynccontextmanager
async def kept(
    sources: list[Source], root: Path, fetcher: Fetcher, shape_from: int = 0
) -> AsyncIterator[RetainedPictures]:
    """Pictures and mask, read, checked and stored; removed again when the body raises."""
    names = await keep(sources, root, fetcher)
    try:
        paths = [(source.field == MASK, str(root / name)) for source, name in zip(sources, names, strict=True)]
        pictures = [path for is_mask, path in paths if not is_mask]
        mask = next((path for is_mask, path in paths if is_mask), None)
        size = await _shape(pictures[shape_from], mask) if pictures else None
        sampling = {inputs.PICTURE: pictures or None, inputs.MASK: mask}
        yield RetainedPictures(names, {name: value for name, value in sampling.items() if value is not None}, size)
    except BaseException:
        await uploads.remove(names, root)
        raise


async def _shape(picture: str, mask: str | None) -> tuple[int, int]:
    return await anyio.to_thread.run_sync(_check, picture, mask, limiter=uploads.DECODERS)


def _check(picture: str, mask: str | None) -> tuple[int, int]:
    """The picture's size. Raises BadRequest for a mask that does not go with it; no path of ours is told."""
    try:
        size = inputs.size_of(picture)
        if mask is not None:
            inputs.read_mask(mask, size)
    except BadRequest as error:
        raise uploads.without_paths(error, SamplingParams(image_path=[picture], mask_path=mask)) from None
    return size


def check(sources: list[Source], takes: int, model: str) -> None:
    """Raise NotBuilt for a model without a use for pictures, BadRequest for more than it takes."""
    if not takes:
        refuse(sources, model)
    pictures = [source for source in sources if source.field != MASK]
    if len(pictures) > takes:
        field = pictures[0].field
        raise BadRequest(f"{field}: {len(pictures)} pictures; {model!r} takes {takes}", field)
    if len(sources) - len(pictures) > 1:
        raise BadRequest(f"{MASK}: {len(sources) - len(pictures)} masks; one is taken", MASK)


def refuse(sources: list[Source], model: str) -> None:
    """For a model without a use for pictures. Raises NotBuilt."""
    if sources:
        raise NotBuilt(f"{sources[0].field}: {model!r} makes pictures from text alone and takes none", sources[0].field)
