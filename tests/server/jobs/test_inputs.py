"""Pictures from clients: honest ones, hostile ones, and where they are kept."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from sgld import inputs
from sgld.errors import BadRequest, OutputError, SgldError, TooLarge
from sgld.inputs import MAX_PIXELS
from sgld.server.jobs.inputs import UploadedPicture, folder, keep, read_picture, remove, safe_name, sweep

WIDTH, HEIGHT = 12, 8


def scene(mode: str = "RGB") -> Image.Image:
    """Red above blue, so that every way of turning it shows."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, :, 0] = 255
    pixels[HEIGHT // 2 :, :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def packed(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def opened(picture: UploadedPicture) -> Image.Image:
    return Image.open(io.BytesIO(picture.data))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    """A few hundred bytes that claim to be enormous."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


async def refusal(data: bytes, kind: type[SgldError] = BadRequest, name: str | None = "my cat.png") -> str:
    with pytest.raises(kind) as refused:
        await read_picture(data, name, "image[1]")
    assert type(refused.value) is kind and refused.value.param == "image[1]"
    assert refused.value.message.startswith("image[1]: 'my-cat'")
    return refused.value.message


@pytest.mark.parametrize(
    ("format", "mode"),
    [(format, mode) for format in ("png", "jpeg", "webp") for mode in ("RGB", "L")]
    + [("png", "RGBA"), ("png", "P"), ("png", "1"), ("png", "I;16"), ("webp", "RGBA"), ("jpeg", "CMYK")],
)
async def test_one_upright_picture_is_kept_byte_for_byte(format: str, mode: str) -> None:
    image = scene("L").convert("I").convert("I;16") if mode == "I;16" else scene(mode)
    data = packed(image, format)
    assert await read_picture(data, "a.bin", "image") == UploadedPicture(data, format, WIDTH, HEIGHT, "a")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format", "mode"), [("jpeg", "RGB"), ("jpeg", "CMYK"), ("png", "RGBA"), ("webp", "RGB")])
async def test_exif_turns_the_picture(format: str, mode: str, orientation: int) -> None:
    """However the camera was held, red comes out above blue."""
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    back |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    image = scene(mode)
    stored = image.transpose(Image.Transpose[back[orientation]]) if orientation in back else image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = await read_picture(packed(stored, format, exif=exif), None, "image")
    assert (picture.width, picture.height) == (WIDTH, HEIGHT)
    with opened(picture) as turned:
        assert turned.size == (WIDTH, HEIGHT)
        assert turned.getexif().get(ExifTags.Base.Orientation, 1) == 1
        pixels = np.asarray(turned.convert("RGB")).astype(int)
    assert (pixels[1, :, 0] - pixels[1, :, 2] > 150).all()
    assert (pixels[-2, :, 2] - pixels[-2, :, 0] > 150).all()
    assert picture.format == (format if orientation == 1 else "png")


@pytest.mark.parametrize("format", ["gif", "webp", "png"])
async def test_an_animation_gives_its_first_frame(format: str) -> None:
    blank = Image.new("RGB", (WIDTH, HEIGHT), "white")
    data = packed(
        scene(),
        format,
        save_all=True,
        append_images=[blank, scene()],
        **({"lossless": True} if format == "webp" else {}),
    )
    picture = await read_picture(data, "dance.gif", "image")
    assert picture.format == "png"
    with opened(picture) as frame:
        assert not frame.is_animated
        assert np.array_equal(np.asarray(frame.convert("RGB")), np.asarray(scene()))


async def test_a_still_gif_becomes_a_png() -> None:
    picture = await read_picture(packed(scene("P"), "gif"), "x.gif", "image")
    assert (picture.format, picture.width, picture.height) == ("png", WIDTH, HEIGHT)


async def test_transparency_survives() -> None:
    image = scene("RGBA")
    image.putalpha(Image.new("L", image.size, 77))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    picture = await read_picture(packed(image, "png", exif=exif), None, "mask")
    with opened(picture) as turned:
        assert set(np.asarray(turned)[..., 3].flat) == {77}


async def test_no_profile_and_no_place_is_kept_of_a_turned_picture() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "somebody at home"
    data = packed(scene(), "jpeg", exif=exif, icc_profile=b"secret profile")
    assert b"somebody at home" in data and b"secret profile" in data
    picture = await read_picture(data, None, "image")
    with opened(picture) as image:
        assert "icc_profile" not in image.info and ExifTags.Base.Artist not in image.getexif()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        bytes(1000),
    ]
    + [packed(scene(), format) for format in ("bmp", "tiff", "ppm", "ico", "tga")],
    ids=["empty", "text", "svg", "pdf", "eps", "zeros", "bmp", "tiff", "ppm", "ico", "tga"],
)
async def test_other_formats_are_refused(data: bytes) -> None:
    assert "allowed are png, jpeg, webp, gif" in await refusal(data)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif"])
async def test_a_truncated_picture_is_refused(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = packed(noise, format)
    await read_picture(data, None, "image")
    for share in (0.9, 0.5):
        await refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif"])
async def test_any_damage_gives_a_picture_or_a_refusal(format: str) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {} if format == "gif" else {"exif": exif}
    data = packed(scene(), format, **options)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF
        for _ in range(200):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                damaged[at] = rng.integers(256)
            try:
                await read_picture(bytes(damaged), None, "image")
            except (BadRequest, TooLarge):
                refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("width", "height"), [(8001, 8000), (10_000, 10_000), (20_000, 20_000), (100_000, 100_000), (64_000_001, 1)]
)
@pytest.mark.parametrize("filter", ["default", "error"])
async def test_a_bomb_is_refused_from_its_header(
    width: int, height: int, filter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done with Pillow's warning; and nothing is decoded."""

    def load(_: Image.Image) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with warnings.catch_warnings():
        warnings.simplefilter(filter, Image.DecompressionBombWarning)  # type: ignore[arg-type]
        if filter == "default":
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert f"more than {MAX_PIXELS} pixels" in await refusal(huge_png(width, height), TooLarge)


async def test_the_limit_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_PIXELS", WIDTH * HEIGHT)
    data = packed(scene(), "png")
    await read_picture(data, None, "image")
    monkeypatch.setattr(inputs, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    assert "of 12x8" in await refusal(data, TooLarge)


async def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    data = packed(scene(), "png")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))
    await refusal(data[:33] + bomb + data[33:])


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("holiday.jpg", "holiday"),
        ("My Cat (1).PNG", "My-Cat-1"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system"),
        ("/etc/cron.d/x", "x"),
        ("a.php.png", "a-php"),
        (".htaccess", "htaccess"),
        ("..", "picture"),
        ("", "picture"),
        (None, "picture"),
        ("\0\n\r\x1b[31m.png", "31m"),
        ("снимок.png", "picture"),
        ("-rf", "rf"),
        ("x" * 300 + ".png", "x" * 40),
        ("a\u202egnp.exe", "a-gnp"),
        ("con$(id)`id`;'\"<b>.png", "con-id-id-b"),
    ],
)
def test_a_clients_name_becomes_harmless(name: str | None, safe: str) -> None:
    assert safe_name(name) == safe


