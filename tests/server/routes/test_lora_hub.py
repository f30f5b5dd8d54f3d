"""LoRA adapters from a Hugging Face hub, over the wire: a real server, its real client, and a hub on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.adapters import write_adapter
from tests.hub.local_hub import Hub, served
from tests.server.routes.test_lora import Caller, differ
from tests.server.test_server import Server

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("repositories")
    a, b, c = [write_adapter(folder / f"{seed}.safetensors", seed).read_bytes() for seed in (1, 2, 3)]
    hub = Hub(
        {
            "owner/single": {"ink.safetensors": a, "README.md": b"# Ink", "samples/one.bin": bytes(100)},
            "owner/several": {"oil.safetensors": b, "more/chalk.safetensors": c, "pen.safetensors": a},
            "owner/torn": {"torn.safetensors": c},
            "owner/nested": {"deep/oil.safetensors": b},
            "owner/empty": {"README.md": b"nothing yet"},
        }
    )
    hub.torn.add("torn.safetensors")
    with served(hub):
        yield hub


@pytest.fixture(scope="module")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(folder / "hf"))
        server = Server(folder / "out", "--warmup", "off")
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


@pytest.fixture
def caller(server: Server) -> Iterator[Caller]:
    caller = Caller(server, "unused")
    caller.do("unmerge_lora_weights")
    yield caller
    caller.openai.close()


def until_asked(hub: Hub, file: str) -> None:
    deadline = time.monotonic() + 60
    while file not in hub.asked:
        assert time.monotonic() < deadline, hub.asked
        time.sleep(0.02)


def test_a_download_holds_nobody_up(hub: Hub, server: Server, caller: Caller) -> None:
    """Off the queue and off the loop: the server answers, and makes pictures, until the adapter is there."""
    plain = caller.picture()
    hub.flowing.clear()
    with ThreadPoolExecutor(1) as pool:
        body = {"lora_nickname": "ink", "lora_path": "owner/single"}
        setting: Future[Any] = pool.submit(caller.do, "set_lora", body)
        try:
            until_asked(hub, "owner/single:ink.safetensors")
            for _ in range(20):
                began = time.monotonic()
                assert server.get("/health")[0] == 200
                assert time.monotonic() - began < 5, "the loop is held"
            assert (caller.picture() == plain).all() and not setting.done()
            assert caller.do("list_loras") == {"loaded_adapters": [], "active": {}}
        finally:
            hub.flowing.set()
        assert setting.result()["status"] == "ok"
    ink = caller.picture()
    assert differ(ink, plain)
    assert caller.do("list_loras")["loaded_adapters"] == [{"nickname": "ink", "path": "owner/single"}]
    caller.do("unmerge_lora_weights")
    caller.do("set_lora", {"lora_nickname": "again", "lora_path": "owner/single"})
    assert (caller.picture() == ink).all()
    assert [file for file in hub.asked if file.startswith("owner/single")] == ["owner/single:ink.safetensors"], (
        "neither twice, nor what is no adapter"
    )


def test_one_file_of_several(hub: Hub, caller: Caller) -> None:
    plain = caller.picture()
    status, answer = caller.call("set_lora", {"lora_nickname": "x", "lora_path": "owner/several"})
    assert (status, answer["error"]["param"]) == (400, "lora_path")
    assert "name one as owner/several:oil.safetensors" in answer["error"]["message"]
    caller.do("set_lora", {"lora_nickname": "chalk", "lora_path": "owner/several:more/chalk.safetensors"})
    chalk = caller.picture()
    caller.do("set_lora", {"lora_nickname": "oil", "lora_path": "owner/several/oil.safetensors"})
    assert differ(chalk, plain) and differ(caller.picture(), chalk)
    caller.do("unmerge_lora_weights")
    assert (caller.picture(loras=[{"path": "owner/several:more/chalk.safetensors"}]) == chalk).all()
    downloaded = sorted(file for file in hub.asked if file.startswith("owner/several"))
    assert downloaded == ["owner/several:more/chalk.safetensors", "owner/several:oil.safetensors"]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("owner/torn", "'owner/torn' could not be downloaded"),
        ("owner/none", "Hugging Face has no repository 'owner/none'"),
        ("owner/single:none.safetensors", "'owner/single' has no 'none.safetensors'"),
        ("owner/empty", "'owner/empty' holds no .safetensors file"),
        ("owner/nested", "name one as owner/nested:deep/oil.safetensors"),
    ],
)
def test_a_download_that_fails_changes_nothing(caller: Caller, server: Server, reference: str, words: str) -> None:
    caller.do("set_lora", {"lora_nickname": "ink", "lora_path": "owner/single"})
    before = caller.do("list_loras")
    status, answer = caller.call("set_lora", {"lora_nickname": "x", "lora_path": reference})
    assert (status, answer["error"]["param"]) == (400, "lora_path") and words in answer["error"]["message"], answer
    assert caller.do("list_loras") == before
    assert "Traceback" not in server.log.read_text()


def test_a_torn_download_is_made_good(hub: Hub, caller: Caller) -> None:
    """Half a file is never taken for the whole."""
    hub.torn.clear()
    plain = caller.picture()
    caller.do("set_lora", {"lora_nickname": "torn", "lora_path": "owner/torn"})
    assert differ(caller.picture(), plain)
