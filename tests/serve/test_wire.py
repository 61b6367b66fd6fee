"""Bodies that are meant to do harm: bombs, cuts, wrong types. Each is refused, cheaply and in words."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny_bundle import CHANNELS, CLASSES

from flashcocos.errors import InputError
from flashcocos.serve import wire
from flashcocos.serve.errors import ApiError

LIMIT = 1 << 20  # pixels
LABEL = np.arange(64, dtype=np.uint8).reshape(8, 8) % 12


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes], mode: int = 0, depth: int = 8) -> bytes:
    """A PNG of whatever it claims."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0)), *chunks, (b"IDAT", data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*parts, (b"IEND", b""))
    )


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def npz(array: np.ndarray, name: str = "label") -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: array})
    return buffer.getvalue()


ZEROS = zlib.compress(bytes(64 << 20), 9)  # 64 MiB in 64 KiB
TEXT = (b"zTXt", b"k\0\0" + zlib.compress(bytes(64 << 20), 9))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (png(8000, 8000, ZEROS), 413),
        (png(65536, 1, ZEROS), 200),  # long, and small
        (png(2**31 - 1, 2**31 - 1, b""), 413),
        (png(0, 5, b""), 415),
        (png(100, 100, ZEROS), 200),  # more data than pixels: read no further
        (png(100, 100, zlib.compress(bytes(101 * 100)), TEXT), 400),
        (png(100, 100, zlib.compress(bytes(500))), 400),
        (png(100, 100, b"no zlib"), 400),
        (saved("PNG")[:40], 415),
        (saved("PNG")[:-30], 400),
        (saved("JPEG")[:200], 400),
        (saved("JPEG", size=(64, 64))[:-40], 400),
        (saved("WEBP")[:30], 400),
        (saved("GIF"), 415),
        (saved("TIFF"), 415),
        (saved("BMP"), 415),
        (saved("PPM"), 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (b"http://127.0.0.1/picture.png", 415),
        (b"/etc/passwd", 415),
        (b"\x89PNG\r\n\x1a\n", 415),
        (b"RIFF\xff\xff\xff\xffWEBPVP8L", 400),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_pictures_are_refused_before_they_cost_memory(body: bytes, status: int) -> None:
    tracemalloc.start()
    try:
        wire.read_picture(body, LIMIT)
        actual = 200
    except ApiError as error:
        actual = error.status
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert actual == status
    assert peak < 8 << 20


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    for kind in ("WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        assert wire.read_picture(buffer.getvalue(), LIMIT).convert("RGB").getpixel((5, 5)) == (255, 0, 0)


def test_metadata_of_a_picture_goes_no_further() -> None:
    information = PngImagePlugin.PngInfo()
    information.add_text("Comment", "secret")
    body = saved("PNG", pnginfo=information)
    assert b"secret" in body
    assert b"secret" not in wire.fit_picture(wire.read_picture(body, LIMIT), (64, 64))


@pytest.mark.parametrize(
    "body",
    [
        saved("PNG", "RGB"),
        saved("PNG", "I;16"),
        saved("PNG", "1"),
        wire.write_png(np.full((8, 8), 12, np.uint8)),
    ],
)
def test_labels_of_other_ids_or_modes_are_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        wire.read_label(CLASSES, body, LIMIT)


def test_labels_survive_the_wire() -> None:
    assert np.array_equal(wire.read_label(CLASSES, wire.write_label(LABEL), LIMIT), LABEL)
    palette = Image.fromarray(LABEL)
    palette.putpalette([1, 2, 3] * 12)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert np.array_equal(wire.read_label(CLASSES, buffer.getvalue(), LIMIT), LABEL)
    planes = np.random.default_rng(0).integers(0, 256, (5, 8, 12), np.uint8)
    assert np.array_equal(wire.read_label(CHANNELS, wire.write_label(planes), LIMIT), planes)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (npz(np.zeros((5, 2048, 1024), np.uint8)), InputError, "at most 5242880 bytes"),
        (npz(np.zeros((4, 64, 64), np.uint8)), InputError, "4 planes; task tiny expects 5"),
        (npz(np.zeros((1, 2048, 1024), np.uint8)), ApiError, "1024 x 2048 pixels"),
        (npz(np.zeros((5, 64, 64), np.float32)), InputError, "expected uint8"),
        (npz(np.array({"a": 1}, dtype=object)), InputError, "expected uint8"),
        (npz(np.zeros((5, 8, 8), np.uint8), "other"), InputError, "no array named 'label'"),
        (npz(np.zeros((5, 64, 64), np.uint8))[:-40], InputError, "not a readable label"),
        (b"PK\x03\x04", InputError, "not a readable label"),
        (wire.write_label(LABEL), ApiError, "no .npz of 5 planes"),
        (b"", ApiError, "no .npz"),
    ],
)
def test_planes_are_checked(body: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wire.read_label(CHANNELS, body, LIMIT)


def test_a_zip_of_zeros_costs_no_memory() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label.npy", npz_header((5, 8192, 8192)) + bytes(64 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="at most"):
        wire.read_label(CHANNELS, buffer.getvalue(), LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def npz_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("text", ["", "x", "64x", "x64", "64x64x64", "-64", "64.0", " 64", "٦٤", "999999", "64X64"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ApiError, match="size: expected SIDE") as error:
        wire.parse_size(text)
    assert error.value.status == 422


def test_ids_depend_on_where_parts_end() -> None:
    assert wire.content_id(b"ab", b"c") != wire.content_id(b"a", b"bc")
    assert wire.content_id(b"ab", b"c") == wire.content_id(b"ab", b"c")
