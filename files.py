"""Files written whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str], *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` on success, remove it on any error.

    The suffix of `target` is kept, so that writers that choose a format by suffix (Pillow, numpy) work.
    With `directory=True` the temporary path is an existing empty folder, and an existing `target` folder is replaced.
    Missing parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if directory:
        temporary, mode = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)), 0o777
    else:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary, mode = Path(name), 0o666
    try:
        yield temporary
        temporary.chmod(mode & ~_umask())  # last, for some writers replace the file that they are given
        if directory and target.is_dir():
            # a folder cannot be renamed over another: the old one steps aside first and is deleted last
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            os.replace(target, aside)
            os.replace(temporary, target)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """The folder that keeps downloads and rendered data: flashcocos in the platform's cache folder for this user."""
    return platformdirs.user_cache_path("flashcocos", appauthor=False)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()  # a loop because Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    # the only portable way to read the umask is to set it; mkstemp's 0600 would make results unreadable to others
    mask = os.umask(0)
    os.umask(mask)
    return mask
