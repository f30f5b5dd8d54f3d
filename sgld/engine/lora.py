"""LoRA adapters: references to files and folders, nicknames, and the plan of what the model holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import anyio.to_thread
import attrs
from cattrs import BaseValidationError, Converter

from sgld.config import user_path
from sgld.engine.group import WorkerGroup
from sgld.errors import BadRequest, ModelError, SgldError, nearest
from sgld.hub.reference import Reference
from sgld.messages import Command, LoraCommand, LoraPart, LoraState, MergeMode, SetLora, UnmergeLora
from sgld.params import LoraUse
from sgld.settings import Settings

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
    """Find the file or folder of an adapter on this machine, if `local`, or download it from Hugging Face. Blocks.

    References to the hub are `owner/name`, `owner/name:file`, `owner/name/file` and the address of a page. A file in
    the hub's cache is not downloaded again.

    Raises:
        BadRequest: another kind of reference, no such repository or file, or several files to choose from.
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
    """Download a file or folder of a repository, or all of it."""
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
    """The adapter that a nickname stands for, and how to read it."""

    reference: str  # as the client wrote it
    path: Path
    alpha: float | None = None
    strict: bool = True


@attrs.frozen
class LoraPlan:
    """The adapters of an engine as a document that the next server restores."""

    model: str
    at_start: list[LoraUse]  # of the settings: a server started with others ignores this plan
    known: dict[str, NamedAdapter]  # by nickname
    state: LoraState

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        record: dict[str, Any] = _CONVERTER.unstructure(self)
        return record

    @classmethod
    def restore(cls, record: dict[str, Any], settings: Settings) -> LoraPlan | None:
        """Read what `record` wrote. Return None when the settings name another model or other adapters.

        Raises `SgldError` for a record of another version.
        """
        try:
            plan = _CONVERTER.structure(record, cls)
        except (BaseValidationError, SgldError):
            raise SgldError("its form is that of another version of sgld") from None
        if (plan.model, plan.at_start) == (settings.model.model_path, at_start(settings)):
            return plan
        if plan.state.parts:
            log.warning("the adapters that were set over HTTP are left out: --model-path or --lora-path has changed")
        return None


_CONVERTER = Converter(forbid_extra_keys=True)


