"""Whole folders: what is written, what is reported, what goes on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashcocos.config import ModelConfig
from flashcocos.errors import InputError
from flashcocos.preprocess import load_label, load_raw, prepare_folder
from flashcocos.preprocess.labels import read_ids, resize_nearest
from flashcocos.preprocess.palette import palette, read_drawing
from flashcocos.preprocess.prepare import Summary


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def scenes(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two good ADE20K scenes, and one of each kind of bad ones."""
    root = tmp_path / "scenes"
    for name in ("good", "sub/fine", "nophoto"):
        save(root / f"labels/{name}.png", rng.integers(0, 151, (20, 30), dtype=np.uint8))
    for name in ("good", "sub/fine", "range", "color", "empty", "zero", "nolabel", "twice"):
        save(root / f"images/{name}.jpg", np.zeros((20, 30, 3), np.uint8))
    save(root / "images/twice.png", np.zeros((20, 30, 3), np.uint8))
    save(root / "labels/twice.png", np.ones((20, 30), np.uint8))
    save(root / "labels/range.png", np.full((20, 30), 200, np.uint8))
    save(root / "labels/color.png", np.zeros((20, 30, 3), np.uint8))
    save(root / "labels/zero.png", np.zeros((20, 30), np.uint8))
    (root / "labels/empty.png").touch()
    return root


def texts(summary: Summary, failed: bool = True) -> dict[str, str]:
    return {message.name: message.text for message in summary.messages if message.failed == failed}


def test_bad_files_are_reported_by_name_and_the_rest_goes_on(scenes: Path, tmp_path: Path) -> None:
    summary = prepare_folder("ade20k", scenes, tmp_path / "out", size=(16, 32))
    assert (summary.prepared, summary.failed) == (3, 6)
    failures = texts(summary)
    assert "class id 200" in failures["range"]
    assert "image mode 'RGB'" in failures["color"]
    assert "not a readable image" in failures["empty"]
    assert "every pixel is of class 0" in failures["zero"]
    assert failures["nolabel"] == "lacks its label file, NAME.png"
    assert failures["twice"] == "several photographs of one name: twice.jpg, twice.png"
    assert texts(summary, failed=False) == {"nophoto": "lacks its photograph: the label is prepared without"}
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"good.png", "nophoto.png", "sub/fine.png"}
    label = load_label(ModelConfig.preset("ade20k"), tmp_path / "out/good.png")
    np.testing.assert_array_equal(label, load_raw("ade20k", scenes / "images/good.jpg", (16, 32)))


def test_without_a_size_labels_keep_their_own(scenes: Path, tmp_path: Path) -> None:
    prepare_folder("ade20k", scenes, tmp_path / "out", size=None)
    np.testing.assert_array_equal(read_ids(tmp_path / "out/good.png"), read_ids(scenes / "labels/good.png"))


