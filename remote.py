"""Paths in an object store, s3://BUCKET/NAME and gs://BUCKET/NAME, beside paths of this machine.

`to_path` makes an object of universal-pathlib of them, which answers as a `Path` does and is typed as one; the other
functions do what such an object cannot.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard, cast

from .errors import FlashcocosError, InputError

MAX_BYTES = 1 << 28  # of an object that is read: the raw pixels of the largest picture fit
_STORES = ("s3", "gs")  # stores in which an object is written whole or not at all
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")


def to_path(text: str | os.PathLike[str]) -> Path:
    """The path that `text` means, of this machine or of a store; `InputError` for a URL of any other kind."""
    if is_remote(text):
        return cast(Path, text)
    text = os.fspath(text)
    if not (url := _URL.match(text)):
        return Path(text)
    if url[1] not in _STORES or "::" in text:
        raise InputError(f"{text}: expected a path of this machine, s3://BUCKET/NAME or gs://BUCKET/NAME")
    from upath import UPath

    with store_errors(text):
        return cast(Path, UPath(text))


def is_remote(path: object) -> bool:
    """Whether `path` is an object of a store."""
    return hasattr(path, "fs") and not isinstance(path, str | os.PathLike)


def is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether `source` names a file, here or in a store, rather than being its content."""
    return isinstance(source, str | os.PathLike) or is_remote(source)


def kind(path: Path) -> str | None:
    """What lies at `path` in a store: "a file", "a folder" or None for nothing."""
    with store_errors(path):
        return "a file" if path.is_file() else "a folder" if path.is_dir() else None


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder`, hidden ones left out: others' bookkeeping, as macOS leaves ._copies beside files.

    A folder of a store is listed once, and its answers are then known without asking.
    """
    if is_remote(folder):
        place = cast(Any, folder)
        with store_errors(folder):
            paths = [folder / name.removeprefix(place.path).lstrip("/") for name in place.fs.find(place.path)]
    else:
        paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return [path for path in paths if not path.name.startswith(".")]


def read(path: Path) -> bytes:
    """The content of an object of a store; `InputError` for more than `MAX_BYTES`."""
    place = cast(Any, path)
    with store_errors(path):
        data: bytes = place.fs.cat_file(place.path, end=MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES >> 20} MiB; expected a picture or label")
    return data


def write(path: Path, file: Path) -> None:
    """Store the file `file` as the object `path`, whole or not at all."""
    place = cast(Any, path)
    with store_errors(path):
        place.fs.put_file(str(file), place.path)


@contextlib.contextmanager
def store_errors(name: object, *paths: object) -> Iterator[None]:
    """Turn what a store's client raises, which has exceptions of its own, into `InputError` naming `name`.

    Where `paths` are given and none of them is in a store, errors stay as they are.
    """
    try:
        yield
    except (FlashcocosError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        if paths and not any(map(is_remote, paths)):
            raise
        raise InputError(f"{name}: {error or type(error).__name__}") from error
