"""The journal on real files: what a put promises outlives the process."""

from __future__ import annotations

import asyncio
import logging
import resource
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sgld.errors import OutputError, SgldError
from sgld.params import OutputParams
from sgld.server.jobs.record import JobRecord, from_document, to_document
from sgld.server.jobs.sqlite import Journal

WRITER = """
import asyncio, sys
from pathlib import Path
from sgld.server.jobs.sqlite import Journal

async def main():
    journal = await Journal.open(Path(sys.argv[1]))
    for i in range(1_000_000):
        await journal.put("job", f"job_{i}", {"id": i, "prompt": "x" * 2000})
        print(i, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / ".sgld" / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    opened = await Journal.open(path)
    yield opened
    await opened.close()


async def reopened(journal: Journal, kind: str = "job") -> list[dict[str, Any]]:
    """What a server that starts later finds."""
    await journal.close()
    later = await Journal.open(journal.path)
    found = await later.all(kind)
    await later.close()
    return found


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def make(path: Path, text: str | None = None) -> None:
    """A foreign file where the journal goes; a folder without text."""
    if text is None:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(path: Path) -> bytes:
    return path.read_bytes()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_documents_come_back_in_the_order_of_their_first_put(journal: Journal) -> None:
    for id in ("c", "a", "b"):
        await journal.put("job", id, {"id": id, "status": "queued"})
    await journal.put("upload", "a", {"id": "other"})
    await journal.put("job", "c", {"id": "c", "status": "completed"})
    assert await reopened(journal) == [
        {"id": "c", "status": "completed"},
        {"id": "a", "status": "queued"},
        {"id": "b", "status": "queued"},
    ]


async def test_a_document_deleted_and_put_again_is_a_new_one(journal: Journal) -> None:
    await journal.put_many({("job", id): {"id": id} for id in "abc"})
    await journal.put("upload", "a", {})
    await journal.delete("job", ["a", "b", "never there"])
    await journal.put("job", "a", {"id": "a"})
    assert await journal.all("upload") == [{}]
    assert [body["id"] for body in await reopened(journal)] == ["c", "a"]


async def test_text_of_any_script_and_lone_surrogates(journal: Journal) -> None:
    body = {
        "prompt": 'ein Fuchs 🦊 "im" Schnee\n\0 ქართული 雪 \ud83e',
        "sigmas": [1e-7, 0.1],
        "seed": 2**64,
        "none": None,
    }
    await journal.put("job", "é'; DROP TABLE document", body)
    assert await reopened(journal) == [body]


async def test_a_put_holds_the_body_of_its_call(journal: Journal) -> None:
    body = {"status": "queued"}
    put = asyncio.create_task(journal.put("job", "a", body))
    await asyncio.sleep(0)
    body["status"] = "changed"
    await put
    assert await journal.all("job") == [{"status": "queued"}]


async def test_put_many_writes_all_or_nothing(journal: Journal) -> None:
    await journal.put("job", "a", {"id": "a"})
    with full_disk(64_000), pytest.raises(OutputError):
        await journal.put_many({("job", "a"): {"id": "changed"}, ("other", "b"): {"id": "x" * 1_000_000}})
    assert await journal.all("job") == [{"id": "a"}]


async def test_a_full_disk_fails_one_put_and_not_the_next(journal: Journal) -> None:
    with full_disk(64_000), pytest.raises(OutputError) as caught:
        await journal.put("job", "a", {"prompt": "x" * 1_000_000})
    assert str(journal.path) in caught.value.message and "disk" in caught.value.message
    assert caught.value.param == "output_path"
    await journal.put("job", "b", {"id": "b"})
    assert await reopened(journal) == [{"id": "b"}]


async def test_a_cancelled_put_still_happens(journal: Journal) -> None:
    puts = [asyncio.create_task(journal.put("job", str(i), {"id": i})) for i in range(20)]
    await asyncio.sleep(0)
    for put in puts:
        put.cancel()
    ends = await asyncio.gather(*puts, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    assert [body["id"] for body in await reopened(journal)] == list(range(20))


async def test_a_put_that_fails_unheard_is_logged(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    with full_disk(64_000), caplog.at_level(logging.ERROR):
        put = asyncio.create_task(journal.put("job", "a", {"prompt": "x" * 1_000_000}))
        await asyncio.sleep(0)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put
        assert await journal.all("job") == []  # behind the put
    assert [record.name for record in caplog.records] == ["sgld.server.jobs.sqlite"]
    assert str(journal.path) in caplog.text


async def test_close_waits_for_the_writes_under_way_and_ends_the_rest(journal: Journal) -> None:
    put = asyncio.create_task(journal.put("job", "a", {"id": "a"}))
    await asyncio.sleep(0)
    await journal.close()
    await journal.close()
    await put
    for call in (journal.put("job", "b", {}), journal.all("job"), journal.delete("job", ["a"])):
        with pytest.raises(SgldError, match="closed"):
            await call
    assert await reopened(journal) == [{"id": "a"}]


async def test_of_two_servers_one_gets_the_journal(journal: Journal) -> None:
    with pytest.raises(SgldError) as caught:
        await Journal.open(journal.path)
    assert str(journal.path.parent) in caught.value.message and "--output-path" in caught.value.message
    await journal.put("job", "a", {"id": "a"})  # the first is none the worse
    assert await reopened(journal) == [{"id": "a"}]


async def test_a_cancelled_open_leaves_the_journal_free(path: Path) -> None:
    opening = asyncio.create_task(Journal.open(path))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await (await Journal.open(path)).close()


async def test_a_killed_server_loses_nothing_that_it_was_told_is_kept(path: Path) -> None:
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert writer.stdout is not None
    for _ in range(50):
        assert await writer.stdout.readline()
    with pytest.raises(SgldError, match="another server"):
        await Journal.open(path)
    writer.kill()
    kept = 50 + len((await writer.stdout.read()).splitlines())
    assert await writer.wait() == -9
    journal = await Journal.open(path)
    found = await journal.all("job")
    await journal.close()
    assert len(found) in (kept, kept + 1)  # the last may have been written and not yet told
    assert found == [{"id": i, "prompt": "x" * 2000} for i in range(len(found))]


async def test_a_newer_journal_is_refused_and_left_alone(journal: Journal) -> None:
    await journal.put("job", "a", {"id": "a"})
    await journal.close()
    edit(journal.path, "PRAGMA user_version = 2")
    with pytest.raises(SgldError, match="version 2 and this sgld reads version 1"):
        await Journal.open(journal.path)
    edit(journal.path, "PRAGMA user_version = 1")
    assert await reopened(journal) == [{"id": "a"}]


async def test_a_file_that_is_no_journal_is_refused_and_left_alone(path: Path) -> None:
    make(path, "my shopping list\n" * 100)
    with pytest.raises(SgldError, match="not a journal"):
        await Journal.open(path)
    assert content(path) == b"my shopping list\n" * 100


async def test_the_database_of_another_program_is_refused(path: Path) -> None:
    make(path, "")
    edit(path, "CREATE TABLE bookmark (url TEXT)")
    before = content(path)
    with pytest.raises(SgldError, match="another program"):
        await Journal.open(path)
    assert content(path) == before


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    make(tmp_path / "out", "a file")
    with pytest.raises(OutputError) as caught:
        await Journal.open(tmp_path / "out" / ".sgld" / "journal.db")
    assert str(tmp_path / "out") in caught.value.message


async def test_a_folder_in_the_place_of_the_journal(path: Path) -> None:
    make(path)
    with pytest.raises(OutputError, match="unable to open"):
        await Journal.open(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("'{'", "it is not JSON"),
        ("'[]'", "it is not a JSON object"),
        ("json_remove(body, '$.params')", "it has no 'params'"),
        ("json_remove(body, '$.owner')", "'owner'"),
        ("json_remove(body, '$.params.seed')", "it has no seeds"),
        ("json_set(body, '$.newer', 1)", "it has 'newer', as another version of sgld writes it"),
        ("json_set(body, '$.artifacts', json('[{\"newer\": 1}]'))", "'name'"),
        ("json_set(body, '$.params', 1)", "'int'"),
    ],
)
async def test_a_job_that_cannot_be_read_is_named(journal: Journal, change: str, told: str) -> None:
    made = JobRecord("video_1", "video", "", (OutputParams(seed=1),), "mp4", 1.0)
    await journal.put("job", made.id, to_document(made))
    assert await journal.restore("job", from_document) == [made], "the control"
    edit(journal.path, f"UPDATE document SET body = {change}")
    with pytest.raises(SgldError) as caught:
        await journal.restore("job", from_document)
    message = str(caught.value)
    assert message.startswith(f"the journal {journal.path} holds the job 'video_1', which cannot be read: ")
    assert told in message and "move the journal away" in message and "--ephemeral" in message


async def test_ten_thousand_documents(journal: Journal) -> None:
    bodies = {("job", str(i)): {"id": i, "prompt": "a fox in the snow " * 110} for i in range(10_000)}
    started = time.perf_counter()
    await journal.put_many(bodies)
    written = time.perf_counter()
    found = await journal.all("job")
    loaded = time.perf_counter()
    await journal.put("job", "0", {"id": 0})
    print(
        f"10,000 documents of 2 kB: written in {written - started:.2f} s, loaded in {loaded - written:.2f} s,"
        f" one more put {1000 * (time.perf_counter() - loaded):.1f} ms"
    )
    assert found == list(bodies.values())
