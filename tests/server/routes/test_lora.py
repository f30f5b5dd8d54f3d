"""LoRA adapters over HTTP: set, merged, taken away, and one set for each request."""

from __future__ import annotations

import io
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from tests.adapters import write_adapter
from tests.server.test_server import Server, picture

PROMPT = "a red circle on a blue background"
ADMIN, USER = "an-admin-key-of-this-test", "a-user-key-of-this-test-"
VISIBLE = 1.0
KEYS = f"- {{name: studio, key: {USER}, tier: user}}\n- {{name: boss, key: {ADMIN}, tier: admin}}\n"
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a and b, one that does not fit, and the keys of the server."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate("abc"):
        write_adapter(folder / f"{name}.safetensors", seed)
    odd = ("transformer.nowhere.lora_A.weight", "transformer.nowhere.lora_B.weight")
    write_adapter(folder / "odd.safetensors", 9, extra=odd)
    (folder / "keys.yaml").write_text(KEYS)
    (folder / "keys.yaml").chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Server]:
    flags = ["--api-key-file", "keys.yaml", "--lora-path", "c.safetensors", "--lora-nickname", "third"]
    flags = [str(folder / flag) if "." in flag else flag for flag in flags]
    server = Server(folder / "out", *flags)
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


class Caller:
    """Somebody with a key."""

    def __init__(self, server: Server, key: str):
        self._url, self._key = server.url, key
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    def call(self, route: str, body: Any = None, *, typed: bool = True) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self._key}"} | ({"Content-Type": "application/json"} if typed else {})
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if route in ("list_loras", "capabilities") else "POST"
        request = urllib.request.Request(f"{self._url}/v1/{route}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=100) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused)

    def do(self, route: str, body: Any = None, **options: Any) -> Any:
        status, answer = self.call(route, body, **options)
        assert status == 200, answer
        return answer

    def picture(self, seed: int = 3, **extra: Any) -> np.ndarray:
        made = self.openai.images.generate(prompt=PROMPT, extra_body={"seed": seed, "num_inference_steps": 3, **extra})
        assert made.data is not None
        return picture(made.data[0].b64_json)


@pytest.fixture
def admin(served: Server) -> Iterator[Caller]:
    """One who may set adapters; none are set at first, and a and b have their names."""
    caller = Caller(served, ADMIN)
    paths = [str(served.folder.parent / f"{name}.safetensors") for name in "ab"]
    caller.do("set_lora", {"lora_nickname": ["a", "b"], "lora_path": paths})
    caller.do("unmerge_lora_weights")
    yield caller
    caller.openai.close()


@pytest.fixture
def user(served: Server) -> Iterator[Caller]:
    caller = Caller(served, USER)
    yield caller
    caller.openai.close()


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a.astype(int) - b).mean()) > VISIBLE


@pytest.fixture
def stranger(served: Server) -> Iterator[Caller]:
    """An admin who has changed nothing yet."""
    caller = Caller(served, ADMIN)
    yield caller
    caller.openai.close()


def test_adapters_of_the_command_line_hold_at_first(stranger: Caller, user: Caller, folder: Path) -> None:
    listed = user.do("list_loras")
    assert listed["loaded_adapters"] == [{"nickname": "third", "path": str(folder / "c.safetensors")}]
    (active,) = listed["active"]["transformer"]
    assert (active["nickname"], active["merged"], active["mode"], active["strength"]) == ("third", True, "merge", 1.0)
    before = user.picture()
    stranger.do("unmerge_lora_weights")
    assert differ(before, user.picture())
    assert user.do("list_loras")["active"] == {}
    stranger.do("merge_lora_weights")
    assert (user.picture() == before).all()


