"""Names as written, whole files or none, nothing overwritten: on a real folder."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Barrier

import pytest

from sgld.errors import BadRequest, NotFound, OutputError
from sgld.storage.local import (
    ABANDONED_S,
    LocalResultStore,
    LocalStorage,
    check_name,
    complete_name,
    default_name,
    indexed,
)
from sgld.storage.result_store import ResultStore

WHEN = datetime(2026, 2, 3, 4, 5, 6)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


def put(storage: LocalStorage, name: str, content: bytes, overwrite: bool = False) -> None:
    with storage.create(name, overwrite) as part:
        part.write_bytes(content)


def listing(storage: LocalStorage) -> list[str]:
    return sorted(path.name for path in storage.root.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "A curious raccoon.mp4",
        "浣熊 🦝.webm",
        "a..b.png",
        "..a",
        "a:b*?\"<>|'.gif",
        " x ",
        "-rf.mp4",
        "x" * 251 + ".mp4",
    ],
)
def test_names_stay_as_written(name: str, storage: LocalStorage) -> None:
    put(storage, name, b"1")
    assert listing(storage) == [name]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (".", "is a folder"),
        ("..", "is a folder"),
        ("../a.mp4", "has a path separator"),
        ("/a.mp4", "has a path separator"),
        ("a\\b.mp4", "has a path separator"),
        ("a\0.mp4", "has a control character"),
        ("a\n.mp4", "has a control character"),
        ("\ud800.mp4", "is not valid Unicode"),
        ("字" * 86, "has 258 bytes"),
    ],
)
def test_names_that_are_no_plain_names_are_refused(name: str, fault: str, storage: LocalStorage) -> None:
    with pytest.raises(BadRequest, match=f"^output_file_name: .* {fault}; give a plain file name") as caught:
        check_name(name)
    assert caught.value.param == "output_file_name"
    assert "\n" not in caught.value.message
    with pytest.raises(BadRequest), storage.create(name):
        pass
    assert not storage.root.exists()


@pytest.mark.parametrize(
    ("name", "extension", "completed"),
    [
        ("A curious raccoon.mp4", "png", "A curious raccoon.mp4"),
        ("Clip.WebM", "mp4", "Clip.WebM"),
        ("clip", "mp4", "clip.mp4"),
        ("clip.v2", "mp4", "clip.v2.mp4"),
        ("Mr. Fox", "png", "Mr. Fox.png"),
        ("clip.npy", "npy", "clip.npy"),
        ("clip", "npy", "clip.npy"),
        ("clip.mp4", "npy", "clip.mp4.npy"),
    ],
)
def test_a_name_keeps_or_gets_its_extension(name: str, extension: str, completed: str) -> None:
    assert complete_name(name, extension) == completed


def test_extensions_of_other_media_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"'a\.AVI': \.avi is not one of mp4, webm, gif, png, jpg, jpeg, webp, npy"):
        complete_name("a.AVI", "mp4")
    with pytest.raises(BadRequest, match="has 257 bytes"):
        complete_name("x" * 253, "mp4")


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A curious raccoon, in a field!", "A_curious_raccoon_in_a_field"),
        ("浣熊 हिन्दी café", "浣熊_हिन्दी_café"),
        ("../../etc/passwd", "etc_passwd"),
        (" .\n", "output"),
        ("", "output"),
        ("\ud800", "output"),
        ("x" * 500, "x" * 80),
    ],
)
def test_default_names(prompt: str, slug: str) -> None:
    assert default_name(prompt, WHEN, 42, "mp4") == f"{slug}_20260203-040506_42.mp4"


def test_default_names_always_fit() -> None:
    for character in ("a", "é", "字", "𠀀"):
        check_name(indexed(default_name(character * 1000, WHEN, 2**63 - 1, "jpeg"), 9, 10))


def test_several_outputs_get_an_index() -> None:
    assert indexed("a b.mp4", 0, 1) == "a b.mp4"
    assert [indexed("a.b.mp4", i, 2) for i in range(2)] == ["a.b_0.mp4", "a.b_1.mp4"]
    with pytest.raises(BadRequest, match="has 257 bytes"):
        indexed("x" * 251 + ".mp4", 0, 2)


def test_an_existing_file_is_kept_unless_told_otherwise(storage: LocalStorage) -> None:
    put(storage, "a.mp4", b"old")
    told = rf"^cannot write {storage.root}/a\.mp4: the file exists; choose another name or give --overwrite$"
    with pytest.raises(OutputError, match=told):
        storage.check(["b.mp4", "a.mp4"])
    with pytest.raises(OutputError, match=told):
        put(storage, "a.mp4", b"new")
    assert (storage.path("a.mp4").read_bytes(), listing(storage)) == (b"old", ["a.mp4"])
    storage.check(["a.mp4"], overwrite=True)
    put(storage, "a.mp4", b"new", overwrite=True)
    assert (storage.path("a.mp4").read_bytes(), listing(storage)) == (b"new", ["a.mp4"])


def test_a_broken_link_counts_as_taken(storage: LocalStorage) -> None:
    storage.check([])
    storage.path("a.mp4").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists"):
        storage.check(["a.mp4"])
    with pytest.raises(OutputError, match="exists"):
        put(storage, "a.mp4", b"1")


def test_a_folder_of_that_name_is_told(storage: LocalStorage) -> None:
    storage.path("a.mp4").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"a\.mp4: it is a folder$"):
            storage.check(["a.mp4"], overwrite)
        with pytest.raises(OutputError, match=r"(?i)a\.mp4: .*(is a folder|is a directory)$"):
            put(storage, "a.mp4", b"1", overwrite)
    assert listing(storage) == ["a.mp4"]


def test_free_names(storage: LocalStorage) -> None:
    for expected in ("a.mp4", "a_2.mp4", "a_3.mp4"):
        assert storage.free_name("a.mp4") == expected
        put(storage, expected, b"1")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(failure: type[BaseException], storage: LocalStorage) -> None:
    put(storage, "a.mp4", b"old")
    for overwrite in (False, True):
        with pytest.raises(failure), storage.create("a.mp4", overwrite) as part:
            part.write_bytes(b"half")
            assert listing(storage) == [part.name, "a.mp4"]
            raise failure
    assert (storage.path("a.mp4").read_bytes(), listing(storage)) == (b"old", ["a.mp4"])


def test_the_name_appears_only_when_the_file_is_whole(storage: LocalStorage) -> None:
    with storage.create("a.mp4") as part:
        part.write_bytes(b"half")
        assert not storage.path("a.mp4").exists()
    assert listing(storage) == ["a.mp4"]


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and one that refuses them, as FAT does."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "no links":
        monkeypatch.setattr(Path, "hardlink_to", refuse)


@pytest.mark.usefixtures("links")
def test_of_two_writers_exactly_one_wins(storage: LocalStorage) -> None:
    def attempt(writer: int, name: str, ready: Barrier) -> int | None:
        with suppress(OutputError):
            with storage.create(name) as part:
                part.write_bytes(bytes([writer]) * 1000)
                ready.wait()
            return writer
        return None

    with ThreadPoolExecutor(4) as pool:
        for i in range(50):
            ready, name = Barrier(4), f"{i}.mp4"
            winners = [w for w in pool.map(lambda w, n=name, r=ready: attempt(w, n, r), range(4)) if w is not None]
            assert len(winners) == 1
            assert storage.path(name).read_bytes() == bytes(winners) * 1000
    assert len(listing(storage)) == 50


@pytest.mark.usefixtures("links")
def test_a_late_rival_is_not_overwritten(storage: LocalStorage) -> None:
    with pytest.raises(OutputError, match="exists"), storage.create("a.mp4") as part:
        part.write_bytes(b"ours")
        storage.path("a.mp4").write_bytes(b"theirs")
    assert (storage.path("a.mp4").read_bytes(), listing(storage)) == (b"theirs", ["a.mp4"])


@pytest.mark.usefixtures("links")
def test_files_get_ordinary_permissions(storage: LocalStorage) -> None:
    put(storage, "a.mp4", b"1")
    umask = os.umask(0)
    os.umask(umask)
    assert storage.path("a.mp4").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_claimed_name_is_given_back(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="not permitted"):
        put(storage, "a.mp4", b"1")
    assert listing(storage) == []


def test_a_file_in_place_of_the_folder_is_told_early(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/out: it is a file, not a folder$") as caught:
        LocalStorage(tmp_path / "out").check(["a.mp4"])
    assert caught.value.param == "output_path"
    with pytest.raises(OutputError, match=r"out/below: Not a directory$"):
        LocalStorage(tmp_path / "out" / "below").check(["a.mp4"])


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write anywhere, so be nobody for a while."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)


def test_a_folder_without_permission_is_told_early(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with ordinary_user(), pytest.raises(OutputError, match=r"^cannot write .*locked: Permission denied$"):
        LocalStorage(folder).check(["a.mp4"])


def test_a_full_disk_is_one_line_and_leaves_nothing(storage: LocalStorage) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel's own refusal, as on a full disk
    try:
        with pytest.raises(OutputError, match=rf"^cannot write {storage.root}/a\.mp4: File too large$"):
            put(storage, "a.mp4", bytes(2000))
        put(storage, "b.mp4", bytes(1000))  # control: what fits is written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(storage) == ["b.mp4"]


# A store of results


async def test_results_are_stored_served_and_deleted(tmp_path: Path) -> None:
    store: ResultStore = LocalResultStore(tmp_path / "out")
    for content in (b"first", b"another"):
        assert await store.put("a.mp4", lambda path, content=content: path.write_bytes(content)) == len(content)
    assert await store.serve("a.mp4") == tmp_path / "out" / "a.mp4"
    async with store.open("a.mp4") as path:
        assert path.read_bytes() == b"another"
    await store.delete(["a.mp4", "never.mp4"])
    with pytest.raises(NotFound, match=r"^a\.mp4: the file has been removed$"):
        async with store.open("a.mp4") as path:
            path.read_bytes()


async def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    store = LocalResultStore(tmp_path)
    await store.put("a.mp4", lambda path: path.write_bytes(b"old"))

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match="No space left on device"):
        await store.put("a.mp4", fail)
    assert (listing(LocalStorage(tmp_path)), (tmp_path / "a.mp4").read_bytes()) == (["a.mp4"], b"old")


async def test_which_results_exist(tmp_path: Path) -> None:
    store = LocalResultStore(tmp_path)
    for name in ("a.mp4", "a.webp"):
        await store.put(name, lambda path: path.write_bytes(b"1"))
    (tmp_path / "folder").mkdir()
    assert await store.exists(["a.mp4", "a.webp"], newer_than="a.mp4")
    assert not await store.exists(["a.mp4", "b.mp4"])
    assert not await store.exists(["folder"])
    os.utime(tmp_path / "a.webp", (1, 1))
    assert not await store.exists(["a.webp"], newer_than="a.mp4")
    assert not await store.exists(["a.webp"], newer_than="gone.mp4")


async def test_a_sweep_removes_what_nobody_finishes(tmp_path: Path) -> None:
    for name, age in (("a.mp4", 2), (".sgld-old.part", 2), (".sgld-new.part", 0.5)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, 2 * (time.time() - age * ABANDONED_S,))
    await LocalResultStore(tmp_path).sweep()
    assert listing(LocalStorage(tmp_path)) == [".sgld-new.part", "a.mp4"]


async def test_a_folder_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalResultStore(tmp_path / "private")
    await store.create_folder()
    assert store.root.stat().st_mode & 0o777 == 0o700
    await store.put("a.mp4", lambda path: path.write_bytes(b"1"))
    await store.delete_folder()
    assert not store.root.exists()
    await store.delete_folder()
    assert f"cannot remove {store.root}: No such file or directory" in caplog.text
