"""Bytes from and to the network: bodies that are bounded before they are decoded, answers, and content ids."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..config import ModelConfig
from ..errors import InputError
from ..preprocess.images import check_depth, load_rgb, reading
from ..preprocess.labels import load_label, read_npz, resize_nearest
from ..runtime import Translation
from .errors import ApiError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_SIZE = re.compile(r"([0-9]{1,5})(?:x([0-9]{1,5}))?")
_PNG_LEVEL = 1  # of zlib: a third of the time of the default for a tenth more bytes


class Problem(msgspec.Struct):
    """Why a request was not done."""

    code: str
    message: str
    request_id: str


class ErrorReply(msgspec.Struct):
    """The body of every answer that is no success."""

    error: Problem


class LabelReply(msgspec.Struct):
    """A label that the service holds; size is (height, width)."""

    id: str
    size: tuple[int, int]
    bytes: int


class ExemplarReply(msgspec.Struct):
    """An exemplar that the service holds; size is (height, width) as encoded, label the id of its label."""

    id: str
    size: tuple[int, int]
    bytes: int
    label: str | None


class MapSize(msgspec.Struct):
    """Positions of the correspondence, and pixels from one to the next."""

    height: int
    width: int
    stride: int


class TranslationReply(msgspec.Struct):
    """All of a translation: pictures as PNG and matches as uint16 little endian (x, y), each in base64."""

    size: tuple[int, int]
    image: str
    warped: str
    confidence: str
    matches: str
    map: MapSize
    exemplar_size: tuple[int, int]
    timings: dict[str, float]


class Sizes(msgspec.Struct):
    """Sizes of results; a side is a multiple of `multiple` from `min` to `max`."""

    default: tuple[int, int]
    multiple: int
    min: int
    max: int
    stride: int


class Limits(msgspec.Struct):
    """Bounds of the service."""

    body_bytes: int
    pixels: int
    queue: int
    batch: int
    deadline_s: float


class DemoPair(msgspec.Struct):
    """Ids of a label and an exemplar that are always there."""

    name: str
    label: str
    exemplar: str
    exemplar_label: str | None


class ModelReply(msgspec.Struct):
    """The model and the bounds of the service."""

    name: str
    id: str
    version: str
    task: str
    label_kind: str
    label_channels: int
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    exemplar_needs_label: bool
    sizes: Sizes
    limits: Limits
    stages: dict[str, dict[str, str]]
    demo: list[DemoPair]


def content_id(*parts: bytes) -> str:
    """32 hexadecimal digits that stand for `parts`, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]


def parse_size(text: str | None) -> tuple[int, int] | str | None:
    """A size as `Translator` takes it; `ApiError` for what is none. "128x160" is height x width."""
    if text is None or text == "input":
        return text
    if not (match := _SIZE.fullmatch(text)):
        raise ApiError(422, "invalid", f'size: expected SIDE, HEIGHTxWIDTH or "input", got {text[:40]!r}')
    return int(match[1]), int(match[2] or match[1])


def read_picture(body: bytes, max_pixels: int) -> Image.Image:
    """The first frame of a picture; its size is checked before its pixels are decoded. `ApiError` for what is none,
    `InputError` for 16 bits a channel."""
    try:
        image = Image.open(io.BytesIO(body), formats=PICTURE_FORMATS)
    except UnidentifiedImageError as error:
        raise ApiError(415, "unsupported_format", "the body is no PNG, JPEG or WebP picture") from error
    except Image.DecompressionBombError as error:
        raise ApiError(413, "too_large", f"expected at most {max_pixels} pixels: scale the picture down") from error
    except Exception as error:  # Pillow's readers of headers raise anything on damage
        raise ApiError(400, "malformed", f"the picture's header cannot be read: {error}") from error
    _check_pixels(image.width, image.height, max_pixels)
    check_depth(image, "picture")
    try:
        with reading("picture"):
            image.load()
    except InputError as error:
        raise ApiError(400, "malformed", str(error)) from error
    return image


def read_label(config: ModelConfig, body: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """A label: class ids (H, W) of a PNG, or planes (channels, H, W) of an .npz.

    Raises:
        ApiError: the body is of another format, damaged or too large.
        InputError: its ids, mode or planes are not those of `config`.
    """
    if config.label_kind == "classes":
        if not body.startswith(b"\x89PNG"):
            raise ApiError(415, "unsupported_format", "the body is no PNG of class ids")
        return load_label(config, read_picture(body, max_pixels))  # type: ignore[return-value]
    if not body.startswith(b"PK"):
        raise ApiError(415, "unsupported_format", f"the body is no .npz of {config.label_channels} planes")
    planes = read_npz(io.BytesIO(body), "label", max_pixels * config.label_channels)
    _check_pixels(planes.shape[2], planes.shape[1], max_pixels)
    if planes.shape[0] != config.label_channels:
        raise InputError(f"label: {planes.shape[0]} planes; task {config.task} expects {config.label_channels}")
    return planes


def check_label(config: ModelConfig, label: npt.NDArray[np.uint8], max_pixels: int) -> npt.NDArray[np.uint8]:
    """`label`, as `read_label` returns it, if its ids and pixels are in bounds; raises as that does."""
    _check_pixels(label.shape[-1], label.shape[-2], max_pixels)
    return load_label(config, label) if config.label_kind == "classes" else label  # type: ignore[return-value]


def write_label(label: npt.NDArray[np.uint8]) -> bytes:
    """The PNG or .npz that `read_label` reads."""
    if label.ndim == 2:
        return write_png(label)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, label=label)
    return buffer.getvalue()


def write_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 (H, W) or (H, W, 3) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def check_picture(pixels: npt.NDArray[np.uint8], max_pixels: int) -> Image.Image:
    """Pixels (H, W, 3) as a picture; `ApiError` for too many."""
    _check_pixels(pixels.shape[1], pixels.shape[0], max_pixels)
    return Image.fromarray(pixels)


def fit_picture(image: Image.Image, size: tuple[int, int]) -> bytes:
    """A picture at `size` as a PNG, resized as `Translator.encode_exemplar` does."""
    return write_png(np.asarray(load_rgb(image, size)))


def fit_label(label: npt.NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    """A label at `size`, as `write_label` writes it."""
    return write_label(resize_nearest(label, size))


def translation_reply(result: Translation) -> bytes:
    """JSON of all that a translation has."""
    height, width = result.confidence.shape
    reply = TranslationReply(
        size=result.image.shape[:2],
        image=_base64(write_png(result.image)),
        warped=_base64(write_png(result.warped)),
        confidence=_base64(write_png(np.rint(result.confidence * 255).astype(np.uint8))),
        matches=_base64(result.matches.astype("<u2").tobytes()),
        map=MapSize(height, width, result.image.shape[0] // height),
        exemplar_size=result.exemplar_size,
        timings=dict(result.timings),
    )
    return msgspec.json.encode(reply)


def server_timing(milliseconds: Mapping[str, float]) -> str:
    """The header Server-Timing."""
    return ", ".join(f"{name};dur={value:.2f}" for name, value in milliseconds.items())


def _check_pixels(width: int, height: int, limit: int) -> None:
    if not 0 < width * height <= limit:
        raise ApiError(413, "too_large", f"{width} x {height} pixels; expected at most {limit}: scale it down first")


def _base64(data: Any) -> str:
    return base64.b64encode(data).decode()