async def test_kept_under_a_name_of_our_own(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "uploads"
    picture = await read_picture(packed(scene(), "jpeg"), "../../my cat.exe", "image")
    names = [await keep(picture, root) for _ in range(2)]
    assert len(set(names)) == 2
    for name in names:
        random, _, rest = name.partition("-")
        assert len(random) == 32 and rest == "my-cat.jpeg"
        assert (root / name).read_bytes() == picture.data
    assert listed(root) == sorted(names), "and nothing else"
    assert listed(tmp_path) == ["deep"]
    await remove(names[:1], root)
    assert listed(root) == names[1:]
    await remove(names, root)  # one is gone already
    assert listed(root) == []


async def test_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that is full in the middle of the file leaves nothing, and the client does not learn the path."""
    picture = await read_picture(packed(scene(), "png"), "x.png", "image")
    (tmp_path / "file").write_text("no folder")
    for root in (tmp_path / "file", Path("/dev/full")):
        with pytest.raises(OutputError) as failed:
            await keep(picture, root)
        assert str(root) not in failed.value.message and str(root) in caplog.text


async def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = await read_picture(packed(scene(), "png"), "x.png", "image")

    def full(path: Path, data: bytes) -> int:
        path.open("wb").write(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError):
            await keep(picture, tmp_path)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "/etc/passwd"])
async def test_nothing_outside_the_root_is_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").touch()
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(BadRequest):
        await remove([name], root)
    assert (tmp_path / "x").exists()


def test_servers_with_other_results_have_other_folders(tmp_path: Path) -> None:
    mine, again, other = [folder(tmp_path, tmp_path / name) for name in ("a", "a", "b")]
    assert mine == again != other and mine.parent == tmp_path
    assert folder(tmp_path, None) != folder(tmp_path, None), "without a journal there is no next server"


def test_a_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the working directory of the next server: jobs that outlive this one name the files in it."""
    monkeypatch.chdir(tmp_path)
    for results in (tmp_path / "out", None):
        assert folder(Path("inputs"), results).parent == tmp_path / "inputs"


async def test_a_sweep_spares_what_jobs_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    await sweep((), root)
    picture = await read_picture(packed(scene(), "png"), "x.png", "image")
    kept, left = [await keep(picture, root) for _ in range(2)]
    (root / ".sgld-0.part").touch()
    (root / "stubborn").mkdir()
    await sweep({kept, "gone.png"}, root)
    assert listed(root) == sorted([kept, "stubborn"]) and left not in listed(root)
    assert "cannot remove" in caplog.text and "stubborn" in caplog.text
    (root / "stubborn").rmdir()
    await sweep((), root)
    assert not root.exists()
