"""Overlays: the registry, the manifest, and the meaning of ids, folders and revisions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sgld.errors import BadRequest, ModelError, UnknownField
from sgld.hub import materialize, overlay
from sgld.hub.hub import resolve_model
from sgld.hub.overlay import MANIFEST, Overlay
from sgld.settings import Settings
from tests.hub.overlays import MADE, OVERLAY, PLAIN, RAW, SOURCE, files, load, results, write
from tests.hub.repositories import contents, publish

pytestmark = pytest.mark.usefixtures("hub")


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
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(BadRequest, match="nor a file that holds one: .* is no JSON object"):
        overlay.registry(str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{", BadRequest, "'{' is neither a JSON object nor .*: Expecting"),
        ('{"a/b": "c/d", "a/b": "e/f"}', BadRequest, "'a/b' stands twice"),
        ("no.json", BadRequest, "'no.json' is neither .*: No such file"),
        ("", BadRequest, "'' is neither .* Is a directory"),
        ('{"a/b": 3}', BadRequest, "entry 'a/b': overlay_repo_id: 3 is not a valid text"),
        ('{"a/b": null}', BadRequest, "entry 'a/b': overlay_repo_id: it is empty"),
        ('{"a/b": ""}', BadRequest, "entry 'a/b': overlay_repo_id: it is empty; overlay_repo_id is needed"),
        ('{"a/b": {"overlay_revision": "main"}}', BadRequest, "entry 'a/b': overlay_repo_id: it is empty"),
        ('{"a/b": {"overlay_repo_id": "c/d", "source_revision": ""}}', BadRequest, "source_revision: it is empty"),
        ('{"a/b": {"overlay_repo_id": 3}}', BadRequest, "entry 'a/b': overlay_repo_id: 3 is not a valid text"),
        (
            '{"a/b": {"overlay_repo": "c/d"}}',
            UnknownField,
            "entry 'a/b': unknown key 'overlay_repo'; did you mean",
        ),
        ('{"b": "c/d"}', BadRequest, r"entry 'b': its name must be the Hugging Face id \(owner/name\)"),
        ('{"../b": "c/d"}', BadRequest, "entry '../b': its name must be"),
    ],
)
def test_a_wrong_registry_names_its_entry(text: str, kind: type[BadRequest], words: str) -> None:
    with pytest.raises(kind, match=f"^model_overlay_registry: .*{words}") as caught:
        resolve_model(Settings.of(model_overlay_registry=text))  # of whatever model
    assert type(caught.value) is kind and caught.value.param == "model_overlay_registry"


def test_what_a_model_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays = {name: Overlay("a/b") for name in (SOURCE, "Other/Model", "Third/Model")}
    local, cached = tmp_path / "Wan2.2-S2V-14B", tmp_path / "models--Other--Model" / "snapshots" / "0"
    for folder in (local, cached, tmp_path / "Model", tmp_path / "Wan2.2-S2V-14B-b"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(local)
    meanings = {path: overlay.match(path, overlays) for path in (SOURCE, str(local), f"{local}/", ".", str(cached))}
    assert set(meanings.values()) == {SOURCE, "Other/Model"} and meanings[str(cached)] == "Other/Model"
    others = ("Wan-AI/Wan2.2", "Wan2.2-S2V-14B", f"{tmp_path}/Wan2.2-S2V-14B-b", f"{tmp_path}/no/Model")
    assert {overlay.match(other, overlays) for other in others} == {None}
    with pytest.raises(BadRequest, match="may be any of Other/Model, Third/Model; rename the folder"):
        overlay.match(str(tmp_path / "Model"), overlays)
    write(local, {MANIFEST: "{}"})  # now it is an overlay itself
    assert overlay.match(str(local), overlays) is None


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "cannot be read as JSON: .* is no JSON object"),
        ('{"source_revision": "a", "source_revision": "b"}', "'source_revision' stands twice"),
        ({"file_mapping": []}, "unknown key 'file_mapping'; did you mean file_mappings"),
        ({"source_model_id": "../../etc"}, r"source_model_id: '../../etc' is no Hugging Face id \(owner/name\)"),
        ({"source_model_id": 3}, "source_model_id: 3 is not a valid text"),
        ({"source_revision": ""}, "source_revision: it is empty"),
        ({"source_allow_patterns": "*"}, "source_allow_patterns: '\\*' is not a valid list of text"),
        ({"required_source_files": ["a", "../b"]}, "required_source_files: '../b' is not allowed"),
        ({"custom_materializer": "../x.py"}, "custom_materializer: '../x.py' is not allowed"),
        ({"file_mappings": {"src": "a"}}, "file_mappings: .* is not a valid list of"),
        ({"file_mappings": [{"src": "demo.mp4"}, "a"]}, r"file_mappings\[1\]: 'a' is no map of src, type, dst"),
        ({"file_mappings": [{"dst": "a"}]}, r"file_mappings\[0\]: src: '' is not allowed"),
        ({"file_mappings": [{"src": "a", "to": "b"}]}, r"file_mappings\[0\]: unknown key 'to'"),
        ({"file_mappings": [{"src": "a", "type": "copy"}]}, "type: 'copy' is not one of file, tree, glob"),
        ({"file_mappings": [{"src": "a", "dst_dir": "b"}]}, "dst_dir: 'b': a file has none; it is of a tree"),
        ({"file_mappings": [{"src": "a", "type": "tree", "dst": "b"}]}, "dst: 'b': a tree has none; it is of a file"),
        ({"file_mappings": [{"src": "a", "type": "glob", "dst": "b"}]}, "dst: 'b': a glob has none; it is of a file"),
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


def test_a_built_in_overlay_serves_raw_files_unless_another_is_given(hub: Path) -> None:
    source, entry = next(iter(overlay.BUILT_IN.items()))
    publish(hub, source, RAW)
    line = f"^model_path: the overlay of '{source}': .*'{entry.overlay_repo_id}' is no"
    with pytest.raises(ModelError, match=line) as caught:
        resolve_model(Settings.of(model_path=source))  # and of no registry, for none was given
    assert caught.value.param == "model_path"
    publish(hub, entry.overlay_repo_id, files())
    folder = resolve_model(Settings.of(model_path=source)).folder
    assert set(contents(folder)) == MADE and folder.name.startswith(source.replace("/", "__"))
    publish(hub, OVERLAY, PLAIN)
    given = json.dumps({source: OVERLAY})
    other = resolve_model(Settings.of(model_path=source, model_overlay_registry=given)).folder
    assert contents(other).keys() == PLAIN.keys()
    whole = publish(hub, source, PLAIN)  # its owner has converted it
    assert resolve_model(Settings.of(model_path=source)).folder == whole


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
    line = "'main' has no effect: the overlay is complete"
    with pytest.raises(BadRequest, match=f"entry '{SOURCE}': source_revision: {line}"):
        load({SOURCE: entry | {"source_revision": "main"}})
    with pytest.raises(BadRequest, match=f"^revision: {line}") as caught:
        load({SOURCE: entry}, revision="main")
    assert caught.value.param == "revision"


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
