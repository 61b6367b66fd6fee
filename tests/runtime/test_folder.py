"""Folders of translations: what is written, resumed, skipped and reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import CHANNELS, CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.errors import InputError
from flashcocos.preprocess import save_label
from flashcocos.runtime import Translator
from flashcocos.runtime.folder import Summary, translate_folder
from flashcocos.runtime.jobs import FolderRequest


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    return Translator(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "b.zip"), warp="numpy")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        save_label(tmp_path / f"labels/{name}.png", random_label(CLASSES, 64, 64, seed))
        save_label(tmp_path / f"masks/{name}.png", random_label(CLASSES, 64, 64, seed + 10))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(random_picture(64, 64, seed)).save(tmp_path / f"pictures/{name}.png")
    return tmp_path


def run(
    translator: Translator,
    work: Path,
    exemplar: str = "pictures",
    mask: str = "masks",
    *,
    progress: bool = False,
    **more: Any,
) -> Summary:
    request = FolderRequest(work / "labels", work / exemplar, work / mask, work / "out", **more)
    return translate_folder(translator, request, progress)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder(translator: Translator, work: Path) -> None:
    assert run(translator, work) == Summary(3, 0, ())
    assert names(work / "out") == ["a.png", "b.png", "c.png"]
    exemplar = translator.encode_exemplar(work / "pictures/b.png", work / "masks/b.png")
    expected = translator.translate(work / "labels/b.png", exemplar)
    np.testing.assert_array_equal(np.asarray(Image.open(work / "out/b.png")), expected.image)


def test_extra_outputs(translator: Translator, work: Path) -> None:
    run(translator, work, save={"warped", "matches", "confidence", "grid"}, suffix=".jpg", size=(64, 96))
    assert [name for name in names(work / "out") if name.startswith("a")] == [
        "a.confidence.png", "a.grid.png", "a.jpg", "a.matches.npz", "a.warped.png",
    ]  # fmt: skip
    exemplar = translator.encode_exemplar(work / "pictures/a.png", work / "masks/a.png", (64, 96))
    expected = translator.translate(work / "labels/a.png", exemplar, (64, 96))
    with np.load(work / "out/a.matches.npz") as stored:
        np.testing.assert_array_equal(stored["matches"], expected.matches)
        np.testing.assert_array_equal(stored["confidence"], expected.confidence)
        np.testing.assert_array_equal(stored["exemplar_size"], (64, 96))
    np.testing.assert_array_equal(np.asarray(Image.open(work / "out/a.warped.png")), expected.warped)
    confidence = np.asarray(Image.open(work / "out/a.confidence.png"))
    np.testing.assert_allclose(confidence / 255, expected.confidence, atol=0.5 / 255 + 1e-6)
    grid = np.asarray(Image.open(work / "out/a.grid.png"))
    assert grid.shape == (64, 384, 3)
    np.testing.assert_array_equal(grid[:, 192:], np.concatenate([expected.warped, expected.image], axis=1))
    with Image.open(work / "out/a.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (96, 64))


def test_bad_files_are_named_and_the_rest_goes_on(
    translator: Translator, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "labels/b.png").write_bytes(b"not an image")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(work / "labels/d.png")
    (work / "pictures/c.png").unlink()
    summary = run(translator, work, progress=True)
    assert (summary.done, summary.skipped) == (1, 0)
    assert [(path.name, reason.partition(": ")[0]) for path, reason in summary.failed] == [
        ("b.png", str(work / "labels/b.png")),
        ("c.png", f"no picture named c in {work / 'pictures'}"),
        ("d.png", f"no picture named d in {work / 'pictures'}"),
    ]
    assert names(work / "out") == ["a.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{work / 'labels/b.png'}: not a readable image")  # not named twice
    assert lines[1].startswith(f"{work / 'labels/c.png'}: no picture named c in ")


def test_a_failed_write_leaves_nothing_half(
    translator: Translator, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Image.Image.save
    count = 0

    def full_disk(self: Image.Image, path: Path, **more: Any) -> None:
        nonlocal count
        count += 1
        saved(self, path, **more)
        if count == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    summary = run(translator, work)
    assert [(path.name, reason) for path, reason in summary.failed] == [("b.png", "[Errno 28] No space left on device")]
    assert names(work / "out") == ["a.png", "c.png"]


def test_resume_does_what_is_missing(translator: Translator, work: Path) -> None:
    run(translator, work, save=["warped"])
    (work / "out/b.png").unlink()
    (work / "out/c.warped.png").unlink()
    kept = (work / "out/a.png").stat().st_mtime_ns
    assert run(translator, work, save=["warped"], resume=True) == Summary(2, 1, ())
    assert (work / "out/a.png").stat().st_mtime_ns == kept
    assert len(names(work / "out")) == 6
    assert run(translator, work, save=["warped"], resume=True) == Summary(0, 3, ())
    assert run(translator, work, save=["warped"]) == Summary(3, 0, ())


def test_an_exemplar_is_encoded_once(translator: Translator, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = translator.encode_exemplar, []
    monkeypatch.setattr(translator, "encode_exemplar", lambda *arguments: calls.append(arguments) or encode(*arguments))
    run(translator, work, "pictures/a.png", "masks/a.png")
    assert [label for _, label, _ in calls] == [work / "masks/a.png"]
    calls.clear()
    (work / "list.csv").write_text("a.png,a.png\nb.png,b.png\nc.png,a.png\n")
    assert run(translator, work, pairs=work / "list.csv").done == 3
    assert [label.name for _, label, _ in calls] == ["a.png", "b.png"]


def test_a_grid_decodes_no_file_twice(translator: Translator, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, decoded = Image.open, []
    monkeypatch.setattr(Image, "open", lambda path, **more: decoded.append(Path(path)) or opened(path, **more))
    assert run(translator, work, save=["grid"]).done == 3
    files = [work / folder / f"{name}.png" for folder in ("labels", "pictures", "masks") for name in "abc"]
    assert sorted(decoded) == sorted(files)


def test_the_model_is_not_overwritten(work: Path) -> None:
    model = write_tiny_bundle(work / "out" / "b.zip").rename(work / "out" / "b.png")
    content = model.read_bytes()
    with Translator(model, warp="numpy") as translator, pytest.raises(InputError, match=r"b.png would overwrite the "):
        run(translator, work)
    assert model.read_bytes() == content
    assert names(work / "out") == ["b.png"]


def test_arguments_are_checked_before_any_work(translator: Translator, work: Path) -> None:
    with pytest.raises(InputError, match="unknown output to save 'flow'; available: warped, matches, confidence, grid"):
        run(translator, work, save=["flow"])
    with pytest.raises(InputError, match="size: "):
        run(translator, work, size=(100, 100))
    with pytest.raises(InputError, match="needs the exemplars' labels; give --exemplar-label"):
        translate_folder(translator, FolderRequest(work / "labels", work / "pictures", None, work / "out"))
    assert not (work / "out").exists()


def test_planes_from_npz(work: Path, tmp_path: Path) -> None:
    save_label(tmp_path / "planes/a.npz", random_label(CHANNELS, 64, 64))
    with Translator(write_tiny_bundle(tmp_path / "b", CHANNELS), warp="numpy") as translator:
        request = FolderRequest(tmp_path / "planes", work / "pictures", None, work / "out", size="input", save=["grid"])
        assert translate_folder(translator, request) == Summary(1, 0, ())
        with pytest.raises(InputError, match="takes no exemplar labels"):
            translate_folder(translator, dataclasses.replace(request, exemplar_labels=tmp_path / "planes"))
