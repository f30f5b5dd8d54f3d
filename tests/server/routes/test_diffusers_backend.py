"""A diffusers pipeline behind the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.server.test_server import Server, picture
from tools import tiny

SMALL = {"size": "48x32", "num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ovis")
    model = tiny.makers()["ovis-image"](folder / "model")
    (model / "generation_config.json").write_text('{"height": 32, "width": 32}')
    server = Server(folder / "out", "--model-path", str(model), "--backend", "diffusers", "--served-model-name", "ovis")
    server.wait_until_healthy()
    yield server
    assert server.stop() == 0


def test_pictures_with_arguments_of_the_pipeline_s_own(server: Server) -> None:
    def make(**more: object) -> np.ndarray:
        made = server.client.images.generate(prompt="a red cat", extra_body=SMALL | more)
        assert made.data is not None
        return picture(made.data[0].b64_json)

    plain = make()
    assert plain.shape == (32, 48, 3)
    assert (make() == plain).all()
    assert np.abs(make(diffusers_kwargs={"sigmas": [1.0, 0.3]}).astype(int) - plain).max() > 5
    assert np.abs(make(extra_body={"diffusers_kwargs": {"sigmas": [1.0, 0.3]}}).astype(int) - plain).max() > 5


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"diffusers_kwargs": {"generator": 1}}, "diffusers_kwargs.generator", "sgld itself decides it"),
        ({"diffusers_kwargs": {"sigma": 1}}, "diffusers_kwargs.sigma", "did you mean sigmas"),
        ({"diffusers_kwargs": {"latents": [1, 2]}}, "diffusers_kwargs", "OvisImagePipeline cannot run with them"),
        ({"diffusers_kwargs": {"joint_attention_kwargs": {"a": ["/etc/passwd"]}}},
         "diffusers_kwargs.joint_attention_kwargs", "no text is taken here"),
        ({"diffusers_kwargs": "x"}, "diffusers_kwargs", "map of names to values"),
        ({"true_cfg_scale": 2}, "true_cfg_scale", "the call of OvisImagePipeline has no argument true_cfg_scale"),
    ],
)  # fmt: skip
def test_what_the_pipeline_does_not_take_is_refused(
    server: Server, fields: dict[str, object], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        server.client.images.generate(prompt="a red cat", extra_body=SMALL | fields)
    assert refused.value.param == param


def test_it_is_described_as_any_model(server: Server) -> None:
    status, told = server.get("/v1/capabilities")
    assert (status, told["name"], told["tasks"]) == (200, "OvisImagePipeline", ["text-to-image"])
    assert "diffusers_kwargs" in told["fields"] and "flow_shift" in told["unsupported"]
    assert Path(server.folder).is_dir()
