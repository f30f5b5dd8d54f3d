"""Overlays: the registry, the manifest, and the folder that is made of an overlay and its source."""

from __future__ import annotations

import json
import logging
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
from sgld.errors import BadRequest, ModelError, UnknownField
from sgld.hub import materialize, overlay
from sgld.hub.hub import resolve_model
from sgld.hub.overlay import MANIFEST, Overlay
from sgld.settings import Settings
from tests.hub.repositories import contents, publish

SOURCE, OVERLAY = "Wan-AI/Wan2.2-S2V-14B", "your-org/Wan2.2-S2V-14B-overlay"
RAW = {"weights.safetensors": "w" * 100, "text/spiece.json": "pieces", "text/more/vocab.txt": "words", "demo.mp4": "x"}
INDEX = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "tokenizer": ["transformers", "T5TokenizerFast"],
}
MAPPINGS: list[dict[str, Any]] = [
    {"src": "weights.safetensors", "dst": "transformer/model.safetensors"},
    {"type": "tree", "src": "text", "dst_dir": "tokenizer"},
]
Files = dict[str, str | bytes]
PLAIN: Files = {"model_index.json": json.dumps(INDEX), "transformer/config.json": "{}"}
MADE = {"model_index.json", "transformer/config.json", "transformer/model.safetensors", "tokenizer/spiece.json",
        "tokenizer/more/vocab.txt", materialize.MARKER}  # fmt: skip


def files(manifest: dict[str, Any] | None = None) -> Files:
    """An overlay of that manifest, with MAPPINGS unless it has its own."""
    return PLAIN | {MANIFEST: json.dumps({"file_mappings": MAPPINGS} | (manifest or {}))}


def write(folder: Path, files: Files) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds the source, and no network; results go to `results`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path / "results"))
    publish(tmp_path / "hub", SOURCE, RAW)
    return tmp_path / "hub"


@pytest.fixture
def made(hub: Path) -> Callable[..., Path]:
    """Put an overlay of these files in the cache, and load its source by name."""

    def make(files: Files, *, trust: bool = False, **entry: str) -> Path:
        publish(hub, OVERLAY, files)
        return load({SOURCE: {"overlay_repo_id": OVERLAY, **entry}}, trust_remote_code=trust)

    return make


def load(registry: Any, model_path: str = SOURCE, **settings: Any) -> Path:
    settings |= {"model_path": model_path, "model_overlay_registry": json.dumps(registry)}
    command = resolve_model(Settings.of(**settings))
    assert command.settings.model.model_path == model_path  # which is what everybody is told
    return command.folder


def results() -> list[str]:
    """What lies beside the locks."""
    return [path.name for path in (cache_root() / "materialized_models").glob("*") if path.suffix != ".lock"]


# The registry


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (OVERLAY, Overlay(OVERLAY)),
        ({"overlay_repo_id": OVERLAY, "overlay_revision": "main"}, Overlay(OVERLAY, "main")),
        ({"overlay_repo_id": OVERLAY, "overlay_revision": None, "source_revision": "v1"}, Overlay(OVERLAY, None, "v1")),
    ],
)
def test_entries_as_text_and_in_a_file(value: Any, entry: Overlay, tmp_path: Path) -> None:
    text = json.dumps({SOURCE: value})
    (tmp_path / "r.json").write_text(text)
    assert overlay.registry(f"\n {text}") == overlay.registry(str(tmp_path / "r.json")) == {SOURCE: entry}


