"""The folder that is built of an overlay and its source: files, links, code, crashes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sgld.config import cache_root
from sgld.errors import BadRequest, ModelError
from sgld.hub import materialize
from sgld.hub.hub import resolve_model
from sgld.hub.overlay import MANIFEST
from sgld.settings import Settings
from tests.hub.overlays import MADE, MAPPINGS, OVERLAY, RAW, SOURCE, files, load, results, write
from tests.hub.repositories import contents, publish

pytestmark = pytest.mark.usefixtures("hub")


def test_the_folder_that_is_built(made: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = made(files() | {"_overlay/notes.md": "x", "transformer/other.safetensors": "no"})
    assert "an overlay with a manifest brings no weights; not taken: other.safetensors" in caplog.text
    name = re.fullmatch(r"Wan-AI__Wan2\.2-S2V-14B-[0-9a-f]{16}", folder.name)
    assert name is not None and folder.parent == cache_root() / "materialized_models"
    got = contents(folder)
    assert set(got) == MADE
    assert (got["transformer/model.safetensors"], got["tokenizer/more/vocab.txt"]) == (b"w" * 100, b"words")
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    record = json.loads(got[materialize.MARKER])
    assert len(record.pop("overlay_fingerprint")) == 64 and set(record.pop("files")) == MADE - {materialize.MARKER}
    assert record == {"source_model_id": SOURCE, "overlay_repo_id": OVERLAY, "overlay_revision": "main",
                      "materializer_version": "v1"}  # fmt: skip


def test_later_loads_need_no_source(made: Callable[..., Path], hub: Path) -> None:
    folder = made(files())
    marker = (folder / materialize.MARKER).stat().st_mtime_ns
    shutil.rmtree(hub / f"models--{SOURCE.replace('/', '--')}")
    assert made(files()) == folder
    assert (folder / materialize.MARKER).stat().st_mtime_ns == marker
    with pytest.raises(ModelError, match=f"^model_path: '{SOURCE}' is no local folder, not in the cache"):
        made(files({"materializer_version": "v2"}))


def test_large_files_are_linked_and_outlive_the_cache(
    made: Callable[..., Path], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialize, "LINKED_BYTES", 100)
    folder = made(files())
    [blob] = [path for path in hub.rglob("blobs/*") if path.read_bytes() == b"w" * 100]
    assert (folder / "transformer/model.safetensors").samefile(blob)
    assert (folder / "tokenizer/spiece.json").stat().st_nlink == 1
    before = contents(folder)
    shutil.rmtree(hub)
    assert contents(folder) == before


def test_what_cannot_be_linked_is_copied(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialize, "LINKED_BYTES", 1)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = made(files())
    assert {path.stat().st_nlink for path in folder.rglob("*") if path.is_file()} == {1}


def test_globs_keep_paths(made: Callable[..., Path]) -> None:
    given = [{"type": "glob", "src": "text/**"}, {"type": "glob", "src": "*.safetensors"}, {"src": "text/spiece.json"}]
    index = json.dumps({"text": ["a", "B"]})
    got = made({"model_index.json": index, MANIFEST: json.dumps({"file_mappings": given})})
    mapped = {"text/spiece.json", "text/more/vocab.txt", "weights.safetensors", "spiece.json"}
    assert set(contents(got)) == {*mapped, "model_index.json", materialize.MARKER}


def test_an_edited_overlay_is_another_model(made: Callable[..., Path]) -> None:
    first = made(files())
    second = made(files() | {"transformer/config.json": '{"a": 1}'})
    assert first != second and (second / "transformer/config.json").read_text() == '{"a": 1}'
    assert made(files()) == first  # which stands
    assert made(files() | {"transformer/more.bin": "not taken"}) == first


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"required_source_files": ["demo.mp4", "a.json", "b/c.bin"]}, "lacks a.json, b/c.bin, which .*json req"),
        ({"file_mappings": [{"src": "no.bin"}]}, "has no file 'no.bin'"),
        ({"file_mappings": [{"src": "text"}]}, "has no file 'text'"),
        ({"file_mappings": [{"src": "no", "type": "tree"}]}, "has no tree 'no'"),
        ({"file_mappings": [{"src": "**/*.gguf", "type": "glob"}]}, r"has no glob '\*\*/\*.gguf'"),
        ({"file_mappings": [*MAPPINGS, {"src": "demo.mp4", "dst": "transformer/config.json"}]}, "json: two files"),
        ({"file_mappings": [*MAPPINGS, {"src": "demo.mp4", "dst": "model_index.json/x"}]}, "cannot be put together"),
        ({"file_mappings": MAPPINGS[:1]}, "tokenizer: neither the overlay nor its source has this component"),
        ({"file_mappings": MAPPINGS[1:]}, "transformer: has no .safetensors"),
        ({"custom_materializer": "no.py"}, "cannot be put together .*no.py"),
    ],
)
def test_what_does_not_fit_leaves_nothing(manifest: dict[str, Any], words: str, made: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=words):
        made(files(manifest), trust=True)
    assert results() == []


@pytest.mark.parametrize(
    "mapping",
    [
        {"src": "link", "dst": "transformer/model.safetensors"},
        {"src": "folder/secret", "dst": "transformer/model.safetensors"},
        {"type": "tree", "src": "folder", "dst_dir": "transformer"},
        {"type": "tree", "src": ".", "dst_dir": "transformer"},
        {"type": "glob", "src": "lin*"},
        {"type": "glob", "src": "folder/*"},
    ],
)
@pytest.mark.parametrize("escapes", [True, False])
def test_links_of_a_source_may_not_leave_it(mapping: dict[str, str], escapes: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "Wan2.2-S2V-14B", RAW)
    outside = write(tmp_path / ("outside" if escapes else "Wan2.2-S2V-14B/real"), {"secret": "s"})
    (source / "link").symlink_to(outside / "secret")
    (source / "folder").symlink_to(outside)
    (tmp_path / "mine").mkdir()
    index = json.dumps({"_class_name": "WanPipeline"})
    write(tmp_path / "mine", {"model_index.json": index, MANIFEST: json.dumps({"file_mappings": [mapping]})})
    if escapes or mapping["src"] == ".":
        with pytest.raises(ModelError, match="leads out of|links to folders are not followed"):
            load({SOURCE: str(tmp_path / "mine")}, str(source))
        assert results() == []
    else:
        assert b"s" in contents(load({SOURCE: str(tmp_path / "mine")}, str(source))).values()


@pytest.mark.parametrize("link", ["transformer/more.json", "_overlay/more.json", "transformer/more"])
def test_links_of_an_overlay_may_not_leave_it(link: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", files())
    outside = write(tmp_path / "outside", {"secret.json": "s"})
    (folder / link).symlink_to(outside / "secret.json" if link.endswith(".json") else outside)
    with pytest.raises(ModelError, match="leads out of|links to folders are not followed"):
        load({SOURCE: str(folder)})
    assert results() == []


@pytest.mark.parametrize(("target", "reason"), [("nowhere", "No such file"), ("more.json", "Too many levels")])
def test_links_of_an_overlay_that_lead_nowhere(target: str, reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", files())
    (folder / "transformer/more.json").symlink_to(target)
    with pytest.raises(ModelError, match=f"mine/transformer/more.json: cannot be read: {reason}"):
        load({SOURCE: str(folder)})


CODE = """
import json
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Part:
    name: "str"

