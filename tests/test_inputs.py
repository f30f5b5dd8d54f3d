"""Input pictures and masks: what the model gets to see of a file."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sgld import inputs
from sgld.errors import BadRequest, TooLarge

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def halves() -> Image.Image:
    """Red on the left, blue on the right: 60 x 40."""
    image = Image.new("RGB", (60, 40), RED)
    image.paste(BLUE, (30, 0, 60, 40))
    return image


def saved(folder: Path, image: Image.Image, name: str = "picture.png", **options: object) -> str:
    image.save(folder / name, **options)  # type: ignore[arg-type]
    return str(folder / name)


def test_a_picture_covers_the_size_and_is_cut_about_its_centre(halves: Image.Image, tmp_path: Path) -> None:
    halves.paste(WHITE, (0, 0, 10, 40))
    halves.paste(WHITE, (50, 0, 60, 40))
    made = inputs.read(saved(tmp_path, halves), None, 20, 20)
    assert made.mask is None and made.picture.shape == (20, 20, 3)
    assert (made.picture[:, 4:6] == RED).all() and (made.picture[:, 14:16] == BLUE).all(), "the white sides are cut off"
    same = inputs.read(saved(tmp_path, halves), None, 60, 40).picture
    assert (same == np.asarray(halves)).all(), "a picture of that size stays as it is"


def test_exif_turns_it(halves: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its top is on the right
    path = saved(tmp_path, halves, exif=exif)
    assert inputs.size_of(path) == (40, 60)
    assert inputs.size_of(saved(tmp_path, halves, "plain.png")) == (60, 40)
    picture = inputs.read(path, None, 40, 60).picture
    assert (picture[:30] == RED).all() and (picture[30:] == BLUE).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    picture = inputs.read(saved(tmp_path, image.convert(mode)), None, 16, 16).picture
    assert (picture[:, :8] == 255).all() and (picture[:, 8:] == 0).all()


def test_grey_of_16_bits_is_not_clipped(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 16, dtype=np.uint16), (16, 1))
    picture = inputs.read(saved(tmp_path, Image.fromarray(ramp)), None, 16, 16).picture
    assert (picture[..., 0] == np.round(ramp / 257)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
@pytest.mark.parametrize("format", ["png", "jpg", "gif", "webp"])
def test_modes_and_formats(halves: Image.Image, mode: str, format: str, tmp_path: Path) -> None:
    able = {"png": ("1", "L", "P", "RGB"), "jpg": ("1", "L", "CMYK", "RGB"), "gif": ("1", "L", "P", "RGB")}
    if mode not in able.get(format, ("RGB",)):
        pytest.skip("no such files")
    picture = inputs.read(saved(tmp_path, halves.convert(mode), f"a.{format}"), None, 60, 40).picture
    assert picture.shape == (40, 60, 3)
    expected = np.asarray(halves.convert(mode).convert("RGB")).astype(int)
    assert np.abs(picture - expected).mean() < 6


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (inputs.read(path, None, 16, 16).picture == RED).all()


def transparent() -> Image.Image:
    """A mask by OpenAI's rule: its right half is to be painted."""
    image = Image.new("RGBA", (60, 40), "white")
    image.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return image


def white() -> Image.Image:
    """The same without transparency."""
    image = Image.new("L", (60, 40), 0)
    image.paste(255, (30, 0, 60, 40))
    return image


@pytest.mark.parametrize(
    "mask", [transparent(), white(), white().convert("1"), white().convert("RGBA")], ids=lambda m: m.mode
)
def test_masks(mask: Image.Image, halves: Image.Image, tmp_path: Path) -> None:
    picture, drawn = saved(tmp_path, halves), saved(tmp_path, mask, "mask.png")
    made = inputs.read(picture, drawn, 30, 20).mask
    assert made is not None and made.shape == (20, 30)
    assert (made[:, :15] == 0).all() and (made[:, 15:] == 255).all()


def test_a_mask_must_go_with_its_picture(halves: Image.Image, tmp_path: Path) -> None:
    picture = saved(tmp_path, halves)
    small = saved(tmp_path, white().resize((30, 20)), "small.png")
    with pytest.raises(BadRequest, match=r"mask_path: '.*small.png' is 30x20; .* size of the picture, 60x40"):
        inputs.read(picture, small, 30, 20)
    for name, mask in (("black.png", Image.new("L", (60, 40))), ("opaque.png", Image.new("RGBA", (60, 40), "black"))):
        with pytest.raises(BadRequest, match="leaves nothing to paint: no pixel is transparent or white"):
            inputs.read(picture, saved(tmp_path, mask, name), 30, 20)
    edge = Image.new("L", (60, 40))
    edge.paste(255, (0, 0, 4, 40))
    with pytest.raises(BadRequest, match="leaves nothing to paint once it is cut to 16x16"):
        inputs.read(picture, saved(tmp_path, edge, "edge.png"), 16, 16)


def png_header(width: int, height: int) -> bytes:
    """A picture that claims that size, and holds nothing."""
    size = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    chunks = [
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in (size, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_files_that_are_refused(halves: Image.Image, tmp_path: Path) -> None:
    whole = Path(saved(tmp_path, Image.effect_noise((64, 64), 50), "whole.png")).read_bytes()
    cases = {"torn.png": whole[:900], "text.png": b"no picture", "empty.png": b"", "vector.svg": b"<svg/>"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadRequest, match=f"^image_path: '.*{name}' (cannot be read|is no picture)"):
            inputs.read(str(tmp_path / name), None, 16, 16)
    for missing in ("none.png", "whole.png/none.png"):
        with pytest.raises(BadRequest, match="^image_path: '.*none.png'"):
            inputs.size_of(str(tmp_path / missing))
    with pytest.raises(BadRequest, match="^image_path: '.*' cannot be read: Is a directory"):
        inputs.size_of(str(tmp_path))
    for width in (9000, 60000):  # beyond our limit, and beyond Pillow's own
        (tmp_path / "bomb.png").write_bytes(png_header(width, 9000))
        with pytest.raises(TooLarge, match=r"^image_path: '.*bomb.png'.* more than 64000000 pixels"):
            inputs.size_of(str(tmp_path / "bomb.png"))
