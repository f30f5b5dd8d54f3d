"""References to folders: the embedded model, local folders, Hugging Face ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from sgld.config import DEMO_MODEL, Settings, user_path, without_secrets
from sgld.errors import BadRequest, ModelError
from sgld.messages import Load

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
# what is downloaded, by patterns whose `*` takes slashes too; all-in-one checkpoints lie in a model's root and stay out
MODEL_FILES = {"allow_patterns": ["*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]}
COMPONENT_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
    "ignore_patterns": ["*/*"],
}


def resolve_model(settings: Settings) -> Load:
    """The `Load` command for these settings; downloads what the cache does not hold. Blocks."""
    folder = resolve(settings.model_path, settings.revision, "model_path", model_files(settings.trust_remote_code))
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"model_path: {settings.model_path!r} is no model: it has no model_index.json", "model_path")
    components = {
        name: resolve(reference, None, f"component_paths.{name}", COMPONENT_FILES)
        for name, reference in settings.component_paths.items()
    }
    return Load(without_secrets(settings), folder, components)


def model_files(code: bool) -> dict[str, list[str]]:
    """What is downloaded of a model; its code only where that is trusted."""
    return {"allow_patterns": [*MODEL_FILES["allow_patterns"], *(["*.py"] if code else [])]}


def resolve(reference: str, revision: str | None, param: str, wanted: Mapping[str, list[str]] = MODEL_FILES) -> Path:
    """A local folder, or a snapshot of `owner/repository` (with a folder inside it, where one is named).

    Raises:
        BadRequest: a revision of what is no repository.
        ModelError: neither; or the hub cannot be reached and the cache does not hold it.
    """
    local = Path(str(files("sgld.demo"))) if reference == DEMO_MODEL else user_path(reference, param)
    if reference and local.is_dir():
        if revision is not None:
            raise BadRequest(f"revision: {revision!r}: {reference!r} has none, it is no Hugging Face id", "revision")
        return local.resolve()
    if reference and local.exists():
        raise ModelError(f"{param}: {reference!r} is a file; a folder or a Hugging Face id is needed", param)
    if not _HUB_ID.fullmatch(reference) or ".." in reference:
        raise ModelError(f"{param}: no folder {reference!r}, and it is no Hugging Face id (owner/name)", param)
    return download(reference, revision, param, wanted)


def download(reference: str, revision: str | None, param: str, wanted: Mapping[str, list[str]]) -> Path:
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
    patterns = {"allow_patterns": [f"{'/'.join(inside)}/*"]} if inside else wanted
    try:
        folder = snapshot_download(f"{owner}/{name}", revision=revision, **patterns)
    except RepositoryNotFoundError:
        raise ModelError(f"{param}: Hugging Face has no repository {reference!r} that you may read", param) from None
    except RevisionNotFoundError:
        raise ModelError(f"revision: {revision!r} is not in {reference!r}", "revision") from None
    except HFValidationError as error:
        raise ModelError(f"{param}: no folder {reference!r}, and it is no Hugging Face id: {error}", param) from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"{param}: {reference!r} is no local folder, not in the cache, and the hub "
            f"cannot be reached ({type(error).__name__})",
            param,
        ) from None
    except Exception as error:  # whatever the library's transport raises, which changes with its version
        reason = error.strerror if isinstance(error, OSError) else None
        told = reason or f"{type(error).__name__}: {error}"
        raise ModelError(f"{param}: {reference!r} could not be downloaded: {told}", param) from error
    return Path(folder, *inside)
