"""The pictures of a request: uploads of a form, data: URLs, and addresses to fetch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import attrs

from sgld.convert import shorten
from sgld.errors import BadRequest, NotBuilt
from sgld.server.http.body import Body
from sgld.server.http.fetch import Fetcher

MAX_PICTURES = 16
MASK = "mask"  # the field of a mask


@attrs.frozen
class PictureSource:
    """Where a picture comes from: a file of the form, or an address."""

    field: str
    name: str | None
    data: bytes | None
    url: str | None


def find_sources(body: Body, fields: Sequence[str]) -> list[PictureSource]:
    """Remove the pictures of these fields from the body's values. Raises BadRequest for a file in another field."""
    sources = [PictureSource(file.field, file.name, file.data, None) for file in body.files if file.field in fields]
    for file in body.files:
        if file.field not in fields:
            taken = f"pictures go into {', '.join(fields)}"
            raise BadRequest(f"no file is taken here; {taken}", field=file.field)
    for field in fields:
        value = body.values.pop(field, None)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            sources.append(PictureSource(field, None, None, _url(field, item)))
            body.addresses.append(f"{field} {sources[-1].url}")
    if len(sources) > MAX_PICTURES:
        raise BadRequest(f"{sources[0].field}: {len(sources)} pictures; at most {MAX_PICTURES} are taken")
    return sources


def _url(field: str, value: object) -> str:
    if isinstance(value, dict) and set(value) == {"image_url"}:  # as OpenAI's JSON nests it
        value = value["image_url"]
    if not isinstance(value, str):
        raise BadRequest(f"{shorten(value)} is no address; give an http(s) or data: URL, or upload a file", field=field)
    return value


def check_sources(sources: Sequence[PictureSource], most: int, model: str) -> None:
    """Refuse more pictures than the model takes. Raises NotBuilt if it takes none, else BadRequest."""
    if sources and not most:
        raise NotBuilt(f"{model!r} makes pictures from text alone and takes none", field=sources[0].field)
    pictures = [source for source in sources if source.field != MASK]
    if len(pictures) > most:
        raise BadRequest(f"{len(pictures)} pictures; {model!r} takes {most}", field=pictures[0].field)
    if len(sources) - len(pictures) > 1:
        raise BadRequest(f"{len(sources) - len(pictures)} masks; one is taken", field=MASK)


async def read_sources(
    sources: Sequence[PictureSource], fetcher: Fetcher
) -> AsyncIterator[tuple[str, str | None, bytes]]:
    """Yield field, client's file name and bytes of each picture. Addresses are fetched one after the other."""
    for source in sources:
        data = source.data
        if data is None:
            assert source.url is not None
            data = await fetcher.read(source.url, param=source.field)
        yield source.field, source.name, data
