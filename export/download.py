"""Fetch the published checkpoints: resumed where cut, checked by SHA-384, kept in a cache folder.

The ade20k pair is mirrored by Open Model Zoo (2022.1, model cocosnet); names, sizes and hashes are the mirror's own.
The other tasks' checkpoints are behind links that need a browser: see the public CoCosNet README.
"""

from __future__ import annotations

import dataclasses
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ..errors import CheckpointError, FlashcocosError, InputError
from ..files import cache_folder, file_hash

BASE_URL = "https://storage.openvinotoolkit.org/repositories/open_model_zoo/public/2022.1/cocosnet/model_files/ckpt/"
ATTEMPTS = 4
RETRY_WAIT = 1.0  # seconds, times the attempt
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 18


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A published file: its name below the base URL, size in bytes, and SHA-384 (hexadecimal)."""

    name: str
    bytes: int
    sha384: str


# correspondence network, generator
PUBLISHED: dict[str, tuple[RemoteFile, RemoteFile]] = {
    "ade20k": (
        RemoteFile(
            "latest_net_Corr.pth", 237_624_725,
            "f756f61b5b4d7ca0e23b7a3208ec8c8d5307fd834cef0dbeea7b7d8bc051eda9ecee2b71a378a2ecc5086a769242fc9a",
        ),
        RemoteFile(
            "latest_net_G.pth", 387_069_636,
            "25b790181bbb30c5bd09627756bd70c8bd528431c57c8508ea48f3f352fda987203f19cc129b5706927bd68878d46e0d",
        ),
    ),
}  # fmt: skip


def download(
    name: str = "ade20k", cache: str | os.PathLike[str] | None = None, *, base_url: str = BASE_URL
) -> tuple[Path, Path]:
    """Fetch a published checkpoint, unless this machine has it already.

    A file with the right hash is not fetched again; one that was cut off is resumed.

    Args:
        name: One of `PUBLISHED`.
        cache: Folder to keep it in, `files.cache_folder()` by default.
        base_url: A mirror that has the same files.

    Returns:
        Paths of the correspondence network and of the generator.

    Raises:
        InputError: An unknown name or a URL of another scheme than http and https.
        CheckpointError: A file is not the published one.
        FlashcocosError: The network or the disk failed.
    """
    if name not in PUBLISHED:
        raise InputError(
            f"no public mirror of {name!r}; available: {', '.join(PUBLISHED)}. Fetch it with a browser from the links "
            "of the CoCosNet README, then run `flashcocos convert`"
        )
    if not base_url.startswith(("https://", "http://")):
        raise InputError(f"base URL {base_url!r}: expected https:// or http://")
    folder = (cache_folder() if cache is None else Path(cache)) / name
    corr, generator = PUBLISHED[name]
    return _fetch(corr, folder, base_url), _fetch(generator, folder, base_url)


def _fetch(remote: RemoteFile, folder: Path, base_url: str) -> Path:
    """`folder`/`remote.name`, fetched unless it is there already."""
    target = folder / remote.name
    if _size(target) == remote.bytes and file_hash(target, "sha384") == remote.sha384:
        return target
    url = base_url.rstrip("/") + "/" + remote.name
    part = target.with_name(f"{target.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _size(part) > remote.bytes:
            part.unlink()
        missing, free = remote.bytes - _size(part), shutil.disk_usage(folder).free
        if free < missing:
            raise FlashcocosError(
                f"{folder}: {free >> 20} MiB free, {remote.name} needs {-(-missing >> 20)} MiB more; make room or "
                "choose another cache folder"
            )
        with tqdm(desc=remote.name, total=remote.bytes, unit="B", unit_scale=True, disable=None) as progress:
            _complete(url, part, remote, progress)
    except OSError as error:
        raise FlashcocosError(
            f"{part}: {error.strerror or error}; what was fetched is kept, run the command again to resume"
        ) from error
    digest = file_hash(part, "sha384")
    if digest != remote.sha384:
        part.unlink()
        raise CheckpointError(
            f"{url}: SHA-384 is {digest}, expected {remote.sha384}; the file is deleted: run the command again, or use "
            "another mirror"
        )
    os.replace(part, target)
    return target


def _complete(url: str, part: Path, remote: RemoteFile, progress: tqdm) -> None:
    """Extend `part` until it has all bytes, over as many connections as `ATTEMPTS` allows."""
    reason: Exception | None = None
    for attempt in range(ATTEMPTS):
        if _size(part) == remote.bytes:
            return
        if attempt:
            time.sleep(RETRY_WAIT * attempt)
        try:
            _transfer(url, part, remote, progress)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise FlashcocosError(
                    f"{url}: HTTP {error.code} {error.reason}; the mirror may have moved, give another base URL"
                ) from error
            reason = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = error
    if _size(part) != remote.bytes:
        raise FlashcocosError(
            f"{url}: got {_size(part)} of {remote.bytes} bytes ({reason or 'connection closed'}); run the "
            "command again to resume"
        ) from reason


def _transfer(url: str, part: Path, remote: RemoteFile, progress: tqdm) -> None:
    """One connection: append what `part` lacks, or start over where the server ignores the range."""
    start = _size(part)
    headers = {"User-Agent": "flashcocos"} | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and start + int(length) != remote.bytes:
            raise CheckpointError(
                f"{url}: {start + int(length)} bytes on the server, expected {remote.bytes}: not the published file"
            )
        progress.n = start
        with open(part, "ab" if start else "wb") as file:
            while block := response.read(BLOCK):
                if file.tell() + len(block) > remote.bytes:
                    raise CheckpointError(f"{url}: more than {remote.bytes} bytes: not the published file")
                file.write(block)
                progress.update(len(block))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
