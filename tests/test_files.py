"""Atomic writes, checks of paths, and hashes."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path

import pytest

from flashcocos import files
from flashcocos.errors import InputError, printable
from flashcocos.files import atomic_path, file_hash, require_distinct, require_file


def test_success_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_directory(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_path(target, directory=True) as temporary:
            (temporary / name).write_text(name)
        assert [path.name for path in target.iterdir()] == [name]
    with pytest.raises(ValueError, match="stop"), atomic_path(target, directory=True) as temporary:
        (temporary / "c").write_text("c")
        raise ValueError("stop")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_readable_by_others(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)  # as safetensors does
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_files_and_folders_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, directory, message in (
        ("fifo", False, "is a FIFO; expected a file"),
        ("fifo", True, "is a FIFO; expected a folder"),
        ("folder", False, "is a folder; expected a file"),
        ("file", True, "is a file; expected a folder"),
    ):
        with pytest.raises(InputError, match=message), atomic_path(tmp_path / name, directory=directory):
            pytest.fail("yielded a path")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "folder"]


def test_a_replaced_folder_is_left_to_the_run_that_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    os.utime(target, (0, 0))
    ages: list[float] = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: ages.append(time.time() - path.stat().st_mtime))
    with atomic_path(target, directory=True):
        pass
    assert len(ages) == 1
    assert ages[0] < 3600


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path: Path) -> None:
    def age(path: Path, hours: float) -> None:
        os.utime(path, (time.time() - hours * 3600,) * 2)

    leftovers = []
    for name, directory in (("a.png", False), ("noending", False), ("bundle", True)):
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / name, directory=directory) as temporary:
            leftovers.append(temporary)
            raise KeyboardInterrupt
    old, plain, folder = leftovers
    recent = old.with_name(old.name.replace(old.name[12:20], "12345678"))
    others = [tmp_path / name for name in (".flashcocos-notes.txt", "flashcocos-12345678.png", ".a.png")]
    for path in (old, plain, recent, *others):
        path.touch()
    folder.mkdir()
    (folder / "query.onnx").touch()
    for path in (old, plain, folder, *others):
        age(path, 25)
    age(recent, 23)
    files._remove_stale.cache_clear()  # which looks once a process
    with atomic_path(tmp_path / "b.png") as temporary:
        temporary.touch()
    assert {*tmp_path.iterdir()} == {recent, *others, tmp_path / "b.png"}


def test_require_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    require_file(tmp_path / "file")
    require_file(str(tmp_path / "link"))
    for path, what in (
        (tmp_path / "fifo", "is a FIFO; expected a file"),
        (tmp_path / "socket", "is a socket; expected a file"),
        (tmp_path, "is a folder; expected a file"),
        ("/dev/null", "is a device; expected a file"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "dangling", "does not exist"),
        (tmp_path / "file" / "in", "does not exist"),
        ("nu\0l", "does not exist"),
    ):
        with pytest.raises(InputError) as error:
            require_file(path)
        assert str(error.value) == f"{path} {what}"


def test_require_distinct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.zip", "folder/b.png", "folder/list.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("symbolic").symlink_to("a.zip")
    os.link("a.zip", "hard")
    for output in ("a.zip", "folder/../a.zip", "symbolic", "hard", str(tmp_path / "a.zip")):
        with pytest.raises(InputError, match=r"would overwrite the input a\.zip"):
            require_distinct(output, None, "other", "a.zip")
    for output in ("folder", "folder/b.png"):
        with pytest.raises(InputError, match="would overwrite the input folder"):
            require_distinct(output, "folder")
    with pytest.raises(InputError, match="would overwrite"):  # neither is there yet
        require_distinct("new", "./new")
    for output in ("b.zip", "folder/new.png", "folder/list.txt"):
        require_distinct(output, "a.zip", "folder")


def test_printable() -> None:
    assert printable(Path("a é 漢 \\ 'b'")) == "a é 漢 \\ 'b'"
    assert printable("\x1b[31m\n\t\x9b\u202e\udcff") == r"\x1b[31m\n\t\x9b\u202e\udcff"


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()
