"""Finding raw files in every layout, and names from list files of either system."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcocos.errors import InputError
from flashcocos.preprocess import read_list
from flashcocos.preprocess.layouts import find_layout, find_sample, select

FACES = "CelebAMask-HQ-mask-anno"


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(task: str, root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Per key: photographs and roles."""
    return {
        sample.key: ([image.relative_to(root).as_posix() for image in sample.images], sorted(sample.files))
        for sample in find_layout(task, root).samples()
    }


def test_ade20k_side_by_side(tmp_path: Path) -> None:
    touch(tmp_path, "training/a.jpg", "training/a.png", "validation/b.JPG", "c.png", "notes.txt", "._c.png")
    assert found("ade20k", tmp_path) == {
        "c": ([], ["label"]),
        "training/a": (["training/a.jpg"], ["label"]),
        "validation/b": (["validation/b.JPG"], []),
    }


def test_ade20k_as_released(tmp_path: Path) -> None:
    touch(tmp_path, "images/training/a.jpg", "annotations/training/a.png")
    assert found("ade20k", tmp_path) == {"training/a": (["images/training/a.jpg"], ["label"])}
    assert find_sample("ade20k", tmp_path / "images/training/a.jpg").files == {
        "label": tmp_path / "annotations/training/a.png"
    }


def test_celebahq_by_number(tmp_path: Path) -> None:
    touch(
        tmp_path, "CelebA-HQ-img/5487.jpg", f"{FACES}/all_parts_except_glasses/05487.png", f"{FACES}/2/05487_eye_g.png",
        f"{FACES}/2/05487_l_eye.png", f"{FACES}/all_parts_except_glasses/00000.png", "CelebA-HQ-img/me.jpg",
    )  # fmt: skip
    assert found("celebahq", tmp_path) == {
        "0": ([], ["label"]),
        "5487": (["CelebA-HQ-img/5487.jpg"], ["glasses", "label"]),
        "me": (["CelebA-HQ-img/me.jpg"], []),
    }


def test_celebahqedge_by_number(tmp_path: Path) -> None:
    touch(tmp_path, "CelebA-HQ-img/29999.jpg", f"{FACES}/14/29999_hair.png", f"{FACES}/14/29999_ear_r.png")
    touch(tmp_path, f"{FACES}/0/00007_l_eye.png")
    assert found("celebahqedge", tmp_path) == {
        "29999": (["CelebA-HQ-img/29999.jpg"], ["hair"]),
        "7": ([], ["l_eye"]),
    }


def test_deepfashion(tmp_path: Path) -> None:
    touch(tmp_path, "img/W/a.jpg", "pose/W/a_candidate.txt", "pose/W/a_subset.txt", "pose/W/b_subset.txt")
    assert found("deepfashion", tmp_path) == {
        "W/a": (["img/W/a.jpg"], ["candidate", "subset"]),
        "W/b": ([], ["subset"]),
    }
    assert sorted(find_sample("deepfashion", tmp_path / "img/W/a.jpg").files) == ["candidate", "subset"]


@pytest.mark.parametrize("task", ["celebahqedge", "celebahq", "deepfashion"])
@pytest.mark.parametrize(("images", "labels"), [("images/", "labels/"), ("", "")])
def test_plain_layouts(tmp_path: Path, task: str, images: str, labels: str) -> None:
    names = {
        "celebahqedge": ["me_hair.png", "me_l_eye.png"],
        "celebahq": ["me.png", "me_eye_g.png"],
        "deepfashion": ["me_candidate.txt", "me_subset.txt"],
    }[task]
    touch(tmp_path, f"{images}me.jpg", *(labels + name for name in names))
    ((key, (photographs, roles)),) = found(task, tmp_path).items()
    assert (key, photographs, len(roles)) == ("me", [f"{images}me.jpg"], 2)
    assert sorted(find_sample(task, tmp_path / images / "me.jpg").files) == roles


def test_two_photographs_of_one_key_are_both_kept(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/a.png", "labels/a.png")
    assert found("ade20k", tmp_path) == {"a": (["images/a.jpg", "images/a.png"], ["label"])}


def test_unknown_tasks_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task 'faces'.*ade20k, celebahq, celebahqedge, deepfashion"):
        find_layout("faces", tmp_path)
    with pytest.raises(InputError, match="gone: not a folder"):
        find_layout("ade20k", tmp_path / "gone")


def test_list_files_of_either_system(tmp_path: Path) -> None:
    text = "\ufeffimg\\W\\a.jpg,img\\W\\b.jpg\r\n\r\n  c.jpg , d.jpg,\r\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert read_list(tmp_path / "list.txt") == [("img/W/a.jpg", "img/W/b.jpg"), ("c.jpg", "d.jpg")]


@pytest.mark.parametrize("data", [None, b"\xff\xfe\x00\xd8"])
def test_unreadable_list_files_are_named(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"list\.txt(: not a readable text file| does not exist)"):
        read_list(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("training/a.jpg", ["training/a"]),
        ("data/ade/training/a.jpg", ["training/a"]),
        ("a", ["training/a", "validation/a"]),
        ("b.v2", ["b.v2"]),
        ("00012.jpg", ["12"]),
        ("aa.jpg", []),
        ("other/a.jpg", []),
    ],
)
def test_names_mean_samples_by_whole_components(tmp_path: Path, name: str, keys: list[str]) -> None:
    touch(tmp_path, "training/a.png", "validation/a.png", "b.v2.png", "12.png")
    chosen, unknown = select(find_layout("ade20k", tmp_path).samples(), [name])
    assert [sample.key for sample in chosen] == keys
    assert unknown == ([] if keys else [name])
