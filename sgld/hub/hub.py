"""Models by reference: a folder as it is, a snapshot of a repository, or the folder that an overlay describes."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Container
from pathlib import Path

from sgld.errors import BadRequest, ModelError, NotBuilt, SgldError
from sgld.hub import overlay
from sgld.hub.materialize import materialize
from sgld.hub.overlay import BUILT_IN, MANIFEST, Manifest, Overlay
from sgld.hub.reference import Patterns, Reference
from sgld.messages import Load
from sgld.settings import Settings, without_secrets

log = logging.getLogger(__name__)

# These patterns leave out all-in-one checkpoints, which lie in a model's root, and variants of weights.
VARIANTS = "*.*.safetensors"  # such as model.fp16.safetensors
MODEL_FILES: Patterns = {
    "allow_patterns": ["*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"],
    "ignore_patterns": [f"*/{VARIANTS}"],
}
COMPONENT_FILES: Patterns = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
    "ignore_patterns": ["*/*", VARIANTS],
}
OVERLAY_FILES: Patterns = {"allow_patterns": [f"*{suffix}" for suffix in overlay.SUFFIXES]}


def model_files(code: bool) -> Patterns:
    """Return the patterns of a model's files, Python files included only where its `code` is trusted."""
    return {**MODEL_FILES, "allow_patterns": [*MODEL_FILES["allow_patterns"], *(["*.py"] if code else [])]}


def resolve_model(settings: Settings) -> Load:
    """Build the `Load` command for these settings, after downloads. Blocks."""
    folder = _model_folder(settings)
    if not (folder / "model_index.json").is_file():
        reason = f"{settings.model.model_path!r} is no model: it has no model_index.json; raw files need an overlay"
        raise ModelError(f"{reason} (model_overlay_registry)", field="model_path")
    components = {
        name: Reference(text, None, f"component_paths.{name}").folder(COMPONENT_FILES)
        for name, text in settings.model.component_paths.items()
    }
    return Load(without_secrets(settings), folder, components)


def _model_folder(settings: Settings) -> Path:
    """Return the model's folder; materialize it where an overlay describes the model, or is the model path."""
    given = overlay.registry(settings.model.model_overlay_registry)
    if (source := overlay.match(settings.model.model_path, given)) is not None:
        return _apply_overlay(settings, source, given[source])
    reference = Reference(settings.model.model_path, settings.model.revision)
    folder = _download_model(settings, reference)
    is_raw = not (folder / "model_index.json").is_file()
    if is_raw and (source := overlay.match(settings.model.model_path, BUILT_IN)) is not None:
        return _apply_overlay(settings, source, BUILT_IN[source])
    if not (folder / MANIFEST).is_file():
        return folder
    folder = reference.folder(OVERLAY_FILES)
    manifest = overlay.read_manifest(folder)
    if manifest.source_model_id is None:
        reason = "it is needed, for the overlay itself is the model_path"
        raise ModelError(f"{folder / MANIFEST}: source_model_id: {reason}")
    origin = Reference(manifest.source_model_id, manifest.source_revision, "source_model_id", "source_revision")
    return _materialize(settings, origin, reference, folder, manifest)


def _apply_overlay(settings: Settings, source: str, entry: Overlay) -> Path:
    """Materialize a source with its overlay, or return the overlay's own folder where it is a complete model."""
    reference = Reference(entry.overlay_repo_id, entry.overlay_revision, "overlay_repo_id", "overlay_revision")
    no_effect = f"has no effect: the overlay is complete, without a manifest: {reference.name!r}"
    try:
        folder = reference.folder(OVERLAY_FILES)
        is_complete = not (folder / MANIFEST).is_file()
        if is_complete and entry.source_revision:
            raise BadRequest(f"{entry.source_revision!r} {no_effect}", field="source_revision")
        if is_complete and not settings.model.revision:
            log.info("%s is loaded from %s, which is complete", settings.model.model_path, reference.name)
            return _download_model(settings, reference)
    except SgldError as error:
        built_in = entry is BUILT_IN.get(source)
        param, place = ("model_path", "the overlay of") if built_in else (overlay.REGISTRY, "entry")
        raise error.renamed(param, f"{place} {source!r}: {error.message}") from None
    if is_complete:
        raise BadRequest(f"{settings.model.revision!r} {no_effect}", field="revision")
    manifest = overlay.read_manifest(folder)
    revision = settings.model.revision or entry.source_revision or manifest.source_revision
    local = Reference(settings.model.model_path, settings.model.revision).local()
    if local is not None and revision is not None:
        log.warning("source_revision %s is not checked: %s is a local folder", revision, settings.model.model_path)
    revision_param = "revision" if settings.model.revision else "source_revision"
    origin = Reference(source, revision if local is None else None, revision_param=revision_param)
    return _materialize(settings, origin, reference, folder, manifest, local and overlay.snapshot(local))


def _materialize(
    settings: Settings, source: Reference, by: Reference, folder: Path, manifest: Manifest, local: Path | None = None
) -> Path:
    """Materialize a source `by` the overlay in `folder`. Download the source unless it is the folder `local`."""
    patterns = manifest.source_allow_patterns
    wanted = {} if patterns is None else {"allow_patterns": patterns + manifest.required_source_files}
    identity = overlay.identity(source, by, folder, manifest, local)
    trusted = settings.model.trust_remote_code
    return materialize(identity, folder, manifest, trusted, lambda: local or source.download(wanted))


def _download_model(settings: Settings, reference: Reference) -> Path:
    """Return the model's folder. Raise `NotBuilt` before the download of a model whose weights are variants."""
    if (local := reference.local()) is not None:
        return local
    _check_variants(reference, settings.model.component_paths)
    return reference.download(model_files(settings.model.trust_remote_code))


def _check_variants(reference: Reference, replaced: Container[str]) -> None:
    """Raise `NotBuilt` for a component that has variants of its weights only, unless it is replaced."""
    from huggingface_hub import HfApi, hf_hub_download

    repository, root = reference.repository
    try:
        names = HfApi().list_repo_files(repository, revision=reference.revision)
        file = hf_hub_download(repository, f"{root}model_index.json", revision=reference.revision)
        index = overlay.read_object(Path(file))
    except Exception as error:  # the download that follows reports it, or finds the repository in the cache
        log.debug("%s: variants of weights are not looked for: %s", reference.name, error)
        return
    for component, value in index.items():
        is_needed = isinstance(value, list) and any(value[:1]) and component not in replaced
        weights = fnmatch.filter(names, f"{root}{component}/*.safetensors")
        variants = fnmatch.filter(weights, f"{root}{component}/{VARIANTS}")
        if is_needed and variants and variants == weights:
            reason = f"{reference.name!r} has variants alone of its {component}, such as {variants[0]}"
            raise NotBuilt(f"{reason}; they are not built yet in this version of sgld", field="model_variant")