def test_a_built_in_overlay_serves_raw_files_unless_another_is_given(hub: Path) -> None:
    source, entry = next(iter(overlay.BUILT_IN.items()))
    publish(hub, source, RAW)
    with pytest.raises(
        ModelError, match=f"^model_path: the overlay of '{source}': .*'{entry.overlay_repo_id}' is no"
    ) as caught:
        resolve_model(Settings.of(model_path=source))  # and of no registry, for none was given
    assert caught.value.param == "model_path"
    publish(hub, entry.overlay_repo_id, files())
    folder = resolve_model(Settings.of(model_path=source)).folder
    assert set(contents(folder)) == MADE and folder.name.startswith(source.replace("/", "__"))
    publish(hub, OVERLAY, PLAIN)
    given = json.dumps({source: OVERLAY})
    assert (
        contents(resolve_model(Settings.of(model_path=source, model_overlay_registry=given)).folder).keys()
        == PLAIN.keys()
    )
    whole = publish(hub, source, PLAIN)  # its owner has converted it
    assert resolve_model(Settings.of(model_path=source)).folder == whole


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{", BadRequest, "it is not valid JSON: Expecting"),
        ('{"a/b": "c/d", "a/b": "e/f"}', BadRequest, "'a/b' stands twice"),
        ("no.json", BadRequest, "'no.json' is neither a JSON object nor a file that can be read: No such file"),
        ("", BadRequest, "'' is neither .* Is a directory"),
        (
            '{"a/b": 3}',
            BadRequest,
            "entry 'a/b': 3 is neither text nor a map of overlay_repo_id, overlay_revision, source",
        ),
        ('{"a/b": null}', BadRequest, "entry 'a/b': None is neither text nor a map of"),
        ('{"a/b": ""}', BadRequest, "entry 'a/b': overlay_repo_id: it is empty; overlay_repo_id is needed"),
        ('{"a/b": {"overlay_revision": "main"}}', BadRequest, "entry 'a/b': overlay_repo_id: it is empty"),
        ('{"a/b": {"overlay_repo_id": "c/d", "source_revision": ""}}', BadRequest, "source_revision: it is empty"),
        ('{"a/b": {"overlay_repo_id": 3}}', BadRequest, "entry 'a/b': overlay_repo_id: 3 is not a valid text"),
        (
            '{"a/b": {"overlay_repo": "c/d"}}',
            UnknownField,
            "entry 'a/b': unknown key 'overlay_repo'; did you mean over",
        ),
        ('{"b": "c/d"}', BadRequest, r"entry 'b': its name must be the Hugging Face id \(owner/name\)"),
        ('{"../b": "c/d"}', BadRequest, "entry '../b': its name must be"),
    ],
)
def test_a_wrong_registry_names_its_entry(text: str, kind: type[BadRequest], words: str) -> None:
    with pytest.raises(kind, match=f"^model_overlay_registry: .*{words}") as caught:
        resolve_model(Settings.of(model_overlay_registry=text))  # of whatever model
    assert type(caught.value) is kind and caught.value.param == "model_overlay_registry"


