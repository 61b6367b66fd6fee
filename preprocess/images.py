"""Pictures in and out: files, Pillow images and uint8 arrays to [-1, 1] planes and back, with nothing trusted.

Resizing is Pillow's BICUBIC and the scale is x / 255 * 2 - 1, as in the public CoCosNet data loader, so that the same
file gives the same numbers in training, export and translation.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import InputError
from ..files import require_file
from ..remote import is_path, is_remote, read, to_path

MAX_PIXELS = 1 << 26  # 8192 x 8192; a file that claims more is refused before it is decoded
MAX_SIDE = 16384
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow's others include interpreters (EPS)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float32]
PathLike: TypeAlias = "str | os.PathLike[str]"
ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any]"

_COLOR_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")
# what Pillow raises on damaged files, by format
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


def open_image(path: PathLike) -> Image.Image:
    """The decoded image file `path`, upright (EXIF), in the mode it is stored in; `InputError` for what is no image.

    Formats: `FORMATS`. A file over `MAX_PIXELS` is refused by its header, before it is decoded.
    """
    require_file(path)
    with reading(str(path)), Image.open(readable(path), formats=FORMATS) as image:
        check_extent(image.height, image.width, str(path))
        check_depth(image, str(path))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


def readable(path: PathLike) -> Path | BinaryIO:
    """What Pillow and zipfile read: the path, or the content of an object of a store."""
    return BytesIO(read(to_path(path))) if is_remote(path) else Path(path)


def check_depth(image: Image.Image, name: str) -> None:
    """Raise `InputError` where Pillow would drop the low bits of a file of 16 bits a channel without a word."""
    for codec, _, _, arguments in getattr(image, "tile", ()):  # how the pixels are stored; empty once they are decoded
        deep_ppm = codec.startswith("ppm") and arguments[1] > 255
        if image.mode in _COLOR_MODES and (deep_ppm or ";16" in str(arguments)):
            raise InputError(f"{name}: more than 8 bits a channel; expected 8-bit color or gray: save it with 8 bits")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises on damaged files, their pixels or their metadata, into `InputError` naming `name`."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        text = str(error).partition(" <_io.")[0]  # Pillow shows content without a name as an object
        raise InputError(f"{name}: not a readable image: {text or type(error).__name__}") from error


def check_extent(height: int, width: int, name: str) -> None:
    """Raise `InputError` where a picture of `height` x `width` is empty or absurdly large."""
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise InputError(
            f"{name}: {width} x {height} pixels; expected at least 1 x 1, at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS >> 20} Mpixel: scale it down first"
        )


def check_size(size: tuple[int, int] | None) -> None:
    """Raise `InputError` unless `size` is None or (height, width) in sane bounds."""
    if size is None:
        return
    if len(size) != 2 or not all(isinstance(side, int | np.integer) for side in size):
        raise InputError(f"size: expected (height, width) as two integers, got {size!r}")
    check_extent(int(size[0]), int(size[1]), "size")


def load_rgb(
    source: ImageSource,
    size: tuple[int, int] | None = None,
    method: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """`source` as an RGB Pillow image, upright (EXIF), resized to (height, width) where `size` is given.

    Args:
        source: a path, a Pillow image, or an array (H, W, 3) of uint8. Transparency is dropped, not blended.
        size: (height, width), or None for the source's own.
        method: how Pillow resizes.

    Returns:
        The picture, mode RGB.

    Raises:
        InputError: for anything else, unreadable files, and pictures of more than 8 bits a channel.
    """
    check_size(size)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(f"image: expected a uint8 array (height, width, 3), got {source.dtype} {source.shape}")
        check_extent(source.shape[0], source.shape[1], "image")
        image, name = Image.fromarray(np.ascontiguousarray(source)), "image"
    elif isinstance(source, Image.Image):
        image, name = source, "image"
        check_depth(image, name)
    elif is_path(source):
        image, name = open_image(source), str(source)
    else:
        raise InputError(f"image: expected a path, a Pillow image or a uint8 array, got {type(source).__name__}")
    check_extent(image.height, image.width, name)
    if image.mode not in _COLOR_MODES:
        raise InputError(f"{name}: image mode {image.mode!r}; expected 8-bit color or gray: convert it to RGB first")
    with reading(name):
        image = ImageOps.exif_transpose(image).convert("RGB")
    return image if size is None else image.resize((size[1], size[0]), method)


def load_image(source: ImageSource, size: tuple[int, int] | None = None) -> FloatArray:
    """A picture as planes.

    Args:
        source: as for `load_rgb`.
        size: (height, width), or None for the source's own.

    Returns:
        float32 (3, H, W), RGB in [-1, 1].

    Raises:
        InputError: as `load_rgb` does.
    """
    pixels = np.asarray(load_rgb(source, size), np.float32)
    return np.ascontiguousarray((pixels / 255 * 2 - 1).transpose(2, 0, 1))


def to_uint8(image: npt.NDArray[Any]) -> UInt8Array:
    """The inverse of `load_image`.

    Args:
        image: float planes (3, H, W) in [-1, 1]; others are clipped.

    Returns:
        uint8 (H, W, 3), rounded.

    Raises:
        InputError: for another shape and for values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"image: expected planes (3, height, width), got {image.shape}")
    if not np.isfinite(image).all():
        raise InputError("image: holds NaN or infinity; the network that made it overflowed or its weights are damaged")
    pixels = np.rint((np.clip(image, -1, 1).astype(np.float32) + 1) * 127.5)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))


def psnr(image: UInt8Array, reference: UInt8Array) -> float:
    """Peak signal-to-noise ratio of an 8-bit picture.

    Args:
        image: uint8 array of any shape.
        reference: uint8 array of the same shape.

    Returns:
        Decibels against the peak 255; infinity where the two are equal.
    """
    mean_square = float(np.square(image.astype(np.float64) - reference).mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
