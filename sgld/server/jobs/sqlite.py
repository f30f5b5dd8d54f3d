"""Journal: JSON documents that survive the server, in SQLite on a thread of its own."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sgld.errors import OutputError, SgldError

log = logging.getLogger(__name__)
T = TypeVar("T")

VERSION = 1
_CACHE_KIB = 64  # a document is written and forgotten: pages are read again at the next start alone
_APPLICATION = int.from_bytes(b"sgld", "big")
_EMPTY, _OURS = (0, 0), (_APPLICATION, VERSION)
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_SCHEMA = (
    "CREATE TABLE document ("
    " sequence INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL,"
    " UNIQUE (kind, id))",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
_PUT = (
    "INSERT INTO document (kind, id, body) VALUES (?, ?, ?) ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body"
)


class Journal:
    """Documents by kind and id. Calls take effect in the order they are made, each in one transaction.

    A write that has been called for happens, even if its caller is cancelled. Raises `OutputError` where the disk
    fails, and `SgldError` once the journal is closed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.closed = False
        self._thread = ThreadPoolExecutor(1, "sgld-journal")
        self._resources = ExitStack()  # this and the connection are touched on the thread alone
        self._connection: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path) -> Journal:
        """Open the journal at `path`, or make it, for this server alone until it is closed or killed.

        Raises:
            OutputError: the folder or the file cannot be written.
            SgldError: another server has it, a newer sgld wrote it, or it is no journal.
        """
        journal = cls(path)
        try:
            await journal._run(journal._open)
        except BaseException:
            await journal.close()
            raise
        return journal

    async def put(self, kind: str, id: str, body: Mapping[str, object]) -> None:
        """Add or replace one document; it is on the disk when this returns, and keeps its place in `all`."""
        await self.put_many({(kind, id): body})

    async def put_many(self, documents: Mapping[tuple[str, str], Mapping[str, object]]) -> None:
        """Add or replace several documents, by kind and id: all of them or none."""
        rows = [(*key, json.dumps(body)) for key, body in documents.items()]  # now, for the caller may change them
        await self._run(self._write, _PUT, rows)

    async def delete(self, kind: str, ids: Iterable[str]) -> None:
        """Remove documents; one that is not there is no error."""
        await self._run(self._write, "DELETE FROM document WHERE kind = ? AND id = ?", [(kind, id) for id in ids])

    async def all(self, kind: str) -> list[dict[str, Any]]:
        """Return the documents of a kind, the first added first. Raises SgldError for one that is not a JSON object."""
        return await self._run(self._read, kind)

    async def restore(self, kind: str, make: Callable[[dict[str, Any]], T]) -> list[T]:
        """Return the documents of a kind converted by `make`. Raises SgldError that names an unreadable one."""
        return [self._made(kind, make, record) for record in await self.all(kind)]

    def _made(self, kind: str, make: Callable[[dict[str, Any]], T], record: dict[str, Any]) -> T:
        try:
            return make(record)
        except KeyError as error:
            reason = f"it has no {error}"
        except (SgldError, TypeError, ValueError, AttributeError) as error:
            reason = str(error)
        raise _unreadable(self.path, kind, record.get("id", kind), reason)

    async def close(self) -> None:
        """Wait for the writes under way and release the file. Calls after the first do nothing."""
        if not self.closed:
            await asyncio.shield(self._shut())

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        if self.closed:
            raise SgldError(f"the journal {self.path} is closed")
        future = self._submit(function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_log_failure)
            raise

    def _submit(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _shut(self) -> asyncio.Future[None]:
        self.closed = True
        future = self._submit(self._resources.close)
        self._thread.shutdown(wait=False)  # joining it would block the loop
        return future

    def _open(self) -> None:
        with _map_os_errors(self.path):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are nobody else's
            self._lock()
            self._connection = sqlite3.connect(self.path)
            self._resources.callback(self._connection.close)
            self._check()
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit outlives a power failure

    def _lock(self) -> None:
        """Lock the file beside the journal. The system unlocks it when this process ends, however it ends."""
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self._resources.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SgldError(
                f"another server keeps its jobs in {self.path.parent}; stop it, or give this one another"
                " --output-path or --ephemeral",
                "output_path",
            ) from None

    def _check(self) -> None:
        """Make the table in an empty file. Refuse the file of another program or version."""
        mark = (self._pragma("application_id"), self._pragma("user_version"))
        if mark == _EMPTY and self._pragma("schema_version") == 0:
            self._create()
        elif mark[0] != _APPLICATION:
            raise _not_ours(self.path, "it is a database of another program")
        elif mark != _OURS:
            raise SgldError(
                f"the journal {self.path} has version {mark[1]} and this sgld reads version {VERSION}; run the sgld"
                " that wrote it, or give another --output-path",
                "output_path",
            )

    def _pragma(self, name: str) -> int:
        value: int = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def _create(self) -> None:
        with self._connection:
            self._connection.execute("BEGIN")
            for statement in _SCHEMA:
                self._connection.execute(statement)

    def _write(self, statement: str, rows: list[tuple[str, ...]]) -> None:
        with _map_os_errors(self.path), self._connection:
            self._connection.executemany(statement, rows)

    def _read(self, kind: str) -> list[dict[str, Any]]:
        with _map_os_errors(self.path):
            rows = self._connection.execute("SELECT id, body FROM document WHERE kind = ? ORDER BY sequence", (kind,))
            return [_parse(self.path, kind, id, body) for id, body in rows]


@contextmanager
def _map_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot use the journal {path}: {error.strerror or error}", "output_path") from error
    except sqlite3.OperationalError as error:
        raise OutputError(f"cannot use the journal {path}: {error}", "output_path") from error
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode not in _DAMAGED:
            raise
        raise _not_ours(path, str(error)) from error


def _parse(path: Path, kind: str, id: str, body: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError as error:
        raise _unreadable(path, kind, id, f"it is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise _unreadable(path, kind, id, "it is not a JSON object")
    return document


def _unreadable(path: Path, kind: str, id: str, reason: str) -> SgldError:
    return SgldError(
        f"the journal {path} holds the {kind} {id!r}, which cannot be read: {reason}; move the journal away, give"
        " another --output-path, or give --ephemeral to do without a journal",
        "output_path",
    )


def _not_ours(path: Path, reason: str) -> SgldError:
    return SgldError(
        f"{path} is not a journal of sgld, or is damaged: {reason}; move it away, or give another --output-path",
        "output_path",
    )


def _log_failure(future: asyncio.Future[Any]) -> None:
    """Log the failure of a call that nobody waits for any more."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("%s", error)
