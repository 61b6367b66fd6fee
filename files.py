"""Files written whole or not at all, checks of what a path is before it is opened, and hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from . import remote
from .errors import InputError

if TYPE_CHECKING:
    import sqlite3

_TEMPORARY = ".flashcocos-"  # and eight random characters and the target's suffix
_STALE = 24 * 3600  # seconds after which a temporary file has no writer any more
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TEXTS = (".txt", ".csv", ".json", ".jsonl")  # may lie in a folder of pictures, labels or engines


@contextlib.contextmanager
def atomic_path(
    target: str | os.PathLike[str], *, directory: bool = False, scratch: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` on success, remove it on any error.

    Missing parent folders are made, and what killed runs left in the folder more than a day ago is removed. For an
    object of a store (`remote`) the temporary path is in the system's folder for such, and is stored on success.

    Args:
        target: The file or folder to write. Its suffix is kept, so that writers that choose a format by suffix
            (Pillow, numpy) work.
        directory: Yield an existing empty folder, and replace an existing folder `target`.
        scratch: Folder for the temporary file instead, on the file system of `target`.

    Raises:
        InputError: `target` is a folder where a file is expected or the reverse, a FIFO, a socket or a device.
    """
    target = remote.to_path(target)
    stored = remote.is_remote(target)
    if stored and directory:
        raise InputError(f"{target}: expected a folder of this machine")
    if stored:  # nothing there stands in the way
        folder = Path(tempfile.gettempdir())
    else:
        require_target(target, directory=directory)
        folder = scratch or target.parent
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.resolve())
    if directory:
        temporary, mode = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent)), 0o777
    else:
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=target.suffix, dir=folder)
        os.close(handle)
        temporary, mode = Path(name), 0o666
    try:
        yield temporary
        temporary.chmod(mode & ~_umask())  # last, for some writers replace the file that they are given
        if stored:
            remote.write(target, temporary)
            temporary.unlink()
        elif directory and target.is_dir():
            # a folder cannot be renamed over another: the old one steps aside first and is deleted last
            aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
            os.replace(target, aside)
            os.utime(aside)  # it is as new as this run, whose it is, for other runs that clean up
            os.replace(temporary, target)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def require_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a plain file, without opening it: to open a FIFO would wait for its writer.

    Args:
        path: What is about to be read; links are followed.

    Raises:
        InputError: There is nothing at `path`, or it is a folder, a FIFO, a socket or a device.
    """
    if (kind := _kind(path)) != "a file":
        raise InputError(f"{path} is {kind}; expected a file" if kind else f"{path} does not exist")


def require_target(path: str | os.PathLike[str], *, directory: bool = False) -> None:
    """Refuse what cannot be written as a whole.

    Args:
        path: What is about to be written; nothing need be there.
        directory: Whether it is to be a folder.

    Raises:
        InputError: `path` is a folder where a file is expected or the reverse, a FIFO, a socket or a device.
    """
    expected = "a folder" if directory else "a file"
    if (kind := _kind(path)) not in (None, expected):
        raise InputError(f"{path} is {kind}; expected {expected} to write")


def require_distinct(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse to write onto an input.

    Args:
        output: The file or folder to write.
        inputs: What is read: files, folders whose files are read (lists in them may be written), or None.

    Raises:
        InputError: `output` is one of the inputs, or a file in one of them.
    """
    target = remote.to_path(output).resolve()
    for path in inputs:
        if path is None:
            continue
        source = remote.to_path(path).resolve()
        same, inside = target == source, False
        if not remote.is_remote(target) and not remote.is_remote(source):
            same = same or (target.exists() and source.exists() and target.samefile(source))
            inside = target.is_file() and source.is_dir() and target.is_relative_to(source)
        if same or (inside and target.suffix.lower() not in _TEXTS):
            raise InputError(f"output {output} would overwrite the input {path}; choose another output")


def read_text(path: str | os.PathLike[str], limit: int, encoding: str = "utf-8") -> str:
    """The text of a file that a stranger may have written.

    Args:
        path: A file, here or in a store.
        limit: Most bytes that it may have.
        encoding: Of the text.

    Raises:
        InputError: There is no file at `path`, it is larger, or no such text.
    """
    require_file(path)
    place = remote.to_path(path)
    try:
        if (length := place.stat().st_size) > limit:
            raise InputError(f"{path}: {length} bytes; expected at most {limit}: is it the right file?")
        return place.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file: {error}") from error


@contextlib.contextmanager
def open_database(path: Path, remedy: str) -> Iterator[sqlite3.Connection]:
    """An SQLite file, made where there is none; `InputError` with what deleting it does where it is damaged."""
    import sqlite3

    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    try:
        yield connection
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and {remedy}") from error
    finally:
        connection.close()


def cache_folder() -> Path:
    """The folder that keeps downloads and rendered data: flashcocos in the platform's cache folder for this user."""
    return platformdirs.user_cache_path("flashcocos", appauthor=False)


def file_hash(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hash of a file's content, in hexadecimal digits."""
    digest = hashlib.new(algorithm)  # a loop because Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _kind(path: str | os.PathLike[str]) -> str | None:
    """What lies at `path`, in words: "a file", "a folder", ...; None for nothing."""
    place = remote.to_path(path)
    if remote.is_remote(place):
        return remote.kind(place)
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return None


@functools.lru_cache(maxsize=256)  # once a folder: looking through a large one for each of its files would be slow
def _remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` that are older than a day."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if re.fullmatch(rf"{_TEMPORARY}\w{{8}}(\..*)?", path.name):
            with contextlib.suppress(OSError):  # another run may remove it at the same time
                if time.time() - path.lstat().st_mtime > _STALE:
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    # the only portable way to read the umask is to set it; mkstemp's 0600 would make results unreadable to others
    mask = os.umask(0)
    os.umask(mask)
    return mask
