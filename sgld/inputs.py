"""Input pictures: read from local files, turned upright, laid on white, and cut to the size of the output."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import attrs
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sgld.errors import BadRequest, TooLarge

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
PICTURE, MASK = "image_path", "mask_path"
PAINTED = 128  # from this weight of a mask on, the model paints a pixel; below, it is only faded

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)
_OPAQUE = 255
_TURNED = (5, 6, 7, 8)  # EXIF orientations that lie on their side


@attrs.frozen
class Input:
    """A picture u8 [H, W, 3], and how far each pixel may change: a mask u8 [H, W] from 0 (stays) to 255 (anew)."""

    picture: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8] | None


def size_of(path: str) -> tuple[int, int]:
    """Width and height of a picture once it is upright, told from its header. Raises BadRequest, TooLarge."""
    with opened(path, path, PICTURE) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (image.height, image.width) if turned else image.size


def upright(path: str) -> Image.Image:
    """A picture file as RGB, turned as its EXIF orientation says, on white; of an animation the first frame.

    Raises:
        BadRequest: it is missing, damaged or no picture.
        TooLarge: it has more than `MAX_PIXELS` pixels.
    """
    with opened(path, path, PICTURE) as image:
        return _on_white(ImageOps.exif_transpose(image))


def named(path: str, image: Image.Image) -> Image.Image:
    """The image, for what `shown` tells of it."""
    image.info[PICTURE] = path
    return image


def shown(image: Image.Image) -> str:
    """An image in a message: its field, its file where `named` told it, and its size."""
    path = image.info.get(PICTURE)
    return f"{PICTURE}: {'a picture' if path is None else repr(path)} of {image.width}x{image.height} pixels"


def read(picture: str, mask: str | None, width: int, height: int) -> Input:
    """A picture file and its mask, if any, scaled to cover that size in pixels and cut to it about the centre.

    Transparent pixels are laid on white; an animation gives its first frame. In a mask what is transparent is painted
    anew; in a mask without transparency what is white is. Grey, or half transparent, is in between.

    Raises:
        BadRequest: a file that is missing, damaged or no picture, a mask of another size than its picture, or one
            that leaves nothing to paint.
        TooLarge: more than `MAX_PIXELS` pixels.
    """
    whole = upright(picture)
    pixels = _fit(whole, width, height, Image.Resampling.LANCZOS)
    if mask is None:
        return Input(pixels, None)
    weights = _fit(read_mask(mask, whole.size), width, height, Image.Resampling.BOX)
    if weights.max() < PAINTED:
        raise BadRequest(f"{mask!r} leaves nothing to paint once it is cut to {width}x{height} pixels", field=MASK)
    return Input(pixels, weights)


def read_mask(path: str, size: tuple[int, int]) -> Image.Image:
    """The mask of a picture of that width and height, as grey: white where it is painted anew. Raises as `read`."""
    with opened(path, path, MASK) as image:
        mask = _changes(ImageOps.exif_transpose(image))
    if mask.size != size:
        told, wanted = ("x".join(map(str, sides)) for sides in (mask.size, size))
        raise BadRequest(f"{path!r} is {told}; it must have the size of the picture, {wanted}", field=MASK)
    if np.asarray(mask).max() < PAINTED:
        raise BadRequest(f"{path!r} leaves nothing to paint: no pixel is transparent or white", field=MASK)
    return mask


@contextmanager
def opened(file: str | BytesIO, name: str, param: str) -> Iterator[Image.Image]:
    """An image whose header has been read; whatever goes wrong with it, while it is open too, tells that name.

    Raises:
        BadRequest: it is missing, damaged or no picture.
        TooLarge: it has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _bomb(name, param, f" of {image.width}x{image.height}")
            yield image
    except UnidentifiedImageError:
        allowed = ", ".join(FORMATS).lower()
        raise BadRequest(f"{name!r} is no picture that is taken; allowed are {allowed}", field=param) from None
    except _BOMBS:
        raise _bomb(name, param) from None
    except FileNotFoundError:
        raise BadRequest(f"{name!r}: no such file", field=param) from None
    except _DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadRequest(f"{name!r} cannot be read: {reason}", field=param) from None


def _bomb(name: str, param: str, size: str = "") -> TooLarge:
    return TooLarge(f"{name!r}{size} has more than {MAX_PIXELS} pixels, which is the limit", field=param)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent."""
    if not image.has_transparency_data:
        return _eight_bits(image).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _changes(image: Image.Image) -> Image.Image:
    """A mask as grey, white where the picture changes. An alpha channel that is opaque throughout says nothing."""
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != _OPAQUE:
            return ImageOps.invert(alpha)
    return _eight_bits(image).convert("RGB").convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion clips, as grey of 8."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def _fit(image: Image.Image, width: int, height: int, method: Image.Resampling) -> npt.NDArray[np.uint8]:
    return np.array(ImageOps.fit(image, (width, height), method), np.uint8)
