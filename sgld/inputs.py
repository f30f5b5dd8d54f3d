"""Read input pictures: turn them upright, put them on white, and cut them to the size of the output."""

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

from sgld.errors import BadRequest, MissingFile, TooLarge

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
    """Read the width and height of an upright picture from its header. Raises BadRequest, TooLarge."""
    with opened(path, path, PICTURE) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (image.height, image.width) if turned else image.size


def upright(path: str) -> Image.Image:
    """Read a picture as RGB on white, turned as its EXIF orientation says. An animation gives its first frame.

    Raises:
        BadRequest: the file is missing, damaged or no picture.
        TooLarge: it has more than `MAX_PIXELS` pixels.
    """
    with opened(path, path, PICTURE) as image:
        return _on_white(ImageOps.exif_transpose(image))


def named(path: str, image: Image.Image) -> Image.Image:
    """Mark an image with its file, for `refused`."""
    image.info[PICTURE] = path
    return image


def refused(image: Image.Image, reason: str) -> BadRequest:
    """Return an error about an image; it names the file that `named` gave it, and its size."""
    path = image.info.get(PICTURE)
    size = f"of {image.width}x{image.height} pixels {reason}"
    return BadRequest(f"a picture {size}" if path is None else f" {size}", field=PICTURE, file=path)


def read(picture: str, mask: str | None, width: int, height: int) -> Input:
    """Read a picture and its mask, scale them to cover that size in pixels, and cut them about the centre.

    Transparent pixels become white. An animation gives its first frame. The transparent part of a mask is painted
    anew; of a mask without transparency, the white part. Grey and half-transparent pixels are in between.

    Raises:
        BadRequest: a file is missing, damaged or no picture, or the mask has another size than its picture or leaves
            nothing to paint.
        TooLarge: a file has more than `MAX_PIXELS` pixels.
    """
    whole = upright(picture)
    pixels = _fit(whole, width, height, Image.Resampling.LANCZOS)
    if mask is None:
        return Input(pixels, None)
    weights = _fit(read_mask(mask, whole.size), width, height, Image.Resampling.BOX)
    if weights.max() < PAINTED:
        raise BadRequest(f" leaves nothing to paint once it is cut to {width}x{height} pixels", field=MASK, file=mask)
    return Input(pixels, weights)


def read_mask(path: str, size: tuple[int, int]) -> Image.Image:
    """Read the mask of a picture of that width and height as grey; white is painted anew. Raises as `read`."""
    with opened(path, path, MASK) as image:
        mask = _changes(ImageOps.exif_transpose(image))
    if mask.size != size:
        own, wanted = ("x".join(map(str, sides)) for sides in (mask.size, size))
        raise BadRequest(f" is {own}; it must have the size of the picture, {wanted}", field=MASK, file=path)
    if np.asarray(mask).max() < PAINTED:
        raise BadRequest(" leaves nothing to paint: no pixel is transparent or white", field=MASK, file=path)
    return mask


@contextmanager
def opened(file: str | BytesIO, name: str, param: str) -> Iterator[Image.Image]:
    """Open an image and read its header. Errors, also those of the body, name that file and field.

    Raises:
        BadRequest: the file is missing, damaged or no picture.
        TooLarge: it has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _bomb(name, param, f" of {image.width}x{image.height}")
            yield image
    except UnidentifiedImageError:
        allowed = ", ".join(FORMATS).lower()
        raise BadRequest(f" is no picture that is taken; allowed are {allowed}", field=param, file=name) from None
    except _BOMBS:
        raise _bomb(name, param) from None
    except FileNotFoundError:
        raise MissingFile(": no such file", field=param, file=name) from None
    except _DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadRequest(f" cannot be read: {reason}", field=param, file=name) from None


def _bomb(name: str, param: str, size: str = "") -> TooLarge:
    return TooLarge(f"{size} has more than {MAX_PIXELS} pixels, which is the limit", field=param, file=name)


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, with white behind transparent pixels."""
    if not image.has_transparency_data:
        return _eight_bits(image).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _changes(image: Image.Image) -> Image.Image:
    """Convert a mask to grey, white where the picture changes. A fully opaque alpha channel is ignored."""
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != _OPAQUE:
            return ImageOps.invert(alpha)
    return _eight_bits(image).convert("RGB").convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey of 16 bits to grey of 8; Pillow would clip it."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def _fit(image: Image.Image, width: int, height: int, method: Image.Resampling) -> npt.NDArray[np.uint8]:
    return np.array(ImageOps.fit(image, (width, height), method), np.uint8)
