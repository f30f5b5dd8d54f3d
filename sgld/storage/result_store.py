"""The protocol of a store of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol


class ResultStore(Protocol):
    """Files by name. A name is written whole or not at all."""

    async def put(self, name: str, write: Callable[[Path], object]) -> int:
        """Store what `write`, called in a thread, puts at a path, in place of an older file; return its bytes.

        Raises:
            OutputError: the file cannot be stored.
        """

    def open(self, name: str) -> AbstractAsyncContextManager[Path]:
        """Provide a local file to read. Raises NotFound."""

    async def serve(self, name: str) -> Path | str:
        """Return a local file to send, or an address to redirect the client to."""

    async def delete(self, names: Iterable[str]) -> None:
        """Delete files. A missing file is no error; a file that cannot be deleted is logged."""

    async def exists(self, names: Iterable[str], newer_than: str | None = None) -> bool:
        """Return whether all these files exist and, where it is given, none is older than another file."""

    async def sweep(self) -> None:
        """Delete unfinished files that a killed process left behind."""
