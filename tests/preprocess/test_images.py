"""Pictures in and out: every source, every refusal."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashcocos.errors import InputError
from flashcocos.preprocess import images, load_image, to_uint8


def png(color: int, depth: int, side: int = 4) -> bytes:
    """A whole PNG of zeros; color: 0 gray, 2 RGB, 4 gray and alpha, 6 RGB and alpha."""
    row = bytes(1 + side * {0: 1, 2: 3, 4: 2, 6: 4}[color] * depth // 8)
    header = struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * side)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends after its header."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_path_image_and_array_give_the_same_planes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    planes = load_image(pixels)
    assert planes.shape == (3, 5, 7)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    np.testing.assert_array_equal(planes, load_image(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(planes, load_image(Image.fromarray(pixels)))
    np.testing.assert_array_equal(planes, (pixels.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / 0.5)


def test_uint8_round_trip_is_exact_for_every_value() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8(load_image(pixels)), pixels)
    assert to_uint8(np.full((3, 1, 1), 1.5))[0, 0, 0] == 255
    assert to_uint8(np.full((3, 1, 1), -9.0))[0, 0, 0] == 0


def test_size_is_height_and_width_and_bicubic(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (9, 6, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((4, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_uint8(load_image(pixels, (12, 4))), expected)
    assert load_image(np.zeros((1, 1, 3), np.uint8), (32, 64)).shape == (3, 32, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_other_8_bit_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(load_image(path), np.ones((3, 4, 4), np.float32))


def test_a_photograph_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("color", [2, 4, 6])
def test_sixteen_bits_a_channel_are_refused(tmp_path: Path, color: int) -> None:
    (tmp_path / "deep.png").write_bytes(png(color, 16))
    with pytest.raises(InputError, match=r"deep\.png: more than 8 bits a channel; expected 8-bit"):
        load_image(tmp_path / "deep.png")
    with pytest.raises(InputError, match="image: more than 8 bits a channel"):
        load_image(Image.open(tmp_path / "deep.png"))
    (tmp_path / "plain.png").write_bytes(png(color, 8))
    assert load_image(tmp_path / "plain.png").shape == (3, 4, 4)


def test_sixteen_bits_in_other_formats(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24))
    (tmp_path / "deep.png").write_bytes(png(0, 16))
    for name in ("deep.ppm", "deep.png"):
        with pytest.raises(InputError, match=rf"{name}: (more than 8 bits|image mode 'I;16')"):
            load_image(tmp_path / name)
    (tmp_path / "plain.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
    assert load_image(tmp_path / "plain.ppm").shape == (3, 2, 2)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match="expected a file"):
            load_image(path)


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    data = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(data.replace(b"MM\0*", b"M?\0*"))
    with pytest.raises(InputError, match=r"a\.webp: not a readable image: not a TIFF file"):
        load_image(tmp_path / "a.webp")


def test_an_opened_image_that_is_cut_short_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="image: not a readable image"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.png", b""),
        ("text.png", b"hello"),
        ("cut.png", png_header(8, 8)),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    ],
)
def test_files_that_are_no_images_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: not a readable image"):
        load_image(tmp_path / name)


def test_a_truncated_image_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(InputError, match=r"half\.png: not a readable image"):
        load_image(tmp_path / "half.png")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (9000, 9000), (20_000, 4)])
def test_an_absurd_size_is_refused_by_the_header_alone(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(InputError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("I;16", (4, 4)),
        Image.new("F", (4, 4)),
        42,
        None,
    ],
)
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(InputError, match="image"):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4,), (4.0, 4.0), (10**6, 4)])
def test_absurd_target_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="size"):
        load_image(np.zeros((4, 4, 3), np.uint8), size)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((1, 3, 4, 4)), np.full((3, 2, 2), np.nan)])
def test_to_uint8_refuses_other_shapes_and_nan(image: np.ndarray) -> None:
    with pytest.raises(InputError, match="image"):
        to_uint8(image)


def test_no_pixels_are_decoded_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(InputError, match="8 x 8 pixels"):
        load_image(tmp_path / "a.png")


def test_importing_the_folder_needs_numpy_and_pillow_alone() -> None:
    heavy = ("cv2", "skimage", "scipy", "torch", "onnx", "onnxruntime", "numba")
    code = f"import sys, flashcocos.preprocess; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