@pytest.mark.parametrize("typed", [True, False], ids=["json", "as curl -d sends it"])
def test_set_merge_and_unmerge(admin: Caller, folder: Path, typed: bool) -> None:
    plain = admin.picture()
    answer = admin.do("set_lora", {"lora_nickname": "a", "strength": 0.5}, typed=typed)
    told = "Successfully set LoRA adapter(s): a (target: all, strength: 0.50)"
    assert answer == {"status": "ok", "message": told}
    half = admin.picture()
    assert differ(half, plain)
    answer = admin.do("merge_lora_weights", {"strength": 1}, typed=typed)
    assert answer["message"] == "Successfully merged LoRA weights (target: all, strength: 1.00)"
    whole = admin.picture()
    assert differ(whole, half) and differ(whole, plain)
    answer = admin.do("unmerge_lora_weights", typed=typed)
    assert answer["message"] == "Successfully unmerged LoRA weights (target: all)"
    assert (admin.picture() == plain).all()
    answer = admin.do(
        "set_lora",
        {"lora_nickname": ["a", "b"], "lora_path": None, "strength": [0.5, 1], "target": ["all", "transformer"]},
        typed=typed,
    )
    assert answer["message"].endswith(": a, b (target: all, transformer, strength: 0.50, 1.00)")
    assert differ(admin.picture(), half)
    entries = admin.do("list_loras")["active"]["transformer"]
    assert [entry["nickname"] for entry in entries] == ["a", "b"] == entries[0]["nicknames"]
    assert entries[1]["path"] == str(folder / "b.safetensors") and entries[1]["strengths"] == [0.5, 1.0]
    admin.do("set_lora", {"lora_nickname": "a", "strength": 0.5, "merge_mode": "dynamic"})
    assert not admin.do("list_loras")["active"]["transformer"][0]["merged"]
    assert not differ(admin.picture(), half)


@pytest.mark.parametrize(
    ("route", "body", "param", "words"),
    [
        ("set_lora", {}, "lora_nickname", "it names no adapter"),
        ("set_lora", {"lora_nickname": []}, "lora_nickname", "it names no adapter"),
        ("set_lora", {"lora_nickname": "nobody"}, "lora_path", "no adapter is called 'nobody'"),
        ("set_lora", {"lora_nickname": ["a", "b"], "lora_path": "x"}, "lora_path", "a single path for 2"),
        ("set_lora", {"lora_nickname": ["a", "b"], "strength": [1]}, "strength", "1 given for 2"),
        ("set_lora", {"lora_nickname": "a", "strength": "1"}, "strength", "'1' is not a valid"),
        ("set_lora", {"lora_nickname": "a", "target": "critic"}, "target", "'critic' is not one of"),
        ("set_lora", {"lora_nickname": "a", "target": "transformer_2"}, "target", "this model has only"),
        ("set_lora", {"lora_nickname": "a", "merge_mode": "later"}, "merge_mode", "is not one of"),
        ("set_lora", {"lora_nickname": "a", "lora_paht": "x"}, "lora_paht", "did you mean lora_path?"),
        ("set_lora", {"lora_nickname": "x", "lora_path": "/none"}, "lora_path", "'/none'"),
        ("set_lora", {"lora_nickname": "x", "lora_path": "odd"}, "lora_path", "transformer.nowhere.lora_A.weight"),
        ("merge_lora_weights", {"target": "transformer_2"}, "target", "this model has only"),
        ("merge_lora_weights", {"strength": 1e9}, "strength", "out of range"),
        ("unmerge_lora_weights", {"target": "critic"}, "target", "is not one of"),
    ],
)
def test_a_wrong_request_changes_nothing(
    admin: Caller, folder: Path, route: str, body: dict[str, Any], param: str, words: str
) -> None:
    admin.do("set_lora", {"lora_nickname": "a"})
    before = admin.do("list_loras")
    if body.get("lora_path") == "odd":
        body = {**body, "lora_path": str(folder / "odd.safetensors")}
    status, answer = admin.call(route, body)
    assert status == 400 and answer["error"]["param"] == param and words in answer["error"]["message"], answer
    assert admin.do("list_loras") == before
    status, answer = admin.call("merge_lora_weights", {"strength": 1})
    assert status == 200


def test_only_an_admin_changes_the_model(admin: Caller, user: Caller) -> None:
    for route in ("set_lora", "merge_lora_weights", "unmerge_lora_weights"):
        status, answer = user.call(route, {"lora_nickname": "a"} if route == "set_lora" else {})
        assert status == 403 and "needs tier admin" in answer["detail"]
    assert user.do("list_loras")["active"] == {}


