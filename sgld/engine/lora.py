"""LoRA adapters by name: references to files and folders, and the names that were given to them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import anyio.to_thread
import attrs
from cattrs import BaseValidationError, Converter

from sgld.config import Settings, user_path
from sgld.errors import BadRequest, ModelError, SgldError, nearest
from sgld.hub.reference import Reference
from sgld.messages import LoraPart, LoraState
from sgld.params import LoraUse

log = logging.getLogger(__name__)
T = TypeVar("T")
_SEARCHES = anyio.CapacityLimiter(8)  # a hub that does not answer holds up no thread that others need
_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:[:/](?P<file>[\w.-][\w./ -]*))?")
_URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree)/(?P<revision>[\w.-]+)(?:/(?P<file>[\w./ -]+))?)?/?(?:\?.*)?"
)
ADAPTER_FILES = {"allow_patterns": ["*.safetensors", "adapter_config.json"], "ignore_patterns": ["*/*"]}
SUFFIX, PICKLES = ".safetensors", (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEFAULT_NAME = "default"


def resolve_adapter(reference: str, param: str = "lora_path", *, local: bool = True) -> Path:
    """A file or folder: of this machine where `local`, or downloaded from Hugging Face unless the cache holds it.

    Of the hub it takes `owner/name`, `owner/name:file`, `owner/name/file` and the address of a page. Blocks.

    Raises:
        BadRequest: none of these; or no such repository or file; or several files to choose from.
    """
    if local and reference and (path := user_path(reference, param)).exists():
        return path.resolve()
    found = _URL.fullmatch(reference) or _ID.fullmatch(reference)
    if found is None or ".." in PurePosixPath(reference.replace(":", "/")).parts:
        kinds = "it is neither a file or folder nor a" if local else "it is no"
        raise BadRequest(f"{reference!r}: {kinds} Hugging Face id (owner/name or owner/name:file)", field=param)
    parts = found.groupdict()
    try:
        return _download(parts["id"], parts["file"], parts.get("revision"), param)
    except ModelError as error:
        raise BadRequest(error.text, param, field=error.field) from None


def _download(name: str, inside: str | None, revision: str | None, param: str) -> Path:
    """A file or folder of the repository, or all of it."""
    if inside is None:
        _check_single(name, revision, param)
        return Reference(name, revision, param).download(ADAPTER_FILES)
    suffix = PurePosixPath(inside).suffix
    if suffix in PICKLES:
        raise BadRequest(f"{inside!r} is a pickle, which may run code when it is read; only {SUFFIX}", field=param)
    folder = inside if suffix != SUFFIX else str(PurePosixPath(inside).parent)
    files = inside if suffix == SUFFIX else f"{folder}/*{SUFFIX}"
    config = str(PurePosixPath(folder) / "adapter_config.json")
    path = Reference(name, revision, param).download({"allow_patterns": [files, config]}) / inside
    if not path.exists():
        raise BadRequest(f"{name!r} has no {inside!r}", field=param)
    return path


def _check_single(name: str, revision: str | None, param: str) -> None:
    """Raise `BadRequest` for several adapters in the repository's root, or none, before gigabytes are downloaded."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # the download that follows says what is wrong, or finds the repository in the cache
        return
    adapters = [file for file in files if file.endswith(SUFFIX)]
    found = [file for file in adapters if "/" not in file]
    if len(found) == 1:
        return
    if not adapters:
        raise BadRequest(f"{name!r} holds no {SUFFIX} file", field=param)
    several = found or adapters
    shown = ", ".join(several[:5]) + (", ..." if len(several) > 5 else "")
    raise BadRequest(f"{name!r} holds {shown}; name one as {name}:{several[0]}", field=param)


@attrs.frozen
class NamedAdapter:
    """Where the adapter of a nickname lies, and how it was to be read."""

    reference: str  # as it was given
    path: Path
    alpha: float | None = None
    strict: bool = True


@attrs.frozen
class LoraPlan:
    """The adapters of a server, for the next one: what was set, and the names that were given."""

    model: str
    at_start: list[LoraUse]  # by the settings; whoever starts with other ones wants those
    known: dict[str, NamedAdapter]
    state: LoraState

    def record(self) -> dict[str, Any]:
        """As JSON."""
        record: dict[str, Any] = _CONVERTER.unstructure(self)
        return record

    @classmethod
    def restore(cls, record: dict[str, Any], settings: Settings) -> LoraPlan | None:
        """What `record` wrote, unless the settings name another model or other adapters.

        Raises `SgldError` for a record of another version.
        """
        try:
            kept = _CONVERTER.structure(record, cls)
        except (BaseValidationError, SgldError):
            raise SgldError("its form is that of another version of sgld") from None
        if (kept.model, kept.at_start) == (settings.model_path, at_start(settings)):
            return kept
        if kept.state.parts:
            log.warning("the adapters that were set over HTTP are left out: --model-path or --lora-path has changed")
        return None


