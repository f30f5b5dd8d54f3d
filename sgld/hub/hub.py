"""References to folders: the embedded model, local folders, Hugging Face ids."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Container, Mapping
from importlib.resources import files
from pathlib import Path

import attrs

from sgld.config import user_path
from sgld.errors import BadRequest, ModelError, NotBuilt, SgldError
from sgld.hub import overlay
from sgld.hub.materialize import materialize
from sgld.hub.overlay import BUILT_IN, MANIFEST, Manifest, Overlay
from sgld.messages import Load
from sgld.settings import DEMO_MODEL, Settings, without_secrets

log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
# what is downloaded, by patterns whose `*` takes slashes too; all-in-one checkpoints, which lie in a model's root, and
# variants of weights, such as model.fp16.safetensors, stay out
VARIANTS = "*.*.safetensors"
MODEL_FILES = {
    "allow_patterns": ["*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"],
    "ignore_patterns": [f"*/{VARIANTS}"],
}
COMPONENT_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
    "ignore_patterns": ["*/*", VARIANTS],
}
OVERLAY_FILES = {"allow_patterns": [f"*{suffix}" for suffix in overlay.SUFFIXES]}


def resolve_model(settings: Settings) -> Load:
    """The `Load` command for these settings; downloads what the cache does not hold. Blocks."""
    folder = _model_folder(settings)
    if not (folder / "model_index.json").is_file():
        told = f"{settings.model.model_path!r} is no model: it has no model_index.json; raw files need an overlay"
        raise ModelError(f"{told} (model_overlay_registry)", field="model_path")
    components = {
        name: resolve(reference, None, f"component_paths.{name}", COMPONENT_FILES)
        for name, reference in settings.model.component_paths.items()
    }
    return Load(without_secrets(settings), folder, components)


def _model_folder(settings: Settings) -> Path:
    """Where the model lies; where it has an overlay, or is one, the folder that is made of that and its source."""
    given = overlay.registry(settings.model.model_overlay_registry)
    if (source := overlay.match(settings.model.model_path, given)) is not None:
        return _overlaid(settings, source, given[source])
    folder = _model(settings, settings.model.model_path, settings.model.revision, "model_path")
    is_raw = not (folder / "model_index.json").is_file()
    if is_raw and (source := overlay.match(settings.model.model_path, BUILT_IN)) is not None:
        return _overlaid(settings, source, BUILT_IN[source])
    if not (folder / MANIFEST).is_file():
        return folder
    folder = resolve(settings.model.model_path, settings.model.revision, "model_path", OVERLAY_FILES)
    manifest = overlay.read_manifest(folder)
    if manifest.source_model_id is None:
        raise ModelError(
            f"{folder / MANIFEST}: source_model_id: it is needed, for the overlay itself is the model_path"
        )
    entry = Overlay(settings.model.model_path, settings.model.revision, manifest.source_revision)
    return _materialized(settings, manifest.source_model_id, entry, folder, manifest)


def _overlaid(settings: Settings, source: str, entry: Overlay) -> Path:
    """What the overlay makes of the model path, which means that source; the overlay itself, where it is complete."""
    name, version, no_effect = entry.overlay_repo_id, entry.overlay_revision, "has no effect: the overlay is complete"
    try:
        folder = resolve(name, version, "overlay_repo_id", OVERLAY_FILES, "overlay_revision")
        is_complete = not (folder / MANIFEST).is_file()
        if is_complete and entry.source_revision:
            raise BadRequest(f"source_revision: {entry.source_revision!r} {no_effect}, without a manifest")
        if is_complete and not settings.model.revision:
            log.info("%s is loaded from %s, which is complete", settings.model.model_path, name)
            return _model(settings, name, version, "overlay_repo_id", "overlay_revision")
    except SgldError as error:
        built_in = entry is BUILT_IN.get(source)
        param, told = ("model_path", "the overlay of") if built_in else (overlay.REGISTRY, "entry")
        raise error.renamed(param, f"{told} {source!r}: {error.message}") from None
    if is_complete:
        raise BadRequest(f"{settings.model.revision!r} {no_effect}, without a manifest: {name!r}", field="revision")
    manifest, local = overlay.read_manifest(folder), None
    revision = settings.model.revision or entry.source_revision or manifest.source_revision
    if user_path(settings.model.model_path, "model_path").is_dir():
        local = overlay.snapshot(resolve(settings.model.model_path, settings.model.revision, "model_path"))
        if revision is not None:
            log.warning("source_revision %s is not checked: %s is a local folder", revision, settings.model.model_path)
            revision = None
    return _materialized(settings, source, attrs.evolve(entry, source_revision=revision), folder, manifest, local)


def _materialized(
    settings: Settings, source: str, entry: Overlay, folder: Path, manifest: Manifest, local: Path | None = None
) -> Path:
    """What the overlay in `folder` makes of a source, which is downloaded unless it lies in the folder `local`."""

    def fetch() -> Path:
        patterns = manifest.source_allow_patterns
        wanted = {} if patterns is None else {"allow_patterns": patterns + manifest.required_source_files}
        is_given = source == settings.model.model_path
        param = "model_path" if is_given else "source_model_id"
        named = "revision" if is_given and settings.model.revision else "source_revision"
        return local or download(source, entry.source_revision, param, wanted, named)

    identity = overlay.identity(source, entry, folder, manifest, local)
    return materialize(identity, folder, manifest, settings.model.trust_remote_code, fetch)


def model_files(code: bool) -> dict[str, list[str]]:
    """What is downloaded of a model; its code only where that is trusted."""
    return {**MODEL_FILES, "allow_patterns": [*MODEL_FILES["allow_patterns"], *(["*.py"] if code else [])]}


def _model(settings: Settings, reference: str, revision: str | None, param: str, named: str = "revision") -> Path:
    """What `resolve` gives. Raises NotBuilt before the download of a model whose weights are variants."""
    local = _local(reference, revision, param, named)
    if local is None:
        _refuse_variants(reference, revision, settings.model.component_paths)
    return local or download(reference, revision, param, model_files(settings.model.trust_remote_code), named)


def _refuse_variants(reference: str, revision: str | None, replaced: Container[str]) -> None:
    """Raise NotBuilt for a component that is not replaced, and of whose weights there are variants alone."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, *inside = reference.split("/")
    repository, root = f"{owner}/{name}", "".join(f"{part}/" for part in inside)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        index = overlay.read_object(Path(hf_hub_download(repository, f"{root}model_index.json", revision=revision)))
    except Exception as error:  # the download that follows says what is wrong, or finds the repository in the cache
        log.debug("%s: variants of weights are not looked for: %s", reference, error)
        return
    needed = [key for key, value in index.items() if isinstance(value, list) and any(value[:1]) and key not in replaced]
    for component in needed:
        weights = fnmatch.filter(files, f"{root}{component}/*.safetensors")
        variants = fnmatch.filter(weights, f"{root}{component}/{VARIANTS}")
        if variants and variants == weights:
            told = f"{reference!r} has variants alone of its {component}, such as {variants[0]}"
            raise NotBuilt(f"{told}; they are not built yet in this version of sgld", field="model_variant")