class LoraRegistry:
    """The one owner of an engine's adapters: their nicknames, and what each component of the model holds.

    Nicknames are registered on the loop. `state` is frozen, and replaced on the executor thread as ranks carry out a
    change. Ranks hold no plan of their own: new ones get `commands()`.
    """

    def __init__(self, settings: Settings) -> None:
        self.known: dict[str, NamedAdapter] = {}
        self.state = LoraState()
        self.restored = False  # from the plan of an earlier server
        self._settings = settings
        self._save: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        self._found: dict[tuple[str, bool], Path] = {}

    # ------------------------------------------------------------------------------------------- what ranks hold

    def persist(self, plan: LoraPlan | None, save: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Start from `plan`, the last one that was saved, and save every later one. Call it before the model loads."""
        self._save = save
        if plan is not None:
            self.known, self.state, self.restored = dict(plan.known), plan.state, True

    async def save(self) -> None:
        """Save the present plan."""
        if self._save is not None:
            plan = LoraPlan(self._settings.model.model_path, at_start(self._settings), dict(self.known), self.state)
            await self._save(plan.record())

    def commands(self) -> dict[str, Command]:
        """Return the command that gives new ranks the adapters of each component."""
        parts = self.state.parts.items()
        return {name: SetLora(part.loras, part.merge_mode) for name, part in parts if part.applied is not None}

    def merging(self, target: str, strength: float) -> list[LoraCommand]:
        """Return the commands that apply the adapters last set for `target` again, with another strength.

        Raises `BadRequest` when none were set.
        """
        by_mode: dict[MergeMode, list[LoraUse]] = {}
        for part in self._parts(target).values():
            by_mode.setdefault(part.merge_mode, []).extend(attrs.evolve(lora, strength=strength) for lora in part.loras)
        if not by_mode:
            raise BadRequest(f"no adapter was set for {target!r}; set one first", field="target")
        return [SetLora(tuple(loras), mode) for mode, loras in by_mode.items()]

    def apply(self, commands: Sequence[LoraCommand], group: WorkerGroup) -> None:
        """Carry out each command, and note what it changed for new ranks. Runs on the executor thread."""
        for command in commands:
            changed: dict[str, LoraPart] = group.run(command).parts
            if isinstance(command, UnmergeLora):
                changed = {name: attrs.evolve(part, applied=None) for name, part in self._parts(command.target).items()}
            self.state = LoraState({**self.state.parts, **changed})
            group.set_replay(self.commands(), changed)

    def replay(self, group: WorkerGroup) -> list[BadRequest]:
        """Give the ranks all adapters of the state. Return the errors of those that fail."""
        group.set_replay(self.commands())
        return group.catch_up()

    def _parts(self, target: str) -> dict[str, LoraPart]:
        return {name: part for name, part in self.state.parts.items() if target in ("all", name)}

    # ---------------------------------------------------------------------------------------------- names and files

    def register(self, requested: Sequence[LoraUse], resolved: Sequence[LoraUse]) -> None:
        """Let the nicknames of the requested adapters stand for the resolved ones."""
        for asked, found in zip(requested, resolved, strict=True):
            if asked.path is not None and found.nickname is not None and found.path is not None:
                self.known[found.nickname] = NamedAdapter(asked.path, Path(found.path), asked.alpha, asked.strict)

    async def resolve(self, loras: Sequence[LoraUse], param: str, *, local: bool) -> list[LoraUse]:
        """Return the adapters with the path of a file or folder each. `local` admits paths of this machine.

        Raises:
            BadRequest: an unknown nickname, or as `resolve_adapter` does.
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
        known = await self._present(lora.nickname)
        alpha = known.alpha if lora.alpha is None else lora.alpha
        return attrs.evolve(lora, path=str(known.path), alpha=alpha, strict=lora.strict and known.strict)

    async def _present(self, nickname: str) -> NamedAdapter:
        """Return a named adapter. Look its reference up again when the file is gone: it may have been a download."""
        known = self.known[nickname]
        if not await anyio.Path(known.path).exists():
            try:
                path = await self._find(known.reference, "lora_path", local=True)
            except BadRequest as error:  # whoever reads the file reports that it is missing
                log.warning("the adapter %r has gone: %s", nickname, error)
            else:
                known = self.known[nickname] = attrs.evolve(known, path=path)
        return known

    async def refind(self) -> None:
        """Look up the files of the state again that are gone, by their nicknames."""
        used = {lora.nickname for part in self.state.parts.values() for lora in part.loras}
        before = {name: str(known.path) for name, known in self.known.items() if name in used}
        moved = {old: str((await self._present(name)).path) for name, old in before.items()}

        def present(part: LoraPart) -> LoraPart:
            loras = [attrs.evolve(lora, path=moved.get(lora.path or "", lora.path)) for lora in part.loras]
            return attrs.evolve(part, loras=tuple(loras))

        self.state = LoraState({name: present(part) for name, part in self.state.parts.items()})

    async def _find(self, reference: str, param: str, local: bool) -> Path:
        path = self._found.get((reference, local))
        if path is None or not await anyio.Path(path).exists():
            find = partial(resolve_adapter, reference, param, local=local)
            path = self._found[reference, local] = await anyio.to_thread.run_sync(find, limiter=_SEARCHES)
        return path


def at_start(settings: Settings) -> list[LoraUse]:
    """Return the adapters that the settings name. Their lists have one length (see `config.settings_of`)."""
    paths = settings.lora.lora_path or []
    names = settings.lora.lora_nickname or [
        DEFAULT_NAME if i == 1 else f"{DEFAULT_NAME}_{i}" for i in range(1, len(paths) + 1)
    ]
    strengths, targets = (
        _each(settings.lora.lora_scale, len(paths), 1.0),
        _each(settings.lora.lora_target, len(paths), "all"),
    )
    return [
        LoraUse(nickname=name, path=path, strength=strength, target=target)
        for path, name, strength, target in zip(paths, names, strengths, targets, strict=True)
    ]


def _each(values: list[T] | None, count: int, default: T) -> list[T]:
    """Return one value for each adapter. A single value holds for all."""
    found = values or [default]
    return found * count if len(found) == 1 else found
