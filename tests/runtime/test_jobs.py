"""Which files are paired and where results go: folders, single files and lists; nothing here opens a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flashcocos.errors import InputError
from flashcocos.runtime.jobs import FolderRequest, Job, match_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = (
        "labels/a.png labels/sub/b.PNG labels/c.npz labels/notes.txt pictures/a.jpg pictures/sub/b.jpeg one.jpg one.png"
    )
    for name in (*names.split(), "masks/a.png", "masks/sub/b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def plan(
    tree: Path, inputs: str | None, exemplars: str | None, labels: str | None, output: str, **more: Any
) -> list[Job]:
    paths = (None if name is None else tree / name for name in (inputs, exemplars, labels))
    return match_files(FolderRequest(*paths, tree / output, **more))  # type: ignore[arg-type]


def listed(tree: Path, text: str, *folders: str | None, **more: Any) -> list[Job]:
    (tree / "list.csv").write_text(text)
    folders = folders or (None, None, None)
    return plan(tree, *folders, "out", pairs=tree / "list.csv", **more)  # type: ignore[misc]


def test_folders_are_paired_by_relative_name(tree: Path) -> None:
    jobs = plan(tree, "labels", "pictures", "masks", "out")
    assert jobs == [
        Job(tree / "labels/a.png", tree / "pictures/a.jpg", tree / "masks/a.png", tree / "out/a.png"),
        Job(tree / "labels/c.npz", tree / "pictures/c.*", tree / "masks/c.*", tree / "out/c.png"),  # reported later
        Job(tree / "labels/sub/b.PNG", tree / "pictures/sub/b.jpeg", tree / "masks/sub/b.png", tree / "out/sub/b.png"),
    ]


def test_pictures_beside_their_labels(tree: Path) -> None:
    (tree / "pictures/a.png").touch()
    jobs = plan(tree, "labels/a.png", "pictures", "pictures", "out")
    assert jobs == [Job(tree / "labels/a.png", tree / "pictures/a.jpg", tree / "pictures/a.png", tree / "out/a.png")]


def test_one_exemplar_for_all(tree: Path) -> None:
    jobs = plan(tree, "labels", "one.jpg", "one.png", "out", suffix=".jpg")
    assert [(job.exemplar.name, job.exemplar_label and job.exemplar_label.name) for job in jobs] == [
        ("one.jpg", "one.png")
    ] * 3
    assert [job.output.name for job in jobs] == ["a.jpg", "c.jpg", "b.jpg"]
    assert plan(tree, "labels", "one.jpg", None, "out")[0].exemplar_label is None


def test_single_files(tree: Path) -> None:
    assert plan(tree, "labels/a.png", "one.jpg", "one.png", "new/result.jpeg") == [
        Job(tree / "labels/a.png", tree / "one.jpg", tree / "one.png", tree / "new/result.jpeg")
    ]
    assert plan(tree, "labels/a.png", "pictures", "masks", "out")[0].output == tree / "out/a.png"
    assert plan(tree, "labels/a.png", "pictures", "masks", "out")[0].exemplar == tree / "pictures/a.jpg"


def test_extras_lie_beside_the_result(tree: Path) -> None:
    job = plan(tree, "labels/a.png", "one.jpg", None, "x.jpg", save=("matches", "warped"))[0]
    assert job.extra("matches") == tree / "x.matches.npz"
    assert job.extra("warped") == tree / "x.warped.png"


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_lists(tree: Path, separator: str) -> None:
    rows = "input,exemplar\r\nlabels/a.jpg, pictures/a.jpg\r\n\r\nlabels/sub/b,pictures/sub/b.jpeg,masks/sub/b.jpg\r\n"
    assert listed(tree, "\ufeff" + rows.replace("/", separator)) == [
        Job(tree / "labels/a.png", tree / "pictures/a.jpg", None, tree / "out/labels/a.png"),
        Job(
            tree / "labels/sub/b.PNG",
            tree / "pictures/sub/b.jpeg",
            tree / "masks/sub/b.png",
            tree / "out/labels/sub/b.png",
        ),
    ]
    jobs = listed(tree, "sub/b.jpg,a.jpg\n".replace("/", separator), "labels", "pictures", "masks")
    assert jobs == [
        Job(tree / "labels/sub/b.PNG", tree / "pictures/a.jpg", tree / "masks/a.png", tree / "out/sub/b.png")
    ]


def test_lists_may_use_an_input_twice(tree: Path) -> None:
    jobs = listed(tree, "labels/a.png,one.jpg\nlabels/a.png,pictures/a.jpg\nlabels/c.npz,one.jpg\n")
    assert [job.output.name for job in jobs] == ["a_one.png", "a_a.png", "c.png"]
    with pytest.raises(InputError, match="would both be written to"):
        listed(tree, "labels/a.png,one.jpg\nlabels/a.png,one.jpg\n")


def test_lists_keep_results_in_the_output_folder(tree: Path) -> None:
    jobs = listed(tree, f"{tree}/labels/a.png,one.jpg\nlabels/../labels/c.npz,one.jpg\n")
    assert [(job.label.name, job.output) for job in jobs] == [
        ("a.png", tree / "out/a.png"),
        ("c.npz", tree / "out/c.png"),
    ]


def test_folders_may_have_a_suffix(tree: Path) -> None:
    assert plan(tree, "labels/a.png", "one.jpg", None, "results.v2")[0].output == tree / "results.v2/a.png"
    (tree / "results.png").mkdir()
    assert plan(tree, "labels", "one.jpg", None, "results.png")[0].output == tree / "results.png/a.png"


def test_hidden_files_are_no_inputs(tree: Path) -> None:
    (tree / "labels/._a.png").touch()
    assert [job.label.name for job in plan(tree, "labels", "one.jpg", None, "out")] == ["a.png", "c.npz", "b.PNG"]


def test_a_list_is_not_overwritten(tree: Path) -> None:
    (tree / "a.png").write_text("a.png,pictures/a.jpg\n")  # a list of this name would be its own result
    with pytest.raises(InputError, match=r"a\.png would overwrite an input"):
        plan(tree, "labels", ".", None, ".", pairs=tree / "a.png")


def test_missing_files_are_named(tree: Path) -> None:
    (tree / "pictures/c.jpg").mkdir()
    jobs = plan(tree, "labels", "pictures", "masks", "out")
    jobs[0].check()
    with pytest.raises(InputError, match=r"^no picture named c in .*/pictures$"):
        jobs[1].check()
    (tree / "pictures/c.png").touch()
    with pytest.raises(InputError, match=r"^no label named c in .*/masks$"):
        plan(tree, "labels", "pictures", "masks", "out")[1].check()
    os.mkfifo(tree / "fifo.png")
    with pytest.raises(InputError, match=r"fifo.png is a FIFO; expected a file"):  # and does not wait for a writer
        Job(tree / "labels/a.png", tree / "fifo.png", None, tree / "out.png").check()


def test_missing_files_of_a_list_are_left_to_be_reported(tree: Path) -> None:
    assert listed(tree, "none/x.png,y.jpg\n") == [
        Job(tree / "none/x.png", tree / "y.jpg", None, tree / "out/none/x.png")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list is empty"),
        ("input,exemplar\n", "the list is empty"),
        ("labels/a.png\n", "line 1: expected input,exemplar"),
        ("labels/a.png,one.jpg\n,one.jpg\n", "line 2: expected input,exemplar"),
        ("labels/a.png,one.jpg,one.png,one.png\n", "line 1: expected"),
        ("labels/a.png,o\0ne.jpg\n", "line 1: expected|NUL"),
    ],
)
def test_bad_lists(tree: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        listed(tree, text)


def test_a_list_that_is_no_text(tree: Path) -> None:
    (tree / "list.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match="not a readable text file"):
        plan(tree, None, None, None, "out", pairs=tree / "list.csv")
    with pytest.raises(InputError, match=r"one.jpg: expected a folder that the names of the list"):
        listed(tree, "a,b\n", "labels", "one.jpg", None)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (("absent", "one.jpg", None, "out"), {}, "absent does not exist"),
        (("labels", None, None, "out"), {}, "nothing to translate"),
        (("pictures", "one.jpg", None, "out"), {}, "no label files in this folder"),
        (("labels", "one.jpg", "labels/none.png", "out"), {}, "labels/none.png does not exist"),
        (("labels", "one.jpg", None, "one.png"), {}, "expected a folder, because the input .*labels is a folder"),
        (("labels", "one.jpg", None, "new.png"), {}, "expected a folder, because the input .*labels is a folder"),
        (("labels", "one.jpg", None, "new.webp"), {}, "expected a folder, because the input .*labels is a folder"),
        (("labels/a.png", "one.jpg", None, "new.webp"), {}, "expected .*, or a picture ending in .png, .jpg, .jpeg"),
        (("labels/a.png", "one.jpg", None, "labels/notes.txt"), {}, "or a picture ending in .png, .jpg, .jpeg"),
        (("labels", "one.jpg", None, "out"), {"suffix": ".webp"}, r"suffix '.webp': expected one of .png"),
        (("labels", "one.jpg", None, "labels"), {}, "lies in the input folder"),
        (("labels", "one.jpg", None, "labels/out"), {}, "lies in the input folder"),
        (("labels/a.png", "one.jpg", None, "labels"), {}, "would overwrite an input"),
        (("labels/a.png", "one.jpg", "one.png", "one.png"), {}, "would overwrite an input"),
    ],
)
def test_arguments_that_make_no_sense(tree: Path, arguments: Any, more: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tree, *arguments, **more)


def test_two_inputs_of_one_name_are_refused(tree: Path) -> None:
    (tree / "labels/a.npz").touch()
    with pytest.raises(InputError, match=r"a.npz and .*a.png would both be written to .*a.png; rename one"):
        plan(tree, "labels", "one.jpg", None, "out")
    (tree / "labels/a.npz").rename(tree / "labels/a.warped.png")
    with pytest.raises(InputError, match=r"would both be written to .*a.warped.png"):
        plan(tree, "labels", "one.jpg", None, "out", save=["warped"])
