"""Labels and exemplars that the service holds: by content, the least recently used make room, each encoded once."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ..files import atomic_path
from ..runtime import Exemplar
from ..runtime.lru import LruBytes
from .errors import ApiError

_ID = re.compile(r"[0-9a-f]{32}")
T = TypeVar("T")


class Source(msgspec.Struct, frozen=True):
    """What an exemplar is encoded from: PNG of its picture and, for models that want it, its label, both at `size`."""

    image: bytes
    label: bytes | None
    label_id: str | None
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A source and its encoding."""

    source: Source
    exemplar: Exemplar

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return source_bytes(self.source) + self.exemplar.phi.nbytes + self.exemplar.values.nbytes


def source_bytes(source: Source) -> int:
    """Memory that a source takes."""
    return len(source.image) + len(source.label or b"")


class Folder(Generic[T]):
    """Values of `kind` as files, of bounded size together; the oldest make room. Processes may share the folder."""

    def __init__(self, path: str, limit: int, kind: type[T], suffix: str) -> None:
        self._path, self._limit, self._kind, self._suffix = Path(path), limit, kind, suffix
        self._path.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> T | None:
        """The value; None where there is none that can be read."""
        if not _ID.fullmatch(key):
            return None
        path = self._file(key)
        try:
            with path.open("rb") as file:
                value = msgspec.msgpack.decode(file.read(self._limit), type=self._kind)
            os.utime(path)
        except (OSError, msgspec.DecodeError):
            return None
        return value

    def write(self, key: str, value: T) -> None:
        """Keep a value."""
        with atomic_path(self._file(key)) as temporary:
            temporary.write_bytes(msgspec.msgpack.encode(value))
        files = []
        for entry in os.scandir(self._path):
            if entry.name.endswith(self._suffix):
                status = entry.stat()
                files.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files)[:-1]:
            if total > self._limit:
                Path(name).unlink(missing_ok=True)
                total -= size

    def remove(self, key: str) -> bool:
        """Remove a value; whether it was there."""
        if not _ID.fullmatch(key):
            return False
        path = self._file(key)
        there = path.is_file()
        path.unlink(missing_ok=True)
        return there

    def _file(self, key: str) -> Path:
        return self._path / f"{int(key, 16):032x}{self._suffix}"  # of a number, so that no name reaches the disk


class ExemplarStore:
    """Exemplars by id.

    Args:
        encode: encodes a source, waiting for its turn.
        disk: runs a blocking function in a thread.
        limit: bytes of encoded exemplars.
        folder: where sources are kept too, if anywhere.
        builtin: sources that are always there.
        on_lookup: called with "hit", "encode" or "unknown".
    """

    def __init__(
        self,
        encode: Callable[[Source], Awaitable[Exemplar]],
        disk: Callable[..., Awaitable[Source | bool | None]],
        limit: int,
        folder: Folder[Source] | None,
        builtin: dict[str, Source],
        on_lookup: Callable[[str], None] = lambda result: None,
    ) -> None:
        self.entries: LruBytes[Entry] = LruBytes(limit, lambda entry: entry.nbytes)
        self._encode, self._disk, self._folder, self._builtin, self._on_lookup = (
            encode,
            disk,
            folder,
            builtin,
            on_lookup,
        )
        self._flights: dict[str, tuple[asyncio.Task[Entry], set[object]]] = {}

    async def source(self, key: str) -> Source:
        """What the exemplar `key` is encoded from; `ApiError` 404."""
        if entry := self.entries.get(key):
            return entry.source
        source = self._builtin.get(key)
        if source is None and self._folder:
            source = await self._disk(self._folder.read, key)  # type: ignore[assignment]
        if source is None:
            self._on_lookup("unknown")
            raise ApiError(404, "exemplar_unknown", "no exemplar of this id: put it (again, after a restart)")
        return source

    def size(self, key: str) -> int:
        """Memory that the exemplar takes now."""
        entry = self.entries.get(key)
        return entry.nbytes if entry else 0

    async def get(self, key: str) -> Entry:
        """The encoded exemplar; `ApiError` 404."""
        if entry := self.entries.get(key):
            self._on_lookup("hit")
            return entry
        return await self._fly(key, await self.source(key))

    async def put(self, key: str, source: Source) -> tuple[Entry, bool]:
        """Encode a source and keep it; and whether it is new."""
        if entry := self.entries.get(key):
            return entry, False
        entry = await self._fly(key, source)
        if self._folder and key not in self._builtin:
            await self._disk(self._folder.write, key, source)
        return entry, True

    async def delete(self, key: str) -> None:
        """Forget an exemplar; `ApiError` 404."""
        there = self.entries.pop(key)
        if self._folder:
            there = bool(await self._disk(self._folder.remove, key)) or there
        if not there:
            raise ApiError(404, "exemplar_unknown", "no exemplar of this id, or one that always stays")

    async def _fly(self, key: str, source: Source) -> Entry:
        """Encode once, however many ask at a time; the last of them to go away takes it off the queue."""
        if key not in self._flights:
            self._on_lookup("encode")
            self._flights[key] = asyncio.create_task(self._encoded(key, source)), set()
        task, callers = self._flights[key]
        callers.add(me := object())
        try:
            return await asyncio.shield(task)
        finally:
            callers.discard(me)
            if not callers and not task.done():
                task.cancel()

    async def _encoded(self, key: str, source: Source) -> Entry:
        try:
            entry = Entry(source, await self._encode(source))
            self.entries.put(key, entry)
            return entry
        finally:
            del self._flights[key]
