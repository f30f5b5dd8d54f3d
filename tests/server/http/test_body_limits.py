"""Bodies that are small to send and long to read: the answer is short, and so is what was done for it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from sgld.convert import MAX_CHARACTERS, MAX_ENTRIES
from sgld.errors import BadRequest
from sgld.server.http.body import MAX_COMMAS, split
from sgld.server.http.errors import error_response
from sgld.server.http.schema import ImageFields
from tests.server.jobs.test_jobs import Client, Start, start
from tests.server.routes.test_routes import IMAGES, VIDEOS, refusal

__all__ = ["start"]
MIB = 2**20
SHORT = 1000  # characters of an answer


class Unread(list[Any]):
    """A list that nobody may walk."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("its length says enough")


async def posted(client: Client, path: str, text: str) -> dict[str, Any]:
    """The refusal of a JSON body, while another request is answered."""
    json_type = {"Content-Type": "application/json"}
    refused = refusal(client, "POST", path, data=io.BytesIO(text.encode()), headers=json_type)
    (status, error, headers), (health, _) = await asyncio.gather(refused, client.call("GET", "/health"))
    assert (status, health) == (400, 200)
    assert int(headers["Content-Length"]) < SHORT
    return error


def body(name: str, value: Any) -> str:
    return json.dumps({"prompt": "{}", name: value})


COMMAS = f"the body is not valid JSON: it has more than {MAX_COMMAS} commas"
HUGE: list[tuple[str, Any, str]] = [
    ("loras", ["a"] * 10**6, COMMAS),
    ("seed", [1] * 5 * 10**6, COMMAS),
    ("k" * 16 * MIB, 1, "unknown parameter 'kkk"),
    ("priority", "p" * 16 * MIB, f"priority: {16 * MIB} characters are too many; at most 32768 are allowed"),
    ("size", "s" * 30 * MIB, f"size: {30 * MIB} characters are too many; at most 32768 are allowed"),
]


async def test_a_huge_value_gets_a_short_answer(start: Start) -> None:
    client = await start()
    for name, value, says in HUGE:
        error = await posted(client, VIDEOS, body(name, value))
        assert error["message"].startswith(says)
        assert says == COMMAS or error["param"].startswith(name[:100])


LONG: list[tuple[str, Any, str]] = [
    ("loras", ["a"] * 90_000, "loras: 90000 entries are too many; at most 1000 are allowed"),
    ("loras", ["a"] * 17, "loras: 17 adapters are too many; at most 16 are allowed"),
    ("loras", json.dumps(["a"] * 17), "loras: 17 adapters are too many; at most 16 are allowed"),
    ("loras", f"[{' ' * 32768}]", "loras: '[   "),
    ("loras", {"a": 1}, "loras: {'a': 1} is not a list of adapters"),
    ("loras", [{f"a{i}": 1 for i in range(90_000)}], "unknown key 'loras.a0'"),
    ("loras", [{"nickname": "a", "target": "t" * 900}], "loras.target: 'ttt"),
    ("seed", [1] * 90_000, "seed: 90000 entries are too many; at most 1000 are allowed"),
    ("seed", [1] * 900, "seed: 900 seeds for 1 outputs per prompt"),
    ("images", ["https://example.com"] * 90_000, "images: 90000 entries are too many; at most 1000 are allowed"),
    ("prompt", ["p"] * 900, "prompt: ['p', 'p', "),
    ("extra_body", ["e"] * 900, "extra_body: ['e', 'e', "),
    ("size", "s" * 900, "size: 'sss"),
    ("priority", "p" * 900, "priority: 'ppp"),
    ("user", "u" * 40_000, "user: 40000 characters are too many; at most 32768 are allowed"),
    ("save_output", "n" * 90_000, "save_output: 'nnn"),
    ("n", "n" * 900, "n: 'nnn"),
]


async def test_a_long_value_is_named_and_shortened(start: Start) -> None:
    client = await start()
    for name, value, says in LONG:
        error = await posted(client, IMAGES, body(name, value))
        assert error["message"].startswith(says)
        assert error["param"].partition(".")[0] == name


async def test_a_key_that_stands_twice_is_shortened(start: Start) -> None:
    key = json.dumps("k" * MIB)
    error = await posted(await start(), IMAGES, f"{{{key}: 1, {key}: 2}}")
    assert error["message"].endswith("kkk...: given several times; give it once")
    assert error["param"].endswith("kkk...")


async def test_an_unknown_model_has_its_own_code(start: Start) -> None:
    client = await start()
    for model, told in (("another", "'another'"), ("m" * 4000, f"'{'m' * 116}...")):
        asked = refusal(client, "POST", IMAGES, json={"prompt": "{}", "model": model})
        for answer in (asked, refusal(client, "GET", f"/v1/models/{model}")):
            status, error, _ = await answer
            assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert error["message"].startswith(f"model: {told} is not served here; ")


def test_no_error_sends_back_what_was_sent() -> None:
    answer = error_response(BadRequest("m" * MIB, "p" * MIB))
    assert isinstance(answer.text, str) and len(answer.text) < 5000
    answer = error_response(BadRequest("m" * 2000, "p" * 120))
    assert json.loads(str(answer.text))["error"].items() >= {"message": "m" * 2000, "param": "p" * 120}.items()


def test_lists_are_measured_before_they_are_walked() -> None:
    with pytest.raises(BadRequest, match=r"^loras: 17 adapters are too many; at most 16 are allowed$"):
        split({"prompt": "", "loras": Unread(["a"] * 17)}, ImageFields)
    with pytest.raises(AssertionError):
        split({"prompt": "", "loras": Unread(["a"] * 16)}, ImageFields)


async def test_whatever_is_allowed_still_passes(start: Start) -> None:
    """The longest prompts, all commas, and a list of every output's seed."""
    client = await start()
    fields = {"negative_prompt": "," * MAX_CHARACTERS, "n": 10, "seed": [*range(10)], "size": "16x16"}
    prompt = '{"a":"' + "," * (MAX_CHARACTERS - 8) + '"}'
    status, answer = await client.call("POST", IMAGES, json={"prompt": prompt, **fields, "output_format": "webp"})
    assert (status, answer.get("seeds")) == (200, [*range(10)]), answer
    _, error, _ = await refusal(client, "POST", IMAGES, json={"prompt": "{}", "loras": ["a"] * 16})
    assert error["message"] == "loras: this model takes no LoRA adapters"
    _, error, _ = await refusal(client, "POST", IMAGES, json={"prompt": "{}", "seed": [1] * MAX_ENTRIES})
    assert error["message"].startswith(f"seed: {MAX_ENTRIES} seeds for 1 outputs")
