"""Atomic writes and hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flashcocos.files import atomic_path, sha256


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


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