_CONVERTER = Converter(forbid_extra_keys=True)


class AdapterNames:
    """The nicknames of adapters, kept on the loop. A reference is sought once; only `give` names anything."""

    def __init__(self) -> None:
        self.known: dict[str, NamedAdapter] = {}
        self._found: dict[tuple[str, bool], Path] = {}

    async def resolve(self, loras: Sequence[LoraUse], param: str, *, local: bool) -> list[LoraUse]:
        """The same, each with the path of its file or folder; `local`: paths of this machine are taken too.

        Raises:
            BadRequest: a nickname that nobody gave, or as `resolve_adapter` does.
        """
        return [await self._resolve(lora, param, local) for lora in loras]

    async def _resolve(self, lora: LoraUse, param: str, local: bool) -> LoraUse:
        if lora.path is not None:
            path = await self._find(lora.path, param, local)
            return attrs.evolve(lora, nickname=lora.nickname or lora.path, path=str(path))
        assert lora.nickname is not None
        if lora.nickname not in self.known:
            names = ", ".join(sorted(self.known)) or "none"
            hint = nearest(lora.nickname, self.known) or f"; known: {names}"
            raise BadRequest(f"no adapter is called {lora.nickname!r}{hint}", field=param)
        known = await self._known(lora.nickname)
        alpha = known.alpha if lora.alpha is None else lora.alpha
        return attrs.evolve(lora, path=str(known.path), alpha=alpha, strict=lora.strict and known.strict)

    async def _known(self, nickname: str) -> NamedAdapter:
        """What a nickname stands for; a file that has gone is sought anew, for it may have been a download."""
        known = self.known[nickname]
        if not await anyio.Path(known.path).exists():
            try:
                path = await self._find(known.reference, "lora_path", local=True)
            except BadRequest as error:  # whoever reads the file will say that it is not there
                log.warning("the adapter %r has gone: %s", nickname, error)
            else:
                known = self.known[nickname] = attrs.evolve(known, path=path)
        return known

    async def sought_again(self, state: LoraState) -> LoraState:
        """The same, with files that have gone sought anew by their nicknames."""
        names = {lora.nickname for part in state.parts.values() for lora in part.loras}
        known = {name: each for name, each in self.known.items() if name in names}
        now = {str(each.path): str((await self._known(name)).path) for name, each in known.items()}

        def present(part: LoraPart) -> LoraPart:
            loras = [attrs.evolve(lora, path=now.get(lora.path or "", lora.path)) for lora in part.loras]
            return attrs.evolve(part, loras=tuple(loras))

        return LoraState({name: present(part) for name, part in state.parts.items()})

    async def _find(self, reference: str, param: str, local: bool) -> Path:
        path = self._found.get((reference, local))
        if path is None or not await anyio.Path(path).exists():
            find = partial(resolve_adapter, reference, param, local=local)
            path = self._found[reference, local] = await anyio.to_thread.run_sync(find, limiter=_SEARCHES)
        return path

    def register(self, given: Sequence[LoraUse], resolved: Sequence[LoraUse]) -> None:
        """From now on these nicknames stand for what they were found to be."""
        for asked, found in zip(given, resolved, strict=True):
            if asked.path is not None and found.nickname is not None and found.path is not None:
                self.known[found.nickname] = NamedAdapter(asked.path, Path(found.path), asked.alpha, asked.strict)


def at_start(settings: Settings) -> list[LoraUse]:
    """The adapters that the settings name; their lists are of one length (see `config.settings_of`)."""
    paths = settings.lora_path or []
    names = settings.lora_nickname or [
        DEFAULT_NAME if i == 1 else f"{DEFAULT_NAME}_{i}" for i in range(1, len(paths) + 1)
    ]
    strengths, targets = _each(settings.lora_scale, len(paths), 1.0), _each(settings.lora_target, len(paths), "all")
    return [
        LoraUse(nickname=name, path=path, strength=strength, target=target)
        for path, name, strength, target in zip(paths, names, strengths, targets, strict=True)
    ]


def _each(values: list[T] | None, count: int, default: T) -> list[T]:
    """One value for each adapter: a single one is everybody's."""
    given = values or [default]
    return given * count if len(given) == 1 else given
