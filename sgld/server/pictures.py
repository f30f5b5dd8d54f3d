"""Pictures that a request brings: uploads, data: URLs and addresses to fetch, kept for the workers to read."""

from __future__ import annotations

from pathlib import Path

import attrs

from sgld.convert import shown
from sgld.errors import BadRequest, NotBuilt
from sgld.server import uploads
from sgld.server.body import Body
from sgld.server.fetch import Fetcher

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
    if len(sources) > MAX_PICTURES:
        raise BadRequest(f"{sources[0].field}: {len(sources)} pictures; at most {MAX_PICTURES} are taken")
    return sources


def _url(field: str, value: object) -> str:
    if isinstance(value, dict) and set(value) == {"image_url"}:  # as OpenAI's JSON nests it
        value = value["image_url"]
    if not isinstance(value, str):
        raise BadRequest(f"{field}: {shown(value)} is no address; give an http(s) or data: URL, or upload a file", field)
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


def refuse(sources: list[Source], model: str) -> None:
    """For a model without a use for pictures. Raises NotBuilt."""
    if sources:
        raise NotBuilt(f"{sources[0].field}: {model!r} makes pictures from text alone and takes none", sources[0].field)