def test_a_list_file_with_windows_paths_chooses(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("images\\sub\\fine.jpg,gone.jpg\r\n")
    summary = prepare_folder("ade20k", scenes, tmp_path / "out", size=None, list_file=tmp_path / "list.txt")
    assert summary.prepared == 1
    assert texts(summary) == {"gone.jpg": f"listed in {tmp_path / 'list.txt'}, but not found"}
    assert (tmp_path / "out/sub/fine.png").is_file()


def test_running_again_replaces_what_is_there(scenes: Path, tmp_path: Path) -> None:
    first = prepare_folder("ade20k", scenes, tmp_path / "out", size=(16, 16))
    (tmp_path / "out/good.png").write_bytes(b"stale")
    assert prepare_folder("ade20k", scenes, tmp_path / "out", size=(16, 16)) == first
    assert read_ids(tmp_path / "out/good.png").shape == (16, 16)
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_edges_of_a_plain_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    root = tmp_path / "faces"
    half = np.zeros((24, 24), np.uint8)
    half[:12] = 255
    for name in ("me", "bare", "gray"):
        save(root / f"images/{name}.jpg", rng.integers(0, 256, (48, 40, 3), dtype=np.uint8))
    save(root / "labels/me_hair.png", half)
    save(root / "labels/me_skin.png", 255 - half)
    save(root / "labels/gray_skin.png", half // 2)
    save(root / "labels/masksonly_skin.png", half)
    summary = prepare_folder("celebahqedge", root, tmp_path / "out", size=(32, 64))
    assert (summary.prepared, summary.failed) == (1, 3)
    failures = texts(summary)
    assert failures["bare"].startswith("lacks the masks of its parts, NAME_skin.png and")
    assert "gray_skin.png: a mask with intermediate gray values" in failures["gray"]
    assert failures["masksonly"].startswith("lacks its photograph")
    assert texts(summary, failed=False)["me"].startswith("lacks l_brow, r_brow")
    planes = load_label(ModelConfig.preset("celebahqedge"), tmp_path / "out/me.npz")
    expected = load_raw("celebahqedge", root / "images/me.jpg", (32, 64))
    np.testing.assert_array_equal(np.rint(planes * 255), expected)
    prepare_folder("celebahqedge", root, tmp_path / "modern", size=(32, 64), canny="modern")
    modern = load_label(ModelConfig.preset("celebahqedge"), tmp_path / "modern/me.npz")
    assert (modern[0] != planes[0]).any()
    np.testing.assert_array_equal(modern[1:], planes[1:])


def test_poses_of_a_plain_folder(tmp_path: Path) -> None:
    root = tmp_path / "people"
    for name, persons in (("one", 1), ("two", 2), ("none", 0)):
        save(root / f"{name}.jpg", np.zeros((40, 30, 3), np.uint8))
        (root / f"{name}_candidate.txt").write_text("5 5 1 0\n20 30 1 1\n")
        (root / f"{name}_subset.txt").write_text(("0 1 " + "-1 " * 16 + "2 2\n") * persons)
    save(root / "half.jpg", np.zeros((40, 30, 3), np.uint8))
    (root / "half_candidate.txt").write_text("5 5 1 0\n")
    summary = prepare_folder("deepfashion", root, tmp_path / "out", size=None)
    assert (summary.prepared, summary.failed) == (1, 3)
    failures = texts(summary)
    assert "2 persons" in failures["two"]
    assert "0 persons" in failures["none"]
    assert failures["half"] == "lacks its label file, NAME_subset.txt"
    assert load_label(ModelConfig.preset("deepfashion"), tmp_path / "out/one.npz").shape == (20, 40, 30)


def test_faces_with_glasses(tmp_path: Path) -> None:
    root = tmp_path / "faces/CelebAMask-HQ-mask-anno"
    save(root / "all_parts_except_glasses/02001.png", np.full((8, 8), 1, np.uint8))
    save(root / "1/02001_eye_g.png", np.eye(8, dtype=np.uint8) * 255)
    summary = prepare_folder("celebahq", tmp_path / "faces", tmp_path / "out", size=None)
    assert summary == Summary(1, 0, ())
    label = load_label(ModelConfig.preset("celebahq"), tmp_path / "out/2001.png")
    np.testing.assert_array_equal(label, 1 + 15 * np.eye(8, dtype=np.uint8))


def test_drawings_in_the_palette(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 12, (20, 30), dtype=np.uint8)
    drawing = palette(12)[ids]
    save(tmp_path / "drawings/good.png", drawing)
    Image.fromarray(drawing).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "drawings/indexed.png")
    soft = drawing.copy()
    soft[3, 7], soft[5, 0] = (120, 10, 0), (0, 0, 9)  # nearest: 1, dark red, and 0, black
    save(tmp_path / "drawings/soft.png", soft)
    summary = prepare_folder("avatars", tmp_path / "drawings", tmp_path / "out", size=None)
    assert (summary.prepared, summary.failed) == (2, 1)
    assert texts(summary)["soft"].endswith(
        "soft.png: color #780a00 at pixel (7, 3) is not in the palette (2 such colors); the nearest is #800000, "
        "class 1; draw without soft edges, or accept the nearest with --nearest"
    )
    for name in ("good", "indexed"):
        np.testing.assert_array_equal(load_label(ModelConfig.preset("avatars-128"), tmp_path / f"out/{name}.png"), ids)
    assert prepare_folder("avatars", tmp_path / "drawings", tmp_path / "out", size=None, nearest=True).failed == 0
    expected = ids.copy()
    expected[3, 7], expected[5, 0] = 1, 0
    np.testing.assert_array_equal(read_ids(tmp_path / "out/soft.png"), expected)
    prepare_folder("avatars", tmp_path / "drawings", tmp_path / "small", size=(10, 15), nearest=True)
    np.testing.assert_array_equal(read_ids(tmp_path / "small/good.png"), resize_nearest(ids, (10, 15)))


def test_drawings_that_stand_for_no_label(tmp_path: Path) -> None:
    folder = tmp_path / "drawings"
    save(folder / "clear.png", np.zeros((4, 4, 4), np.uint8))
    save(folder / "solid.png", np.full((4, 4, 4), (128, 0, 0, 255), np.uint8))
    Image.new("RGB", (4, 4)).save(folder / "photo.png", format="JPEG")
    summary = prepare_folder("avatars", folder, tmp_path / "out", size=None, nearest=True)
    assert (summary.prepared, summary.failed) == (1, 2)
    assert "JPEG alters colors" in texts(summary)["photo"]
    assert "has transparent pixels" in texts(summary)["clear"]
    with pytest.raises(InputError, match=r"--nearest.* is for drawings of task avatars, not for ade20k"):
        prepare_folder("ade20k", folder, tmp_path / "out", size=None, nearest=True)


def test_every_color_has_a_nearest_class(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)  # 10 000 colors, more than are compared at once
    save(tmp_path / "a.png", pixels)
    distances = np.square(pixels.reshape(-1, 1, 3).astype(int) - palette(12)).sum(-1)
    np.testing.assert_array_equal(
        read_drawing(tmp_path / "a.png", 12, nearest=True), distances.argmin(1).reshape(100, 100)
    )


def test_nothing_to_do_is_refused(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no ade20k files"):
        prepare_folder("ade20k", tmp_path / "void", tmp_path / "out", size=None)
    with pytest.raises(InputError, match="lies inside the source files"):
        prepare_folder("ade20k", scenes, scenes / "labels", size=None)
    with pytest.raises(InputError, match="canny: expected one of"):
        prepare_folder("ade20k", scenes, tmp_path / "out", size=None, canny="new")
    with pytest.raises(InputError, match="size"):
        prepare_folder("ade20k", scenes, tmp_path / "out", size=(0, 0))
    assert not (tmp_path / "out").exists()


def test_load_raw_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks its label file"):
        load_raw("ade20k", tmp_path / "a.jpg")
    with pytest.raises(InputError, match="no raw data to prepare"):
        load_raw("mine", tmp_path / "a.jpg")