def materialize(overlay_dir, source_dir, output_dir, manifest):
    found = Path(source_dir, "weights.safetensors").read_text() + Path(overlay_dir, "README.md").read_text()
    Path(output_dir, "transformer", Part("made.safetensors").name).write_text(found + manifest["materializer_version"])
"""
CUSTOM = {"custom_materializer": "_overlay/code.py", "materializer_version": "v7", "file_mappings": MAPPINGS[1:]}


def test_code_runs_only_where_it_is_trusted(made: Callable[..., Path], hub: Path) -> None:
    whole = files(CUSTOM) | {"_overlay/code.py": CODE, "README.md": "!"}
    line = r"^trust_remote_code: the overlay 'your-org/.*code of its own \(_overlay/code"
    with pytest.raises(BadRequest, match=line):
        made(whole)
    assert not cache_root().exists()
    folder = made(whole, trust=True)
    assert (folder / "transformer/made.safetensors").read_text() == "w" * 100 + "!v7"
    assert not list(hub.rglob("__pycache__"))
    assert made(whole) == folder  # nothing runs


def test_code_that_writes_over_a_file_spoils_no_source(
    made: Callable[..., Path], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materialize, "LINKED_BYTES", 1)
    code = """
def materialize(output_dir, **others):
    with open(output_dir + "/transformer/model.safetensors", "r+") as file:
        file.write("anew")
