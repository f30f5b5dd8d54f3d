"""The real server, killed, stopped and started again: what it keeps, and what it says."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import openai
import psutil
import pytest
from PIL import Image

from tests.processes import ranks_of
from tests.server.test_server import Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a red circle moving right on a blue background"
LONG, ENDLESS = 60, 1000  # steps: seconds, and more than any test waits for
DENOISING = 6  # percent: the workers have it, and its first step is done
KEY = "correct-horse-battery-staple"
Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server that is ready, on one and the same output folder."""
    servers: list[Server] = []

    def run(*flags: str) -> Server:
        servers.append(Server(tmp_path / "out", "--warmup", "off", *flags))
        servers[-1].wait_until_healthy()
        return servers[-1]

    yield run
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)
        server.client.close()


def create(server: Server, steps: int = 2, **fields: Any) -> Any:
    body = {"num_inference_steps": steps, "num_frames": 5, **fields}
    return server.client.videos.create(prompt=PROMPT, extra_body=body)


def until(server: Server, video: Any, reached: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 90
    while not reached(video):
        assert time.monotonic() < deadline, video
        time.sleep(0.02)
        video = server.client.videos.retrieve(video.id)
    return video


def ended(video: Any) -> bool:
    return video.status in ("completed", "failed")


def under_way(video: Any) -> bool:
    return video.status == "in_progress" and video.progress >= DENOISING


def download(server: Server, video: Any) -> bytes:
    return server.client.videos.download_content(video.id).content


def listed(server: Server) -> list[Any]:
    return list(server.client.videos.list(order="asc"))


def family(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still live after a while."""
    return psutil.wait_procs(processes, timeout=15)[1]


def kill(server: Server) -> None:
    """SIGKILL to the server alone: its workers must hear of it by themselves."""
    workers = family(server)
    assert workers
    server.process.kill()
    server.process.wait(10)
    assert left(workers) == []


def test_jobs_and_results_outlive_a_killed_server(start: Start) -> None:
    first = start()
    done = until(first, create(first, n=2), ended)
    clip = download(first, done)
    small = first.client.videos.download_content(done.id, variant="thumbnail").content
    made = first.client.images.generate(
        prompt=PROMPT, response_format="url", extra_body={"num_inference_steps": 2, "seed": 3}
    )
    assert made.data is not None and made.data[0].url is not None
    address = made.data[0].url
    picture = urllib.request.urlopen(address, timeout=10).read()
    deleted = until(first, create(first), ended)
    assert first.client.videos.delete(deleted.id).deleted
    running, *waiting = create(first, LONG, seed=11), create(first, seed=12), create(first, seed=13)
    unwanted = create(first)
    assert first.client.videos.delete(unwanted.id).deleted
    until(first, running, under_way)
    kill(first)

    second = start()
    jobs = listed(second)
    assert [job.id for job in jobs] == [done.id, running.id, *(job.id for job in waiting)]
    assert [job.seeds for job in jobs[1:]] == [[11], [12], [13]]
    assert download(second, done) == clip
    assert (second.folder / f"{done.id}_0.thumbnail.webp").read_bytes() == small
    for last in ("0", "7000"):  # of the server before this one, or of none
        asked = urllib.request.Request(f"{second.url}/v1/videos/{done.id}/events", headers={"Last-Event-ID": last})
        with urllib.request.urlopen(asked, timeout=10) as told:
            number, event, _ = told.read().split(b"\n", 2)
        assert event == b"event: completed"
    asked.add_header("Last-Event-ID", number.decode().removeprefix("id: "))
    with urllib.request.urlopen(asked, timeout=10) as told:
        assert told.status == 204, "it has seen that already"
    assert jobs[0].model_dump(exclude={"url", "urls"}) == done.model_dump(exclude={"url", "urls"})
    assert urllib.request.urlopen(address.replace(first.url, second.url), timeout=10).read() == picture
    while not all(map(ended, jobs)):
        finished = [ended(job) for job in jobs]
        assert finished == sorted(finished, reverse=True), "they end in the order of their arrival"
        time.sleep(0.02)
        jobs = listed(second)
    assert [job.status for job in jobs] == ["completed"] * 4
    assert all(download(second, job)[4:8] == b"ftyp" for job in jobs)
    for gone in (deleted, unwanted):
        with pytest.raises(openai.NotFoundError):
            second.client.videos.retrieve(gone.id)
    assert second.stop() == 0


def test_a_job_whose_server_is_killed_twice_fails(start: Start) -> None:
    server = start()
    fatal, other = create(server, ENDLESS), create(server)
    for _ in range(2):
        until(server, fatal, under_way)
        assert server.client.videos.retrieve(other.id).status == "queued"
        kill(server)
        server = start()
    failed = server.client.videos.retrieve(fatal.id)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "worker_died" and "killed 2 times" in failed.error.message
    assert until(server, other, ended).status == "completed"
    kill(server)
    server = start()
    assert [job.status for job in listed(server)] == ["failed", "completed"], "an end is an end"


def test_a_journal_of_another_model_is_not_made_with_this_one(start: Start) -> None:
    first = start("--served-model-name", "painter")
    done, running = until(first, create(first), ended), create(first, ENDLESS)
    until(first, running, under_way)
    kill(first)
    second = start()
    failed = second.client.videos.retrieve(running.id)
    assert failed.error is not None and failed.error.code == "model_error"
    assert "'painter'" in failed.error.message and "'sgld/demo'" in failed.error.message
    assert download(second, done)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and ".sgld" not in path.parent.name}


def test_what_a_killed_server_left_is_removed(start: Start, tmp_path: Path) -> None:
    """Uploads and files that no job names, be they half-written, and outputs of a picture whose client has gone."""
    uploads, out = tmp_path / "uploads", tmp_path / "out"
    flags = ("--input-save-path", str(uploads))
    first = start(*flags)
    deleted = until(first, create(first), ended)
    first.client.videos.download_content(deleted.id, variant="spritesheet")

    def wait_for_pictures() -> None:
        with pytest.raises(openai.APIConnectionError):
            first.client.images.generate(prompt=PROMPT, n=2, extra_body={"num_inference_steps": LONG})

    client = threading.Thread(target=wait_for_pictures)
    client.start()
    while not list(out.glob("image_*_0.png")):
        time.sleep(0.02)
    picture = next(out.glob("image_*_0.png")).read_bytes()
    waiting = first.client.videos.create(
        prompt=PROMPT, input_reference=("mine.png", picture, "image/png"), extra_body={"num_frames": 5}
    )
    kill(first)
    client.join()
    (kept,) = files(uploads)
    (folder,) = uploads.iterdir()
    (uploads / "holiday.png").write_bytes(picture)  # not ours
    for name in (f"{'0' * 32}-cut-off.png", ".sgld-0123.part"):
        (folder / name).touch()
    for name, age_s in ((".sgld-old.part", 7200), (".sgld-new.part", 0)):
        (out / name).touch()
        os.utime(out / name, (time.time() - age_s,) * 2)
    with closing(sqlite3.connect(out / ".sgld" / "journal.db")) as journal, journal:  # as a killed DELETE leaves it
        journal.execute("UPDATE document SET body = json_set(body, '$.status', 'deleted') WHERE id = ?", [deleted.id])
    (out / "video_notes.mp4").touch()
    assert len(list(out.glob("image_*"))) == 1, "the control: it was there"
    assert {path.name for path in out.glob("video_*.*")} == {
        "video_notes.mp4",
        f"{deleted.id}.mp4",
        f"{deleted.id}.spritesheet.webp",
    }

    second = start(*flags)
    assert files(uploads) == {kept, "holiday.png"}
    assert files(out) == {".sgld-new.part", "video_notes.mp4"}, "which another program may be writing"
    assert [video.id for video in second.client.videos.list()] == [waiting.id]
    assert until(second, waiting, ended).status == "completed"
    second.client.videos.delete(waiting.id)
    assert files(uploads) == {"holiday.png"}
    assert second.stop() == 0

    third = start("--ephemeral", *flags)
    asked = {"prompt": PROMPT, "input_reference": ("mine.png", picture, "image/png")}
    until(third, third.client.videos.create(**asked, extra_body={"num_frames": 5, "num_inference_steps": 2}), ended)  # type: ignore[call-overload]
    assert len(files(uploads)) == 2
    assert third.stop() == 0
    assert {path.name for path in uploads.iterdir()} <= {"holiday.png", folder.name}, "it takes its own with it"
    assert files(uploads) == {"holiday.png"}


def test_a_video_finds_its_picture_from_another_working_directory(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(picture, "png")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first = start()
    running = create(first, ENDLESS)
    waiting = first.client.videos.create(
        prompt=PROMPT,
        input_reference=("mine.png", picture.getvalue(), "image/png"),
        extra_body={"num_frames": 5, "num_inference_steps": 2},
    )
    kill(first)
    assert len(files(tmp_path / "here")) == 1, "the default is relative"
    monkeypatch.chdir(tmp_path / "there")
    second = start()
    second.client.videos.delete(running.id)
    done = until(second, waiting, ended)
    assert done.status == "completed", done.error


class Receiver(BaseHTTPRequestHandler):
    """A user's server: it takes no event before it is asked to."""

    got: ClassVar[list[tuple[dict[str, str], bytes]]] = []
    status = 500

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((dict(self.headers), body))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[str]:
    """The address of one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_that_waits_outlives_a_killed_server(start: Start, receiver: str) -> None:
    first = start("--allow-private-urls")
    endpoint = first.client.webhooks.create(name="mine", url=receiver, event_types=["video.completed"])
    video = create(first)
    while not Receiver.got:
        time.sleep(0.01)
    kill(first)
    tried = len(Receiver.got)
    Receiver.status = 200
    second = start("--allow-private-urls")
    deadline = time.monotonic() + 60
    while len(Receiver.got) == tried:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    headers, body = Receiver.got[-1]
    event = second.client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
    assert (event.type, event.data.id) == ("video.completed", video.id)  # type: ignore[union-attr, comparison-overlap]
    assert {told["webhook-id"] for told, _ in Receiver.got} == {headers["webhook-id"]}
    assert second.stop() == 0
    start("--allow-private-urls")
    assert len(Receiver.got) == tried + 1, "once taken, it is over"


def test_an_ephemeral_server_forgets(start: Start, tmp_path: Path) -> None:
    first = start("--ephemeral")
    done = until(first, create(first), ended)
    until(first, create(first, ENDLESS), under_way)
    kill(first)
    second = start("--ephemeral")
    assert listed(second) == []
    with pytest.raises(openai.NotFoundError):
        second.client.videos.retrieve(done.id)
    assert not (tmp_path / "out" / ".sgld").exists()


def test_sigterm_lets_the_running_job_finish(start: Start) -> None:
    first = start("--shutdown-timeout", "60")
    running, waiting = create(first, LONG), create(first)
    until(first, running, under_way)
    workers = family(first)
    first.process.send_signal(signal.SIGTERM)
    while first.get("/health")[1]["status"] != "stopping":
        time.sleep(0.01)
    with pytest.raises(openai.InternalServerError) as refused:
        create(first)
    assert refused.value.status_code == 503 and refused.value.code == "not_ready"
    assert int(refused.value.response.headers["Retry-After"]) > 0
    with pytest.raises(openai.InternalServerError, match="stopping"):
        first.client.images.generate(prompt=PROMPT)
    assert first.client.videos.retrieve(running.id).status == "in_progress", "who has a job may still ask for it"
    assert first.process.wait(60) == 0
    assert left(workers) == []

    second = start()
    assert second.client.videos.retrieve(running.id).status == "completed"
    assert download(second, running)
    assert until(second, waiting, ended).status == "completed"


def test_a_job_that_sigterm_cuts_short_runs_after_the_restart(start: Start) -> None:
    """Twice, which is as often as a killed server's job is tried: a stop is not the job's fault."""
    server = start("--shutdown-timeout", "0")
    cut, waiting = create(server, ENDLESS), create(server)
    for _ in range(2):
        until(server, cut, under_way)
        followed = urllib.request.urlopen(f"{server.url}/v1/videos/{cut.id}/events", timeout=30)
        workers = family(server)
        server.process.send_signal(signal.SIGTERM)
        told = followed.read()  # raises IncompleteRead for a stream that is cut off
        assert told.rstrip().splitlines()[-1].startswith(b"data: ")
        assert server.process.wait(30) == 0
        assert left(workers) == []
        server = start("--shutdown-timeout", "0")
    assert server.client.videos.retrieve(cut.id).status in ("queued", "in_progress")
    assert server.client.videos.delete(cut.id).deleted
    assert until(server, waiting, ended).status == "completed"


def test_who_waits_for_a_picture_is_told_that_the_server_stops(start: Start, tmp_path: Path) -> None:
    server = start("--shutdown-timeout", "0")
    until(server, create(server, ENDLESS), under_way)
    refusals: list[openai.APIStatusError] = []

    def wait_for_picture() -> None:
        try:
            server.client.images.generate(prompt=PROMPT)
        except openai.APIStatusError as refused:
            refusals.append(refused)

    waiting = threading.Thread(target=wait_for_picture)
    waiting.start()
    while server.get("/server_info")[1]["queue_depth"] < 1:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    waiting.join(20)
    assert [(refused.status_code, refused.code) for refused in refusals] == [(503, "not_ready")]
    assert int(refusals[0].response.headers["Retry-After"]) > 0
    assert server.process.wait(30) == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]


def refused(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sgld", "serve", "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


def test_two_servers_do_not_share_a_folder(start: Start, tmp_path: Path) -> None:
    first = start()
    code, told = refused("--output-path", str(tmp_path / "out"))
    assert code == 1
    *_, last = told.splitlines()
    assert last.startswith("error: another server keeps its jobs in ") and "--ephemeral" in last
    assert "Traceback" not in told
    assert until(first, create(first), ended).status == "completed", "the first is not disturbed"


def test_without_a_folder_nothing_stays(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    server = start("--output-path", "")
    done = until(server, create(server), ended)
    assert download(server, done)[4:8] == b"ftyp"
    folders = list(temporary.glob("sgld-*"))
    assert len(folders) == 1 and list(folders[0].glob("video_*.mp4"))
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700, "the folder above it is everybody's"
    assert server.stop() == 0
    assert list(temporary.glob("sgld-*")) == []
    assert not (tmp_path / "out").exists()


def test_a_key_from_the_environment_and_a_log_of_json(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    server = start("--log-format", "json", "--log-level", "debug")
    for key, wrong in ((None, "missing"), ("not-the-key-at-all", "not known")):
        request = urllib.request.Request(f"{server.url}/v1/models")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 401 and wrong in json.load(caught.value)["detail"]
    server.client = server.client.with_options(api_key=KEY)
    done = until(server, create(server), ended)
    fatal = until(server, create(server, ENDLESS), under_way)
    for worker in ranks_of(server.process.pid):
        worker.kill()
    assert until(server, fatal, ended).error.code == "worker_died"
    assert server.stop() == 0
    text = server.log.read_text()
    assert KEY not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    told = {line["job_id"]: line["message"] for line in lines if line["logger"] == "sgld.server.jobs.runs"}
    assert "completed" in told[done.id] and "failed" in told[fatal.id]


def test_no_address_beyond_this_machine_without_a_key(tmp_path: Path) -> None:
    code, told = refused("--host", "0.0.0.0", "--output-path", str(tmp_path))
    assert code == 2
    assert told.startswith("error: ") and "--api-key" in told and "--allow-unauthenticated" in told
