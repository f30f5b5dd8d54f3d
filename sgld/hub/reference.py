"""References to folders: the embedded model, local folders, Hugging Face ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import attrs

from sgld.config import user_path
from sgld.errors import BadRequest, ModelError
from sgld.settings import DEMO_MODEL

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
Patterns = Mapping[str, list[str]]  # allow_patterns and ignore_patterns of files; their `*` matches slashes too


@attrs.frozen
class Reference:
    """A local folder or Hugging Face id (`owner/name`, `owner/name/folder`), and the fields that it came in."""

    name: str
    revision: str | None = None
    param: str = "model_path"
    revision_param: str = "revision"

    @property
    def repository(self) -> tuple[str, str]:
        """Split a Hugging Face id into the repository and the folder inside it, which is empty or ends in `/`."""
        owner, name, *inside = self.name.split("/")
        return f"{owner}/{name}", "".join(f"{part}/" for part in inside)

    def folder(self, wanted: Patterns) -> Path:
        """Return the local folder, or download a snapshot of the repository. Raises as `local` and `download`."""
        return self.local() or self.download(wanted)

    def local(self) -> Path | None:
        """Return the local folder; None for a reference that may be a repository.

        Raises:
            BadRequest: a local folder with a revision.
            ModelError: a file, or neither a folder nor a Hugging Face id.
        """
        path = Path(str(files("sgld.demo"))) if self.name == DEMO_MODEL else user_path(self.name, self.param)
        if self.name and path.is_dir():
            if self.revision is not None:
                reason = f"{self.name!r} has none, it is no Hugging Face id"
                raise BadRequest(f"{self.revision!r}: {reason}", field=self.revision_param)
            return path.resolve()
        if self.name and path.exists():
            raise self._error("is a file; a folder or a Hugging Face id is needed")
        if not _HUB_ID.fullmatch(self.name) or ".." in self.name:
            raise ModelError(f"no folder {self.name!r}, and it is no Hugging Face id (owner/name)", field=self.param)
        return None

    def download(self, wanted: Patterns) -> Path:
        """Download what the cache lacks of the repository, or of the folder inside it. Blocks.

        Raises:
            ModelError: no such repository or revision, or no connection and nothing in the cache.
        """
        from huggingface_hub import errors, snapshot_download

        repository, root = self.repository
        patterns = {kind: [root + each for each in given] for kind, given in wanted.items()}
        try:
            return Path(snapshot_download(repository, revision=self.revision, **patterns), root)
        except errors.RevisionNotFoundError:
            raise ModelError(f"{self.revision!r} is not in {self.name!r}", field=self.revision_param) from None
        except errors.RepositoryNotFoundError:
            text = f"Hugging Face has no repository {self.name!r} that you may read"
            raise ModelError(text, field=self.param) from None
        except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
            reason = "is no local folder, not in the cache, and the hub cannot be reached"
            raise self._error(f"{reason} ({type(error).__name__})") from None
        except Exception as error:  # of the library's transport, whose types change with its version
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            raise self._error(f"could not be downloaded: {reason}") from error

    def _error(self, reason: str) -> ModelError:
        return ModelError(f"{self.name!r} {reason}", field=self.param)