def test_a_file_that_holds_no_object(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(BadRequest, match="holds no JSON object"):
        overlay.registry(str(tmp_path / "r.json"))


def test_what_a_model_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays = {name: Overlay("a/b") for name in (SOURCE, "Other/Model", "Third/Model")}
    local, cached = tmp_path / "Wan2.2-S2V-14B", tmp_path / "models--Other--Model" / "snapshots" / "0"
    for folder in (local, cached, tmp_path / "Model", tmp_path / "Wan2.2-S2V-14B-b"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(local)
    meanings = {path: overlay.match(path, overlays) for path in (SOURCE, str(local), f"{local}/", ".", str(cached))}
    assert set(meanings.values()) == {SOURCE, "Other/Model"} and meanings[str(cached)] == "Other/Model"
    for other in (
        "Wan-AI/Wan2.2",
        "Wan2.2-S2V-14B",
        str(tmp_path / "Wan2.2-S2V-14B-b"),
        str(tmp_path / "no" / "Model"),
    ):
        assert overlay.match(other, overlays) is None
    with pytest.raises(BadRequest, match="may be any of Other/Model, Third/Model; rename the folder"):
        overlay.match(str(tmp_path / "Model"), overlays)
    write(local, {MANIFEST: "{}"})  # now it is an overlay itself
    assert overlay.match(str(local), overlays) is None


# What is made


def test_the_folder_that_is_made(made: Callable[..., Path]) -> None:
    folder = made(files() | {"_overlay/notes.md": "x"})
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


def test_weights_of_an_overlay_are_left_out_and_named(
    made: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = made(files() | {"transformer/other.safetensors": "no"})
    assert set(contents(folder)) == MADE
    assert "not taken: other.safetensors" in caplog.text


def test_revisions(made: Callable[..., Path], hub: Path) -> None:
    for branch in ("a", "b", "c"):
        publish(hub, SOURCE, RAW | {"weights.safetensors": branch}, branch)
    pinned = files({"source_revision": "a"})

    def weights(folder: Path) -> str:
        return (folder / "transformer/model.safetensors").read_text()

    assert weights(made(pinned)) == "a"
    assert weights(made(pinned, source_revision="b")) == "b"
    assert weights(load({SOURCE: {"overlay_repo_id": OVERLAY, "source_revision": "b"}}, revision="c")) == "c"
    publish(hub, OVERLAY, files({"source_revision": "c"}), "v2")
    assert weights(made(pinned, overlay_revision="v2")) == "c"
    with pytest.raises(ModelError, match=f"entry '{SOURCE}': overlay_repo_id: '{OVERLAY}' .* not in the cache"):
        made(pinned, overlay_revision="v3")


def test_a_local_source_is_used_in_place(made: Callable[..., Path], tmp_path: Path, hub: Path) -> None:
    made(files())
    shutil.rmtree(hub / f"models--{SOURCE.replace('/', '--')}")
    got = []
    for parent in ("one", "two"):
        write(tmp_path / parent / "Wan2.2-S2V-14B", RAW | {"weights.safetensors": parent})
        got.append(load({SOURCE: OVERLAY}, str(tmp_path / parent / "Wan2.2-S2V-14B")))
    assert [(folder / "transformer/model.safetensors").read_text() for folder in got] == ["one", "two"]
    with pytest.raises(BadRequest, match="^revision: 'main': .* has none"):
        load({SOURCE: OVERLAY}, str(tmp_path / "one" / "Wan2.2-S2V-14B"), revision="main")


@pytest.mark.parametrize("inside", ["", "snapshots/{}"])
def test_a_source_in_another_cache_of_the_hub(inside: str, made: Callable[..., Path], tmp_path: Path) -> None:
    publish(tmp_path / "hub", OVERLAY, files())
    snapshot = publish(tmp_path / "other", SOURCE, RAW | {"weights.safetensors": "other"})
    path = snapshot.parents[1] / inside.format(snapshot.name)
    assert (load({SOURCE: OVERLAY}, str(path)) / "transformer/model.safetensors").read_text() == "other"


def test_a_local_overlay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "mine", files({"source_revision": "main"}))
    got = load({SOURCE: str(folder)})
    assert set(contents(got)) == MADE
    record = json.loads((got / materialize.MARKER).read_text())
    assert (record["overlay_revision"], record["source_revision"]) == ("local", "main")
    with pytest.raises(BadRequest, match=f"entry '{SOURCE}': overlay_revision: 'main': .* has none"):
        load({SOURCE: {"overlay_repo_id": str(folder), "overlay_revision": "main"}})


def test_an_overlay_as_the_model_path(hub: Path, tmp_path: Path) -> None:
    whole = files({"source_model_id": SOURCE})
    publish(hub, OVERLAY, whole)
    publish(hub, OVERLAY, whole | {"transformer/config.json": '{"v": 2}'}, "v2")
    got = [
        resolve_model(Settings.of(model_path=path, revision=revision)).folder
        for path, revision in ((OVERLAY, None), (OVERLAY, "v2"), (str(write(tmp_path / "mine", whole)), None))
    ]
    assert len(set(got)) == 3 and all(set(contents(folder)) == MADE for folder in got)
    assert (got[1] / "transformer/config.json").read_text() == '{"v": 2}'
    write(tmp_path / "mine", files())
    with pytest.raises(ModelError, match=f"{MANIFEST}: source_model_id: it is needed"):
        resolve_model(Settings.of(model_path=str(tmp_path / "mine")))


def test_an_overlay_without_a_manifest_is_the_model(hub: Path, tmp_path: Path) -> None:
    publish(hub, OVERLAY, PLAIN)
    second = publish(hub, OVERLAY, PLAIN | {"transformer/model.safetensors": "w"}, "v2")
    entry = {"overlay_repo_id": OVERLAY, "overlay_revision": "v2"}
    assert load({SOURCE: entry}) == second
    assert results() == []
    with pytest.raises(
        BadRequest, match=f"entry '{SOURCE}': source_revision: 'main' has no effect: the overlay is complete"
    ):
        load({SOURCE: entry | {"source_revision": "main"}})
    with pytest.raises(BadRequest, match="^revision: 'main' has no effect: the overlay is complete") as caught:
        load({SOURCE: entry}, revision="main")
    assert caught.value.param == "revision"


# What is wrong


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ('{"source_revision": "a", "source_revision": "b"}', "'source_revision' stands twice"),
        ({"file_mapping": []}, "unknown key 'file_mapping'; did you mean file_mappings"),
        ({"source_model_id": "../../etc"}, r"source_model_id: '../../etc' is no Hugging Face id \(owner/name\)"),
        ({"source_model_id": 3}, "source_model_id: 3 is not a valid text"),
        ({"source_revision": ""}, "source_revision: it is empty"),
        ({"source_allow_patterns": "*"}, "source_allow_patterns: '\\*' is not a valid list of text"),
        ({"required_source_files": ["a", "../b"]}, "required_source_files: '../b' is not allowed"),
        ({"custom_materializer": "../x.py"}, "custom_materializer: '../x.py' is not allowed"),
        ({"file_mappings": {"src": "a"}}, "file_mappings: .* is not a valid list of"),
        (
            {"file_mappings": [{"src": "demo.mp4"}, "a"]},
            r"file_mappings\[1\]: 'a' is no map of src, type, dst, dst_dir",
        ),
        ({"file_mappings": [{"dst": "a"}]}, r"file_mappings\[0\]: src: '' is not allowed"),
        ({"file_mappings": [{"src": "a", "to": "b"}]}, r"file_mappings\[0\]: unknown key 'to'"),
        ({"file_mappings": [{"src": "a", "type": "copy"}]}, "type: 'copy' is not one of file, tree, glob"),
        ({"file_mappings": [{"src": "a", "dst_dir": "b"}]}, "dst_dir: 'b': a file has none; it has dst"),
        ({"file_mappings": [{"src": "a", "type": "tree", "dst": "b"}]}, "dst: 'b': a tree has none; it has dst_dir"),
        ({"file_mappings": [{"src": "a", "type": "glob", "dst": "b"}]}, "dst: 'b': a glob has none; its files keep"),
        ({"file_mappings": [{"src": "../a"}]}, r"file_mappings\[0\]: src: '../a' is not allowed"),
        ({"file_mappings": [{"src": "/etc/passwd"}]}, "src: '/etc/passwd' is not allowed"),
        ({"file_mappings": [{"src": "x/../../*", "type": "glob"}]}, "src: 'x/../../\\*' is not allowed"),
        ({"file_mappings": [{"src": "text", "type": "tree", "dst_dir": "a/../../b"}]}, "dst_dir: .* is not allowed"),
        ({"file_mappings": [{"src": "demo.mp4", "dst": "../b"}]}, "dst: '../b' is not allowed"),
        ({"file_mappings": [{"src": "demo.mp4", "dst": "/tmp/b"}]}, "dst: '/tmp/b' is not allowed"),
        ({"file_mappings": [{"src": "demo.mp4", "dst": "a\0b"}]}, "dst: 'a.x00b' is not allowed"),
    ],
)
def test_a_wrong_manifest_names_file_field_and_value(
    manifest: Any, words: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    with pytest.raises(ModelError, match=f"{MANIFEST}: {words}|{MANIFEST}: .*{words}"):
        made(PLAIN | {MANIFEST: text})
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            {"required_source_files": ["demo.mp4", "a.json", "b/c.bin"]},
            "lacks a.json, b/c.bin, which .*manifest.json req",
        ),
        ({"file_mappings": [{"src": "no.bin"}]}, "has no file 'no.bin'"),
        ({"file_mappings": [{"src": "text"}]}, "has no file 'text'"),
        ({"file_mappings": [{"src": "no", "type": "tree"}]}, "has no tree 'no'"),
        ({"file_mappings": [{"src": "**/*.gguf", "type": "glob"}]}, r"has no glob '\*\*/\*.gguf'"),
        (
            {"file_mappings": [*MAPPINGS, {"src": "demo.mp4", "dst": "transformer/config.json"}]},
            "config.json: two files",
        ),
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


