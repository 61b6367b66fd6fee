"""Prepared labels: both forms, both sources, and every refusal."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.preprocess import load_label, save_label
from flashcocos.preprocess.images import load_rgb

CLASSES = ModelConfig.preset("tiny")  # 12 classes
PLANES = ModelConfig.preset("tiny-channels")  # 5 planes


@pytest.fixture
def ids(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 12, (6, 9), dtype=np.uint8)


@pytest.fixture
def planes(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (5, 6, 9), dtype=np.uint8)


def test_class_ids_from_every_source(tmp_path: Path, ids: np.ndarray) -> None:
    save_label(tmp_path / "sub" / "a.png", ids)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([7, 8, 9] * 256)
    palette.save(tmp_path / "palette.png")
    for source in (
        tmp_path / "sub" / "a.png", str(tmp_path / "palette.png"), Image.fromarray(ids), ids, ids.astype(np.int64),
    ):  # fmt: skip
        label = load_label(CLASSES, source)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, ids)


def test_planes_from_every_source(tmp_path: Path, planes: np.ndarray) -> None:
    save_label(tmp_path / "a.npz", planes)
    expected = planes.astype(np.float32) / 255
    for source in (tmp_path / "a.npz", planes, expected, expected.astype(np.float64)):
        label = load_label(PLANES, source)
        assert label.dtype == np.float32
        np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_is_turned_as_its_picture_is(tmp_path: Path, ids: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ids).save(tmp_path / "label.png", exif=exif)
    Image.fromarray(np.stack([ids] * 3, 2)).save(tmp_path / "picture.png", exif=exif)
    picture = np.asarray(load_rgb(tmp_path / "picture.png"))[..., 0]
    np.testing.assert_array_equal(load_label(CLASSES, tmp_path / "label.png"), picture)
    np.testing.assert_array_equal(load_label(CLASSES, Image.open(tmp_path / "label.png")), picture)
    assert (picture.shape == ids.shape) == (orientation < 5)


def test_a_color_picture_as_label_says_what_to_do(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="`flashcocos prepare avatars DRAWINGS -o labels/` makes them of drawings"):
        load_label(CLASSES, tmp_path / "a.png")


def test_pipes_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        for config in (CLASSES, PLANES):
            with pytest.raises(InputError, match="expected a file"):
                load_label(config, path)


@pytest.mark.parametrize("size", [(12, 18), (3, 4), (32, 5), (1, 1)])
def test_resizing_takes_the_nearest_pixel(ids: np.ndarray, planes: np.ndarray, size: tuple[int, int]) -> None:
    rows = ((np.arange(size[0]) + 0.5) * 6 / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * 9 / size[1]).astype(int)
    np.testing.assert_array_equal(load_label(CLASSES, ids, size), ids[np.ix_(rows, columns)])
    expected = planes[:, rows][:, :, columns].astype(np.float32) / 255
    np.testing.assert_array_equal(load_label(PLANES, planes, size), expected)
    np.testing.assert_array_equal(load_label(PLANES, planes.astype(np.float32) / 255, size), expected)


def test_an_id_out_of_range_is_named_with_its_place(tmp_path: Path, ids: np.ndarray) -> None:
    ids[2, 3] = 12
    save_label(tmp_path / "a.png", ids)
    with pytest.raises(InputError, match=r"a\.png: class id 12 at row 2, column 3 \(1 pixels.*expected 0 to 11"):
        load_label(CLASSES, tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "I;16", "LA"])
def test_other_image_modes_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"a\.png: image mode '{mode}'"):
        load_label(CLASSES, tmp_path / "a.png")


def test_a_jpeg_label_is_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="JPEG alters class ids"):
        load_label(CLASSES, tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((1, 4, 4), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.full((4, 4), -1),
        np.full((4, 4), 256),
        3,
    ],
)
def test_other_class_sources_are_refused(source: object) -> None:
    with pytest.raises(InputError, match="label"):
        load_label(CLASSES, source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((5, 4, 4), np.int64),
        np.full((5, 4, 4), 1.01),
        np.full((5, 4, 4), -0.01),
        np.full((5, 4, 4), np.nan),
        np.zeros((5, 0, 4), np.uint8),
        Image.new("L", (4, 4)),
    ],
)
def test_other_plane_sources_are_refused(source: object) -> None:
    with pytest.raises(InputError, match="label"):
        load_label(PLANES, source)  # type: ignore[arg-type]


def npz(member: bytes, name: str = "label.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, member)
    return buffer.getvalue()


def npy(shape: tuple[int, ...], dtype: str = "|u1", data: bytes = b"", fortran: bool = False) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable label"),
        (b"PK\x03\x04 nothing", "not a readable label"),
        (npz(b"\x93NUMPY\x01\x00"), "not a readable label"),
        (npz(npy((5, 4, 4), data=bytes(80)), "other.npy"), "no array named 'label'"),
        (npz(npy((5, 4, 4), data=bytes(79))), "cut short: 79 of 80"),
        (npz(npy((5, 4, 4), "<f4", bytes(320))), "expected uint8"),
        (npz(npy((80,), data=bytes(80))), "expected uint8"),
        (npz(npy((5, 4, 4), data=bytes(80), fortran=True)), "expected uint8"),
        (npz(npy((5, 10**6, 10**6))), "pixels"),
        (npz(npy((255, 8192, 8192))), "bytes"),
        (npz(npy((0, 4, 4))), "1 to 255 planes"),
        (npz(npy((5, 4, 4), data=bytes(80)), method=zipfile.ZIP_LZMA), "neither stored nor deflated"),
        (npz(npy((4, 4, 4), data=bytes(64))), "4 label planes; task tiny expects 5"),
    ],
)
def test_bad_npz_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.npz.*{message}"):
        load_label(PLANES, tmp_path / "a.npz")


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a label file was unpickled",)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(npz(npy((5, 4, 4), "|O", pickle.dumps(Trap()))))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(InputError, match=name):
            load_label(PLANES, tmp_path / name)


def test_save_label_refuses_other_arrays_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected uint8"):
        save_label(tmp_path / "a.png", np.zeros((4, 4), np.int32))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