def test_a_request_brings_its_own(admin: Caller, user: Caller) -> None:
    plain = user.picture()
    alone = {name: user.picture(lora=name) for name in "ab"}
    assert differ(alone["a"], plain) and differ(alone["b"], plain) and differ(alone["a"], alone["b"])
    assert (user.picture(loras=[{"nickname": "a", "strength": 1.0, "target": "transformer"}]) == alone["a"]).all()
    assert (user.picture(loras=[{"nickname": "a", "strength": 0}]) == plain).all()
    admin.do("set_lora", {"lora_nickname": "b"})
    assert (user.picture() == alone["b"]).all()
    assert (user.picture(loras=[]) == alone["b"]).all(), "an empty list asks for nothing else"
    with ThreadPoolExecutor(6) as pool:
        asked = ["a", "b", "a", None, "b", "a"]
        made = list(pool.map(lambda name: user.picture(**({} if name is None else {"lora": name})), asked))
    for name, shown in zip(asked, made, strict=True):
        assert (shown == alone[name or "b"]).all(), "each as if it were alone"
    both = user.picture(loras=["a", {"nickname": "b", "strength": 0.5}])
    assert differ(both, alone["a"]) and differ(both, alone["b"])
    video = user.openai.videos.create_and_poll(
        prompt=PROMPT, extra_body={"loras": ["a"], "num_frames": 5, "num_inference_steps": 2}
    )
    assert video.status == "completed"


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"lora": "nobody"}, "loras", "no adapter is called 'nobody'"),
        ({"loras": [{"path": "{folder}/a.safetensors"}]}, "loras", "it is no Hugging Face id"),
        ({"loras": [{"nickname": "a", "path": "{folder}"}]}, "loras", "it is no Hugging Face id"),
        ({"lora": {"nickname": "a", "strenght": 1}}, "loras.strenght", "did you mean strength?"),
        ({"loras": "a"}, "loras", "is not a list"),
        ({"lora": "a", "loras": ["b"]}, "lora", "give one of them"),
        ({"lora": {"strength": 1}}, "loras.nickname", "it names no adapter"),
        ({"lora": {"nickname": "a", "target": "transformer_2"}}, "loras.target", "this model has only"),
        ({"loras": ["a"] * 17}, "loras", "at most 16"),
        ({"lora": 3}, "loras", "3 is not a valid map"),
    ],
)
def test_a_request_with_a_wrong_adapter(
    admin: Caller, user: Caller, folder: Path, given: dict[str, Any], param: str, words: str
) -> None:
    body = json.loads(json.dumps(given).replace("{folder}", str(folder)))
    with pytest.raises(openai.BadRequestError) as wrong:
        user.openai.images.generate(prompt=PROMPT, extra_body=body)
    assert wrong.value.param == param and words in wrong.value.message, wrong.value.message


def test_a_file_that_has_gone_is_told_without_its_path(admin: Caller, user: Caller, folder: Path) -> None:
    shutil.copyfile(folder / "a.safetensors", folder / "short-lived.safetensors")
    admin.do("set_lora", {"lora_nickname": "brief", "lora_path": str(folder / "short-lived.safetensors")})
    admin.do("unmerge_lora_weights")
    (folder / "short-lived.safetensors").unlink()
    with pytest.raises(openai.NotFoundError) as gone:
        user.picture(lora="brief")
    assert gone.value.body["message"] == "loras: 'brief' is gone from the server; send the request again"  # type: ignore[index]
    assert gone.value.param == "loras"


# Forms


def test_adapters_in_a_form(admin: Caller) -> None:
    """As the stock client writes them: nicknames, objects, JSON text; the types are those of JSON."""
    red = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(red, "png")

    def edit(**given: Any) -> np.ndarray:
        fields = {"seed": 3, "num_inference_steps": 4, "strength": 1, **given}
        made = admin.openai.images.edit(image=("red.png", red.getvalue()), prompt=PROMPT, extra_body=fields)
        assert made.data is not None
        return picture(made.data[0].b64_json)

    plain, a = edit(), edit(lora="a")
    assert differ(plain, a)
    half = edit(lora={"nickname": "a", "strength": 0.5, "strict": False})
    assert differ(half, plain) and differ(half, a)
    assert (edit(loras=["a"]) == a).all()
    assert (edit(loras=[{"nickname": "a", "strength": 0.5}]) == half).all()
    assert (edit(lora=json.dumps({"nickname": "a", "strength": 0.5})) == half).all()
    both = edit(loras=["b", {"nickname": "a", "strength": 0.5}])
    assert differ(both, half)
    assert (edit(loras=["b", json.dumps({"nickname": "a", "strength": 0.5})]) == both).all()
    wrong: list[tuple[Any, str, str]] = [
        ([{"nickname": "a"}, {"nickname": "b"}], "loras[][nickname]", "give each as JSON text in loras[]"),
        ([{"nickname": "a"}, {"path": "o/n"}], "loras[][path]", "give each as JSON text in loras[]"),
        ([{"nickname": "a", "strength": "much"}], "loras.strength", "'much' is not a valid number"),
        (["{"], "loras", "not valid JSON"),
        (["nobody"], "loras", "no adapter is called 'nobody'"),
    ]
    for given, param, words in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            edit(loras=given)
        assert refused.value.param == param and words in refused.value.message, refused.value.message