# Code of an overlay

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
    with pytest.raises(
        BadRequest, match=r"^trust_remote_code: the overlay 'your-org/.*code of its own \(_overlay/code"
    ):
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
        ("def materialise(): pass", "AttributeError: .*materialize"),
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


# Crashes and company


@pytest.mark.parametrize("damage", ["missing", "short", "unmarked", "garbled", "another's"])
def test_what_is_not_whole_is_made_again(damage: str, made: Callable[..., Path]) -> None:
    folder = made(files())
    good = contents(folder)
    weights, marker = folder / "transformer/model.safetensors", folder / materialize.MARKER
    {
        "missing": weights.unlink,
        "short": lambda: weights.write_text("w"),
        "unmarked": marker.unlink,
        "garbled": lambda: marker.write_text("{"),
        "another's": lambda: marker.write_text(marker.read_text().replace("v1", "v2")),
    }[damage]()
    assert contents(folder) != good
    assert made(files()) == folder
    assert contents(folder) == good
    assert results() == [folder.name]


def test_what_a_crash_has_left_is_cleared(made: Callable[..., Path]) -> None:
    """Killed while what was not whole gave way to what was made in its stead."""
    folder = made(files())
    good = contents(folder)
    new = folder.rename(folder.with_name(f"{folder.name}.tmp"))
    write(folder, {"transformer/config.json": "{}"})
    assert made(files()) == folder
    assert contents(folder) == good and not new.exists()
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
    told = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert told[0] == told[1] and [first.returncode, second.returncode] == [0, 0]
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