"""
    folder = made(files(CUSTOM | {"file_mappings": MAPPINGS}) | {"_overlay/code.py": code}, trust=True)
    assert (folder / "transformer/model.safetensors").read_text() == "anew" + "w" * 96
    assert not [path for path in hub.rglob("blobs/*") if path.read_bytes().startswith(b"anew")]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def materialize(**all): raise KeyError('model.diffusion')", "failed: KeyError: 'model.diffusion'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def materialise(): pass", "KeyError: .materialize"),
        ("def materialize(", "SyntaxError"),
        ("def materialize(overlay_dir): pass", "TypeError: .*source_dir"),
        ("import os\ndef materialize(source_dir, output_dir, **others):\n"
         "    os.symlink(source_dir + '/weights.safetensors', output_dir + '/transformer/model.safetensors')",
         "materialize made a symbolic link, transformer/model.safetensors"),
    ],
)  # fmt: skip
def test_code_that_fails_is_named(code: str, words: str, made: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=f"_overlay/code.py|blobs/.*: .*{words}"):
        made(files(CUSTOM) | {"_overlay/code.py": code}, trust=True)
    assert results() == []


@pytest.mark.parametrize("damage", ["missing", "short", "unmarked", "garbled", "another's", "interrupted"])
def test_a_damaged_folder_is_built_again(damage: str, made: Callable[..., Path]) -> None:
    folder = made(files())
    good = contents(folder)
    weights, marker = folder / "transformer/model.safetensors", folder / materialize.MARKER
    new = folder.with_name(f"{folder.name}.tmp")  # which a crash leaves behind
    {
        "missing": weights.unlink,
        "short": lambda: weights.write_text("w"),
        "unmarked": marker.unlink,
        "garbled": lambda: marker.write_text("{"),
        "another's": lambda: marker.write_text(marker.read_text().replace("v1", "v2")),
        "interrupted": lambda: write(folder.rename(new) and folder, {"transformer/config.json": "{}"}),
    }[damage]()
    assert contents(folder) != good
    assert made(files()) == folder
    assert contents(folder) == good
    assert results() == [folder.name]


LOADER = """
import json, logging, sys
from sgld.settings import Settings
from sgld.hub.hub import resolve_model
logging.basicConfig(level=logging.INFO, format="%(message)s")
print(resolve_model(Settings.of(**json.loads(sys.argv[1]))).folder)
"""


class Loaders:
    """Processes that load the source, and wait in the overlay's code for as long as `hold` is there."""

    def __init__(self, tmp_path: Path):
        self.hold, self.log = write(tmp_path, {"hold": ""}) / "hold", tmp_path / "log"
        self.started: list[subprocess.Popen[str]] = []
        code = f"""
import time
from pathlib import Path

def materialize(output_dir, **others):
    Path(output_dir, "transformer/model.safetensors").write_text("w")
    with Path({str(self.log)!r}).open("a") as log:
        log.write("begun\\n")
    while Path({str(self.hold)!r}).exists():
        time.sleep(0.01)
"""
        publish(tmp_path / "hub", OVERLAY, files(CUSTOM) | {"_overlay/code.py": code})
        self.settings = {"model_path": SOURCE, "trust_remote_code": True,
                         "model_overlay_registry": json.dumps({SOURCE: OVERLAY})}  # fmt: skip
        self._environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def start(self) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", LOADER, json.dumps(self.settings)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.started.append(subprocess.Popen(words, env={**os.environ, **self._environment}, text=True, **pipes))
        return self.started[-1]

    def begun(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def until_begun(self, process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while not self.begun() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        assert self.begun() == 1


@pytest.fixture
def loaders(tmp_path: Path) -> Iterator[Loaders]:
    made = Loaders(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_a_build_that_is_killed_is_never_taken_for_whole(loaders: Loaders) -> None:
    process = loaders.start()
    loaders.until_begun(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [left] = results()
    assert left.endswith(".tmp")
    loaders.hold.unlink()
    folder = resolve_model(Settings.of(**loaders.settings)).folder
    assert results() == [folder.name] and folder.name == left.removesuffix(".tmp")
    assert (folder / "transformer/model.safetensors").read_text() == "w" and loaders.begun() == 2


def test_two_at_once_build_once(loaders: Loaders) -> None:
    first = loaders.start()
    loaders.until_begun(first)
    second = loaders.start()
    assert second.stderr is not None
    line = ""
    while not line.startswith("another process puts"):
        line = second.stderr.readline()
        assert line, "it did not wait"
    loaders.hold.unlink()
    printed = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert printed[0] == printed[1] and [first.returncode, second.returncode] == [0, 0]
    assert loaders.begun() == 1


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "results"
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "sgl_diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "sgl_diffusion"


def test_where_nothing_can_be_written(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=f"^model_path: '{SOURCE}' cannot be put together in .*Not a directory"):
        made(files())