def resolve(
    reference: str,
    revision: str | None,
    param: str,
    wanted: Mapping[str, list[str]] = MODEL_FILES,
    named: str = "revision",
) -> Path:
    """A local folder, or a snapshot of `owner/repository` (with a folder inside it, where one is named).

    Raises:
        BadRequest: a revision, which goes by `named`, of what is no repository.
        ModelError: neither; or the hub cannot be reached and the cache does not hold it.
    """
    return _local(reference, revision, param, named) or download(reference, revision, param, wanted, named)


def _local(reference: str, revision: str | None, param: str, named: str) -> Path | None:
    """A local folder; None for what may be a repository. Raises as `resolve`."""
    local = Path(str(files("sgld.demo"))) if reference == DEMO_MODEL else user_path(reference, param)
    if reference and local.is_dir():
        if revision is not None:
            raise BadRequest(f"{revision!r}: {reference!r} has none, it is no Hugging Face id", field=named)
        return local.resolve()
    if reference and local.exists():
        raise ModelError(f"{reference!r} is a file; a folder or a Hugging Face id is needed", field=param)
    if not _HUB_ID.fullmatch(reference) or ".." in reference:
        raise ModelError(f"no folder {reference!r}, and it is no Hugging Face id (owner/name)", field=param)
    return None


def download(
    reference: str, revision: str | None, param: str, wanted: Mapping[str, list[str]], named: str = "revision"
) -> Path:
    """A snapshot of `owner/repository`, or the folder inside it that is named; `ModelError` as `resolve` says."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    owner, name, *inside = reference.split("/")
    patterns = {kind: ["/".join((*inside, each)) for each in given] for kind, given in wanted.items()}
    try:
        folder = snapshot_download(f"{owner}/{name}", revision=revision, **patterns)
    except RepositoryNotFoundError:
        raise ModelError(f"Hugging Face has no repository {reference!r} that you may read", field=param) from None
    except RevisionNotFoundError:
        raise ModelError(f"{revision!r} is not in {reference!r}", field=named) from None
    except HFValidationError as error:
        raise ModelError(f"no folder {reference!r}, and it is no Hugging Face id: {error}", field=param) from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"{reference!r} is no local folder, not in the cache, and the hub "
            f"cannot be reached ({type(error).__name__})",
            field=param,
        ) from None
    except Exception as error:  # whatever the library's transport raises, which changes with its version
        reason = error.strerror if isinstance(error, OSError) else None
        told = reason or f"{type(error).__name__}: {error}"
        raise ModelError(f"{reference!r} could not be downloaded: {told}", field=param) from error
    return Path(folder, *inside)
