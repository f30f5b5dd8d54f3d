"""References to folders: local, embedded, cached; and what a wrong one says."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.hub.hub import COMPONENT_FILES, MODEL_FILES, model_files, resolve_model
from sgld.hub.overlay import MANIFEST
from sgld.hub.reference import Reference
from sgld.models import load_family
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from sgld.settings import DEMO_MODEL, Settings
from tests.cli.command import sgld
from tests.hub.local_hub import Hub, served
from tests.hub.repositories import contents

NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one snapshot, and no network."""
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "vae" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_the_embedded_model() -> None:
    assert (Reference(DEMO_MODEL).folder(MODEL_FILES) / "model_index.json").is_file()


def test_a_cached_repository_and_a_folder_in_it(cache: Path) -> None:
    assert Reference(NAME).folder(MODEL_FILES) == cache
    assert Reference(NAME, "main").folder(MODEL_FILES) == cache
    assert Reference(f"{NAME}/vae").folder(COMPONENT_FILES) == cache / "vae"


def test_components_are_resolved_with_the_model(cache: Path) -> None:
    load = resolve_model(Settings.of(model_path=NAME, component_paths={"vae": f"{NAME}/vae"}))
    assert load.folder == cache
    assert load.component_folders == {"vae": cache / "vae"}


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("nobody/nothing", "not in the cache"),
        ("no such folder", "no folder"),
        ("../../nowhere", "no folder"),
        ("a/../../b", "no folder"),
        ("", "no folder"),
    ],
)
def test_a_reference_that_leads_nowhere(cache: Path, reference: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        Reference(reference).folder(MODEL_FILES)
    assert caught.value.param == "model_path"


def test_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        Reference(str(file)).folder(MODEL_FILES)
    with pytest.raises(ModelError, match="no model_index.json"):
        resolve_model(Settings.of(model_path=str(tmp_path)))


@pytest.mark.parametrize("reference", [DEMO_MODEL, "."])
def test_only_a_repository_has_revisions(reference: str) -> None:
    with pytest.raises(BadRequest, match=r"^revision: 'main': .* has none"):
        Reference(reference, "main").folder(MODEL_FILES)


@pytest.mark.parametrize(
    ("reference", "words"), [("~no-such-user/x", "there is no such user"), ("a\0b", "holds a NUL byte")]
)
def test_what_no_path_can_be(reference: str, words: str) -> None:
    with pytest.raises(BadRequest, match=rf"^component_paths.vae: .*{words}"):
        resolve_model(Settings.of(component_paths={"vae": reference}))


def test_the_files_of_a_model_and_of_a_component() -> None:
    nested = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/spiece.model"]
    root = ["config.json", "diffusion_pytorch_model-00001-of-2.safetensors", "merges.txt", "spiece.model"]
    others = ["README.md", "vae/model.bin", "vae/model.fp16.safetensors", "model.fp16.safetensors", "demo.mp4"]
    names = [*nested, *root, *others]
    assert set(filter_repo_objects(names, **MODEL_FILES)) == {*nested, "config.json"}
    code = ["pipeline.py", "transformer/own.py"]
    for trusted in (True, False):
        found = set(filter_repo_objects([*names, *code], **model_files(code=trusted)))
        assert found - {*nested, "config.json"} == set(code * trusted)
    assert set(filter_repo_objects(names, **COMPONENT_FILES)) == set(root)


NAMED = {"unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"], "safety_checker": [None, None]}
LIGHT = {"model_index.json": json.dumps({"_class_name": "P", **NAMED}), "unet/config.json": "{}"}
SHARDS = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
PLAIN = ["unet/diffusion_pytorch_model.safetensors.index.json", *SHARDS, "text_encoder/model.safetensors"]
VARIANTS = [
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/model.fp16.safetensors",
]


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of models with plain weights and variants, with variants alone, and with variants of what is not used."""
    light = {name: text.encode() for name, text in LIGHT.items()}

    def repository(*names: str) -> dict[str, bytes]:
        return {**light, **dict.fromkeys(names, b"weights")}

    unused = ("safety_checker/model.fp16.safetensors", "vae_1_0/model.fp16.safetensors")
    both, variants = repository(*PLAIN, *VARIANTS), repository(*SHARDS, VARIANTS[-1])
    hub = Hub({"owner/both": both, "owner/variants": variants, "owner/unused": repository(*PLAIN, *unused)})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "online"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    with served(hub):
        yield hub


def test_variants_stay_on_the_hub(online: Hub) -> None:
    part = {"unet": "owner/both/unet"}
    load = resolve_model(Settings.of(model_path="owner/both", component_paths=part))
    assert set(contents(load.folder)) == {*LIGHT, *PLAIN}
    assert load.component_folders == {"unet": load.folder / "unet"}
    assert set(contents(resolve_model(Settings.of(model_path="owner/unused")).folder)) == {*LIGHT, *PLAIN}


def test_variants_alone_are_refused_before_they_are_downloaded(online: Hub, tmp_path: Path) -> None:
    line = "^model_variant: 'owner/variants' .*text_encoder, such as text_encoder/model.fp16"
    with pytest.raises(NotBuilt, match=line):
        resolve_model(Settings.of(model_path="owner/variants"))
    assert online.asked == ["owner/variants:model_index.json"]
    (tmp_path / "mine").mkdir()
    replaced = Settings.of(model_path="owner/variants", component_paths={"text_encoder": str(tmp_path / "mine")})
    assert set(contents(resolve_model(replaced).folder)) == {*LIGHT, *SHARDS}


def test_a_revision_that_is_not_there_goes_by_its_name(online: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^revision: 'gone' is not in 'owner/both'"):
        resolve_model(Settings.of(model_path="owner/both", revision="gone"))
    (tmp_path / "mine" / "_overlay").mkdir(parents=True)
    (tmp_path / "mine" / MANIFEST).write_text(json.dumps({"source_revision": "lost"}))
    for revision, entry, words in (
        ("gone", str(tmp_path / "mine"), "^revision: 'gone' is not in 'owner/both'"),
        (None, str(tmp_path / "mine"), "^source_revision: 'lost' is not in 'owner/both'"),
        (None, {"overlay_repo_id": "owner/unused", "overlay_revision": "off"}, "overlay_revision: 'off'"),
    ):
        registry = json.dumps({"owner/both": entry})
        with pytest.raises(ModelError, match=words):
            resolve_model(Settings.of(model_path="owner/both", revision=revision, model_overlay_registry=registry))


def test_a_replaced_component_loads(tmp_path: Path) -> None:
    vae = Reference(DEMO_MODEL).folder(MODEL_FILES) / "vae"
    shutil.copytree(vae, tmp_path / "mine")
    load = resolve_model(Settings.of(component_paths={"vae": str(tmp_path / "mine")}))
    assert load_family(load, Mesh.solo(), Cpu(), lambda step, total: None).info.name == "WanPipeline"
    (tmp_path / "mine" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="mine: no weights"):
        load_family(load, Mesh.solo(), Cpu(), lambda step, total: None)


class BreakingOff(BaseHTTPRequestHandler):
    """A hub that sends half an answer, or one of another shape."""

    def do_GET(self) -> None:
        body = b'{"sha": "0123' if "half" in self.path else b"[1, 2]"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) + 100 * ("half" in self.path)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def broken_hub() -> Iterator[str]:
    """The address of a hub that no answer of can be used."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BreakingOff)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["half/an-answer", "another/shape"])
def test_a_download_that_breaks_off_is_one_line(name: str, broken_hub: str, tmp_path: Path) -> None:
    asked = ["generate", "--prompt", "x", "--model-path", name]
    done = sgld(*asked, folder=tmp_path, HF_ENDPOINT=broken_hub, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --model-path: '{name}' could not be downloaded: ")
    assert "Traceback" not in done.stderr
