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
from flashcocos.preprocess.labels import read_ids
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
        load_raw("avatars", tmp_path / "a.jpg")