def test_capabilities_name_the_targets(admin: Caller) -> None:
    assert admin.do("capabilities")["lora_targets"] == ["transformer"]


# A restart


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait(10)
    server.client.close()


def finished(server: Server, id: str) -> np.ndarray:
    """The frames of a video, once it is completed."""
    deadline = time.monotonic() + 100
    while (video := server.client.videos.retrieve(id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert video.status == "completed", video.error
    with av.open(io.BytesIO(server.client.videos.download_content(id).content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of 255; the same frames, encoded twice, may differ a little."""
    return float(np.abs(a.astype(int) - b).mean())


def test_what_is_set_outlives_a_killed_server(folder: Path, tmp_path: Path) -> None:
    """A queued job is made as if the server had never died; other adapters on the command line win."""
    asked: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 3, "seed": 5}
    flags = ["--warmup", "off", "--lora-path", str(folder / "c.safetensors"), "--lora-nickname", "third"]
    servers = []

    def start(*flags: str) -> tuple[Server, Caller]:
        servers.append(Server(tmp_path / "out", *flags))
        servers[-1].wait_until_healthy()
        return servers[-1], Caller(servers[-1], "unused")

    try:
        server, caller = start(*flags)
        make = server.client.videos.create
        third = finished(server, make(prompt=PROMPT, extra_body=asked).id)
        caller.do("set_lora", {"lora_nickname": "a", "lora_path": str(folder / "a.safetensors"), "strength": 0.5})
        with_a = finished(server, make(prompt=PROMPT, extra_body=asked).id)
        assert apart(with_a, third) > 2, "the control: the adapter is seen"
        held = caller.do("list_loras")
        long = make(prompt=PROMPT, extra_body={"num_inference_steps": 1000}).id
        waiting = make(prompt=PROMPT, extra_body=asked).id
        kill(server)

        server, caller = start(*flags)
        assert caller.do("list_loras") == held
        server.client.videos.delete(long)
        assert apart(finished(server, waiting), with_a) < 0.5
        caller.do("unmerge_lora_weights")
        plain = caller.picture()
        kill(server)

        server, caller = start(*flags)
        assert caller.do("list_loras") == {**held, "active": {}}, "what was taken away does not come back"
        assert (caller.picture() == plain).all()
        caller.do("merge_lora_weights", {"strength": 0.5})
        assert caller.do("list_loras") == held
        kill(server)

        server, caller = start("--warmup", "off", "--lora-path", str(folder / "b.safetensors"))
        assert [lora["nickname"] for lora in caller.do("list_loras")["active"]["transformer"]] == ["default"]
        assert "are left out" in server.log.read_text()
    finally:
        for server in servers:
            if server.process.poll() is None:
                kill(server)


def test_a_server_does_not_start_without_what_was_set(folder: Path, tmp_path: Path) -> None:
    """Rather than make jobs silently without it; and it says what to do."""
    mine = tmp_path / "mine.safetensors"
    shutil.copyfile(folder / "a.safetensors", mine)
    server = Server(tmp_path / "out", "--warmup", "off")
    server.wait_until_healthy()
    Caller(server, "unused").do("set_lora", {"lora_nickname": "mine", "lora_path": str(mine)})
    kill(server)
    mine.unlink()
    server = Server(tmp_path / "out", "--warmup", "off")
    assert server.process.wait(100) == 1
    server.client.close()
    (line,) = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
    assert "cannot be set again: lora_path: " in line and "mine.safetensors" in line and "--lora-path" in line
