"""`sgld generate --image-path`: files are found and checked before a worker starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgld.cli.plan import plan_of
from sgld.cli.sources import Layer
from sgld.errors import BadRequest
from tests import media_files
from tests.cli.command import sgld

QUICK = ("--num-inference-steps", "4", "--num-frames", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with `in/cat.png` of 120 x 60."""
    (tmp_path / "in").mkdir()
    ramp = np.tile(np.arange(120, dtype=np.uint8)[:, None] * 2, (60, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "in" / "cat.png")
    return tmp_path


def test_relative_paths_home_and_the_pictures_shape(folder: Path) -> None:
    asked = ("--prompt", "a red circle", "--seed", "3", "--strength", "0.5", *QUICK, "--output-path", "o")
    near = sgld("generate", *asked, "--image-path", "in/cat.png", "--output-file-name", "a.png", folder=folder)
    assert near.returncode == 0, near.stderr
    assert "warning: size: 96x96 becomes 120x48, after the picture's 120x60 pixels" in near.stderr
    home = sgld(
        "generate", *asked, "--image-path", "~/cat.png", "--output-file-name", "b.png", folder=folder,
        HOME=str(folder / "in"),
    )  # fmt: skip
    assert home.returncode == 0, home.stderr
    one, two = (media_files.decode(folder / "o" / name)[0] for name in ("a.png", "b.png"))
    assert (one == two).all() and one.shape[1] < one.shape[2], "wider than high, as the picture is"
    told = media_files.read_metadata(folder / "o" / "a.png")
    assert (told["image_path"], told["strength"]) == (["cat.png"], 0.5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--image-path", "none.png"), "error: --image-path: '{folder}/none.png': no such file"),
        (("--image-path", "in"), "error: --image-path: '{folder}/in' cannot be read: Is a directory"),
        (("--image-path", "in/cat.png", "--mask-path", "none.png"),
         "error: --mask-path: '{folder}/none.png': no such file"),
        (("--strength", "0.5"), "error: --strength: it needs a picture to start from"),
        (("--mask-path", "in/cat.png"), "error: --mask-path: it needs a picture to start from"),
    ],
)  # fmt: skip
def test_a_file_that_is_missing_is_told_before_a_worker_starts(words: tuple[str, ...], line: str, folder: Path) -> None:
    done = sgld("generate", "--prompt", "a cat", *words, folder=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [line.format(folder=folder)], "and nothing was loaded"


def plan(**values: object) -> list[dict[str, object]]:
    return plan_of(Layer(values, {})).sampling


def test_pictures_are_dealt_out_to_prompts() -> None:
    given = plan(prompt=["a", "b"], image_path=["/x.png", "/y.png"])
    assert [values["image_path"] for values in given] == [["/x.png"], ["/y.png"]]
    given = plan(prompt=["a", "b"], image_path=["/x.png"])
    assert [values["image_path"] for values in given] == [["/x.png"], ["/x.png"]]
    assert plan(prompt="a", image_path=["/x.png", "/y.png"])[0]["image_path"] == ["/x.png", "/y.png"]
    with pytest.raises(BadRequest, match="image_path: 3 pictures for 2 prompts; give one, or one for each prompt"):
        plan(prompt=["a", "b"], image_path=["/x.png", "/y.png", "/z.png"])
